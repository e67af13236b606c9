//! Many WAL records for each turn of core's walsender.
//!
//! Between any two records of WAL, core's walsender asks its socket for replies (a system call) and looks at the clock twice; that costs more than
//! decoding the record does. A load of a million rows is two million records, for each walsender of the node where it runs and for each of every node where it
//! is applied. While core reads WAL it asks the plugin one thing only: whether the origin of a row change is wanted. When much WAL lies ahead,
//! that question is answered by doing the work: the record in hand and those that follow are handed to core's own
//! decoder, as the walsender would do in its next turns, and then the answer is *not wanted*, since this record is done.
//!
//! Facts of PostgreSQL 15 to 18 that this relies on (`replication/logical/decode.c`, `replication/walsender.c`):
//!
//! - whoever asks about a row change (`DecodeInsert`, `DecodeUpdate`, `DecodeDelete`, `DecodeMultiInsert`) returns at once when it is not wanted, and so
//!   do all its callers up to the walsender, which then takes the position of the reader, wherever that is;
//! - what precedes the question (assigning subtransactions, taking the base snapshot) does nothing when it is done a second time.
//!
//! Replies wait for the end of the batch: less than a millisecond, unless a transaction is sent meanwhile, and sending looks after replies itself.

use pgrx::pg_sys;
use std::cell::Cell;

/// Records of one batch.
const RECORDS_MAX: u32 = 512;
/// So much flushed WAL has to lie ahead: reading a record must not wait for WAL, that is the walsender's business. Few records are longer.
const AHEAD_BYTES: u64 = 64 * 1024;

const HEAP_OPERATION: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;

thread_local! {
    /// A batch is under way; further questions are about its records.
    static READING: Cell<bool> = const { Cell::new(false) };
}

struct Reading;

impl Reading {
    /// None while a batch is under way.
    fn begin() -> Option<Reading> {
        (!READING.replace(true)).then(|| Reading)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        READING.set(false);
    }
}

mod unguarded {
    use super::pg_sys;

    unsafe extern "C-unwind" {
        pub fn LogicalDecodingProcessRecord(
            context: *mut pg_sys::LogicalDecodingContext,
            record: *mut pg_sys::XLogReaderState,
        );
    }
}

/// Decodes the record about which core has just asked and some that follow. True when that was done: the record must then be called unwanted.
///
/// # Safety
/// Within the callback that filters origins; nothing of the plugin's state is borrowed.
pub unsafe fn read_on(context: *mut pg_sys::LogicalDecodingContext) -> bool {
    // SAFETY: core's context with its reader, which holds the record that core is decoding.
    unsafe {
        let reader = (*context).reader;
        if !pg_sys::am_walsender || !is_row_change(reader) {
            return false;
        }
        let Some(_reading) = Reading::begin() else {
            return false;
        };
        let flushed = pg_sys::GetFlushRecPtr(std::ptr::null_mut());
        if !lies_ahead(reader, flushed) {
            return false;
        }
        decode(context);
        for _ in 1..RECORDS_MAX {
            if !lies_ahead(reader, flushed) || !next(reader) {
                break;
            }
            decode(context);
        }
        true
    }
}

/// # Safety
/// The reader of a walsender.
unsafe fn lies_ahead(reader: *mut pg_sys::XLogReaderState, flushed: pg_sys::XLogRecPtr) -> bool {
    // SAFETY: as the caller promises.
    unsafe { (*reader).EndRecPtr + AHEAD_BYTES <= flushed }
}

/// Whether the record in hand is one whose decoding ends with the answer.
///
/// # Safety
/// As [`lies_ahead`].
unsafe fn is_row_change(reader: *mut pg_sys::XLogReaderState) -> bool {
    // SAFETY: as the caller promises; null between records.
    unsafe {
        let Some(record) = (*reader).record.as_ref() else {
            return false;
        };
        let operation = record.header.xl_info & HEAP_OPERATION;
        match u32::from(record.header.xl_rmid) {
            pg_sys::RmgrIds::RM_HEAP_ID => matches!(
                operation,
                HEAP_INSERT | HEAP_DELETE | HEAP_UPDATE | HEAP_HOT_UPDATE
            ),
            pg_sys::RmgrIds::RM_HEAP2_ID => operation == HEAP2_MULTI_INSERT,
            _ => false,
        }
    }
}

/// Reads the next record; false when there is none.
///
/// # Safety
/// As [`lies_ahead`]. What was taken from the record before is gone.
unsafe fn next(reader: *mut pg_sys::XLogReaderState) -> bool {
    let mut error = std::ptr::null_mut();
    // SAFETY: as the caller promises; the error is null or a zero-terminated string of the reader's.
    unsafe {
        let record = pg_sys::XLogReadRecord(reader, &mut error);
        if !error.is_null() {
            let error = std::ffi::CStr::from_ptr(error).to_string_lossy();
            pgrx::error!("could not find record while sending logically-decoded data: {error}");
        }
        !record.is_null()
    }
}

/// Has core decode the record in hand.
///
/// # Safety
/// As [`read_on`].
unsafe fn decode(context: *mut pg_sys::LogicalDecodingContext) {
    // SAFETY: what the walsender does with each record; the guard turns an error into an unwind.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            unguarded::LogicalDecodingProcessRecord(context, (*context).reader)
        })
    }
}
