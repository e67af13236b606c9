//! PREPARE, COMMIT PREPARED and ROLLBACK PREPARED from a background worker.

use super::{in_flight, process, senders};
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};
use protocol::Gid;
use std::ffi::{CStr, CString};

mod guarded {
    use std::ffi::c_char;
    unsafe extern "C-unwind" {
        pub fn FinishPreparedTransaction(gid: *const c_char, is_commit: bool);
    }
}

/// How an attempt to finish a prepared transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    Done,
    /// There is no such prepared transaction in this database (any more).
    Unknown,
    /// Another process has it in its hands.
    Busy,
    /// An error of another kind: it may or may not be finished.
    Failed,
}

/// Commits or rolls back a prepared transaction, durably, in a transaction of its own.
pub fn finish(name: &str, commit: bool) -> Finished {
    finish_after(name, commit, || ())
}

/// As [`finish`]; `before` runs first, in the same transaction.
pub fn finish_after(name: &str, commit: bool, before: impl FnOnce()) -> Finished {
    let Ok(name) = CString::new(name) else {
        return Finished::Unknown;
    };
    // A user's own transaction is finished through the stream, which must not wait.
    let attempt = quietly_if_ours(name.as_c_str(), || {
        process::in_bare_transaction(|| {
            before();
            // SAFETY: guarded; the name outlives the call.
            unsafe {
                pg_sys::ffi::pg_guard_ffi_boundary(|| {
                    guarded::FinishPreparedTransaction(name.as_ptr(), commit)
                });
            }
        });
        Finished::Done
    });
    let result = PgTryBuilder::new(std::panic::AssertUnwindSafe(attempt))
        .catch_when(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, |_| {
            Finished::Unknown
        })
        // Names are the server's: one of another database is not the one that is meant. The stream would bring its finish again for ever.
        .catch_when(PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, |_| {
            Finished::Unknown
        })
        .catch_when(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            |_| Finished::Busy,
        )
        .execute();
    if result != Finished::Done {
        process::abort_transaction();
    }
    result
}

/// Finishes a prepared transaction inside the calling backend's transaction.
///
/// `before` runs first. Every error is an answer: nothing may unwind into the hook's callers. After `Failed` the transaction must be aborted.
///
/// # Safety
/// In a transaction; the caller's frames own nothing with a destructor.
pub unsafe fn finish_in_transaction(
    name: *const std::ffi::c_char,
    commit: bool,
    before: impl FnOnce(),
) -> Finished {
    // SAFETY: a zero-terminated name that outlives the call.
    let attempt = quietly_if_ours(unsafe { CStr::from_ptr(name) }, || {
        before();
        // SAFETY: guarded: errors become unwinding, which the handlers below end.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| guarded::FinishPreparedTransaction(name, commit))
        };
        Finished::Done
    });
    PgTryBuilder::new(std::panic::AssertUnwindSafe(attempt))
        .catch_when(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, |_| {
            Finished::Unknown
        })
        .catch_when(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            |_| {
                // "is busy" is raised with the lock on the table of prepared transactions held; the transaction goes on, so it is given back here.
                // SAFETY: no lock of this kind is held by the commit sequence itself.
                unsafe { pg_sys::LWLockReleaseAll() };
                Finished::Busy
            },
        )
        .catch_others(|_| Finished::Failed)
        .execute()
}

/// `work`, so that it does not wake walsenders if it concerns a transaction of the cluster: its outcome travels by message.
fn quietly_if_ours<T>(name: &CStr, work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let ours = name.to_bytes().starts_with(b"mtm-");
    move || {
        if ours {
            senders::flushing_quietly(work)
        } else {
            work()
        }
    }
}

/// Turns the current transaction into a prepared one, durably.
///
/// Raises (unwinding) when deferred constraints fail, when there is no free slot or the name is in use.
pub fn prepare(name: &str) {
    if let Some((_, gid)) = Gid::parse(name) {
        // SAFETY: in a transaction; PREPARE would assign the xid otherwise.
        in_flight::enter(gid, unsafe { pg_sys::GetTopTransactionId() }.into_inner());
    }
    let name = CString::new(name).expect("names of prepared transactions have no zero bytes");
    // SAFETY: in a transaction begun by StartTransactionCommand; the order is the one of an explicit block.
    unsafe {
        pg_sys::BeginTransactionBlock();
        pg_sys::CommitTransactionCommand();
        pg_sys::PrepareTransactionBlock(name.as_ptr());
        senders::flushing_quietly(|| pg_sys::CommitTransactionCommand());
    }
}
