//! PREPARE, COMMIT PREPARED and ROLLBACK PREPARED from a background worker.

use super::process;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};
use std::ffi::CString;

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
    /// There is no such prepared transaction (any more).
    Unknown,
    /// Another process has it in its hands.
    Busy,
}

/// Commits or rolls back a prepared transaction, durably, in a transaction of its own.
pub fn finish(name: &str, commit: bool) -> Finished {
    let Ok(name) = CString::new(name) else { return Finished::Unknown };
    let result = PgTryBuilder::new(|| {
        process::in_transaction(|| {
            // SAFETY: guarded; the name outlives the call.
            unsafe {
                pg_sys::ffi::pg_guard_ffi_boundary(|| guarded::FinishPreparedTransaction(name.as_ptr(), commit));
            }
        });
        Finished::Done
    })
    .catch_when(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, |_| Finished::Unknown)
    .catch_when(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, |_| Finished::Busy)
    .execute();
    if result != Finished::Done {
        process::abort_transaction();
    }
    result
}

/// Turns the current transaction into a prepared one, durably.
///
/// Raises (unwinding) when deferred constraints fail, when there is no free slot or the name is in use.
pub fn prepare(name: &str) {
    let name = CString::new(name).expect("names of prepared transactions have no zero bytes");
    // SAFETY: in a transaction begun by StartTransactionCommand; the order is the one of an explicit block.
    unsafe {
        pg_sys::BeginTransactionBlock();
        pg_sys::CommitTransactionCommand();
        pg_sys::PrepareTransactionBlock(name.as_ptr());
        pg_sys::CommitTransactionCommand();
    }
}
