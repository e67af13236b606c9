//! What PREPARE refuses and COMMIT does: notifications and temporary objects, which are the session's alone.

use super::raw;
use pgrx::pg_sys;

/// What a transaction did that concerns its session.
#[derive(Clone, Copy, Default)]
pub struct SessionWork {
    /// It sent a NOTIFY.
    pub notified: bool,
    /// It created the schema of the session's temporary objects.
    pub new_temp_schema: bool,
}

/// Step 3 of `commit`: does now what COMMIT would do about notifications and temporary objects.
///
/// # Safety
/// In the transaction that is to be prepared; the caller's frames own nothing with a destructor.
pub unsafe fn detach_from_session() -> SessionWork {
    // SAFETY: as the caller promises.
    unsafe {
        let mut work = SessionWork::default();
        raw::PreCommit_Notify();
        work.notified = holds_notify_lock();
        raw::AtCommit_Notify();
        if pg_sys::MyXactFlags as u32 & pg_sys::XACT_FLAGS_ACCESSEDTEMPNAMESPACE != 0 {
            work.new_temp_schema = created_temp_schema();
            raw::PreCommit_on_commit_actions();
            pg_sys::MyXactFlags &= !(pg_sys::XACT_FLAGS_ACCESSEDTEMPNAMESPACE as i32);
        }
        work
    }
}

/// Whether the schema of this session's temporary objects was created by the running transaction.
///
/// That happens once in the life of a process slot of the server. PREPARE makes the session believe in the schema for good, so after a veto
/// it would create objects in a schema that does not exist: such a session is ended.
unsafe fn created_temp_schema() -> bool {
    // SAFETY: a catalog look-up in a transaction; the tuple is released before anything can raise.
    unsafe {
        let (mut schema, mut toast) = (pg_sys::Oid::INVALID, pg_sys::Oid::INVALID);
        raw::GetTempNamespaceState(&mut schema, &mut toast);
        let key = pg_sys::Datum::from(schema.to_u32());
        let tuple = raw::SearchSysCache1(pg_sys::SysCacheIdentifier::NAMESPACEOID as i32, key);
        if tuple.is_null() {
            return false;
        }
        let creator = (*(*tuple).t_data).t_choice.t_heap.t_xmin;
        raw::ReleaseSysCache(tuple);
        raw::TransactionIdIsCurrentTransactionId(creator)
    }
}

/// PreCommit_Notify holds an exclusive lock on "database 0" iff there was something to send.
unsafe fn holds_notify_lock() -> bool {
    let tag = pg_sys::LOCKTAG {
        locktag_field1: 0,
        locktag_field2: pg_sys::DatabaseRelationId.to_u32(),
        locktag_field3: 0,
        locktag_field4: 0,
        locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
        locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
    };
    // SAFETY: reads this backend's local lock table.
    unsafe { pg_sys::LockHeldByMe(&tag, pg_sys::AccessExclusiveLock as i32) }
}
