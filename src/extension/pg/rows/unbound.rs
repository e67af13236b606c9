//! Functions of PostgreSQL that the bindings leave out.

use pgrx::pg_sys;
use std::ffi::c_int;

mod unguarded {
    use super::{c_int, pg_sys};

    unsafe extern "C-unwind" {
        pub fn ExecComputeStoredGenerated(
            table: *mut pg_sys::ResultRelInfo,
            estate: *mut pg_sys::EState,
            slot: *mut pg_sys::TupleTableSlot,
            command: pg_sys::CmdType::Type,
        );
        pub fn datum_image_eq(
            left: pg_sys::Datum,
            right: pg_sys::Datum,
            by_value: bool,
            length: c_int,
        ) -> bool;
    }
}

/// Fills in the generated columns of the row in `slot`. Raises what their expressions raise.
///
/// # Safety
/// `table`, `estate` and `slot` belong together.
pub unsafe fn compute_generated(
    table: *mut pg_sys::ResultRelInfo,
    estate: *mut pg_sys::EState,
    slot: *mut pg_sys::TupleTableSlot,
    command: pg_sys::CmdType::Type,
) {
    // SAFETY: as the caller promises; the guard turns an error into an unwind.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            unguarded::ExecComputeStoredGenerated(table, estate, slot, command)
        })
    }
}

/// Whether two values are the same bytes, TOAST aside.
///
/// # Safety
/// Both are non-null values of a type with this length and way of passing.
pub unsafe fn same_image(
    left: pg_sys::Datum,
    right: pg_sys::Datum,
    by_value: bool,
    length: i16,
) -> bool {
    // SAFETY: as the caller promises; the guard turns an error into an unwind.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            unguarded::datum_image_eq(left, right, by_value, c_int::from(length))
        })
    }
}
