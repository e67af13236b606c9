//! What the victim of the conflict rule reads.
//!
//! The monitor uses core's own "give way" signal, which raises 40001 with a text about recovery. On its way to the log and to the client that text
//! is replaced by the reason. Where the server is set not to log errors the hook is not called, and the client reads core's text.

use super::shared::{self, stage};
use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::CString;
use std::sync::atomic::Ordering;

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
        if is_victims_error(&*data)
            && let Some((message, detail)) = reason()
        {
            (*data).message = pg_sys::MemoryContextStrdup((*data).assoc_context, message.as_ptr());
            if !detail.is_empty() {
                (*data).detail = pg_sys::MemoryContextStrdup((*data).assoc_context, detail.as_ptr());
            }
        }
        if let Some(previous) = PREVIOUS {
            previous(data);
        }
    }
}

fn is_victims_error(data: &pg_sys::ErrorData) -> bool {
    if data.elevel < pgrx::PgLogLevel::ERROR as i32
        || data.sqlerrcode != PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32
        || !shared::exists()
    {
        return false;
    }
    // SAFETY: a plain pointer of this process.
    let attached = unsafe { !pg_sys::MyProc.is_null() };
    attached && shared::my_backend().stage.load(Ordering::Acquire) == stage::VICTIM
}

fn reason() -> Option<(CString, CString)> {
    let refusal = shared::my_backend().refusal.get()?;
    Some((CString::new(refusal.message()).ok()?, CString::new(refusal.detail()).ok()?))
}
