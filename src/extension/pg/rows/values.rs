//! Rows off the wire, as datums.

use super::plan::{ColumnPlan, Read, TablePlan};
use super::target;
use crate::apply::rows::ApplyError;
use pgrx::{pg_sys, varlena};
use wire::stream::{Field, Malformed, Row};

/// The arrays of a row: one value and one null flag per attribute of the table.
#[derive(Clone, Copy)]
pub struct RowArrays {
    pub values: *mut pg_sys::Datum,
    pub nulls: *mut bool,
}

impl RowArrays {
    /// Those of a slot.
    ///
    /// # Safety
    /// `slot` is valid.
    pub unsafe fn of(slot: *mut pg_sys::TupleTableSlot) -> Self {
        // SAFETY: as the caller promises.
        unsafe {
            RowArrays {
                values: (*slot).tts_values,
                nulls: (*slot).tts_isnull,
            }
        }
    }
}

/// Which columns a row of the stream has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    All,
    /// Those of the origin's replica identity.
    Key,
}

/// Reads a row into `arrays`; what is unchanged there stays. By-reference values are allocated in the current memory
/// context.
///
/// # Safety
/// The arrays have an element for every attribute of the table.
pub unsafe fn load(
    table: &TablePlan,
    row: &Row<'_>,
    which: Which,
    arrays: RowArrays,
) -> Result<(), ApplyError> {
    let mut fields = row.fields();
    let columns = table
        .columns
        .iter()
        .filter(|column| which == Which::All || column.key);
    for column in columns {
        let field = fields.next().ok_or(WRONG_COUNT)??;
        // SAFETY: the column's index is within the arrays.
        unsafe { set(table, column, field, arrays) }?;
    }
    if fields.next().is_some() {
        Err(WRONG_COUNT.into())
    } else {
        Ok(())
    }
}

const WRONG_COUNT: Malformed =
    Malformed("a row and its relation have different numbers of columns");

/// Notes the key of a row for messages.
pub fn note_key(table: &TablePlan, row: &Row<'_>, which: Which) {
    let columns = table
        .columns
        .iter()
        .filter(|column| which == Which::All || column.key);
    for (column, field) in columns.zip(row.fields()) {
        if let (true, Ok(field)) = (column.shown, field) {
            target::add_key_field(field);
        }
    }
}

/// # Safety
/// As [`load`].
unsafe fn set(
    table: &TablePlan,
    column: &ColumnPlan,
    field: Field<'_>,
    arrays: RowArrays,
) -> Result<(), ApplyError> {
    let (value, null) = match field {
        Field::Unchanged => return Ok(()),
        Field::Null => (pg_sys::Datum::null(), true),
        // SAFETY: within a transaction, as all of applying.
        Field::Value(bytes) => (unsafe { read(table, column, bytes) }?, false),
    };
    // SAFETY: as the caller promises.
    unsafe {
        *arrays.values.add(column.index) = value;
        *arrays.nulls.add(column.index) = null;
    }
    Ok(())
}

/// # Safety
/// Within a transaction; input functions may read catalogs.
unsafe fn read(
    table: &TablePlan,
    column: &ColumnPlan,
    bytes: &[u8],
) -> Result<pg_sys::Datum, ApplyError> {
    let expected = match column.read {
        Read::ByValue(length) | Read::Fixed(length) => length,
        Read::Varlena | Read::Text { .. } => bytes.len(),
    };
    if bytes.len() != expected {
        return Err(ApplyError::ValueLength {
            table: table.table.clone(),
        });
    }
    Ok(match column.read {
        Read::ByValue(_) => by_value(bytes),
        // SAFETY: copies into fresh memory of the right size.
        Read::Fixed(_) => unsafe { pg_sys::Datum::from(copied(bytes, 0)) },
        // SAFETY: as above, with room for a header, which is then set.
        Read::Varlena => unsafe {
            let value = copied(bytes, pg_sys::VARHDRSZ);
            varlena::set_varsize_4b(value.cast(), (bytes.len() + pg_sys::VARHDRSZ) as i32);
            pg_sys::Datum::from(value)
        },
        // SAFETY: the type's own input function and a zero-terminated copy.
        Read::Text {
            function,
            io_param,
            typmod,
        } => unsafe {
            let text = zero_terminated(bytes);
            pg_sys::InputFunctionCall(function, text, io_param, typmod)
        },
    })
}

/// Widens as fetching from a row does, so that equal values are equal datums.
fn by_value(bytes: &[u8]) -> pg_sys::Datum {
    match bytes {
        [byte] => pg_sys::Datum::from(*byte as std::ffi::c_char as isize as usize),
        [a, b] => pg_sys::Datum::from(i16::from_le_bytes([*a, *b])),
        [a, b, c, d] => pg_sys::Datum::from(i32::from_le_bytes([*a, *b, *c, *d])),
        other => pg_sys::Datum::from(other.try_into().map_or(0, i64::from_le_bytes)),
    }
}

/// Copies into palloc'd memory, behind `room` bytes for a header.
///
/// # Safety
/// Within a memory context, as all of applying.
unsafe fn copied(bytes: &[u8], room: usize) -> *mut u8 {
    // SAFETY: fresh memory of the right size.
    unsafe {
        let copy = pg_sys::palloc(room + bytes.len()).cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.add(room), bytes.len());
        copy
    }
}

/// # Safety
/// As [`copied`].
unsafe fn zero_terminated(bytes: &[u8]) -> *mut std::ffi::c_char {
    // SAFETY: fresh memory with room for the zero.
    unsafe {
        let copy = pg_sys::palloc(bytes.len() + 1).cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy, bytes.len());
        *copy.add(bytes.len()) = 0;
        copy.cast()
    }
}
