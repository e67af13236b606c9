//! Rows that are inserted together, as COPY does: one after another into one table, without a row of another kind in between.
//!
//! A page's worth of rows then costs one lock of the page and one WAL record instead of one for each row; the walsenders of this node read less, too. Rows that wait
//! here are inserted before anything else of the transaction happens to its tables.

use super::super::memory;
use super::segment::{OpenTable, Statement};
use super::target;
use super::values::{self, RowArrays, Which};
use super::write;
use crate::apply::rows::ApplyError;
use pgrx::pg_sys;
use wire::stream::Row;

/// Rows that may wait, and bytes of theirs on the wire; about what COPY takes.
const ROWS_MAX: usize = 500;
const BYTES_MAX: usize = 64 * 1024;

/// Rows of one table that are to be inserted.
pub struct Batch {
    /// Not where a trigger may change the row before it is inserted, or ask what is there already.
    pub allowed: bool,
    /// Used again and again; the first `filled` hold rows.
    slots: Vec<*mut pg_sys::TupleTableSlot>,
    /// The keys of those rows, for messages.
    keys: Vec<target::Aside>,
    filled: usize,
    bytes: usize,
}

impl Batch {
    pub fn new(allowed: bool) -> Batch {
        Batch {
            allowed,
            slots: Vec::new(),
            keys: Vec::new(),
            filled: 0,
            bytes: 0,
        }
    }

    pub fn is_full(&self) -> bool {
        self.filled >= ROWS_MAX || self.bytes >= BYTES_MAX
    }
}

/// Puts a row with the others that wait. Its values stay in the statement's row context until [`flush`].
///
/// # Safety
/// As [`write::insert`].
pub unsafe fn add(
    statement: &mut Statement,
    table: &mut OpenTable,
    new: &Row<'_>,
) -> Result<(), ApplyError> {
    values::note_key(&table.plan, new, Which::All);
    // SAFETY: as the caller promises; the slot is the statement's.
    unsafe {
        let place = table.batch.filled;
        if place == table.batch.slots.len() {
            let slot = pg_sys::ExecInitExtraTupleSlot(
                statement.estate,
                (*table.relation).rd_att,
                &raw const pg_sys::TTSOpsVirtual,
            );
            table.batch.slots.push(slot);
            table.batch.keys.push(target::Aside::default());
        }
        let slot = table.batch.slots[place];
        pg_sys::ExecClearTuple(slot);
        let arrays = RowArrays::of(slot);
        write::empty(table, arrays);
        write::load(statement, table, new, Which::All, arrays)?;
        pg_sys::ExecStoreVirtualTuple(slot);
    }
    let batch = &mut table.batch;
    target::put_aside(&mut batch.keys[batch.filled]);
    batch.filled += 1;
    batch.bytes += new.byte_len();
    Ok(())
}

/// Inserts the rows that wait.
///
/// # Safety
/// As [`write::insert`].
pub unsafe fn flush(statement: &mut Statement, table: &mut OpenTable) {
    let count = std::mem::take(&mut table.batch.filled);
    table.batch.bytes = 0;
    // SAFETY: as the caller promises; the slots hold rows, whose values are in the row context until it is emptied here.
    unsafe {
        match count {
            0 => return,
            1 => {
                target::take_up(&mut table.batch.keys[0]);
                let slot = table.batch.slots[0];
                pg_sys::ExecSimpleRelationInsert(table.info, statement.estate, slot);
                if table.checked_later {
                    target::check_later();
                }
            }
            count => insert_together(statement, table, count),
        }
        statement.written = true;
        pg_sys::MemoryContextReset(statement.row_context());
    }
}

/// # Safety
/// As [`flush`]; so many slots are filled.
unsafe fn insert_together(statement: &Statement, table: &mut OpenTable, count: usize) {
    let (info, estate) = (table.info, statement.estate);
    // SAFETY: as the caller promises.
    unsafe {
        for place in 0..count {
            target::take_up(&mut table.batch.keys[place]);
            let slot = table.batch.slots[place];
            write::check_row(table, estate, slot, pg_sys::CmdType::CMD_INSERT);
            target::put_aside(&mut table.batch.keys[place]);
        }
        {
            // Copies of the rows, which nobody needs afterwards.
            let _entered = memory::enter(statement.row_context());
            pg_sys::table_multi_insert(
                table.relation,
                table.batch.slots.as_mut_ptr(),
                count as i32,
                pg_sys::GetCurrentCommandId(true),
                0,
                std::ptr::null_mut(),
            );
        }
        let triggers = !(*info).ri_TrigDesc.is_null();
        if (*info).ri_NumIndices == 0 && !triggers {
            return;
        }
        for place in 0..count {
            target::take_up(&mut table.batch.keys[place]);
            insert_into_indexes(table, estate, table.batch.slots[place]);
            if table.checked_later {
                target::check_later();
            }
            target::put_aside(&mut table.batch.keys[place]);
        }
    }
}

/// # Safety
/// As [`flush`]; the row of the slot is in the table.
unsafe fn insert_into_indexes(
    table: &OpenTable,
    estate: *mut pg_sys::EState,
    slot: *mut pg_sys::TupleTableSlot,
) {
    let none = std::ptr::null_mut;
    // SAFETY: as the caller promises.
    unsafe {
        let mut recheck = std::ptr::null_mut();
        if (*table.info).ri_NumIndices > 0 {
            recheck = pg_sys::ExecInsertIndexTuples(
                table.info,
                slot,
                estate,
                false,
                false,
                std::ptr::null_mut(),
                none(),
            );
        }
        if !(*table.info).ri_TrigDesc.is_null() {
            pg_sys::ExecARInsertTriggers(estate, table.info, slot, recheck, std::ptr::null_mut());
        }
        pg_sys::list_free(recheck);
    }
}
