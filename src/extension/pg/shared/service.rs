//! The stretches of time in which this node serves.

use super::super::outcome;
use std::sync::atomic::{AtomicU64, Ordering};

/// A new stretch begins when the node comes online in a generation, when it serves again, and when a lease that had lapsed is renewed. Written by the
/// arbiter's tokio thread, each time *before* the first statement can find that the node serves.
#[repr(C)]
pub struct Service {
    /// Number of the stretch; 0 before the first.
    stretch: AtomicU64,
    /// The last stretch that began with a return: the node had been excluded.
    returned: AtomicU64,
    /// Full xid from which on transactions have begun after the stretch did. It is raised before the stretch's number, so a reader finds its own or a later one's.
    first_xid: AtomicU64,
}

impl Service {
    /// A stretch begins; `returned` says that the node has recovered.
    pub fn begin(&self, returned: bool) {
        let number = self.stretch() + 1;
        if returned {
            self.returned.store(number, Ordering::Release);
        }
        self.first_xid
            .store(outcome::next_xid_unlocked(), Ordering::Release);
        self.stretch.store(number, Ordering::Release);
    }

    /// Number of the present stretch, or of the last one.
    pub fn stretch(&self) -> u64 {
        self.stretch.load(Ordering::Acquire)
    }

    /// Whether the node was excluded and has come back after a stretch.
    pub fn returned_since(&self, stretch: u64) -> bool {
        self.returned.load(Ordering::Acquire) > stretch
    }

    /// Every transaction that ended here before the stretch began has a lower xid.
    pub fn first_xid(&self) -> u64 {
        self.first_xid.load(Ordering::Acquire)
    }
}
