//! The durable record of a commit, on its way from the arbiter's network thread to the backend that commits.
//!
//! The record has to precede the COMMIT PREPARED in WAL, and nobody waits for it alone. So the backend writes it itself, in the transaction that
//! finishes, and one flush takes both along; the arbiter's main thread is not asked.

use super::records::{Body, Place};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};

/// A record and where it goes; empty in zeroed memory.
#[repr(C)]
pub struct HandedRecord {
    full: AtomicBool,
    content: UnsafeCell<(Place, Body)>,
}

// SAFETY: written by the network thread while the slot's outcome says that the backend waits, and read by the backend after it has read its outcome there,
// which the thread stores after this with release.
unsafe impl Sync for HandedRecord {}

impl HandedRecord {
    /// Hands over a record, or says that there is none. Network thread only, before it tells the outcome.
    pub fn set(&self, record: Option<(Place, Body)>) {
        self.full.store(record.is_some(), Ordering::Relaxed);
        if let Some(record) = record {
            // SAFETY: see the Sync implementation.
            unsafe { *self.content.get() = record };
        }
    }

    /// The record that belongs to the outcome. Its backend only, after it has heard.
    pub fn get(&self) -> Option<(Place, Body)> {
        // SAFETY: see the Sync implementation.
        self.full
            .load(Ordering::Relaxed)
            .then(|| unsafe { *self.content.get() })
    }
}
