//! Durable protocol state: fixed tuples of ordinary tables, overwritten in place.
//!
//! The tables `mtm.records` and `mtm.marks` have rows of an id and 64 bytes. A row is inserted once and never updated through SQL; its 64 bytes are
//! overwritten in the buffer under GenericXLog, as core's `heap_inplace_update` does for its own catalogs. So there is no bloat, no xid and one
//! WAL record for many rows of a page, and crash recovery, base backups, standbys and promotion come for free. The tables are
//! read through the buffers, never by a snapshot.

use super::{process, senders};
use pgrx::{Spi, pg_sys};
use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Payload of a row, bytes.
pub const BODY_BYTES: usize = 64;
/// id and pad before the payload.
const BODY_OFFSET: usize = 8;

/// One row's payload.
pub type Body = [u8; BODY_BYTES];

#[derive(Clone, Copy, Debug)]
struct Position {
    block: u32,
    offset: u16,
}

/// Where a row lies, for a process that has not opened its table.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Place {
    relation: u32,
    id: u32,
    position: Position,
}

/// Where all rows of a table lie.
pub struct Places {
    relation: u32,
    positions: Vec<Position>,
}

impl Places {
    /// The row's place.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn of(&self, id: u32) -> Place {
        Place {
            relation: self.relation,
            id,
            position: self.positions[id as usize],
        }
    }
}

/// An open table of fixed rows.
pub struct DurableTable {
    relation: pg_sys::Oid,
    positions: Vec<Position>,
}

impl DurableTable {
    /// Opens `mtm.<name>`, filling it with rows `0..rows` where they are missing. Runs in a transaction of the caller; raises (unwinding) on
    /// errors of the catalog.
    pub fn open(name: &CStr, rows: u32) -> DurableTable {
        let relation = find_relation(name);
        let mut table = DurableTable {
            relation,
            positions: Vec::new(),
        };
        table.load();
        if (table.positions.len() as u32) < rows {
            fill(name, table.positions.len() as u32, rows);
            table.load();
        }
        table
    }

    /// Keeps VACUUM FULL and CLUSTER, which would move the rows, away for the life of this process. Once in a process.
    pub fn pin(&self) {
        let mut id = pg_sys::LockRelId {
            relId: self.relation,
            dbId: my_database(),
        };
        // SAFETY: a session-level lock on a relation that exists.
        unsafe { pg_sys::LockRelationIdForSession(&mut id, pg_sys::RowExclusiveLock as i32) };
        PINNED.store(self.relation.to_u32(), Ordering::Relaxed);
        process::at_exit(unpin);
    }

    fn load(&mut self) {
        let mut found: Vec<(u32, Position)> = Vec::new();
        self.each_tuple(|position, data| {
            let id = u32::from_ne_bytes([data[0], data[1], data[2], data[3]]);
            found.push((id, position));
        });
        found.sort_by_key(|(id, _)| *id);
        assert!(
            found
                .iter()
                .enumerate()
                .all(|(index, (id, _))| index as u32 == *id),
            "rows of a table of durable records are numbered without gaps"
        );
        self.positions = found.into_iter().map(|(_, position)| position).collect();
    }

    /// The payloads of all rows, in order of their ids, as the buffers hold them.
    pub fn read_all(&self) -> Vec<Body> {
        let mut bodies = vec![[0; BODY_BYTES]; self.positions.len()];
        self.each_tuple(|_, data| {
            let id = u32::from_ne_bytes([data[0], data[1], data[2], data[3]]) as usize;
            if let Some(body) = bodies.get_mut(id) {
                body.copy_from_slice(&data[BODY_OFFSET..BODY_OFFSET + BODY_BYTES]);
            }
        });
        bodies
    }

    /// Where the rows lie, as long as this process lives and has them pinned.
    pub fn places(&self) -> Places {
        Places {
            relation: self.relation.to_u32(),
            positions: self.positions.clone(),
        }
    }

    /// Overwrites rows; returns the WAL position up to which WAL must be flushed for them to be durable. Runs in a transaction.
    pub fn write(&self, updates: &mut [(u32, Body)]) -> protocol::Lsn {
        updates.sort_by_key(|(id, _)| self.positions[*id as usize].block);
        let mut end = 0;
        // SAFETY: ordinary buffer access under the relation's lock; the rows' places were read from valid line pointers and rows never move
        // while `pin` holds off VACUUM FULL.
        unsafe {
            let relation = pg_sys::table_open(self.relation, pg_sys::RowExclusiveLock as i32);
            for group in updates.chunk_by(|left, right| {
                self.positions[left.0 as usize].block == self.positions[right.0 as usize].block
            }) {
                let rows = group
                    .iter()
                    .map(|(id, body)| (self.positions[*id as usize].offset, body));
                let block = self.positions[group[0].0 as usize].block;
                end = write_page(relation, block, rows, |_| false)
                    .map_or(end, |written| end.max(written));
            }
            pg_sys::table_close(relation, pg_sys::NoLock as i32);
        }
        protocol::Lsn(end)
    }

    fn each_tuple(&self, mut visit: impl FnMut(Position, &[u8])) {
        // SAFETY: as write(); shared buffer locks, every line pointer is checked before use.
        unsafe {
            let relation = pg_sys::table_open(self.relation, pg_sys::AccessShareLock as i32);
            let blocks =
                pg_sys::RelationGetNumberOfBlocksInFork(relation, pg_sys::ForkNumber::MAIN_FORKNUM);
            for block in 0..blocks {
                let buffer = pg_sys::ReadBuffer(relation, block);
                pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
                let page = pg_sys::BufferGetPage(buffer).cast::<u8>();
                for offset in 1..=line_pointers(page) {
                    if line_pointer(page, offset).lp_flags() == pg_sys::LP_NORMAL
                        && is_inserted(page, offset)
                    {
                        let data = tuple_data(page, offset);
                        let bytes = std::slice::from_raw_parts(data, BODY_OFFSET + BODY_BYTES);
                        visit(Position { block, offset }, bytes);
                    }
                }
                pg_sys::UnlockReleaseBuffer(buffer);
            }
            pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        }
    }
}

/// Overwrites rows of one page, by their line pointers; returns the end of the WAL record, or none when the page `is_wrong`: then nothing is written.
///
/// # Safety
/// The relation is open and locked, and the line pointers are those of fixed rows unless the page is wrong.
unsafe fn write_page<'b>(
    relation: pg_sys::Relation,
    block: u32,
    rows: impl Iterator<Item = (u16, &'b Body)>,
    is_wrong: impl FnOnce(*mut u8) -> bool,
) -> Option<u64> {
    // SAFETY: as the caller promises. Nothing between start and finish of the generic record raises except for lack of memory.
    unsafe {
        let buffer = pg_sys::ReadBuffer(relation, block);
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_EXCLUSIVE as i32);
        if is_wrong(pg_sys::BufferGetPage(buffer).cast::<u8>()) {
            pg_sys::UnlockReleaseBuffer(buffer);
            return None;
        }
        let state = pg_sys::GenericXLogStart(relation);
        let page = pg_sys::GenericXLogRegisterBuffer(state, buffer, 0).cast::<u8>();
        for (offset, body) in rows {
            let data = tuple_data(page, offset);
            std::ptr::copy_nonoverlapping(body.as_ptr(), data.add(BODY_OFFSET), BODY_BYTES);
        }
        let end = pg_sys::GenericXLogFinish(state);
        pg_sys::UnlockReleaseBuffer(buffer);
        Some(end)
    }
}

/// Overwrites one row of a table that another process has pinned. Runs in a transaction; raises (unwinding) when another row lies there: the pin was lost for
/// a moment and the table was rewritten.
pub fn write_at(place: Place, body: &Body) {
    let Position { block, offset } = place.position;
    // SAFETY: buffer access under the relation's lock. The row's number is compared before anything is written.
    let written = unsafe {
        let relation = pg_sys::table_open(
            pg_sys::Oid::from(place.relation),
            pg_sys::RowExclusiveLock as i32,
        );
        let row = std::iter::once((offset, body));
        let is_another = |page| id_at(page, offset) != Some(place.id);
        let written = write_page(relation, block, row, is_another);
        pg_sys::table_close(relation, pg_sys::NoLock as i32);
        written
    };
    if written.is_none() {
        pgrx::error!("multimaster's table of durable records was rewritten");
    }
}

/// The number of the row at a line pointer, if there is a row.
///
/// # Safety
/// A page of a table of fixed rows, under a buffer lock.
unsafe fn id_at(page: *mut u8, offset: u16) -> Option<u32> {
    // SAFETY: as the caller promises; the line pointer is checked before use.
    unsafe {
        let is_row = offset <= line_pointers(page)
            && line_pointer(page, offset).lp_flags() == pg_sys::LP_NORMAL;
        is_row.then(|| tuple_data(page, offset).cast::<u32>().read_unaligned())
    }
}

/// The relation that `pin` has locked.
static PINNED: AtomicU32 = AtomicU32::new(0);

/// Core gives back session-level locks on relations only when a transaction is rolled back; a process that ends outside of one leaves
/// them to whoever gets its place in the array of processes.
fn unpin() {
    let mut id = pg_sys::LockRelId {
        relId: pg_sys::Oid::from(PINNED.load(Ordering::Relaxed)),
        dbId: my_database(),
    };
    // SAFETY: taken by pin(). This runs before core's own exit callback, which could give it back.
    unsafe { pg_sys::UnlockRelationIdForSession(&mut id, pg_sys::RowExclusiveLock as i32) };
}

/// Makes everything up to the position durable. One flush serves all callers that wait for the same WAL.
///
/// Where the server has synchronous standbys they have it too, as they have PREPARE and COMMIT PREPARED: one of them may take this node's place.
pub fn flush(lsn: protocol::Lsn) {
    // SAFETY: the first raises only PANIC on I/O failure; the second waits outside of any critical section, returns at once without
    // synchronous standbys, and wants interrupts held: one that it served would leave this process in its queue.
    unsafe {
        senders::flushing_quietly(|| pg_sys::XLogFlush(lsn.0));
        pg_sys::InterruptHoldoffCount += 1;
        pg_sys::SyncRepWaitForLSN(lsn.0, false);
        pg_sys::InterruptHoldoffCount -= 1;
    }
}

/// Makes everything durable that this server has written so far.
pub fn flush_all() {
    // SAFETY: reads shared memory.
    flush(protocol::Lsn(unsafe { pg_sys::GetXLogInsertRecPtr() }));
}

/// Up to where this server's WAL is durable.
pub fn flushed() -> protocol::Lsn {
    // SAFETY: reads shared memory; the timeline is not asked for.
    protocol::Lsn(unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) })
}

fn my_database() -> pg_sys::Oid {
    // SAFETY: set when the process connected.
    unsafe { pg_sys::MyDatabaseId }
}

fn find_relation(name: &CStr) -> pg_sys::Oid {
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        let namespace = pg_sys::get_namespace_oid(c"mtm".as_ptr(), false);
        let relation = pg_sys::get_relname_relid(name.as_ptr(), namespace);
        assert!(
            relation != pg_sys::Oid::INVALID,
            "table mtm.{name:?} belongs to the extension"
        );
        relation
    }
}

fn fill(name: &CStr, first: u32, rows: u32) {
    let name = name.to_str().expect("names of our own tables are ASCII");
    Spi::run(&format!(
        "INSERT INTO mtm.{name} SELECT id, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM generate_series({first}, {}) AS id",
        rows - 1
    ))
    .expect("the extension's own table takes its rows");
}

/// Number of line pointers of a page.
unsafe fn line_pointers(page: *const u8) -> u16 {
    // SAFETY: a valid page header.
    let (lower, header) = unsafe {
        (
            (*page.cast::<pg_sys::PageHeaderData>()).pd_lower as usize,
            pg_sys::SizeOfPageHeaderData(),
        )
    };
    (lower.saturating_sub(header) / size_of::<pg_sys::ItemIdData>()) as u16
}

unsafe fn line_pointer(page: *const u8, offset: u16) -> pg_sys::ItemIdData {
    // SAFETY: 1 <= offset <= line_pointers(page).
    unsafe {
        let first = page
            .add(pg_sys::SizeOfPageHeaderData())
            .cast::<pg_sys::ItemIdData>();
        *first.add(offset as usize - 1)
    }
}

/// Whether the tuple at a line pointer is there for good, or was inserted by the running transaction. A server that went down while it filled the
/// table leaves tuples of a transaction that never committed; VACUUM will take them away.
unsafe fn is_inserted(page: *const u8, offset: u16) -> bool {
    // SAFETY: the line pointer is LP_NORMAL; pg_xact is asked only about transactions whose hint bits are not set yet.
    unsafe {
        let start = line_pointer(page, offset).lp_off() as usize;
        let header = page.add(start).cast::<pg_sys::HeapTupleHeaderData>();
        let hints = u32::from((*header).t_infomask);
        if hints & pg_sys::HEAP_XMIN_COMMITTED != 0 {
            return true;
        }
        let inserter = (*header).t_choice.t_heap.t_xmin;
        hints & pg_sys::HEAP_XMIN_INVALID == 0
            && (pg_sys::TransactionIdIsCurrentTransactionId(inserter)
                || pg_sys::TransactionIdDidCommit(inserter))
    }
}

/// The user data of the tuple at a line pointer.
unsafe fn tuple_data(page: *mut u8, offset: u16) -> *mut u8 {
    // SAFETY: the line pointer is LP_NORMAL and the table's columns are all NOT NULL and fixed, so that the data start at t_hoff.
    unsafe {
        let base = page.cast_const();
        let start = line_pointer(base, offset).lp_off() as usize;
        let header = base.add(start).cast::<pg_sys::HeapTupleHeaderData>();
        page.add(start + (*header).t_hoff as usize)
    }
}
