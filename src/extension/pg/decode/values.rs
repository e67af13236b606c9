//! Rows out of WAL, onto the wire.

use super::super::memory::OwnedContext;
use super::plan::{ColumnPlan, Send};
use pgrx::{pg_sys, varlena};
use std::ffi::CStr;
use wire::stream::RowWriter;

/// A row taken apart; the buffers are used again and again.
#[derive(Default)]
pub struct Deformed {
    values: Vec<pg_sys::Datum>,
    nulls: Vec<bool>,
}

impl Deformed {
    /// Takes a tuple apart.
    ///
    /// # Safety
    /// `tuple` belongs to the open `relation`, and stays where it is while the values are used.
    pub unsafe fn load(
        &mut self,
        relation: pg_sys::Relation,
        tuple: *mut pg_sys::ReorderBufferTupleBuf,
    ) {
        // SAFETY: an open relation has a descriptor; the buffers have room for each of its attributes.
        unsafe {
            let descriptor = (*relation).rd_att;
            let natts = (*descriptor).natts as usize;
            self.values.resize(natts, pg_sys::Datum::null());
            self.nulls.resize(natts, true);
            let (values, nulls) = (self.values.as_mut_ptr(), self.nulls.as_mut_ptr());
            pg_sys::heap_deform_tuple(&raw mut (*tuple).tuple, descriptor, values, nulls);
        }
    }

    /// Writes these columns. Output functions and decompression allocate in the current memory context.
    ///
    /// # Safety
    /// What was loaded is still there, and the columns are of the same relation.
    pub unsafe fn write<'p>(
        &self,
        columns: impl Iterator<Item = &'p ColumnPlan>,
        row: &mut RowWriter<'_>,
    ) {
        for column in columns {
            if self.nulls[column.index] {
                row.null();
            } else {
                // SAFETY: a non-null value of the column's type.
                unsafe { write_value(column, self.values[column.index], row) }
            }
        }
    }
}

/// # Safety
/// `value` is a non-null value of the column.
unsafe fn write_value(column: &ColumnPlan, value: pg_sys::Datum, row: &mut RowWriter<'_>) {
    // SAFETY: a varlena's datum is its address.
    if column.varlena && unsafe { is_unchanged_toast(value.cast_mut_ptr()) } {
        return row.unchanged();
    }
    match &column.send {
        Send::ByValue(length) => row.value(&value.value().to_le_bytes()[..*length]),
        // SAFETY: a fixed-length value's datum is the address of so many bytes.
        Send::Fixed(length) => {
            row.value(unsafe { std::slice::from_raw_parts(value.cast_mut_ptr(), *length) })
        }
        // SAFETY: as above; the detoasted copy lives in the current memory context.
        Send::Varlena => row.value(unsafe {
            let plain = plain_varlena(value.cast_mut_ptr());
            std::slice::from_raw_parts(
                varlena::vardata_any(plain).cast(),
                varlena::varsize_any_exhdr(plain),
            )
        }),
        // SAFETY: the type's own output function; it returns a zero-terminated string.
        Send::Text(function) => row.value(unsafe {
            CStr::from_ptr(pg_sys::OutputFunctionCall(*function, value)).to_bytes()
        }),
    }
}

/// A TOAST pointer into the table means that the UPDATE did not touch the value: new values are in WAL, and core has
/// put them in place of their pointers.
///
/// # Safety
/// `value` is a varlena.
unsafe fn is_unchanged_toast(value: *const pg_sys::varlena) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        varlena::varatt_is_1b_e(value)
            && u32::from(varlena::vartag_1b_e(value)) == pg_sys::vartag_external::VARTAG_ONDISK
    }
}

/// # Safety
/// `value` is a varlena, and not a TOAST pointer into a table.
unsafe fn plain_varlena(value: *mut pg_sys::varlena) -> *const pg_sys::varlena {
    // SAFETY: as the caller promises.
    unsafe {
        if varlena::varatt_is_4b_u(value)
            || (varlena::varatt_is_1b(value) && !varlena::varatt_is_1b_e(value))
        {
            value
        } else {
            pg_sys::pg_detoast_datum_packed(value)
        }
    }
}

/// Where values are prepared for sending; emptied after each change that used it.
pub struct Scratch {
    context: OwnedContext,
}

impl Scratch {
    pub fn new() -> Self {
        Scratch {
            context: OwnedContext::new(c"multimaster output values"),
        }
    }

    /// Runs `work` in the scratch context and then empties it.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        let result = {
            let _entered = self.context.enter();
            work()
        };
        // SAFETY: rows are copied into the message; no value of the scratch context is left.
        unsafe { self.context.reset() };
        result
    }
}
