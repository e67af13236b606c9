//! The conflict rule: a committing transaction waits for nobody's think time, and only for younger committing ones.
//!
//! An apply worker that waits for a lock waits for one of these (architecture.md, "Conflicts"):
//!
//! - a transaction that is committing too (prepared here, or being applied here): if the waiting one is younger it dies here; if it is older it
//!   waits, because the younger one meets the older where that one is prepared, and dies there;
//! - a running transaction: it is cancelled with 40001, at once if it is younger, after the grace if it is older and does not begin to commit by then;
//!   a session that is idle in its transaction learns at its next statement, and is ended if that does not come soon;
//! - a user's own prepared transaction: nobody knows how long it stays, so the waiting one dies after the grace.
//!
//! A transaction that comes to COMMIT while an older one waits for it here gives way by itself (`pg::age`).
//!
//! The recovery waits for nobody who runs: what it applies is committed elsewhere, so who stands in its way could never commit.
//!
//! So waits among committing transactions only go from older to younger and never end in a running one: no cycle survives.

use crate::arbiter::event::Conflict;
use crate::guc;
use crate::pg::age::WaitingWorker;
use crate::pg::clock;
use crate::pg::in_flight;
use crate::pg::locks::{self, Holder, LockSnapshot};
use crate::pg::process::{self, Wait};
use crate::pg::shared::{self, WorkerSlot, shared, stage, worker};
use protocol::{Gid, NodeId, Refusal};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often workers that wait are looked at.
const LOOK: Duration = Duration::from_millis(1);
/// How often the others are: a worker that waits for a row says so, but not one that core lets wait, for a unique key say.
const LOOK_FOR_UNSAID: Duration = Duration::from_millis(10);
/// How long the monitor sleeps while nothing is applied; the receivers wake it.
const IDLE: Duration = Duration::from_millis(1000);
/// Nothing is applied, when nothing has been for so long.
const IDLE_AFTER: Duration = Duration::from_millis(500);

/// How long a committing transaction waits for a session that holds what it needs and does not come back to learn that it must give way: it is
/// idle in its transaction. Then the session is ended.
const VICTIM_PATIENCE: Duration = Duration::from_millis(500);

/// Whom a worker waits for.
#[derive(Debug)]
enum Blocker {
    Committing(Gid),
    UserPrepared(String),
    /// Since when it has run, microseconds since 2000-01-01; `None` when it has not written anything.
    Running(Option<i64>),
    /// It has been told to give way.
    Victim(i32),
}

/// Body of the background worker `multimaster monitor`.
pub fn main() {
    process::attach_signals();
    process::stay_local();
    if !shared().monitor.claim() {
        return;
    }
    process::at_exit(|| {
        shared().monitor.release();
    });
    process::connect_to_cluster();
    Monitor::default().run();
}

/// The monitor's memory between two looks.
#[derive(Default)]
pub struct Monitor {
    /// Prepared transactions by local xid; an xid never gets another name.
    names: BTreeMap<u32, String>,
    /// Since when a worker (by index and transaction) waits for a holder that gets a grace.
    since: BTreeMap<(usize, u64, Holder), Instant>,
    /// Since when the recovery waits for a holder.
    recovery_since: BTreeMap<Holder, Instant>,
}

impl Monitor {
    /// Runs until the process is asked to go away.
    pub fn run(&mut self) {
        let mut busy_at = Instant::now();
        let mut waits = false;
        loop {
            process::check_interrupts();
            if busy() {
                busy_at = Instant::now();
            }
            let pause = if waits || somebody_waits() {
                LOOK
            } else if busy_at.elapsed() < IDLE_AFTER {
                LOOK_FOR_UNSAID
            } else {
                shared().monitor_idle.store(true, Ordering::SeqCst);
                // Who began before that did not see it.
                if busy() { LOOK_FOR_UNSAID } else { IDLE }
            };
            process::wait_latch(pause, Wait::Work);
            self.clear_way_of_recovery();
            waits = self.look();
        }
    }

    /// Judges everybody who waits; whether there is anybody.
    fn look(&mut self) -> bool {
        let waiting: Vec<(usize, &WorkerSlot, Gid)> = shared::workers()
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.state.load(Ordering::Acquire) == worker::BUSY)
            .filter_map(|(index, slot)| Some((index, slot, slot.gid.get()?)))
            .filter(|(_, slot, _)| locks::waits_for_lock(slot.process.pid()))
            .collect();
        if waiting.is_empty() {
            self.since.clear();
            return false;
        }
        let applying: BTreeMap<usize, u64> = waiting
            .iter()
            .map(|(index, slot, _)| (*index, slot.applying.load(Ordering::Acquire)))
            .collect();
        self.since
            .retain(|(index, transaction, _), _| applying.get(index) == Some(transaction));
        let snapshot = LockSnapshot::take();
        for (index, slot, gid) in waiting {
            let transaction = applying[&index];
            for holder in snapshot.blockers_of(slot.process.pid()) {
                if let Some(blocker) = self.identify(&snapshot, holder) {
                    self.judge(index, slot, transaction, gid, holder, blocker);
                }
            }
        }
        true
    }

    /// Makes running transactions victims that hold what the recovery needs, and ends the sessions of those that sleep.
    fn clear_way_of_recovery(&mut self) {
        let pid = shared().recovery.pid();
        if pid == 0 || !locks::waits_for_lock(pid) {
            self.recovery_since.clear();
            return;
        }
        let snapshot = LockSnapshot::take();
        for holder in snapshot.blockers_of(pid) {
            let since = *self
                .recovery_since
                .entry(holder)
                .or_insert_with(Instant::now);
            match self.identify(&snapshot, holder) {
                Some(Blocker::Running(_)) => {
                    locks::cancel_running(holder, &Refusal::retry(BLOCKS_RECOVERY, place_of("")));
                }
                Some(Blocker::Victim(pid)) if since.elapsed() >= VICTIM_PATIENCE => {
                    locks::end_session(pid);
                }
                // Its outcome is on the way, or comes in the donor's order.
                _ => {}
            }
        }
    }

    fn identify(&mut self, snapshot: &LockSnapshot, holder: Holder) -> Option<Blocker> {
        if holder.pid == 0 {
            if let Some(gid) = snapshot.xids_of(holder).find_map(in_flight::gid_of) {
                return Some(Blocker::Committing(gid));
            }
            let name = self.name_of(snapshot, holder)?;
            return Some(match Gid::parse(&name) {
                Some((_, gid)) => Blocker::Committing(gid),
                None => Blocker::UserPrepared(name),
            });
        }
        if let Some(slot) = shared::workers()
            .iter()
            .find(|slot| slot.process.pid() == holder.pid)
        {
            return slot.gid.get().map(Blocker::Committing);
        }
        let backend = locks::backend_of(holder.pid)?;
        match backend.stage.load(Ordering::Acquire) {
            // Between its PREPARE and its announcement it has no gid to compare yet: look again.
            stage::COMMITTING => backend.gid.get().map(Blocker::Committing),
            stage::RUNNING => {
                let started_at = backend.started_at.load(Ordering::Acquire);
                Some(Blocker::Running((started_at != 0).then_some(started_at)))
            }
            stage::VICTIM => Some(Blocker::Victim(holder.pid)),
            _ => None,
        }
    }

    fn name_of(&mut self, snapshot: &LockSnapshot, holder: Holder) -> Option<String> {
        let find = |names: &BTreeMap<u32, String>| {
            snapshot
                .xids_of(holder)
                .find_map(|xid| names.get(&xid).cloned())
        };
        if let Some(name) = find(&self.names) {
            return Some(name);
        }
        self.names = locks::prepared_names();
        find(&self.names)
    }

    fn judge(
        &mut self,
        index: usize,
        slot: &WorkerSlot,
        transaction: u64,
        gid: Gid,
        holder: Holder,
        blocker: Blocker,
    ) {
        match blocker {
            Blocker::Committing(other) if other == gid => {}
            Blocker::Committing(other) => {
                if gid.age() > other.age() {
                    shared()
                        .counters
                        .conflicts_committing
                        .fetch_add(1, Ordering::Relaxed);
                    let message = format!(
                        "could not serialize access due to concurrent update on node {}",
                        other.coordinator.get()
                    );
                    slot.winner.set(Some(other));
                    cancel_worker(slot, transaction, &Refusal::retry(message, String::new()));
                }
            }
            Blocker::Running(started_at)
                if is_younger(started_at, gid)
                    || self.grace_is_over(index, transaction, holder) =>
            {
                shared()
                    .counters
                    .conflicts_running
                    .fetch_add(1, Ordering::Relaxed);
                let message = format!("{BLOCKS} {}", gid.coordinator.get());
                let target = awaited_row(slot);
                if locks::cancel_running(holder, &Refusal::retry(message, place_of(&target))) {
                    remember("running", None, Some(gid), &target);
                }
            }
            Blocker::UserPrepared(name) if self.grace_is_over(index, transaction, holder) => {
                let message =
                    format!("could not lock what the prepared transaction \"{name}\" holds");
                cancel_worker(slot, transaction, &Refusal::retry(message, String::new()));
            }
            Blocker::Victim(pid) if self.waited(index, transaction, holder) >= VICTIM_PATIENCE => {
                locks::end_session(pid);
            }
            Blocker::Running(_) | Blocker::UserPrepared(_) | Blocker::Victim(_) => {}
        }
    }

    fn grace_is_over(&mut self, index: usize, transaction: u64, holder: Holder) -> bool {
        self.waited(index, transaction, holder) >= guc::conflict_grace()
    }

    fn waited(&mut self, index: usize, transaction: u64, holder: Holder) -> Duration {
        self.since
            .entry((index, transaction, holder))
            .or_insert_with(Instant::now)
            .elapsed()
    }
}

/// Why a transaction that has not begun to commit loses; the node follows.
const BLOCKS: &str = "canceling transaction because it blocks a committing transaction of node";

/// The same of one that stands in the way of what this node has missed.
const BLOCKS_RECOVERY: &str =
    "canceling transaction because it blocks what this node has to recover from the others";

/// Counts a transaction that gives way at its COMMIT to the one that the worker applies, and writes what its client reads.
pub fn tell_loser(waiting: WaitingWorker, message: &mut impl Write, detail: &mut impl Write) {
    let slot = &shared::workers()[waiting.index];
    let target = awaited_row(slot);
    shared()
        .counters
        .conflicts_running
        .fetch_add(1, Ordering::Relaxed);
    remember("running", None, Some(waiting.gid), &target);
    // A text that is too long is cut.
    let _ = write!(message, "{BLOCKS} {}", waiting.gid.coordinator.get());
    let _ = write!(detail, "{}", place_of(&target));
}

/// Whether a running transaction of this node must lose against a committing one in any case: when it came to commit, that one would be older.
fn is_younger(started_at: Option<i64>, committing: Gid) -> bool {
    let here = shared().node_id();
    started_at
        .zip(here)
        .is_some_and(|age| age > (committing.started_at, committing.coordinator))
}

/// Whether some worker applies, or the recovery does.
fn busy() -> bool {
    shared().recovery.pid() != 0
        || shared::workers()
            .iter()
            .any(|slot| slot.state.load(Ordering::SeqCst) == worker::BUSY)
}

/// Whether some worker has said that it waits for a row.
fn somebody_waits() -> bool {
    shared::workers()
        .iter()
        .any(|slot| slot.waits_for_row.load(Ordering::Acquire))
}

/// Adds a line to `mtm.conflicts`. Main threads only.
pub fn remember(kind: &str, loser: Option<Gid>, winner: Option<Gid>, target: &str) {
    let Some(node) = shared().node_id() else {
        return;
    };
    shared().conflicts.add(&Conflict {
        happened_at: clock::now_us(),
        kind: kind.to_owned(),
        node,
        target: target.to_owned(),
        loser,
        winner,
    });
}

/// The row that the worker waits for, as `table "s.t", key (...)`; empty when it waits for something else.
fn awaited_row(slot: &WorkerSlot) -> String {
    slot.target
        .get()
        .map(|refusal| refusal.detail().to_owned())
        .unwrap_or_default()
}

/// The same, for the victim's DETAIL.
fn place_of(target: &str) -> String {
    let node = shared().node_id().map_or(0, NodeId::get);
    if target.is_empty() {
        format!("On node {node}.")
    } else {
        format!("On node {node}, {target}.")
    }
}

/// Makes a worker give up the transaction it applies; it votes no with the refusal.
fn cancel_worker(slot: &WorkerSlot, transaction: u64, refusal: &Refusal) {
    if slot.cancel.swap(transaction, Ordering::AcqRel) == transaction {
        return;
    }
    slot.refusal.set(refusal);
    slot.cancel_said.store(transaction, Ordering::Release);
    locks::interrupt_process(slot.process.pid());
}

/// Stops the apply of a transaction that is already aborted. Callable from any thread.
pub fn cancel_apply(gid: Gid) {
    for slot in shared::workers() {
        if slot.state.load(Ordering::Acquire) == worker::BUSY && slot.gid.get() == Some(gid) {
            let transaction = slot.applying.load(Ordering::Acquire);
            cancel_worker(
                slot,
                transaction,
                &Refusal::retry("transaction was aborted by its coordinator", ""),
            );
        }
    }
}

/// Makes the youngest transaction that waits for a lock give way. Called when every worker is taken and none gets free: workers may then wait
/// for transactions whose votes wait for workers.
pub fn give_way() {
    let youngest = shared::workers()
        .iter()
        .filter(|slot| {
            slot.state.load(Ordering::Acquire) == worker::BUSY
                && locks::waits_for_lock(slot.process.pid())
        })
        .filter_map(|slot| Some((slot.gid.get()?.age(), slot)))
        .max_by_key(|(age, _)| *age);
    if let Some((_, slot)) = youngest {
        let transaction = slot.applying.load(Ordering::Acquire);
        cancel_worker(
            slot,
            transaction,
            &Refusal::retry(
                "no apply worker was free; raise multimaster.max_workers",
                "",
            ),
        );
    }
}
