//! Finding the row that a change means, and waiting for whoever has it in hand.

use super::super::memory;
use super::identity::{self, Search};
use super::segment::{OpenTable, Statement};
use super::target;
use super::values::RowArrays;
use pgrx::pg_sys;

/// So often a row is looked for before it is taken to be missing. While another transaction's new version of a row appears,
/// a scan of what is not committed yet can pass it by: it may have seen neither version.
const ATTEMPTS: usize = 3;

/// What came of looking for a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Yes,
    /// There was none.
    No,
    /// There was one, until a transaction that was waited for committed.
    Taken,
}

/// Looks for the row like `table.wanted` and leaves it in `table.found`; waits until no other transaction in progress has
/// written it.
///
/// # Safety
/// The table belongs to the statement, and `wanted` is filled in.
pub unsafe fn find(statement: &mut Statement, table: &mut OpenTable) -> Found {
    // SAFETY: as the caller promises.
    unsafe {
        let mut attempts = 0;
        let mut missing = Found::No;
        while attempts < ATTEMPTS {
            let found = match table.plan.search {
                Search::Index { .. } => by_index(statement, table),
                Search::Scan { .. } => by_scan(statement, table),
                Search::Impossible => return Found::No,
            };
            if !found {
                attempts += 1;
                continue;
            }
            let writer = if (*table.dirty).xmin != pg_sys::InvalidTransactionId {
                (*table.dirty).xmin
            } else {
                (*table.dirty).xmax
            };
            if writer == pg_sys::InvalidTransactionId {
                return Found::Yes;
            }
            wait_for(writer, table);
            missing = Found::Taken;
        }
        missing
    }
}

/// # Safety
/// `table.found` holds the row that the transaction has written.
unsafe fn wait_for(writer: pg_sys::TransactionId, table: &mut OpenTable) {
    target::begin_to_wait();
    // SAFETY: as the caller promises. The row's page is let go: one must not wait with it pinned.
    unsafe {
        let mut place = (*table.found).tts_tid;
        pg_sys::ExecClearTuple(table.found);
        let purpose = pg_sys::XLTW_Oper::XLTW_Update;
        crate::apply::worker::wait_for_row(writer.into_inner(), || {
            pg_sys::XactLockTableWait(writer, table.relation, &mut place, purpose);
        });
    }
}

/// # Safety
/// As [`find`].
unsafe fn by_index(statement: &Statement, table: &mut OpenTable) -> bool {
    let (wanted, slot) = (table.wanted, table.found);
    // SAFETY: as the caller promises; the keys point to values that live as long as the row is handled.
    unsafe {
        let Some((scan, attributes)) = table.index_scan(statement.estate) else {
            return false;
        };
        for (place, attribute) in attributes.iter().enumerate() {
            (*scan.keys.add(place)).sk_argument = *wanted.values.add(*attribute);
            if *wanted.nulls.add(*attribute) {
                // The columns are never null here.
                return false;
            }
        }
        // The index keeps what it allocates while it is read (killed items, say) for the life of the scan, which is longer than this row's.
        let row_context = pg_sys::MemoryContextSwitchTo((*statement.estate).es_query_cxt);
        pg_sys::index_rescan(
            scan.scan,
            scan.keys,
            attributes.len() as i32,
            std::ptr::null_mut(),
            0,
        );
        let found = pg_sys::index_getnext_slot(
            scan.scan,
            pg_sys::ScanDirection::ForwardScanDirection,
            slot,
        );
        pg_sys::MemoryContextSwitchTo(row_context);
        found
    }
}

/// # Safety
/// As [`find`].
unsafe fn by_scan(statement: &mut Statement, table: &OpenTable) -> bool {
    let Search::Scan { columns } = &table.plan.search else {
        return false;
    };
    let context = statement.comparison_context();
    // SAFETY: as the caller promises; the scan is ended on every way out but an error, after which the transaction ends it.
    unsafe {
        let scan = pg_sys::table_beginscan(table.relation, table.dirty, 0, std::ptr::null_mut());
        let mut found = false;
        while !found
            && pg_sys::table_scan_getnextslot(
                scan,
                pg_sys::ScanDirection::ForwardScanDirection,
                table.found,
            )
        {
            pgrx::check_for_interrupts!();
            pg_sys::slot_getallattrs(table.found);
            found = {
                let _entered = memory::enter(context);
                identity::agree(columns, RowArrays::of(table.found), table.wanted)
            };
            pg_sys::MemoryContextReset(context);
        }
        if found {
            // The slot points into the scan's memory, which goes now.
            pg_sys::ExecMaterializeSlot(table.found);
            pg_sys::slot_getallattrs(table.found);
        }
        pg_sys::table_endscan(scan);
        found
    }
}

/// Whether the row in `table.found` was written by this transaction under the current command id. Such a row cannot be
/// changed before the next command begins.
///
/// # Safety
/// `table.found` holds a row of the table.
pub unsafe fn is_of_this_command(table: &OpenTable) -> bool {
    // SAFETY: a slot of this kind holds a heap tuple with its header; all rows found by scans have one.
    unsafe {
        let slot = table.found;
        if (*slot).tts_ops != &raw const pg_sys::TTSOpsBufferHeapTuple {
            return true;
        }
        let tuple = (*slot.cast::<pg_sys::HeapTupleTableSlot>()).tuple;
        if tuple.is_null() {
            return true;
        }
        let heap = (*(*tuple).t_data).t_choice.t_heap;
        heap.t_xmin == pg_sys::GetCurrentTransactionIdIfAny()
            && heap.t_field3.t_cid >= pg_sys::GetCurrentCommandId(false)
    }
}
