//! What a client hears when its transaction is refused, or when nobody knows its outcome.
//!
//! Nothing here owns a destructor across a call of `raw` (see there): texts are plain arrays.

use super::fixed_text::FixedText;
use super::raw;
use super::shared;
use pgrx::PgLogLevel;
use std::ffi::{CStr, c_char};
use std::fmt::Write;

/// Raises the refusal in this backend's slot.
///
/// # Safety
/// The caller's frames own nothing with a destructor.
pub unsafe fn raise_refusal() {
    // SAFETY: as the caller promises.
    unsafe { raise_refusal_at(PgLogLevel::ERROR) }
}

/// The same at another level: FATAL ends the session.
///
/// # Safety
/// As [`raise_refusal`].
pub unsafe fn raise_refusal_at(level: PgLogLevel) {
    let mut message = FixedText::<1024>::new();
    let mut detail = FixedText::<1024>::new();
    let code = copy_refusal(&mut message, &mut detail);
    // SAFETY: the texts live in this frame and are plain arrays.
    unsafe {
        raise_at(
            level,
            code,
            message.as_c_str(),
            detail.as_c_str(),
            c"The transaction was rolled back on every node; run it again.",
        )
    };
}

fn copy_refusal(message: &mut FixedText<1024>, detail: &mut FixedText<1024>) -> i32 {
    let Some(refusal) = shared::my_backend().refusal.get() else {
        let _ = message.write_str("transaction was refused by another node");
        return pgrx::PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32;
    };
    let _ = message.write_str(refusal.message());
    let _ = detail.write_str(refusal.detail());
    sqlstate_number(refusal.sqlstate())
}

/// Whether the refusal in this backend's slot says that the transaction may succeed when it is run again.
pub fn lost_a_conflict() -> bool {
    shared::my_backend()
        .refusal
        .get()
        .is_none_or(|refusal| refusal.sqlstate() == *b"40001")
}

/// `MAKE_SQLSTATE` of utils/elog.h.
pub fn sqlstate_number(sqlstate: [u8; 5]) -> i32 {
    sqlstate
        .iter()
        .enumerate()
        .fold(0, |number, (place, letter)| {
            number | (i32::from(letter.wrapping_sub(b'0') & 0x3f) << (6 * place))
        })
}

/// Raises that nobody knows yet how the transaction of this name ends (08007).
///
/// # Safety
/// As [`raise_refusal`]; the name is zero-terminated.
pub unsafe fn raise_unknown(name: *const c_char) {
    let mut message = FixedText::<512>::new();
    // SAFETY: a zero-terminated name of at most 199 bytes.
    let shown = unsafe { CStr::from_ptr(name) };
    let _ = write!(
        message,
        "outcome of transaction \"{}\" is not known yet",
        shown.to_str().unwrap_or("?")
    );
    // SAFETY: as raise_refusal.
    unsafe {
        raise(
            pgrx::PgSqlErrorCode::ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN as i32,
            message.as_c_str(),
            c"A majority of the nodes could not be reached to decide it. It will be committed or rolled back on every node.",
            c"Ask mtm.transaction_status() before running it again.",
        )
    };
}

/// Raises the error of a transaction that is committed, of which it cannot be told whether other nodes that serve show it. `level`: FATAL ends the session.
///
/// # Safety
/// As [`raise_unknown`].
pub unsafe fn raise_unconfirmed(name: *const c_char, level: PgLogLevel) {
    let mut message = FixedText::<512>::new();
    // SAFETY: a zero-terminated name of at most 199 bytes.
    let shown = unsafe { CStr::from_ptr(name) };
    let _ = write!(
        message,
        "transaction \"{}\" is not known to be committed on every node yet",
        shown.to_str().unwrap_or("?")
    );
    // SAFETY: as raise_refusal.
    unsafe {
        raise_at(
            level,
            pgrx::PgSqlErrorCode::ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN as i32,
            message.as_c_str(),
            c"This node has committed it, but has lost the others before they had told that they show it. It will be committed on every node.",
            c"Ask mtm.transaction_status() before running it again.",
        )
    };
}

/// Warns whoever did not wait for the other nodes, as core does where a synchronous standby is not waited for.
///
/// # Safety
/// In a backend; returns.
pub unsafe fn warn_unconfirmed() {
    // SAFETY: below ERROR nothing is thrown.
    unsafe {
        raise_at(
            PgLogLevel::WARNING,
            pgrx::PgSqlErrorCode::ERRCODE_WARNING as i32,
            c"the wait for the other nodes was cancelled",
            c"The transaction is committed and will be on every node, but another node may not show it yet.",
            c"",
        )
    };
}

/// Raises an error with all its parts. Does not return.
///
/// # Safety
/// The caller's frames own nothing with a destructor.
pub unsafe fn raise(code: i32, message: &CStr, detail: &CStr, hint: &CStr) {
    // SAFETY: as the caller promises.
    unsafe { raise_at(PgLogLevel::ERROR, code, message, detail, hint) }
}

unsafe fn raise_at(level: PgLogLevel, code: i32, message: &CStr, detail: &CStr, hint: &CStr) {
    // SAFETY: ereport() spelled out; the format strings take one string each.
    unsafe {
        if raw::errstart(level as i32, std::ptr::null()) {
            raw::errcode(code);
            raw::errmsg_internal(c"%s".as_ptr(), message.as_ptr());
            if !detail.is_empty() {
                raw::errdetail_internal(c"%s".as_ptr(), detail.as_ptr());
            }
            if !hint.is_empty() {
                raw::errhint(c"%s".as_ptr(), hint.as_ptr());
            }
            raw::errfinish(
                c"refusal.rs".as_ptr(),
                line!() as i32,
                c"multimaster".as_ptr(),
            );
        }
    }
}
