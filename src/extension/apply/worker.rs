//! The apply worker: applies one transaction at a time, PREPAREs it and votes; between transactions it finishes prepared ones.

use super::{finish, order};
use crate::arbiter::event::{LocalEvent, submit};
use crate::failpoint::{Failpoint, hit};
use crate::pg::apply_error::{ApplyFailure, attempt};
use crate::pg::barrier;
use crate::pg::process::{self, Wait};
use crate::pg::records::DurableTable;
use crate::pg::shared::{self, WorkerSlot, shared, worker};
use crate::pg::{ddl, locks, rows, sequences, twophase};
use protocol::membership::Admission;
use protocol::{Csn, Gid, Lsn, NodeId, Refusal, Vote};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use wire::stream::{Message, Resume, StreamFrame};

/// How often a worker that waits looks around although nobody woke it.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// How often a worker that applies ahead looks whether somebody waits for it; that one waits so long at most.
const LOOK_BEHIND: Duration = Duration::from_millis(20);
/// How long it waits for a lock itself. It cannot look behind meanwhile.
const AHEAD_PATIENCE: Duration = Duration::from_millis(50);

/// This process's slot, for the exit callback.
static MY_SLOT: AtomicUsize = AtomicUsize::new(usize::MAX);
/// The transaction in hand is durably prepared: its vote can only be yes.
static PREPARED: AtomicBool = AtomicBool::new(false);

/// It is a user's own PREPARE TRANSACTION.
static USERS: AtomicBool = AtomicBool::new(false);

/// Where the PREPARE of the transaction in hand lies in its origin's WAL.
static PREPARE_AT: AtomicU64 = AtomicU64::new(0);

/// The transaction in hand.
pub(super) struct Job {
    pub gid: Gid,
    name: String,
    deps: Vec<(NodeId, Csn)>,
}

impl Job {
    /// Whether it is a user's own PREPARE TRANSACTION.
    pub fn is_users(&self) -> bool {
        !self.name.starts_with("mtm-")
    }
}

/// Messages of one transaction, out of the ring.
struct Inbox {
    slot: &'static WorkerSlot,
    index: usize,
    /// The receiver's number of this job.
    job: u64,
    buffer: Vec<u8>,
    taken: usize,
    ended: bool,
    /// The transaction still runs at its origin, as far as is known here: nobody may have to wait for it.
    ahead: bool,
    looked_behind_at: Instant,
}

/// Body of the background worker `multimaster apply worker <index + 1>`.
pub fn main(index: usize) {
    process::attach_signals();
    process::stay_local();
    let slot = &shared::workers()[index];
    MY_SLOT.store(index, Ordering::Relaxed);
    slot.process.set_self();
    // Before anything can fail: a slot whose process did not come up must not stay taken.
    process::at_exit(leave);
    process::connect_to_cluster();
    process::tag_as_applied();
    rows::tell_waits_to(show_target);
    let records = process::in_transaction(|| DurableTable::open(c"records", 0));
    shared::ring(index).reset();
    slot.jobs_done
        .store(slot.jobs_given.load(Ordering::Acquire), Ordering::Release);
    slot.state.store(worker::IDLE, Ordering::Release);
    loop {
        // What was to be cancelled has ended.
        process::forget_cancel();
        process::check_interrupts();
        finish::finish_all(&records);
        if slot.state.load(Ordering::Acquire) == worker::BUSY {
            if !shared().finishes.is_empty() {
                // Queued for this worker, which may now have to wait for just that.
                shared().finisher.wake();
            }
            run_job(slot, index);
            continue;
        }
        process::report_statistics();
        if shared().finishes.is_empty() {
            process::wait_latch(LOOK_AROUND, Wait::Work);
        }
    }
}

/// Shows whom it may concern which row this process waits for: the monitor names it to those who must give way.
fn show_target(target: &str) {
    if let Some(slot) = shared::workers().get(MY_SLOT.load(Ordering::Relaxed)) {
        slot.target.set(&Refusal::retry("", target));
    }
}

/// Leaves the slot in a state in which nobody waits for this process.
fn leave() {
    let Some(slot) = shared::workers().get(MY_SLOT.load(Ordering::Relaxed)) else {
        return;
    };
    finish::leave();
    barrier::leave();
    // From here on no receiver can claim it.
    let state = slot.state.swap(worker::STARTING, Ordering::AcqRel);
    match slot.gid.get() {
        Some(gid) => {
            let vote = if PREPARED.load(Ordering::Relaxed) {
                Vote::Yes
            } else {
                Vote::No(Refusal::retry(
                    "the process that applied the transaction was terminated",
                    "",
                ))
            };
            send_vote(
                gid,
                vote,
                Lsn(PREPARE_AT.load(Ordering::Relaxed)),
                USERS.load(Ordering::Relaxed),
            );
        }
        // Said before the job is called done: whoever sees the one sees the other.
        None if state == worker::BUSY => slot.lost.store(true, Ordering::Release),
        None => {}
    }
    slot.gid.set(None);
    slot.ahead.store(false, Ordering::Release);
    slot.waits_for_row.store(false, Ordering::Release);
    slot.process.clear();
    slot.jobs_done
        .store(slot.jobs_given.load(Ordering::Acquire), Ordering::Release);
    slot.feeder.wake();
    slot.state.store(worker::FREE, Ordering::Release);
}

/// One transaction from its first message to the vote.
fn run_job(slot: &'static WorkerSlot, index: usize) {
    let job_number = slot.jobs_done.load(Ordering::Acquire) + 1;
    let mut inbox = Inbox {
        slot,
        index,
        job: job_number,
        buffer: Vec::new(),
        taken: 0,
        ended: false,
        ahead: false,
        looked_behind_at: Instant::now(),
    };
    PREPARED.store(false, Ordering::Relaxed);
    slot.target.clear();
    slot.applying.fetch_add(1, Ordering::AcqRel);
    process::forget_cancel();
    let mut job = None;
    let mut end = Lsn::ZERO;
    let result = attempt(|| apply(&mut inbox, &mut job, &mut end));
    if result.is_err() {
        rows::forget_all();
        process::abort_transaction();
        barrier::leave();
    }
    if let Some(job) = job {
        // An error behind the PREPARE takes nothing back: what is durably prepared has voted yes.
        let result = match result {
            Err(_) if is_prepared(&job) => Ok(Applied::Prepared),
            other => other,
        };
        report(slot, &job, end, result);
    } else {
        // Before its gid was known: nobody hears of it but the feeder, who may apply it otherwise.
        slot.dropped_job.store(job_number, Ordering::Release);
        slot.feeder.wake();
    }
    inbox.leave_ahead();
    inbox.skip_rest();
    shared::ring(index).reset();
    slot.gid.set(None);
    slot.waits_for_row.store(false, Ordering::Release);
    slot.jobs_done.store(job_number, Ordering::Release);
    slot.state.store(worker::IDLE, Ordering::SeqCst);
    if shared().worker_awaited.swap(false, Ordering::SeqCst) {
        wake_receivers();
    }
    wake_feeder(slot);
}

/// Some receiver waits for a worker, and this one has become idle.
fn wake_receivers() {
    for node in shared().configured_nodes().iter() {
        shared().node(node).receiver.wake();
    }
}

/// Wakes the feeder if it sleeps: most transactions fit the ring, and it has better to do than to hear of each.
fn wake_feeder(slot: &WorkerSlot) {
    if slot.feeder_waits.swap(false, Ordering::SeqCst) {
        slot.feeder.wake();
    }
}

/// This process, if it is an apply worker, is about to wait for the transaction `xid`, which has a row in hand: the conflict rule has to look at it now.
pub fn wait_for_row(xid: u32, wait: impl FnOnce()) {
    let slot = shared::workers().get(MY_SLOT.load(Ordering::Relaxed));
    if let Some(slot) = slot {
        slot.awaited_xid.store(xid, Ordering::Release);
        slot.waits_for_row.store(true, Ordering::Release);
        shared().monitor.wake();
    }
    wait();
    if let Some(slot) = slot {
        slot.waits_for_row.store(false, Ordering::Release);
    }
}

/// Whether the transaction in hand is prepared here, after an error that can have come before or behind that.
///
/// Nobody else prepares under a name of the cluster's. A user's name can be another node's as well, so there it is what this process knows.
fn is_prepared(job: &Job) -> bool {
    PREPARED.load(Ordering::Relaxed)
        || (!job.is_users()
            && locks::prepared_names()
                .values()
                .any(|name| *name == job.name))
}

fn report(slot: &WorkerSlot, job: &Job, end: Lsn, result: Result<Applied, ApplyFailure>) {
    let vote = match result {
        Ok(Applied::Prepared) => Vote::Yes,
        // Its feeder went away and will have it sent again.
        Ok(Applied::Dropped) => return,
        // The record of it must say where its PREPARE lies, if somebody has asked about it.
        Ok(Applied::RolledBack) => Vote::No(Refusal::retry(
            "the transaction was rolled back by its origin",
            "",
        )),
        Err(failure) => Vote::No(refusal(slot, failure)),
    };
    let counter = if vote == Vote::Yes {
        &shared().counters.applied
    } else {
        &shared().counters.refused
    };
    counter.fetch_add(1, Ordering::Relaxed);
    let (before, after) = match vote {
        Vote::Yes => (None, Failpoint::ApplyAfterYes),
        Vote::No(_) => (Some(Failpoint::ApplyBeforeNo), Failpoint::ApplyAfterNo),
    };
    before.into_iter().for_each(hit);
    send_vote(job.gid, vote, end, job.is_users());
    hit(after);
}

/// Hands the vote to the arbiter.
fn send_vote(gid: Gid, vote: Vote, lsn: Lsn, users: bool) {
    if users {
        submit(&LocalEvent::UserVoted { gid, vote });
    } else {
        submit(&LocalEvent::Voted { gid, vote, lsn });
    }
}

/// What the coordinator's client will read.
///
/// Whatever two nodes can only disagree about because they ran at the same moment is a serialization failure: running it again gives the true answer.
fn refusal(slot: &WorkerSlot, failure: ApplyFailure) -> Refusal {
    let node = shared().node_id().map_or(0, NodeId::get);
    let place = match &failure.target {
        Some(target) => format!("On node {node}, {target}."),
        None => format!("On node {node}."),
    };
    if slot.cancel_said.load(Ordering::Acquire) == slot.applying.load(Ordering::Acquire)
        && let Some(reason) = slot.refusal.get()
    {
        let target = failure.target.as_deref().unwrap_or_default();
        crate::conflict::remember("committing", slot.gid.get(), slot.winner.get(), target);
        return Refusal::retry(reason.message(), place);
    }
    let detail = if failure.detail.is_empty() {
        place
    } else {
        format!("{place} {}", failure.detail)
    };
    match &failure.sqlstate {
        [b'2', b'3', ..] | [b'4', b'0', ..] | b"55P03" | b"57014" | b"57P01" => {
            Refusal::retry(failure.message, detail)
        }
        other => {
            pgrx::warning!(
                "multimaster could not apply a transaction: {} ({detail})",
                failure.message
            );
            Refusal::new(*other, failure.message, detail)
        }
    }
}

/// How an apply without an error ended.
enum Applied {
    Prepared,
    /// The origin's stream broke off.
    Dropped,
    RolledBack,
}

fn apply(inbox: &mut Inbox, job: &mut Option<Job>, end: &mut Lsn) -> Result<Applied, ApplyFailure> {
    process::begin_transaction();
    let mut applier = rows::RowApplier::begin();
    let mut message_bytes = Vec::new();
    while inbox.next(&mut message_bytes) {
        let message = Message::parse(&message_bytes).map_err(ApplyFailure::malformed)?;
        inbox.ended = message.ends();
        for frame in message.frames() {
            match frame.map_err(ApplyFailure::malformed)? {
                StreamFrame::Piece(piece) => {
                    if job.is_none() {
                        inbox.run_ahead();
                    }
                    let deps: Vec<_> = piece.deps.iter().collect();
                    order::wait_for(inbox.slot, job.as_ref(), &deps)?;
                }
                StreamFrame::Begin(begin) | StreamFrame::Resume(Resume { begin, .. }) => {
                    let begun = Job {
                        gid: begin.gid,
                        name: begin.name.to_string(),
                        deps: begin.deps.iter().collect(),
                    };
                    // Right behind the start of the PREPARE record: a mark beyond it is a mark beyond the record.
                    *end = Lsn(begin.prepare_lsn.0 + 1);
                    PREPARE_AT.store(end.0, Ordering::Relaxed);
                    USERS.store(begun.is_users(), Ordering::Relaxed);
                    inbox.resume(begun.gid);
                    // From here on there is somebody to answer, whatever happens.
                    let begun = job.insert(begun);
                    hit(Failpoint::ApplyBegins);
                    let begun = &*begun;
                    order::wait_for(inbox.slot, Some(begun), &begun.deps)?;
                }
                StreamFrame::Ddl(payload) => {
                    applier.before_ddl();
                    ddl::execute(payload).map_err(ApplyFailure::from)?;
                }
                StreamFrame::Sequence(payload) => {
                    sequences::apply(payload).map_err(ApplyFailure::from)?;
                }
                StreamFrame::Prepare(prepare) => {
                    *end = prepare.end_lsn;
                    if prepare.aborted {
                        applier.abandon();
                        process::abort_transaction();
                        return Ok(Applied::RolledBack);
                    }
                }
                row => applier.apply(&row).map_err(ApplyFailure::from)?,
            }
        }
        if inbox.ended {
            break;
        }
    }
    let Some(job) = job.as_mut().filter(|_| inbox.ended) else {
        applier.abandon();
        process::abort_transaction();
        return Ok(Applied::Dropped);
    };
    applier.finish().map_err(ApplyFailure::from)?;
    hit(Failpoint::ApplyBeforePrepare);
    let opened = barrier::enter();
    if job.is_users() {
        // Whoever counts the votes has to know under which generation this one was prepared.
        job.gid.generation = opened;
    }
    if shared().admit(job.gid) != Admission::Apply {
        barrier::leave();
        return Err(ApplyFailure::generation_over());
    }
    twophase::prepare(&job.name);
    barrier::leave();
    PREPARED.store(true, Ordering::Relaxed);
    hit(Failpoint::ApplyAfterPrepare);
    Ok(Applied::Prepared)
}

impl Inbox {
    /// What is applied here still runs at its origin.
    fn run_ahead(&mut self) {
        if !self.ahead {
            self.ahead = true;
            locks::limit_waits(Some(AHEAD_PATIENCE));
        }
    }

    /// The transaction is known by its gid from now on; one that was applied ahead commits now, and is treated like any other.
    fn resume(&mut self, gid: Gid) {
        if self.ahead {
            locks::limit_waits(None);
            // That limit may have struck at the last moment.
            process::forget_cancel();
        }
        self.slot.gid.set(Some(gid));
        if std::mem::take(&mut self.ahead) {
            self.slot.ahead.store(false, Ordering::Release);
            self.slot.resumed_job.store(self.job, Ordering::Release);
            self.slot.feeder.wake();
        }
    }

    /// The job ends.
    fn leave_ahead(&mut self) {
        if std::mem::take(&mut self.ahead) {
            locks::limit_waits(None);
        }
        self.slot.ahead.store(false, Ordering::Release);
    }

    /// Whether a transaction that is applied ahead has to be dropped: its feeder does not want it any more, or somebody waits for it.
    fn has_to_give_way(&mut self) -> bool {
        if !self.ahead || self.looked_behind_at.elapsed() < LOOK_BEHIND {
            return false;
        }
        self.looked_behind_at = Instant::now();
        self.slot.broken_job.load(Ordering::Acquire) == self.job || locks::somebody_waits_for_me()
    }

    /// Reads the next message into `message`; false when the feeder broke off, or when the transaction has to give way.
    fn next(&mut self, message: &mut Vec<u8>) -> bool {
        message.clear();
        if self.has_to_give_way() {
            return false;
        }
        let Some(length) = self
            .take(4)
            .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        else {
            return false;
        };
        match self.take(length as usize) {
            Some(bytes) => {
                message.extend_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    fn take(&mut self, count: usize) -> Option<&[u8]> {
        while self.buffer.len() - self.taken < count {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            if shared::ring(self.index).read(&mut self.buffer) > 0 {
                wake_feeder(self.slot);
                continue;
            }
            if self.slot.broken_job.load(Ordering::Acquire) == self.job {
                return None;
            }
            let patience = if self.ahead { LOOK_BEHIND } else { LOOK_AROUND };
            process::wait_latch(patience, Wait::Ring);
            // A cancel has to wait: it must not lose the place between two messages.
            process::exit_if_terminated();
            if self.has_to_give_way() {
                return None;
            }
        }
        let start = self.taken;
        self.taken += count;
        Some(&self.buffer[start..self.taken])
    }

    /// Drops what is left of a transaction that cannot be applied.
    fn skip_rest(&mut self) {
        let mut message = Vec::new();
        while !self.ended && self.next(&mut message) {
            self.ended = Message::parse(&message).is_ok_and(|message| message.ends());
        }
    }
}
