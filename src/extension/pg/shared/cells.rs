//! Values of several words that one party writes and others read.

use super::EVENT_BYTES;
use protocol::membership::{Phase, Standing};
use protocol::{Generation, GenerationNum, Gid, NodeId, NodeSet, Refusal};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// A gid that one process writes and others read.
#[repr(C)]
#[derive(Default)]
pub struct GidCell {
    version: AtomicU32,
    coordinator: AtomicU32,
    generation: AtomicU32,
    members: AtomicU32,
    xid: AtomicU64,
    started_at: AtomicI64,
}

impl GidCell {
    pub fn set(&self, gid: Option<Gid>) {
        self.version.fetch_add(1, Ordering::AcqRel);
        let (node, generation, members, xid, started_at) = match gid {
            Some(gid) => (
                u32::from(gid.coordinator.get()),
                gid.generation.0,
                u32::from(gid.members.bits()),
                gid.xid,
                gid.started_at,
            ),
            None => (0, 0, 0, 0, 0),
        };
        self.coordinator.store(node, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        self.members.store(members, Ordering::Relaxed);
        self.xid.store(xid, Ordering::Relaxed);
        self.started_at.store(started_at, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The gid, or nothing when there is none or it is being changed at this moment.
    pub fn get(&self) -> Option<Gid> {
        let before = self.version.load(Ordering::Acquire);
        let gid = Gid {
            coordinator: NodeId::new(self.coordinator.load(Ordering::Relaxed) as u8)?,
            generation: GenerationNum(self.generation.load(Ordering::Relaxed)),
            members: NodeSet::from_bits(self.members.load(Ordering::Relaxed) as u16),
            xid: self.xid.load(Ordering::Relaxed),
            started_at: self.started_at.load(Ordering::Relaxed),
        };
        std::sync::atomic::fence(Ordering::Acquire);
        (before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed)).then_some(gid)
    }
}

/// Where the node stands: written by the tokio thread, read by all who apply.
#[repr(C)]
#[derive(Default)]
pub struct StandingCell {
    /// Odd while it is being written.
    version: AtomicU32,
    num: AtomicU32,
    members: AtomicU32,
    online_in: AtomicU32,
    recovered_to: AtomicU32,
    phase: AtomicU32,
}

/// In the order of their numbers in [`StandingCell`]; zeroed memory says `Waiting`.
const PHASES: [Phase; 4] = [
    Phase::Waiting,
    Phase::Online,
    Phase::Recovering,
    Phase::Outside,
];

impl StandingCell {
    /// Tokio thread only.
    pub fn set(&self, standing: &Standing) {
        let phase = PHASES.iter().position(|phase| *phase == standing.phase);
        self.version.fetch_add(1, Ordering::AcqRel);
        self.num.store(standing.current.num.0, Ordering::Relaxed);
        self.members.store(
            u32::from(standing.current.members.bits()),
            Ordering::Relaxed,
        );
        self.online_in
            .store(standing.online_in.0, Ordering::Relaxed);
        self.recovered_to
            .store(standing.recovered_to.0, Ordering::Relaxed);
        self.phase
            .store(phase.unwrap_or(0) as u32, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    pub fn get(&self) -> Standing {
        loop {
            let before = self.version.load(Ordering::Acquire);
            let phase = self.phase.load(Ordering::Relaxed) as usize;
            let standing = Standing {
                current: Generation {
                    num: GenerationNum(self.num.load(Ordering::Relaxed)),
                    members: NodeSet::from_bits(self.members.load(Ordering::Relaxed) as u16),
                },
                online_in: GenerationNum(self.online_in.load(Ordering::Relaxed)),
                recovered_to: GenerationNum(self.recovered_to.load(Ordering::Relaxed)),
                phase: PHASES.get(phase).copied().unwrap_or_default(),
            };
            std::sync::atomic::fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed) {
                return standing;
            }
            std::hint::spin_loop();
        }
    }
}

/// A refusal handed from one process to another; the state word beside it says whose it is.
#[repr(C)]
pub struct RefusalCell {
    length: AtomicU32,
    bytes: UnsafeCell<[u8; EVENT_BYTES]>,
}

// SAFETY: written by the one party that the owner's state word names, before it publishes that word with release.
unsafe impl Sync for RefusalCell {}

impl RefusalCell {
    /// Stores a refusal. The caller owns the cell by the protocol of the state word beside it.
    pub fn set(&self, refusal: &Refusal) {
        // SAFETY: see the Sync implementation.
        let bytes = unsafe { &mut *self.bytes.get() };
        let length = bincode::serde::encode_into_slice(refusal, bytes, bincode::config::standard())
            .unwrap_or(0);
        self.length.store(length as u32, Ordering::Release);
    }

    /// Stores that there is none.
    pub fn clear(&self) {
        self.length.store(0, Ordering::Release);
    }

    pub fn get(&self) -> Option<Refusal> {
        let length = self.length.load(Ordering::Acquire) as usize;
        // SAFETY: see the Sync implementation; the length was published after the bytes.
        let bytes = unsafe { &(&*self.bytes.get())[..length.min(EVENT_BYTES)] };
        let (refusal, _) =
            bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
        Some(refusal)
    }
}

/// Longest text of a [`TextCell`], bytes.
const TEXT_BYTES: usize = EVENT_BYTES;

/// A text that one party writes and others read; empty in zeroed memory.
#[repr(C)]
pub struct TextCell {
    /// Odd while it is being written.
    version: AtomicU32,
    length: AtomicU32,
    bytes: [AtomicU8; TEXT_BYTES],
}

impl TextCell {
    /// Stores a text; what is too long is cut at a character boundary. One thread only.
    pub fn set(&self, text: &str) {
        let length = text.floor_char_boundary(TEXT_BYTES);
        self.version.fetch_add(1, Ordering::AcqRel);
        for (cell, byte) in self.bytes.iter().zip(text[..length].bytes()) {
            cell.store(byte, Ordering::Relaxed);
        }
        self.length.store(length as u32, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The text, or nothing when there is none or it is being changed at this moment.
    pub fn get(&self) -> Option<String> {
        let before = self.version.load(Ordering::Acquire);
        let length = self.length.load(Ordering::Relaxed) as usize;
        let bytes = self.bytes.iter().take(length);
        let bytes = bytes.map(|cell| cell.load(Ordering::Relaxed)).collect();
        std::sync::atomic::fence(Ordering::Acquire);
        let whole = before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed);
        String::from_utf8(bytes)
            .ok()
            .filter(|text| whole && !text.is_empty())
    }
}
