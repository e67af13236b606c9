//! Whom a flush of WAL wakes.
//!
//! Core wakes all walsenders at each flush. Our peers wait for one kind of WAL only: the PREPAREs of this node's own transactions. What is applied here
//! for others, what was decided (that travels by message) and our durable records would wake each walsender several times for each transaction of
//! the cluster, for nothing; on a busy machine that is an eighth of all work. So such flushes wake nobody; the walsenders take their WAL along with
//! the next PREPARE, or when a receiver looks around.
//!
//! Servers with synchronous standbys are left as they are: there a flush waits for a walsender.

use super::shared::shared;
use super::{raw, standby};
use pgrx::pg_sys;
use std::ffi::c_int;
use std::sync::atomic::Ordering;

/// Puts the number of walsenders back, also when an error unwinds.
struct Restore(c_int);

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: a plain variable of this process.
        unsafe { pg_sys::max_wal_senders = self.0 };
    }
}

/// Runs `work`; the walsenders are not woken by what it flushes. Errors must unwind through this, not jump over it.
pub fn flushing_quietly<T>(work: impl FnOnce() -> T) -> T {
    if standby::has_synchronous() {
        return work();
    }
    // SAFETY: a plain variable of this process. Between here and its restoration core only asks it whether, and how many, walsenders there are to be
    // woken after a flush (WalSndWakeupProcessRequests of replication/walsender.h).
    let restore = unsafe {
        let restore = Restore(pg_sys::max_wal_senders);
        pg_sys::max_wal_senders = 0;
        restore
    };
    let result = work();
    drop(restore);
    shared().senders_lag.store(true, Ordering::Release);
    result
}

/// Wakes the walsenders. A backend does so after its PREPARE: its WAL can have been flushed by a process that flushes quietly.
pub fn wake() {
    shared().senders_lag.store(false, Ordering::Release);
    // SAFETY: touches shared memory and kill(2) only.
    unsafe { raw::WalSndWakeup() };
}

/// Wakes the walsenders if something was flushed of which they do not know.
pub fn wake_if_behind() {
    if shared().senders_lag.swap(false, Ordering::AcqRel) {
        // SAFETY: as above.
        unsafe { raw::WalSndWakeup() };
    }
}
