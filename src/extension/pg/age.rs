//! The age of this session's transactions: what the conflict rule goes by.
//!
//! A transaction that had to give way is usually run again. If its second attempt counted as a new transaction it would be the youngest again, and could lose
//! for ever where others come all the time. So it keeps the start of its first attempt, and becomes the oldest one in the end.

use super::process::{self, Wait};
use super::{in_flight, raw, shared};
use pgrx::pg_sys;
use protocol::Gid;
use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Who does not come back within that time, microseconds, has given up, or does something else.
const RETRY_WITHIN_US: i64 = 5_000_000;

/// How long a second attempt waits at its first lock for whoever the first one had to give way to. Otherwise it would often be faster than a process
/// that has to wake up first, and be in the way again.
const LET_PASS: Duration = Duration::from_millis(20);
/// How long a COMMIT waits for an older transaction's process to find out whom it has to wait for.
const WAKE_UP: Duration = Duration::from_millis(5);
const LOOK_AROUND: Duration = Duration::from_millis(1);

/// An apply worker that waits for a row.
#[derive(Clone, Copy)]
pub struct WaitingWorker {
    pub index: usize,
    /// Number of what it applies.
    transaction: u64,
    pub gid: Gid,
}

impl WaitingWorker {
    fn still_waits(self) -> bool {
        let slot = &shared::workers()[self.index];
        slot.applying.load(Ordering::Acquire) == self.transaction
            && slot.waits_for_row.load(Ordering::Acquire)
    }
}

/// A transaction of this session that had to give way; times in microseconds since 2000-01-01.
#[derive(Clone, Copy)]
struct Lost {
    started_at: i64,
    lost_at: i64,
    passed_by: Option<WaitingWorker>,
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

/// A second attempt is about to take its first lock: it lets the winner of the first one pass before.
///
/// # Safety
/// An interrupt is raised by `longjmp`: the callers' frames own nothing with a destructor.
pub unsafe fn let_pass() {
    let Some(Lost {
        passed_by: Some(winner),
        ..
    }) = LOST.get()
    else {
        return;
    };
    if shared::my_backend().started_at.load(Ordering::Relaxed) != 0 {
        return;
    }
    let begun = Instant::now();
    while winner.still_waits() && begun.elapsed() < LET_PASS {
        process::wait_latch(LOOK_AROUND, Wait::Work);
        // SAFETY: as the caller promises.
        unsafe { raw::check_for_interrupts() };
    }
}

/// A transaction of this session that started at `started_at` had to give way.
pub fn lost(started_at: i64, passed_by: Option<WaitingWorker>) {
    // SAFETY: reads the clock.
    let lost_at = unsafe { pg_sys::GetCurrentTimestamp() };
    LOST.set(Some(Lost {
        started_at,
        lost_at,
        passed_by,
    }));
}

/// The running transaction has to give way.
pub fn lost_running() {
    // SAFETY: reads this backend's transaction state.
    let xid = unsafe { raw::GetTopTransactionIdIfAny() }.into_inner();
    lost(started_at(), waiting_for(xid));
}

/// A transaction of this session has committed: the next one is a new one.
pub fn won() {
    LOST.set(None);
}

/// A worker that waits for a row which the transaction `xid` of this server has in hand.
pub fn waiting_for(xid: u32) -> Option<WaitingWorker> {
    waiting_workers().find_map(|(awaited, waiting)| (awaited == xid).then_some(waiting))
}

/// A worker that waits for the running transaction `gid`, and applies an older one.
///
/// When the transaction that had a row ends, a local session and a worker wake up, and the session often has taken the row, and come here, before
/// the worker knows. So the worker gets a moment to find out.
pub fn older_waiting_for_me(gid: Gid) -> Option<WaitingWorker> {
    let begun = Instant::now();
    loop {
        let mut wakes_up = false;
        for (awaited, waiting) in waiting_workers() {
            if waiting.gid.age() < gid.age() {
                if is_mine(awaited) {
                    return Some(waiting);
                }
                wakes_up |= !in_flight::in_progress(awaited);
            }
        }
        if !wakes_up || begun.elapsed() >= WAKE_UP {
            return None;
        }
        process::wait_latch(LOOK_AROUND, Wait::Work);
    }
}

fn is_mine(xid: u32) -> bool {
    // SAFETY: reads this backend's transaction state.
    unsafe { raw::TransactionIdIsCurrentTransactionId(pg_sys::TransactionId::from(xid)) }
}

/// Workers that wait for a row, each with the xid of the transaction that has it.
fn waiting_workers() -> impl Iterator<Item = (u32, WaitingWorker)> {
    shared::workers()
        .iter()
        .enumerate()
        .filter(|(_, slot)| slot.waits_for_row.load(Ordering::Acquire))
        .filter_map(|(index, slot)| {
            let waiting = WaitingWorker {
                index,
                transaction: slot.applying.load(Ordering::Acquire),
                gid: slot.gid.get()?,
            };
            let awaited = slot.awaited_xid.load(Ordering::Acquire);
            waiting.still_waits().then_some((awaited, waiting))
        })
}
