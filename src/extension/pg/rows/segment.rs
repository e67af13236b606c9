//! The executor's side of a stretch of row changes between two DDL commands.
//!
//! All changes of a segment are one statement to PostgreSQL: one executor state, one round of AFTER triggers at the end, so that it does not
//! matter in which order the origin's statements touched parents and children. Tables are opened once.

use super::batch::{self, Batch};
use super::identity::Search;
use super::plan::{Known, Opened, TablePlan};
use super::values::RowArrays;
use super::{super::memory, triggers};
use crate::apply::rows::ApplyError;
use pgrx::pg_sys;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::rc::Rc;
use wire::stream::RelationId;

/// A table open for changes.
pub struct OpenTable {
    pub plan: Rc<TablePlan>,
    pub relation: pg_sys::Relation,
    pub info: *mut pg_sys::ResultRelInfo,
    pub range: *mut pg_sys::RangeTblEntry,
    /// The row found here.
    pub found: *mut pg_sys::TupleTableSlot,
    /// The row as it shall be.
    pub new: *mut pg_sys::TupleTableSlot,
    /// The row to look for.
    pub wanted: RowArrays,
    /// Sees what others have not committed yet, and says who they are.
    pub dirty: *mut pg_sys::SnapshotData,
    /// Scan of the index the plan searches, once there was something to look for.
    pub scan: Option<IndexScan>,
    /// Triggers ask which columns changed.
    pub columns_watched: bool,
    /// Triggers run before a row is updated or deleted.
    pub triggers_before: bool,
    /// Triggers check rows at the end of the statement.
    pub checked_later: bool,
    /// Has columns that are computed.
    pub generated: bool,
    /// Rows that are to be inserted.
    pub batch: Batch,
}

/// An index scan that is positioned again for each row.
#[derive(Clone, Copy)]
pub struct IndexScan {
    pub index: pg_sys::Relation,
    pub scan: pg_sys::IndexScanDesc,
    pub keys: *mut pg_sys::ScanKeyData,
}

/// What PostgreSQL takes for one statement.
pub struct Statement {
    pub estate: *mut pg_sys::EState,
    /// For triggers that run before a change; made when the first is met.
    recheck: *mut pg_sys::EPQState,
    /// Emptied after each comparison of a row with the one looked for; made for the first.
    compared: pg_sys::MemoryContext,
    /// Something was written under the current command id.
    pub written: bool,
}

/// A statement with its tables.
pub struct Segment {
    statement: Statement,
    tables: BTreeMap<RelationId, OpenTable>,
    /// The one table with rows that wait to be inserted.
    waiting: Option<RelationId>,
}

impl Statement {
    /// # Safety
    /// Within a transaction.
    unsafe fn begin() -> Statement {
        // SAFETY: as the caller promises; the snapshot is popped in `end`, or by the end of the transaction.
        unsafe {
            pg_sys::CommandCounterIncrement();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let previous = pg_sys::MemoryContextSwitchTo(pg_sys::TopTransactionContext);
            let estate = pg_sys::CreateExecutorState();
            pg_sys::MakePerTupleExprContext(estate);
            pg_sys::MemoryContextSwitchTo(previous);
            (*estate).es_snapshot = pg_sys::GetActiveSnapshot();
            (*estate).es_output_cid = pg_sys::GetCurrentCommandId(true);
            pg_sys::AfterTriggerBeginQuery();
            Statement {
                estate,
                recheck: std::ptr::null_mut(),
                compared: std::ptr::null_mut(),
                written: false,
            }
        }
    }

    /// The context in which the executor runs, and remembers.
    pub fn context(&self) -> pg_sys::MemoryContext {
        // SAFETY: made in `begin`.
        unsafe { (*self.estate).es_query_cxt }
    }

    /// The context that is emptied after each row.
    pub fn row_context(&self) -> pg_sys::MemoryContext {
        // SAFETY: made in `begin`.
        unsafe { (*(*self.estate).es_per_tuple_exprcontext).ecxt_per_tuple_memory }
    }

    /// The context that is emptied after each comparison.
    pub fn comparison_context(&mut self) -> pg_sys::MemoryContext {
        if self.compared.is_null() {
            // SAFETY: a child of the statement's context, which ends with it.
            self.compared = unsafe {
                pg_sys::AllocSetContextCreateInternal(
                    self.context(),
                    c"multimaster comparison".as_ptr(),
                    pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                    pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                    pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
                )
            };
        }
        self.compared
    }

    /// Makes what was written so far visible to the commands to come.
    pub fn next_command(&mut self) {
        // SAFETY: within the segment's transaction.
        unsafe {
            pg_sys::CommandCounterIncrement();
            (*self.estate).es_output_cid = pg_sys::GetCurrentCommandId(true);
        }
        self.written = false;
    }

    /// What triggers that run before a change must be given, to look at a row again that others have changed. They never do: the row is
    /// locked before they run.
    pub fn recheck(&mut self) -> *mut pg_sys::EPQState {
        if self.recheck.is_null() {
            // SAFETY: fresh zeroed memory of the segment.
            unsafe {
                let size = size_of::<pg_sys::EPQState>();
                let state = pg_sys::MemoryContextAllocZero((*self.estate).es_query_cxt, size);
                self.recheck = state.cast();
            }
        }
        self.recheck
    }

    /// # Safety
    /// `opened` stays open until `end`.
    unsafe fn open(&mut self, opened: Opened) -> OpenTable {
        let Opened { relation, plan } = opened;
        // SAFETY: an open table; all is allocated in the context of the segment, which ends before the table is closed.
        unsafe {
            let estate = self.estate;
            let previous = pg_sys::MemoryContextSwitchTo((*estate).es_query_cxt);
            let range = range_entry(relation);
            (*estate).es_range_table = pg_sys::lappend((*estate).es_range_table, range.cast());
            (*estate).es_range_table_size += 1;
            let info = allocated::<pg_sys::ResultRelInfo>();
            (*info).type_ = pg_sys::NodeTag::T_ResultRelInfo;
            let place = (*estate).es_range_table_size;
            pg_sys::InitResultRelInfo(info, relation, place, std::ptr::null_mut(), 0);
            (*info).ri_TrigDesc = triggers::keep_firing((*info).ri_TrigDesc);
            pg_sys::ExecOpenIndices(info, false);
            (*estate).es_opened_result_relations =
                pg_sys::lappend((*estate).es_opened_result_relations, info.cast());
            let dirty = allocated::<pg_sys::SnapshotData>();
            (*dirty).snapshot_type = pg_sys::SnapshotType::SNAPSHOT_DIRTY;
            let descriptor = (*relation).rd_att;
            let natts = (*descriptor).natts as usize;
            let constraints = (*descriptor).constr.as_ref();
            let table = OpenTable {
                found: pg_sys::table_slot_create(relation, &raw mut (*estate).es_tupleTable),
                new: pg_sys::ExecInitExtraTupleSlot(
                    estate,
                    descriptor,
                    &raw const pg_sys::TTSOpsVirtual,
                ),
                wanted: RowArrays {
                    values: pg_sys::palloc0(natts * size_of::<pg_sys::Datum>()).cast(),
                    nulls: pg_sys::palloc0(natts).cast(),
                },
                columns_watched: triggers::watch_columns((*info).ri_TrigDesc),
                triggers_before: triggers::run_before((*info).ri_TrigDesc),
                generated: constraints.is_some_and(|constraints| constraints.has_generated_stored),
                checked_later: triggers::run_after((*info).ri_TrigDesc),
                batch: Batch::new(!triggers::run_before_insert((*info).ri_TrigDesc)),
                dirty,
                scan: None,
                plan,
                relation,
                info,
                range,
            };
            if table.generated {
                // Which columns are computed anew is decided once per table: all of them.
                (*range).updatedCols = every_column(natts);
            }
            pg_sys::MemoryContextSwitchTo(previous);
            table
        }
    }
}

impl Segment {
    /// # Safety
    /// Within a transaction.
    pub unsafe fn begin() -> Segment {
        // SAFETY: as the caller promises.
        Segment {
            statement: unsafe { Statement::begin() },
            tables: BTreeMap::new(),
            waiting: None,
        }
    }

    /// Rows of this relation wait to be inserted.
    pub fn set_waiting(&mut self, id: RelationId) {
        self.waiting = Some(id);
    }

    /// Inserts the rows that wait, unless they are of this relation.
    pub fn flush_others(&mut self, than: RelationId) {
        if self.waiting != Some(than) {
            self.flush();
        }
    }

    /// Inserts the rows that wait.
    pub fn flush(&mut self) {
        let Some(table) = self.waiting.take().and_then(|id| self.tables.get_mut(&id)) else {
            return;
        };
        // SAFETY: the context lives as long as the segment, to which the table belongs.
        unsafe {
            let _entered = memory::enter(self.statement.context());
            batch::flush(&mut self.statement, table);
        }
    }

    /// Whether a table is open for this relation of the stream.
    pub fn has_open(&self, id: RelationId) -> bool {
        self.tables.contains_key(&id)
    }

    /// The table of a relation, opened if need be, and the statement that changes it.
    pub fn table(
        &mut self,
        id: RelationId,
        known: &Known,
    ) -> Result<(&mut Statement, &mut OpenTable), ApplyError> {
        let table = match self.tables.entry(id) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(free) => {
                // SAFETY: within the segment's transaction; `end` closes the table.
                let open = unsafe {
                    let opened = known.open(pg_sys::RowExclusiveLock as i32)?;
                    self.statement.open(opened)
                };
                free.insert(open)
            }
        };
        Ok((&mut self.statement, table))
    }

    /// Fires what waits for the end of the statement and closes everything. No row waits to be inserted.
    pub fn end(mut self) {
        // SAFETY: in the order in which the executor does it: triggers, indexes, slots, tables, memory.
        unsafe {
            let estate = self.statement.estate;
            self.statement.next_command();
            pg_sys::PopActiveSnapshot();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            (*estate).es_snapshot = pg_sys::GetActiveSnapshot();
            pg_sys::AfterTriggerEndQuery(estate);
            for scan in self.tables.values().filter_map(|table| table.scan) {
                pg_sys::index_endscan(scan.scan);
                pg_sys::index_close(scan.index, pg_sys::NoLock as i32);
            }
            pg_sys::ExecCloseResultRelations(estate);
            pg_sys::ExecResetTupleTable((*estate).es_tupleTable, false);
            for table in self.tables.values() {
                pg_sys::table_close(table.relation, pg_sys::NoLock as i32);
            }
            pg_sys::FreeExecutorState(estate);
            pg_sys::PopActiveSnapshot();
        }
    }
}

impl OpenTable {
    /// The scan of the plan's index, begun if need be; `None` when the plan has no index.
    ///
    /// # Safety
    /// Within the segment to which the table belongs.
    pub unsafe fn index_scan(
        &mut self,
        estate: *mut pg_sys::EState,
    ) -> Option<(IndexScan, &[usize])> {
        let Search::Index {
            index,
            attributes,
            keys,
        } = &self.plan.search
        else {
            return None;
        };
        if self.scan.is_none() {
            // SAFETY: the index belongs to the open and locked table; memory is the segment's.
            unsafe {
                let previous = pg_sys::MemoryContextSwitchTo((*estate).es_query_cxt);
                let open = pg_sys::index_open(*index, pg_sys::RowExclusiveLock as i32);
                let count = keys.len() as i32;
                let scan = pg_sys::index_beginscan(self.relation, open, self.dirty, count, 0);
                let size = keys.len() * size_of::<pg_sys::ScanKeyData>();
                let entries = pg_sys::palloc0(size).cast::<pg_sys::ScanKeyData>();
                for (place, key) in keys.iter().enumerate() {
                    pg_sys::ScanKeyInit(
                        entries.add(place),
                        place as i16 + 1,
                        pg_sys::BTEqualStrategyNumber as u16,
                        key.procedure,
                        pg_sys::Datum::null(),
                    );
                    (*entries.add(place)).sk_collation = key.collation;
                }
                pg_sys::MemoryContextSwitchTo(previous);
                self.scan = Some(IndexScan {
                    index: open,
                    scan,
                    keys: entries,
                });
            }
        }
        self.scan.map(|scan| (scan, attributes.as_slice()))
    }
}

/// # Safety
/// `relation` is an open table.
unsafe fn range_entry(relation: pg_sys::Relation) -> *mut pg_sys::RangeTblEntry {
    // SAFETY: fresh memory; as the caller promises.
    unsafe {
        let range = allocated::<pg_sys::RangeTblEntry>();
        (*range).type_ = pg_sys::NodeTag::T_RangeTblEntry;
        (*range).rtekind = pg_sys::RTEKind::RTE_RELATION;
        (*range).relid = (*relation).rd_id;
        (*range).relkind = (*(*relation).rd_rel).relkind;
        (*range).rellockmode = pg_sys::RowExclusiveLock as i32;
        range
    }
}

/// The columns of a table with so many, as a set of the executor's.
///
/// # Safety
/// Allocates in the current memory context.
unsafe fn every_column(natts: usize) -> *mut pg_sys::Bitmapset {
    (1..=natts as i32).fold(std::ptr::null_mut(), |set, number| {
        // SAFETY: null or made here.
        unsafe { pg_sys::bms_add_member(set, number - pg_sys::FirstLowInvalidHeapAttributeNumber) }
    })
}

/// # Safety
/// `T` is a plain C struct for which zeroes are valid.
unsafe fn allocated<T>() -> *mut T {
    // SAFETY: fresh zeroed memory of the right size.
    unsafe { pg_sys::palloc0(size_of::<T>()).cast() }
}
