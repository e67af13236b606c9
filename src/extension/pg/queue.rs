//! Bounded queues and byte rings in shared memory, without locks.
//!
//! The arbiter's tokio thread may take no lock of PostgreSQL, so everything it shares with other processes goes through these. A process
//! that dies by a signal in the middle of an operation makes the postmaster re-create the whole segment, so no half-done
//! operation is ever seen.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[repr(C, align(64))]
struct Padded(AtomicU64);

#[repr(C)]
struct Cell<const BYTES: usize> {
    sequence: AtomicU64,
    length: AtomicU32,
    data: UnsafeCell<[u8; BYTES]>,
}

/// A bounded queue of byte records for many producers and many consumers (Vyukov's bounded MPMC queue).
#[repr(C)]
pub struct Queue<const BYTES: usize, const CAPACITY: usize> {
    head: Padded,
    tail: Padded,
    cells: [Cell<BYTES>; CAPACITY],
}

// SAFETY: a cell's data is touched only by the one party that claimed it by moving head or tail, and handed on with release/acquire on
// its sequence number.
unsafe impl<const BYTES: usize, const CAPACITY: usize> Sync for Queue<BYTES, CAPACITY> {}

impl<const BYTES: usize, const CAPACITY: usize> Queue<BYTES, CAPACITY> {
    /// Makes zeroed memory an empty queue. Called once, before any other process sees it.
    pub fn init(&self) {
        for (index, cell) in self.cells.iter().enumerate() {
            cell.sequence.store(index as u64, Ordering::Relaxed);
        }
    }

    /// Appends a record; false when the queue is full.
    ///
    /// # Panics
    /// When the record is longer than `BYTES`: only our own encoder can cause it.
    pub fn push(&self, record: &[u8]) -> bool {
        assert!(
            record.len() <= BYTES,
            "record of {} bytes in a queue of {BYTES}",
            record.len()
        );
        let mut position = self.tail.0.load(Ordering::Relaxed);
        loop {
            let cell = &self.cells[position as usize % CAPACITY];
            let lag = cell.sequence.load(Ordering::Acquire).wrapping_sub(position) as i64;
            if lag < 0 {
                return false;
            }
            if lag > 0 {
                position = self.tail.0.load(Ordering::Relaxed);
                continue;
            }
            match self.tail.0.compare_exchange_weak(
                position,
                position + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    // SAFETY: moving the tail made this cell ours until the sequence is published.
                    unsafe { (&mut *cell.data.get())[..record.len()].copy_from_slice(record) };
                    cell.length.store(record.len() as u32, Ordering::Relaxed);
                    cell.sequence.store(position + 1, Ordering::Release);
                    return true;
                }
                Err(seen) => position = seen,
            }
        }
    }

    /// Takes the oldest record into `buffer`.
    pub fn pop<'a>(&self, buffer: &'a mut [u8; BYTES]) -> Option<&'a [u8]> {
        let mut position = self.head.0.load(Ordering::Relaxed);
        loop {
            let cell = &self.cells[position as usize % CAPACITY];
            let lag = cell
                .sequence
                .load(Ordering::Acquire)
                .wrapping_sub(position + 1) as i64;
            if lag < 0 {
                return None;
            }
            if lag > 0 {
                position = self.head.0.load(Ordering::Relaxed);
                continue;
            }
            match self.head.0.compare_exchange_weak(
                position,
                position + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    let length = cell.length.load(Ordering::Relaxed) as usize;
                    // SAFETY: moving the head made this cell ours until the sequence is published.
                    buffer[..length].copy_from_slice(unsafe { &(&*cell.data.get())[..length] });
                    cell.sequence
                        .store(position + CAPACITY as u64, Ordering::Release);
                    return Some(&buffer[..length]);
                }
                Err(seen) => position = seen,
            }
        }
    }

    /// True when nothing can be taken at this moment.
    pub fn is_empty(&self) -> bool {
        let position = self.head.0.load(Ordering::Relaxed);
        self.cells[position as usize % CAPACITY]
            .sequence
            .load(Ordering::Acquire)
            != position + 1
    }
}

/// A stream of bytes from one process to one other.
#[repr(C)]
pub struct Ring<const BYTES: usize> {
    read: Padded,
    written: Padded,
    data: UnsafeCell<[u8; BYTES]>,
}

// SAFETY: the single writer touches only bytes between `written` and `read + BYTES`, the single reader only those between `read` and `written`.
unsafe impl<const BYTES: usize> Sync for Ring<BYTES> {}

impl<const BYTES: usize> Ring<BYTES> {
    /// Drops what is in the ring. Only while neither side uses it.
    pub fn reset(&self) {
        self.read.0.store(0, Ordering::Relaxed);
        self.written.0.store(0, Ordering::Release);
    }

    /// Writes as many bytes as fit; returns their number. Writer only.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let written = self.written.0.load(Ordering::Relaxed);
        let free = BYTES - (written - self.read.0.load(Ordering::Acquire)) as usize;
        let count = bytes.len().min(free);
        let start = written as usize % BYTES;
        let first = count.min(BYTES - start);
        let base = self.data.get().cast::<u8>();
        // SAFETY: both ranges are free by the computation above and inside `data`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(start), first);
            std::ptr::copy_nonoverlapping(bytes.as_ptr().add(first), base, count - first);
        }
        self.written
            .0
            .store(written + count as u64, Ordering::Release);
        count
    }

    /// Appends all bytes there are to `out`; returns their number. Reader only.
    pub fn read(&self, out: &mut Vec<u8>) -> usize {
        let read = self.read.0.load(Ordering::Relaxed);
        let count = (self.written.0.load(Ordering::Acquire) - read) as usize;
        let start = read as usize % BYTES;
        let first = count.min(BYTES - start);
        let base = self.data.get().cast::<u8>();
        // SAFETY: these bytes were published by the writer and stay until `read` moves.
        unsafe {
            out.extend_from_slice(std::slice::from_raw_parts(base.add(start), first));
            out.extend_from_slice(std::slice::from_raw_parts(base, count - first));
        }
        self.read.0.store(read + count as u64, Ordering::Release);
        count
    }

    /// True when the reader has taken everything.
    pub fn is_empty(&self) -> bool {
        self.read.0.load(Ordering::Acquire) == self.written.0.load(Ordering::Acquire)
    }
}
