//! Inserting, updating and deleting rows as the origin did, with the checks that must be made here.

use super::super::memory;
use super::find::{self, Found};
use super::segment::{OpenTable, Statement};
use super::values::{self, RowArrays, Which};
use super::{identity, unbound};
use crate::apply::rows::ApplyError;
use pgrx::pg_sys;
use wire::stream::{OldRow, Row};

/// So often a change starts over because others changed the row first. Each time somebody else has committed.
const ATTEMPTS: usize = 1000;

/// # Safety
/// The table belongs to the statement; the current memory context is the statement's.
pub unsafe fn insert(
    statement: &mut Statement,
    table: &mut OpenTable,
    new: &Row<'_>,
) -> Result<(), ApplyError> {
    values::note_key(&table.plan, new, Which::All);
    // SAFETY: as the caller promises.
    unsafe {
        let arrays = empty_slot(table);
        load(statement, table, new, Which::All, arrays)?;
        pg_sys::ExecStoreVirtualTuple(table.new);
        pg_sys::ExecSimpleRelationInsert(table.info, statement.estate, table.new);
    }
    statement.written = true;
    Ok(())
}

/// # Safety
/// As [`insert`].
pub unsafe fn update(
    statement: &mut Statement,
    table: &mut OpenTable,
    old: &OldRow<'_>,
    new: &Row<'_>,
) -> Result<(), ApplyError> {
    // SAFETY: as the caller promises.
    unsafe {
        want(statement, table, old, Some(new))?;
        for attempt in 0..ATTEMPTS {
            find_changeable(statement, table, "update", attempt > 0)?;
            if table.triggers_before && !lock_found(statement, table) {
                continue;
            }
            let arrays = empty_slot(table);
            copy_found(table, arrays);
            load(statement, table, new, Which::All, arrays)?;
            pg_sys::ExecStoreVirtualTuple(table.new);
            let updated = update_found(statement, table);
            forget_changed_columns(table);
            if updated {
                return Ok(());
            }
        }
    }
    pgrx::error!(
        "row of table \"{}\" does not come to rest",
        table.plan.table
    );
}

/// # Safety
/// As [`insert`].
pub unsafe fn delete(
    statement: &mut Statement,
    table: &mut OpenTable,
    old: &OldRow<'_>,
) -> Result<(), ApplyError> {
    // SAFETY: as the caller promises.
    unsafe {
        want(statement, table, old, None)?;
        for attempt in 0..ATTEMPTS {
            find_changeable(statement, table, "delete", attempt > 0)?;
            if table.triggers_before && !lock_found(statement, table) {
                continue;
            }
            if delete_found(statement, table) {
                return Ok(());
            }
        }
    }
    pgrx::error!(
        "row of table \"{}\" does not come to rest",
        table.plan.table
    );
}

/// Reads a row into `arrays`; its values live until the row is done with.
///
/// # Safety
/// As [`insert`]; the arrays are of the table.
pub unsafe fn load(
    statement: &Statement,
    table: &OpenTable,
    row: &Row<'_>,
    which: Which,
    arrays: RowArrays,
) -> Result<(), ApplyError> {
    // SAFETY: as the caller promises.
    unsafe {
        let _entered = memory::enter(statement.row_context());
        values::load(&table.plan, row, which, arrays)
    }
}

/// Fills in the row to look for: what the origin logged of the old row, or the key that the new one kept.
///
/// # Safety
/// As [`insert`].
unsafe fn want(
    statement: &Statement,
    table: &OpenTable,
    old: &OldRow<'_>,
    new: Option<&Row<'_>>,
) -> Result<(), ApplyError> {
    let plan = &table.plan;
    let no_identity = || ApplyError::NoIdentity {
        table: plan.table.clone(),
    };
    if matches!(plan.search, identity::Search::Impossible) {
        return Err(no_identity());
    }
    let (row, which) = match (old, new) {
        (OldRow::Full(row), _) => (row, Which::All),
        (OldRow::Key(row), _) => (row, Which::Key),
        (OldRow::Absent, Some(row)) if plan.identity == wire::stream::ReplicaIdentity::Key => {
            (row, Which::All)
        }
        (OldRow::Absent, _) => return Err(no_identity()),
    };
    values::note_key(plan, row, which);
    // SAFETY: as the caller promises.
    unsafe {
        // A column that the row leaves out must not keep the last row's value, whose memory is gone.
        empty(table, table.wanted);
        load(statement, table, row, which, table.wanted)
    }
}

/// Finds the wanted row, and begins the next command if this one has written it. `contended` says that it was there before, and somebody
/// else was faster.
///
/// # Safety
/// As [`insert`].
unsafe fn find_changeable(
    statement: &mut Statement,
    table: &mut OpenTable,
    command: &'static str,
    contended: bool,
) -> Result<(), ApplyError> {
    // SAFETY: as the caller promises.
    unsafe {
        let found = find::find(statement, table);
        if found != Found::Yes {
            let table = table.plan.table.clone();
            return Err(match found {
                Found::No if !contended => ApplyError::RowMissing { table, command },
                _ => ApplyError::RowTaken { table, command },
            });
        }
        if statement.written && find::is_of_this_command(table) {
            statement.next_command();
        }
        // A trigger may have begun a command of its own.
        (*statement.estate).es_output_cid = pg_sys::GetCurrentCommandId(true);
    }
    Ok(())
}

/// Locks the row in `table.found` before triggers see it; false when somebody else was faster.
///
/// # Safety
/// As [`insert`]; the slot is filled.
unsafe fn lock_found(statement: &mut Statement, table: &OpenTable) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        let mut place = (*table.found).tts_tid;
        let mut failure = pg_sys::TM_FailureData::default();
        let result = pg_sys::table_tuple_lock(
            table.relation,
            &mut place,
            (*statement.estate).es_snapshot,
            table.found,
            pg_sys::GetCurrentCommandId(false),
            pg_sys::LockTupleMode::LockTupleExclusive,
            pg_sys::LockWaitPolicy::LockWaitBlock,
            0,
            &mut failure,
        );
        succeeded(statement, result)
    }
}

/// The arrays of the slot for the new row, emptied: columns that are not sent (dropped, generated) stay null.
///
/// # Safety
/// As [`insert`].
unsafe fn empty_slot(table: &OpenTable) -> RowArrays {
    // SAFETY: as the caller promises.
    unsafe {
        pg_sys::ExecClearTuple(table.new);
        let arrays = RowArrays::of(table.new);
        empty(table, arrays);
        arrays
    }
}

/// Makes every column null.
///
/// # Safety
/// As [`insert`]; the arrays are of the table.
pub unsafe fn empty(table: &OpenTable, arrays: RowArrays) {
    // SAFETY: the arrays have natts elements, whose values do not matter where they are null.
    unsafe {
        let natts = (*(*table.relation).rd_att).natts as usize;
        std::slice::from_raw_parts_mut(arrays.values, natts).fill(pg_sys::Datum::null());
        std::slice::from_raw_parts_mut(arrays.nulls, natts).fill(true);
    }
}

/// Starts the new row with what the found one holds.
///
/// # Safety
/// `table.found` holds a row; `to` are the arrays of a slot of the same table.
unsafe fn copy_found(table: &OpenTable, to: RowArrays) {
    // SAFETY: as the caller promises; both have natts elements.
    unsafe {
        pg_sys::slot_getallattrs(table.found);
        let natts = (*(*table.relation).rd_att).natts as usize;
        let from = RowArrays::of(table.found);
        std::ptr::copy_nonoverlapping(from.values, to.values, natts);
        std::ptr::copy_nonoverlapping(from.nulls, to.nulls, natts);
    }
}

/// Puts `table.new` in the place of `table.found`; false when somebody else was faster.
///
/// # Safety
/// As [`insert`]; both slots are filled.
unsafe fn update_found(statement: &mut Statement, table: &mut OpenTable) -> bool {
    let (info, estate, new) = (table.info, statement.estate, table.new);
    // SAFETY: as the caller promises.
    unsafe {
        let mut place = (*table.found).tts_tid;
        if table.columns_watched {
            tell_changed_columns(statement, table);
        }
        let before = (*info)
            .ri_TrigDesc
            .as_ref()
            .is_some_and(|triggers| triggers.trig_update_before_row);
        if before && !run_before_update(statement, table, &mut place) {
            return true;
        }
        check_row(table, estate, new, pg_sys::CmdType::CMD_UPDATE);
        let mut failure = pg_sys::TM_FailureData::default();
        let mut lock = pg_sys::LockTupleMode::LockTupleNoKeyExclusive;
        let mut indexes = false;
        let result = pg_sys::table_tuple_update(
            table.relation,
            &mut place,
            new,
            pg_sys::GetCurrentCommandId(true),
            (*estate).es_snapshot,
            std::ptr::null_mut(),
            true,
            &mut failure,
            &mut lock,
            &mut indexes,
        );
        if !succeeded(statement, result) {
            return false;
        }
        let mut recheck = std::ptr::null_mut();
        if indexes && (*info).ri_NumIndices > 0 {
            if !table.columns_watched {
                tell_changed_columns(statement, table);
            }
            let none = std::ptr::null_mut();
            recheck = pg_sys::ExecInsertIndexTuples(
                info,
                new,
                estate,
                true,
                false,
                none,
                std::ptr::null_mut(),
            );
        }
        let none = std::ptr::null_mut;
        let mut old_place = (*table.found).tts_tid;
        pg_sys::ExecARUpdateTriggers(
            estate,
            info,
            none(),
            none(),
            &mut old_place,
            std::ptr::null_mut(),
            new,
            recheck,
            std::ptr::null_mut(),
            false,
        );
        pg_sys::list_free(recheck);
        true
    }
}

/// False when a trigger says that the row shall stay.
///
/// # Safety
/// As [`update_found`].
unsafe fn run_before_update(
    statement: &mut Statement,
    table: &OpenTable,
    place: pg_sys::ItemPointer,
) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        let recheck = statement.recheck();
        let none = std::ptr::null_mut();
        pg_sys::ExecBRUpdateTriggers(
            statement.estate,
            recheck,
            table.info,
            place,
            none,
            table.new,
            std::ptr::null_mut(),
        )
    }
}

/// Computes the generated columns of a new row and checks the constraints that concern it alone.
///
/// # Safety
/// As [`insert`]; the slot holds a row of the table.
pub unsafe fn check_row(
    table: &OpenTable,
    estate: *mut pg_sys::EState,
    row: *mut pg_sys::TupleTableSlot,
    command: pg_sys::CmdType::Type,
) {
    // SAFETY: as the caller promises.
    unsafe {
        if table.generated {
            unbound::compute_generated(table.info, estate, row, command);
        }
        if !(*(*table.relation).rd_att).constr.is_null() {
            pg_sys::ExecConstraints(table.info, row, estate);
        }
        if (*(*table.relation).rd_rel).relispartition {
            pg_sys::ExecPartitionCheck(table.info, row, estate, true);
        }
    }
}

/// Removes the row in `table.found`; false when somebody else was faster.
///
/// # Safety
/// As [`insert`]; the slot is filled.
unsafe fn delete_found(statement: &mut Statement, table: &mut OpenTable) -> bool {
    let (info, estate) = (table.info, statement.estate);
    let none = std::ptr::null_mut;
    // SAFETY: as the caller promises.
    unsafe {
        let mut place = (*table.found).tts_tid;
        let before = (*info)
            .ri_TrigDesc
            .as_ref()
            .is_some_and(|triggers| triggers.trig_delete_before_row);
        if before {
            let recheck = statement.recheck();
            let tuple = std::ptr::null_mut();
            if !pg_sys::ExecBRDeleteTriggers(estate, recheck, info, &mut place, tuple, none()) {
                return true;
            }
        }
        let mut failure = pg_sys::TM_FailureData::default();
        let result = pg_sys::table_tuple_delete(
            table.relation,
            &mut place,
            pg_sys::GetCurrentCommandId(true),
            (*estate).es_snapshot,
            std::ptr::null_mut(),
            true,
            &mut failure,
            false,
        );
        if !succeeded(statement, result) {
            return false;
        }
        pg_sys::ExecARDeleteTriggers(
            estate,
            info,
            &mut place,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            false,
        );
        true
    }
}

/// Judges the storage's answer to a change; false when the row has to be looked for again.
fn succeeded(statement: &mut Statement, result: pg_sys::TM_Result::Type) -> bool {
    match result {
        pg_sys::TM_Result::TM_Ok => {
            statement.written = true;
            true
        }
        pg_sys::TM_Result::TM_SelfModified => {
            statement.next_command();
            false
        }
        pg_sys::TM_Result::TM_Updated | pg_sys::TM_Result::TM_Deleted => false,
        other => pgrx::error!("unexpected answer of the table's storage: {other}"),
    }
}

/// Tells the executor which columns the new row has changed. The set lives as long as the row is handled.
///
/// # Safety
/// As [`update_found`].
unsafe fn tell_changed_columns(statement: &Statement, table: &OpenTable) {
    if table.generated {
        return;
    }
    let first = pg_sys::FirstLowInvalidHeapAttributeNumber;
    // SAFETY: as the caller promises; both slots are taken apart.
    unsafe {
        let _entered = memory::enter(statement.row_context());
        let (old, new) = (RowArrays::of(table.found), RowArrays::of(table.new));
        let attributes = (*(*table.relation).rd_att)
            .attrs
            .as_slice((*(*table.relation).rd_att).natts as usize);
        let mut changed = std::ptr::null_mut();
        for column in &table.plan.columns {
            if !same_column(&attributes[column.index], column.index, old, new) {
                changed = pg_sys::bms_add_member(changed, column.index as i32 + 1 - first);
            }
        }
        (*table.range).updatedCols = changed;
    }
}

/// Takes back what [`tell_changed_columns`] said, before the memory of the row goes.
///
/// # Safety
/// As [`insert`].
unsafe fn forget_changed_columns(table: &OpenTable) {
    if !table.generated {
        // SAFETY: the entry is the statement's own.
        unsafe { (*table.range).updatedCols = std::ptr::null_mut() };
    }
}

/// # Safety
/// Both rows are of the table to which the attribute belongs.
unsafe fn same_column(
    attribute: &pg_sys::FormData_pg_attribute,
    index: usize,
    old: RowArrays,
    new: RowArrays,
) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        match (*old.nulls.add(index), *new.nulls.add(index)) {
            (true, true) => true,
            (false, false) => {
                let (old, new) = (*old.values.add(index), *new.values.add(index));
                old.value() == new.value()
                    || (!attribute.attbyval
                        && identity::same_bytes(old, new, false, attribute.attlen))
            }
            _ => false,
        }
    }
}
