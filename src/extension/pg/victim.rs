//! What the victim of the conflict rule reads.
//!
//! The monitor cancels a running statement as a user would, or ends an idle session with core's own "give way" signal. On the way to the log and to
//! the client that error becomes 40001 with the reason. Where the server is set not to log errors (`log_min_messages` above `error`) the
//! hook is not called, and the client reads core's own words. A session between two statements is told at the next one.

use super::shared;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::{CStr, CString};

static mut PREVIOUS: pg_sys::emit_log_hook_type = None;

/// Installs the hook. Called once, from `_PG_init` in the postmaster.
pub fn register() {
    // SAFETY: hook variables are plain function pointers, set before any child process exists.
    unsafe {
        PREVIOUS = pg_sys::emit_log_hook;
        pg_sys::emit_log_hook = Some(rewrite);
    }
}

unsafe extern "C-unwind" fn rewrite(data: *mut pg_sys::ErrorData) {
    // SAFETY: PostgreSQL passes the error that is being reported; new texts are made in the context that owns the old ones.
    unsafe {
        if is_refused_prepare(&*data) {
            (*data).hint =
                pg_sys::MemoryContextStrdup((*data).assoc_context, PREPARE_HINT.as_ptr());
        }
        if is_victims_error(&*data)
            && let Some((message, detail)) = reason()
        {
            (*data).sqlerrcode = PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32;
            (*data).message = pg_sys::MemoryContextStrdup((*data).assoc_context, message.as_ptr());
            if !detail.is_empty() {
                (*data).detail =
                    pg_sys::MemoryContextStrdup((*data).assoc_context, detail.as_ptr());
            }
        }
        if let Some(previous) = PREVIOUS {
            previous(data);
        }
    }
}

/// What core's PREPARE refuses although COMMIT would not, and what to do then.
const PREPARE_HINT: &CStr = c"In a multimaster cluster, COMMIT of a transaction that wrote something prepares it on every node. Export snapshots from transactions that write nothing, and take an advisory lock either for the session or for the transaction.";

/// Whether core refused a PREPARE that the user has not asked for.
unsafe fn is_refused_prepare(data: &pg_sys::ErrorData) -> bool {
    // SAFETY: the message of an error is a zero-terminated string or null.
    unsafe {
        data.elevel == pgrx::PgLogLevel::ERROR as i32
            && data.hint.is_null()
            && !data.message.is_null()
            && super::commit::commits_globally()
            && CStr::from_ptr(data.message)
                .to_bytes()
                .starts_with(b"cannot PREPARE ")
    }
}

/// Raises the reason when the running transaction has become a victim. Called at the start of each statement.
///
/// # Safety
/// From the hooks: raises by `longjmp`.
pub unsafe fn check() {
    if shared::exists() && shared::my_backend().is_victim() {
        // SAFETY: as the caller promises.
        unsafe { super::refusal::raise_refusal() };
    }
}

fn is_victims_error(data: &pg_sys::ErrorData) -> bool {
    if data.elevel < pgrx::PgLogLevel::ERROR as i32
        || !(data.sqlerrcode == PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32
            || data.sqlerrcode == PgSqlErrorCode::ERRCODE_QUERY_CANCELED as i32)
        || !shared::exists()
    {
        return false;
    }
    // SAFETY: a plain pointer of this process.
    let attached = unsafe { !pg_sys::MyProc.is_null() };
    attached && shared::my_backend().is_victim()
}

fn reason() -> Option<(CString, CString)> {
    let refusal = shared::my_backend().refusal.get()?;
    Some((
        CString::new(refusal.message()).ok()?,
        CString::new(refusal.detail()).ok()?,
    ))
}
