//! Reading parse trees: lists, names, relations.

use pgrx::pg_sys;
use std::ffi::{CStr, CString, c_char};

/// The pointers of a list, in order; none for the null list.
///
/// # Safety
/// `list` is null or a valid list of pointers to `T`, which stays alive.
pub unsafe fn items<T>(list: *const pg_sys::List) -> impl Iterator<Item = *mut T> {
    // SAFETY: a list that is not null is valid.
    let length = unsafe { list.as_ref() }.map_or(0, |list| list.length as usize);
    // SAFETY: as above; cells of pointer lists hold pointers.
    (0..length).map(move |position| unsafe { (*(*list).elements.add(position)).ptr_value.cast() })
}

/// The text of a C string in the database's encoding; empty for null. Bytes that are no text in that encoding are refused.
///
/// # Safety
/// `text` is null or a valid C string.
pub unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: stated above.
    unsafe { text_of_length(text, CStr::from_ptr(text).count_bytes()) }
}

/// As [`text`], for the first `length` bytes.
///
/// # Safety
/// `text` points to at least `length` bytes.
pub unsafe fn text_of_length(text: *const c_char, length: usize) -> String {
    // SAFETY: stated above; what is converted is terminated and lives in the current memory context.
    let bytes = unsafe {
        let converted =
            pg_sys::pg_server_to_any(text, length as i32, pg_sys::pg_enc::PG_UTF8 as i32);
        if std::ptr::eq(converted, text) {
            std::slice::from_raw_parts(text.cast(), length)
        } else {
            CStr::from_ptr(converted).to_bytes()
        }
    };
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => super::refuse::raise(
            "a statement that is not valid UTF-8 cannot be replicated",
            "A database with encoding SQL_ASCII can replicate statements in UTF-8 only.",
        ),
    }
}

/// The text in the database's encoding, as a C string. Raises what that encoding cannot express.
pub fn server_text(text: &str) -> CString {
    let text = CString::new(text.replace('\0', "")).expect("zero bytes are gone");
    // SAFETY: a valid C string; the result is that string or a palloced one.
    unsafe {
        let length = text.count_bytes() as i32;
        let converted =
            pg_sys::pg_any_to_server(text.as_ptr(), length, pg_sys::pg_enc::PG_UTF8 as i32);
        if std::ptr::eq(converted, text.as_ptr()) {
            text
        } else {
            CStr::from_ptr(converted).to_owned()
        }
    }
}

/// The text of a `String` node.
///
/// # Safety
/// `node` is a valid `String` node.
pub unsafe fn string(node: *mut pg_sys::String) -> String {
    // SAFETY: stated above.
    unsafe { text((*node).sval) }
}

/// The relation of that name as it is found now, without a lock; `None` when there is none.
///
/// Without a lock the answer may be old in a moment. It decides only what a statement is about; the statement itself looks again.
///
/// # Safety
/// `relation` is a valid RangeVar.
pub unsafe fn find_relation(relation: *const pg_sys::RangeVar) -> Option<pg_sys::Oid> {
    // SAFETY: a valid RangeVar; guarded.
    let oid = unsafe {
        pg_sys::RangeVarGetRelidExtended(
            relation,
            pg_sys::NoLock as i32,
            pg_sys::RVROption::RVR_MISSING_OK,
            None,
            std::ptr::null_mut(),
        )
    };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// An identifier, quoted where SQL needs it.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
