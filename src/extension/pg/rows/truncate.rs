//! TRUNCATE, of the very tables the origin emptied.

use super::plan::Known;
use crate::apply::rows::ApplyError;
use pgrx::pg_sys;
use std::rc::Rc;

/// Lets triggers fire as on a replica until it is dropped: those that were enabled for it, and no others.
struct AsReplica {
    previous: i32,
}

impl AsReplica {
    fn begin() -> Self {
        // SAFETY: a variable of this process, looked at when a trigger is about to fire.
        unsafe {
            let previous = pg_sys::SessionReplicationRole;
            pg_sys::SessionReplicationRole = pg_sys::SESSION_REPLICATION_ROLE_REPLICA as i32;
            AsReplica { previous }
        }
    }
}

impl Drop for AsReplica {
    fn drop(&mut self) {
        // SAFETY: as in `begin`.
        unsafe { pg_sys::SessionReplicationRole = self.previous };
    }
}

/// Empties the tables. No row change may be under way.
///
/// # Safety
/// Within a transaction.
pub unsafe fn truncate(tables: &[Rc<Known>], restart_identity: bool) -> Result<(), ApplyError> {
    let mut opened = Vec::with_capacity(tables.len());
    for table in tables {
        // SAFETY: as the caller promises.
        opened.push(unsafe { table.open(pg_sys::AccessExclusiveLock as i32) }?.relation);
    }
    let _role = AsReplica::begin();
    // SAFETY: the tables are open and locked. CASCADE was the origin's: all tables it reached are here. The active snapshot is for
    // whatever a trigger asks.
    unsafe {
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let (mut relations, mut relids, mut logged) = (
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
        for relation in &opened {
            relations = pg_sys::lappend(relations, (*relation).cast());
            relids = pg_sys::lappend_oid(relids, (**relation).rd_id);
            if pg_sys::wal_level >= pg_sys::WalLevel::WAL_LEVEL_LOGICAL as i32 {
                logged = pg_sys::lappend_oid(logged, (**relation).rd_id);
            }
        }
        pg_sys::ExecuteTruncateGuts(
            relations,
            relids,
            logged,
            pg_sys::DropBehavior::DROP_RESTRICT,
            restart_identity,
        );
        for relation in opened {
            pg_sys::table_close(relation, pg_sys::NoLock as i32);
        }
        pg_sys::PopActiveSnapshot();
        pg_sys::CommandCounterIncrement();
    }
    Ok(())
}
