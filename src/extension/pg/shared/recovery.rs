//! How far a recovery is, for who watches it.

use super::TextCell;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

/// Written by the recovery process, read by views. What it leaves behind stays: a node that has failed shows it.
#[repr(C)]
pub struct RecoveryProgress {
    /// Node that is recovered from; 0 while none is.
    pub donor: AtomicU32,
    /// Microseconds since 2000-01-01.
    pub began_us: AtomicI64,
    /// Position in the donor's WAL from which it was read, and up to which it is applied here.
    pub from: AtomicU64,
    pub applied: AtomicU64,
    /// End of the donor's WAL, as it last said.
    pub end: AtomicU64,
    /// Transactions applied since then.
    pub transactions: AtomicU64,
    /// Bytes of the donor's WAL in a second, of late.
    pub rate: AtomicU64,
    /// How often a transaction could not be applied.
    pub retries: AtomicU64,
    /// What could not be applied, and is tried again or has made the node fail; events of later days must not push it out.
    pub error: TextCell,
}

impl RecoveryProgress {
    /// A recovery from the node begins at a position of its WAL.
    pub fn begin(&self, donor: u32, now_us: i64, from: u64) {
        for cell in [&self.transactions, &self.rate, &self.retries] {
            cell.store(0, Ordering::Relaxed);
        }
        self.error.set("");
        self.from.store(from, Ordering::Relaxed);
        self.applied.store(from, Ordering::Relaxed);
        self.end.store(from, Ordering::Relaxed);
        self.began_us.store(now_us, Ordering::Relaxed);
        self.donor.store(donor, Ordering::Release);
    }

    /// Bytes of the donor's WAL that are not applied yet.
    pub fn left(&self) -> u64 {
        let end = self.end.load(Ordering::Relaxed);
        end.saturating_sub(self.applied.load(Ordering::Relaxed))
    }
}
