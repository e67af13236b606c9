//! The user's own PREPARE TRANSACTION, COMMIT PREPARED and ROLLBACK PREPARED.
//!
//! PREPARE is a global vote; the outcome stays the user's duty, on any node. It reaches the other nodes as a message in the stream, because
//! the commit record of a transaction that was prepared by apply is not decoded.

use super::{commit, raw};
use pgrx::pg_sys;
use std::ffi::{CStr, c_char};

/// Prefix of the names that multimaster gives to prepared transactions.
const RESERVED: &[u8] = b"mtm-";

/// Prefix of the stream message; see `wire::stream`.
const FINISH_PREFIX: &CStr = c"mtm-finish";

/// Raises an error when a user's gid lies in our name space.
///
/// # Safety
/// From the utility hook: raises by `longjmp`.
pub unsafe fn check_name(gid: *const c_char) {
    // SAFETY: the parser's zero-terminated string.
    unsafe {
        if CStr::from_ptr(gid).to_bytes().starts_with(RESERVED) {
            commit::raise(
                pgrx::PgSqlErrorCode::ERRCODE_RESERVED_NAME as i32,
                c"transaction identifiers that start with \"mtm-\" are reserved for multimaster",
                c"",
                c"Transactions of multimaster are finished by the cluster itself; see mtm.transactions.",
            );
        }
    }
}

/// The message's payload (see `wire::stream::UserFinish`) in a fixed array: the caller's frame must own nothing.
fn finish_payload(name: &[u8], commit: bool) -> ([u8; 256], usize) {
    let mut payload = [0u8; 256];
    let length = name.len().min(payload.len() - 1);
    payload[0] = u8::from(commit);
    payload[1..=length].copy_from_slice(&name[..length]);
    (payload, length + 1)
}

/// After COMMIT or ROLLBACK PREPARED of a user's transaction: tells the other nodes.
///
/// # Safety
/// From the utility hook, after the command succeeded.
pub unsafe fn after_command(statement: *mut pg_sys::TransactionStmt) {
    use pg_sys::TransactionStmtKind::*;
    // SAFETY: as check_name.
    unsafe {
        let commit = match (*statement).kind {
            TRANS_STMT_COMMIT_PREPARED => true,
            TRANS_STMT_ROLLBACK_PREPARED => false,
            _ => return,
        };
        let (payload, length) = finish_payload(CStr::from_ptr((*statement).gid).to_bytes(), commit);
        let lsn = raw::LogLogicalMessage(
            FINISH_PREFIX.as_ptr(),
            payload.as_ptr().cast(),
            length,
            false,
        );
        pg_sys::XLogFlush(lsn);
    }
}
