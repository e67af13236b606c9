//! The prepare barrier: nobody is in the middle of a PREPARE while the set of members changes.
//!
//! A PREPARE that was begun under one generation must not reach WAL behind the mark of the next (PROTOCOL.md 6.6): whoever recovers from this node relies
//! on finding everything older before it. So every process says that it prepares, looks at the generation, and goes on; the arbiter closes the
//! barrier, waits until nobody prepares, changes the generation, and opens it again.
//!
//! The word is in the process's own slot: a process that dies in between is cleaned up after, by its abort or by the server's restart. An arbiter
//! that dies while the barrier is closed closes it again when it comes back, for the same generation, and opens it then.
//!
//! An open barrier does not yet mean that this node is online: its own transactions are prepared only in the generation that [`enter`] tells, while
//! those of others are held or refused by what `Shared::admit` says.

use super::process::{self, Wait};
use super::shared::{self, shared};
use protocol::GenerationNum;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often a process looks whether the barrier is open again.
const LOOK_AROUND: Duration = Duration::from_millis(2);

/// Enters, waiting while the barrier is closed; returns the generation in which this node prepares its own transactions, 0 while it is online in none. It
/// stays until [`leave`]. Raises nothing.
pub fn enter() -> GenerationNum {
    let slot = shared::my_backend();
    loop {
        // Both in this order: the arbiter closes first and looks then.
        slot.preparing.store(true, Ordering::SeqCst);
        // Nobody opens it while there is no arbiter, and until there is one again nothing is prepared: `opened` was taken back when it was closed.
        if !shared().barrier_closed.load(Ordering::SeqCst) || !shared().arbiter.is_set() {
            return GenerationNum(shared().opened.load(Ordering::SeqCst));
        }
        leave();
        process::wait_latch(LOOK_AROUND, Wait::Work);
    }
}

/// Leaves, also when it was not entered.
pub fn leave() {
    shared::my_backend()
        .preparing
        .store(false, Ordering::SeqCst);
    if shared().barrier_closed.load(Ordering::SeqCst) {
        shared().wake_arbiter_thread();
    }
}

/// Keeps everybody out from now on. Tokio thread only, as the next three.
pub fn close() {
    shared().opened.store(0, Ordering::SeqCst);
    shared().barrier_closed.store(true, Ordering::SeqCst);
}

/// Whether nobody is in the middle of a PREPARE.
pub fn is_empty() -> bool {
    shared::backends()
        .iter()
        .all(|slot| !slot.preparing.load(Ordering::SeqCst))
}

/// Lets processes in again. Own transactions are still refused.
pub fn open() {
    shared().barrier_closed.store(false, Ordering::SeqCst);
}

/// This node is online in the generation.
pub fn admit_own(num: GenerationNum) {
    shared().opened.store(num.0, Ordering::SeqCst);
}
