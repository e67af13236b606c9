//! Two ways out of the arbiter and the workers for views: a board for one question at a time, and logs of the last things that happened.

use super::process::{self, Wait};
use super::shared::{self, ProcCell, shared};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest answer, bytes; a longer one is cut by whoever answers.
pub const ANSWER_BYTES: usize = 256 * 1024;
/// How long a view waits for its turn and for the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Entries remembered.
const ENTRIES: usize = 256;
/// Longest encoded entry, bytes; longer ones are not remembered.
const ENTRY_BYTES: usize = 1024;

/// A place for one answer of the tokio thread. The asker owns it from `claim` to `release`.
#[repr(C)]
pub struct Board {
    asker: ProcCell,
    taken: AtomicU32,
    /// Number of the question being answered; the answer carries it.
    question: AtomicU64,
    answered: AtomicU64,
    length: AtomicU32,
    bytes: UnsafeCell<[u8; ANSWER_BYTES]>,
}

// SAFETY: the bytes are written by the tokio thread between question and answer, read by the asker after the answer.
unsafe impl Sync for Board {}

impl Board {
    /// Asks with `submit(number)` and waits for the answer; none when the arbiter does not answer in time.
    pub fn ask<T: DeserializeOwned>(&self, submit: impl FnOnce(u64)) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        while self
            .taken
            .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            if Instant::now() >= deadline {
                return None;
            }
            process::pause_ms(1);
        }
        let number = self.question.fetch_add(1, Ordering::AcqRel) + 1;
        self.asker.set_self();
        submit(number);
        while self.answered.load(Ordering::Acquire) != number && Instant::now() < deadline {
            process::wait_latch(Duration::from_millis(50), Wait::Work);
        }
        let answer = (self.answered.load(Ordering::Acquire) == number).then(|| {
            let length = self.length.load(Ordering::Relaxed) as usize;
            // SAFETY: see the Sync implementation.
            let bytes = unsafe { &(&*self.bytes.get())[..length.min(ANSWER_BYTES)] };
            bincode::serde::decode_from_slice(bytes, bincode::config::standard())
                .ok()
                .map(|(answer, _)| answer)
        });
        self.asker.clear();
        self.taken.store(0, Ordering::Release);
        answer.flatten()
    }

    /// Answers question `number`, unless its asker has given up. Tokio thread only.
    pub fn answer(&self, number: u64, answer: &impl Serialize) {
        if self.question.load(Ordering::Acquire) != number
            || self.taken.load(Ordering::Acquire) == 0
        {
            return;
        }
        // SAFETY: see the Sync implementation.
        let bytes = unsafe { &mut *self.bytes.get() };
        let length = bincode::serde::encode_into_slice(answer, bytes, bincode::config::standard())
            .unwrap_or(0);
        self.length.store(length as u32, Ordering::Relaxed);
        self.answered.store(number, Ordering::Release);
        self.asker.wake();
    }
}

/// The last things of one kind that happened, oldest overwritten first.
#[repr(C)]
pub struct RecentLog {
    next: AtomicU64,
    entries: [RecentEntry; ENTRIES],
}

#[repr(C)]
struct RecentEntry {
    /// Odd while it is being written.
    version: AtomicU64,
    length: AtomicU32,
    bytes: UnsafeCell<[u8; ENTRY_BYTES]>,
}

// SAFETY: a reader drops what changed its version while it was read; the bytes are plain data.
unsafe impl Sync for RecentEntry {}

impl RecentLog {
    /// Remembers something. A second writer of the same entry, 256 entries later in the same microsecond, drops its own.
    pub fn add(&self, what: &impl Serialize) {
        let Ok(encoded) = bincode::serde::encode_to_vec(what, bincode::config::standard()) else {
            return;
        };
        if encoded.len() > ENTRY_BYTES {
            return;
        }
        let entry = &self.entries[self.next.fetch_add(1, Ordering::AcqRel) as usize % ENTRIES];
        let version = entry.version.load(Ordering::Acquire);
        if version % 2 == 1
            || entry
                .version
                .compare_exchange(version, version + 1, Ordering::AcqRel, Ordering::Acquire)
                .is_err()
        {
            return;
        }
        // SAFETY: the odd version keeps other writers away.
        unsafe { (&mut *entry.bytes.get())[..encoded.len()].copy_from_slice(&encoded) };
        entry.length.store(encoded.len() as u32, Ordering::Relaxed);
        entry.version.store(version + 2, Ordering::Release);
    }

    /// What is remembered, oldest first.
    pub fn all<T: DeserializeOwned>(&self) -> Vec<T> {
        let next = self.next.load(Ordering::Acquire) as usize;
        (0..ENTRIES)
            .filter_map(|step| self.entries[(next + step) % ENTRIES].read())
            .collect()
    }
}

impl RecentEntry {
    fn read<T: DeserializeOwned>(&self) -> Option<T> {
        let version = self.version.load(Ordering::Acquire);
        let length = self.length.load(Ordering::Relaxed) as usize;
        if version == 0 || version % 2 == 1 || length > ENTRY_BYTES {
            return None;
        }
        // SAFETY: a copy of plain bytes; it is used only if nobody wrote meanwhile.
        let copy = unsafe { (&*self.bytes.get())[..length].to_vec() };
        std::sync::atomic::fence(Ordering::Acquire);
        if self.version.load(Ordering::Relaxed) != version {
            return None;
        }
        bincode::serde::decode_from_slice(&copy, bincode::config::standard())
            .ok()
            .map(|(value, _)| value)
    }
}

/// Asks the arbiter of this server.
pub fn ask_arbiter<T: DeserializeOwned>(submit: impl FnOnce(u64)) -> Option<T> {
    shared::exists()
        .then(|| shared().board.ask(submit))
        .flatten()
}
