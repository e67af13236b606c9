//! The age of this session's transactions: what the conflict rule goes by.
//!
//! A transaction that had to give way is usually run again. If its second attempt counted as a new transaction it would be the youngest again, and could lose
//! for ever where others come all the time. So it keeps the start of its first attempt, and becomes the oldest one in the end.

use super::shared;
use pgrx::pg_sys;
use std::cell::Cell;
use std::sync::atomic::Ordering;

/// Who does not come back within that time, microseconds, has given up, or does something else.
const RETRY_WITHIN_US: i64 = 5_000_000;

/// A transaction of this session that had to give way; microseconds since 2000-01-01.
#[derive(Clone, Copy)]
struct Lost {
    started_at: i64,
    lost_at: i64,
}

thread_local! {
    static LOST: Cell<Option<Lost>> = const { Cell::new(None) };
}

/// When the first attempt of the running transaction started, microseconds since 2000-01-01. The same from its beginning to its end.
pub fn started_at() -> i64 {
    // SAFETY: reads this backend's transaction state.
    let started_at = unsafe { pg_sys::GetCurrentTransactionStartTimestamp() };
    match LOST.get() {
        Some(lost) if started_at - lost.lost_at <= RETRY_WITHIN_US => lost.started_at,
        _ => started_at,
    }
}

/// Shows the conflict rule how old the running transaction is: it is going to have locks that others wait for.
pub fn show() {
    let shown = &shared::my_backend().started_at;
    if shown.load(Ordering::Relaxed) == 0 {
        shown.store(started_at(), Ordering::Release);
    }
}

/// A transaction of this session that started at `started_at` had to give way.
pub fn lost(started_at: i64) {
    // SAFETY: reads the clock.
    let lost_at = unsafe { pg_sys::GetCurrentTimestamp() };
    LOST.set(Some(Lost {
        started_at,
        lost_at,
    }));
}

/// A transaction of this session has committed: the next one is a new one.
pub fn won() {
    LOST.set(None);
}
