//! Facts about this server that are known while it starts: settings and how the library was loaded.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;

/// The value of a setting as text, in the setting's base unit; `None` when this server does not know it or it is null.
///
/// Never raises for a caller that may read the setting, which the postmaster always may.
pub fn value(name: &str) -> Option<String> {
    let name = CString::new(name).ok()?;
    // SAFETY: `name` is a terminated string that outlives the call; the result, if any, is a terminated string in memory of the
    // settings machinery and is copied before anything else of PostgreSQL runs.
    unsafe {
        let text = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

/// Makes PostgreSQL refuse settings with this prefix that nobody has declared.
pub fn reserve_prefix(prefix: &CStr) {
    // SAFETY: `prefix` is a terminated string; PostgreSQL copies it.
    unsafe { pg_sys::MarkGUCPrefixReserved(prefix.as_ptr()) }
}

/// Whether the postmaster is loading `shared_preload_libraries` right now.
pub fn preloading() -> bool {
    // SAFETY: a flag of this process, written by its only thread that runs PostgreSQL.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Whether the current user is a superuser.
pub fn superuser() -> bool {
    // SAFETY: reads the current user's role through the system cache; raises through the guard only.
    unsafe { pg_sys::superuser() }
}

/// Whether the running statement is part of a larger transaction, so that what it did could still be rolled back.
pub fn in_transaction_block() -> bool {
    // SAFETY: both read the state of this process's transaction.
    unsafe { pg_sys::IsTransactionBlock() || pg_sys::IsSubTransaction() }
}

/// Whether the running transaction has a transaction id, that is, has written something.
pub fn has_transaction_id() -> bool {
    // SAFETY: reads the state of this process's transaction.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// Fills `bytes` from the system's source of strong randomness; `false` when there is none.
pub fn strong_random(bytes: &mut [u8]) -> bool {
    // SAFETY: pointer and length describe one writable slice.
    unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) }
}
