//! Recovery: what this node has missed, from one donor, of all origins, in the donor's order of commits.
//!
//! The donor's walsender, asked for it by name, decodes each of the cluster's transactions at its COMMIT PREPARED, whoever ran it, and this process
//! commits it at once: nobody waits for a vote. What is here already is left out: transactions of generations in which this node was online, and
//! those named in `mtm.recovered`, which each recovered transaction adds itself to. So the stream may begin again at any time, at any donor.
//! The stream's place is that of this node's mark of the donor; it is read through a temporary copy of this node's slot, which stays
//! where it is. See `docs/membership.md`, "Recovery".

use crate::arbiter::event::{LocalEvent, submit};
use crate::arbiter::{MARK_ROWS, number_in};
use crate::cluster::{Identity, slot_name};
use crate::decode;
use crate::failpoint::{Failpoint, hit};
use crate::guc;
use crate::pg::apply_error::{ApplyFailure, attempt};
use crate::pg::process::{self, SocketWait, Wait};
use crate::pg::records::{self, DurableTable};
use crate::pg::recovered;
use crate::pg::shared::{RecoveryOrder, shared};
use crate::pg::walreceiver::{Received, Stream};
use crate::pg::{clock, ddl, locks, rows, sequences, twophase};
use protocol::{GenerationNum, Gid, Lsn, NodeId};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use wire::stream::{Marker, Message, StreamFrame};

use super::ends::ends_of;
use super::stream_message::{DATA_HEADER_BYTES, number, status_message};

/// How often the donor hears from us.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before a transaction that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The same where the machine has no room for it. That is not counted.
const ROOM_PAUSE: Duration = Duration::from_secs(1);
/// Failures of one transaction after which the node gives up.
const FAILURES_MAX: u32 = 5;
/// How often the rate is worked out anew.
const RATE_INTERVAL: Duration = Duration::from_secs(1);
/// Most that is told of an error.
const REASON_CHARS: usize = 400;

/// Whom this process recovers from; for the exit callback.
static DONOR: AtomicU32 = AtomicU32::new(0);

/// Where the process stands.
struct Recovery {
    /// What this process was started for.
    order: RecoveryOrder,
    donor: NodeId,
    /// Transactions of this generation and older are here, or can never commit.
    online_in: GenerationNum,
    /// Names of what has been recovered since; of users' prepared transactions, those that have been finished.
    known: BTreeSet<String>,
    /// The generation that the donor's WAL is in here, as its markers and fences say.
    generation: GenerationNum,
    /// The highest marker or fence in this node's own WAL.
    fenced: GenerationNum,
    /// Messages of the transaction that is being received.
    pending: Vec<Vec<u8>>,
    seen: Lsn,
    told_at: Instant,
    /// How far the donor's WAL went at the beginning. Before it has come that far, this node does not ask to be a member: the others would wait for a transaction
    /// that cannot be applied.
    backlog: Lsn,
    /// A transaction failed and is tried again.
    retries: bool,
    was_level: bool,
    /// When the rate was last worked out, and how far the recovery was then.
    rated_at: Instant,
    rated: Lsn,
}

/// Why a recovery ends before its time.
#[derive(Debug, thiserror::Error)]
enum RecoveryError {
    /// Another donor may do better.
    #[error("{0}")]
    Stream(String),
    /// A transaction that is committed elsewhere cannot be applied here.
    #[error("{0}")]
    Replay(String),
}

impl From<String> for RecoveryError {
    fn from(text: String) -> RecoveryError {
        RecoveryError::Stream(text)
    }
}

/// Body of the background worker `multimaster recovery`.
pub fn main(donor: NodeId) {
    process::attach_signals();
    process::stay_local();
    if !shared().recovery.claim() {
        return;
    }
    DONOR.store(u32::from(donor.get()), Ordering::Relaxed);
    process::at_exit(leave);
    process::connect_to_cluster();
    process::tag_as_applied();
    process::commit_asynchronously();
    // It looks for those who stand in the way.
    shared().monitor.wake();
    let Some(order) = shared().recovery_order().filter(|it| it.from() == donor) else {
        return;
    };
    if let Err(error) = run(order) {
        pgrx::warning!("multimaster recovery from node {}: {error}", donor.get());
        if let RecoveryError::Replay(reason) = error {
            // Before the status that makes others look for it.
            shared().recovery_progress.error.set(&reason);
            submit(&LocalEvent::RecoveryFailed { reason });
            shared().arbiter.wake();
        }
    }
}

fn leave() {
    shared().recovery_progress.donor.store(0, Ordering::Release);
    if shared().recovery.release()
        && let Some(from) = NodeId::new(DONOR.load(Ordering::Relaxed) as u8)
    {
        submit(&LocalEvent::RecoveryLost { from });
        shared().arbiter.wake();
    }
}

fn run(order: RecoveryOrder) -> Result<(), RecoveryError> {
    let donor = order.from();
    let identity = match process::in_transaction(Identity::load) {
        Ok(Some(identity)) => identity,
        Ok(None) => return Ok(()),
        Err(error) => return Err(error.to_string().into()),
    };
    let Some(target) = identity.nodes.iter().find(|node| node.id == donor) else {
        return Ok(());
    };
    let slot = slot_name(identity.tag, identity.node_id);
    // Before the mark is read: a receiver may be running beside this process.
    let ends = process::in_transaction(|| ends_of(&target.conninfo, &slot))?;
    let (mark, known) = process::in_transaction(|| {
        let marks = DurableTable::open(c"marks", MARK_ROWS);
        let mark = Lsn(number_in(&marks.read_all()[donor.get() as usize]));
        (mark, recovered::names())
    });
    // A copy of the slot begins where the slot stands: an old copy of this node would miss what lies before.
    ends.check_here(mark)
        .map_err(|mismatch| RecoveryError::Replay(mismatch.to_string()))?;
    let name = format!("multimaster node {} recovers", identity.node_id.get());
    let mut stream = Stream::connect(&target.conninfo, &name).map_err(|error| error.to_string())?;
    let copy = format!("{slot}_recovery_{}", std::process::id());
    stream
        .copy_slot(&slot, &copy)
        .and_then(|()| stream.start_for(&copy, mark, decode::RECOVERY))
        .map_err(|error| error.to_string())?;
    pgrx::log!(
        "multimaster recovers from node {}, from {mark}",
        donor.get()
    );
    let online_in = shared().online_in();
    let mut recovery = Recovery {
        order,
        donor,
        online_in,
        known,
        generation: GenerationNum(0),
        fenced: online_in,
        pending: Vec::new(),
        seen: mark,
        told_at: Instant::now(),
        backlog: ends.wal,
        retries: false,
        was_level: false,
        rated_at: Instant::now(),
        rated: mark,
    };
    shared()
        .recovery_progress
        .begin(donor.get().into(), clock::now_us(), mark.0);
    recovery.receive_all(&mut stream)
}

impl Recovery {
    /// Until this process is no longer wanted, or the stream ends.
    fn receive_all(&mut self, stream: &mut Stream) -> Result<(), RecoveryError> {
        let mut waiting = None::<SocketWait>;
        loop {
            process::check_interrupts();
            if shared().recovery_order() != Some(self.order) {
                return Ok(());
            }
            match stream.receive() {
                Received::Message(message) => self.on_message(message)?,
                Received::Nothing { socket } => {
                    self.tell(stream);
                    let wait = waiting.take().filter(|wait| wait.socket() == socket);
                    waiting
                        .insert(wait.unwrap_or_else(|| SocketWait::new(socket)))
                        .wait(Duration::from_millis(100), Wait::Stream);
                }
                Received::End => return Err("the stream ended".to_owned().into()),
            }
            if self.told_at.elapsed() >= STATUS_INTERVAL {
                self.tell(stream);
            }
        }
    }

    fn on_message(&mut self, message: &[u8]) -> Result<(), RecoveryError> {
        match message.first() {
            Some(b'w') if message.len() > DATA_HEADER_BYTES => {
                self.on_data(Lsn(number(message, 1)), &message[DATA_HEADER_BYTES..])?;
            }
            Some(b'k') if message.len() >= 18 => {
                // All that the donor had to send has come.
                if self.pending.is_empty() {
                    self.seen = self.seen.max(Lsn(number(message, 1)));
                }
            }
            _ => return Err("unknown replication message".to_owned().into()),
        }
        self.measure();
        Ok(())
    }

    fn on_data(&mut self, at: Lsn, bytes: &[u8]) -> Result<(), RecoveryError> {
        let message = Message::parse(bytes).map_err(|error| error.to_string())?;
        let (begins, ends) = (message.begins(), message.ends());
        if begins || !self.pending.is_empty() {
            self.pending.push(bytes.to_vec());
            if ends {
                let transaction = std::mem::take(&mut self.pending);
                self.commit(&transaction)?;
                self.seen = self.seen.max(at);
            }
            return Ok(());
        }
        for frame in message.frames() {
            match frame.map_err(|error| error.to_string())? {
                StreamFrame::Marker(marker) => self.on_marker(marker),
                StreamFrame::CommitPrepared(end) => self.finish_user(end.name.as_bytes(), true),
                StreamFrame::RollbackPrepared(end) => self.finish_user(end.name.as_bytes(), false),
                StreamFrame::FinishUser(finish) => {
                    self.finish_user(finish.name.as_bytes(), finish.commit);
                }
                _ => return Err("a change outside of a transaction".to_owned().into()),
            }
        }
        self.seen = self.seen.max(at);
        Ok(())
    }

    /// Everything older than the generation lies before: it counts once it is flushed.
    fn on_marker(&mut self, marker: Marker) {
        self.generation = self.generation.max(marker.generation);
        records::flush_all();
        submit(&LocalEvent::MarkerReached {
            from: self.donor,
            num: marker.generation,
        });
    }

    /// Applies a transaction, again if that fails: locks of what this node prepared before it went away go when its outcome is known.
    ///
    /// What only wants room on a disk or in memory is tried for as long as that lasts: nothing is wrong with it. The others do not wait for that: the node does not ask
    /// to be a member meanwhile, and a member that makes no progress is found stuck.
    fn commit(&mut self, messages: &[Vec<u8>]) -> Result<(), RecoveryError> {
        let head = head_of(messages)?;
        if self.is_here(&head) {
            return Ok(());
        }
        hit(Failpoint::RecoveryApplies);
        self.fence(self.generation_of(&head));
        let mut failures = 0;
        loop {
            let failure = match attempt(|| apply(messages, &head)) {
                Ok(applied) => {
                    self.note_success(applied);
                    return Ok(());
                }
                Err(failure) => failure,
            };
            self.note_failure(&failure);
            if failure.wants_room() {
                process::wait_latch(ROOM_PAUSE, Wait::Work);
            } else {
                failures += 1;
                if failures == FAILURES_MAX {
                    return Err(RecoveryError::Replay(reason_of(&failure)));
                }
                process::wait_latch(RETRY_PAUSE, Wait::Work);
            }
            process::check_interrupts();
            if shared().recovery_order() != Some(self.order) {
                return Err("it is not wanted any more".to_owned().into());
            }
        }
    }

    fn note_success(&mut self, applied: Option<String>) {
        self.known.extend(applied);
        let progress = &shared().recovery_progress;
        progress.transactions.fetch_add(1, Ordering::Relaxed);
        if self.retries {
            self.retries = false;
            progress.error.set("");
        }
    }

    fn note_failure(&mut self, failure: &ApplyFailure) {
        rows::forget_all();
        process::abort_transaction();
        self.retries = true;
        self.measure();
        let reason = reason_of(failure);
        let progress = &shared().recovery_progress;
        progress.retries.fetch_add(1, Ordering::Relaxed);
        progress.error.set(&reason);
        pgrx::warning!("multimaster recovery could not apply a transaction: {reason}");
    }

    /// Whether there is nothing to do for a transaction.
    ///
    /// One that needs this node's vote cannot have committed without it: it is here, prepared or finished, whatever the generation. That holds for those that
    /// follow while this process has not heard yet that the recovery is over.
    ///
    /// That is all the same for a user's own but that its gid names the members of the generation in which the donor is now.
    fn is_here(&self, head: &Head) -> bool {
        let node = shared().node_id();
        let is_member = node.is_some_and(|node| head.gid.members.contains(node));
        let generation = self.generation_of(head);
        if generation <= self.online_in || (is_member && generation >= head.gid.generation) {
            return true;
        }
        match &head.users_name {
            Some(name) => {
                self.known.contains(name)
                    || locks::prepared_names().values().any(|other| other == name)
            }
            None => self.known.contains(&head.gid.text(shared().cluster_tag())),
        }
    }

    /// The generation of a transaction. A user's own does not name it, but lies behind its marker on every node.
    fn generation_of(&self, head: &Head) -> GenerationNum {
        match head.users_name {
            Some(_) => self.generation,
            None => head.gid.generation,
        }
    }

    /// Before a transaction of a generation, this node's WAL has a marker or fence of that or a later one: who recovers from this node later must read it from there
    /// on, and its ordinary stream does not show it the transaction.
    fn fence(&mut self, generation: GenerationNum) {
        if generation > self.fenced {
            // What is tagged as applied is left out of the ordinary streams.
            process::untagged(|| {
                process::in_transaction(|| recovered::write_marker(generation));
            });
            self.fenced = generation;
        }
    }

    /// Finishes a user's prepared transaction. A commit is noted first: should the stream begin again, at this donor or another one, the PREPARE comes again, and
    /// that of an earlier one of this name that was rolled back.
    fn finish_user(&mut self, name: &[u8], commit: bool) {
        let Ok(name) = std::str::from_utf8(name) else {
            return;
        };
        if commit && self.generation > self.online_in && self.known.insert(name.to_owned()) {
            process::in_transaction(|| recovered::note(name));
        }
        if !commit && self.known.contains(name) {
            return;
        }
        while twophase::finish(name, commit) == twophase::Finished::Busy {
            process::wait_latch(Duration::from_millis(5), Wait::Work);
            process::check_interrupts();
        }
    }

    /// How far behind this node is, for the views and for who decides when it may be a member again.
    fn measure(&mut self) {
        let end = shared().node(self.donor).flushed.load(Ordering::Relaxed);
        let lag = end.saturating_sub(self.seen.0);
        self.show(end);
        let level = self.seen >= self.backlog && !self.retries && lag <= guc::min_recovery_lag();
        if level != self.was_level {
            self.was_level = level;
            submit(&LocalEvent::RecoveryLevel {
                from: self.donor,
                level,
            });
        }
    }

    fn show(&mut self, end: u64) {
        let progress = &shared().recovery_progress;
        progress.applied.store(self.seen.0, Ordering::Relaxed);
        progress.end.store(end.max(self.seen.0), Ordering::Relaxed);
        let since = self.rated_at.elapsed();
        if since >= RATE_INTERVAL {
            let bytes = self.seen.0.saturating_sub(self.rated.0);
            let rate = bytes as f64 / since.as_secs_f64();
            progress.rate.store(rate as u64, Ordering::Relaxed);
            self.rated_at = Instant::now();
            self.rated = self.seen;
        }
    }

    /// The copy of the slot is dropped with the connection: nothing needs to be confirmed.
    fn tell(&mut self, stream: &mut Stream) {
        stream.send(&status_message(self.seen, Lsn::ZERO));
        self.told_at = Instant::now();
    }
}

/// What users are told of a failure.
fn reason_of(failure: &ApplyFailure) -> String {
    let detail = Some(failure.detail.as_str()).filter(|detail| !detail.is_empty());
    let text = detail.map_or(failure.message.clone(), |detail| {
        format!("{} ({detail})", failure.message)
    });
    text.chars().take(REASON_CHARS).collect()
}

/// Which transaction it is.
struct Head {
    gid: Gid,
    /// What a user's own prepared one is called.
    users_name: Option<String>,
}

/// Reads the first frame of a transaction.
fn head_of(messages: &[Vec<u8>]) -> Result<Head, String> {
    let first = messages.first().map_or(&[][..], Vec::as_slice);
    let message = Message::parse(first).map_err(|error| error.to_string())?;
    match message.frames().next() {
        Some(Ok(StreamFrame::Begin(begin))) => Ok(Head {
            gid: begin.gid,
            users_name: Some(begin.name.to_string()).filter(|name| !name.is_empty()),
        }),
        _ => Err("a transaction without its head".to_owned()),
    }
}

/// One transaction from its first frame to its commit; returns the name under which it is known from now on.
fn apply(messages: &[Vec<u8>], head: &Head) -> Result<Option<String>, ApplyFailure> {
    process::begin_transaction();
    let mut applier = rows::RowApplier::begin();
    let mut begun = None::<Begun>;
    for bytes in messages {
        let message = Message::parse(bytes).map_err(ApplyFailure::malformed)?;
        for frame in message.frames() {
            match frame.map_err(ApplyFailure::malformed)? {
                StreamFrame::Begin(_) => begun = Some(Begun::new(head)),
                StreamFrame::Ddl(payload) => {
                    applier.before_ddl();
                    ddl::execute(payload).map_err(ApplyFailure::from)?;
                }
                StreamFrame::Sequence(payload) => {
                    sequences::apply(payload).map_err(ApplyFailure::from)?;
                }
                StreamFrame::Prepare(prepare) if prepare.aborted => {
                    applier.abandon();
                    process::abort_transaction();
                    return Ok(None);
                }
                StreamFrame::Prepare(_) => {}
                row => applier.apply(&row).map_err(ApplyFailure::from)?,
            }
        }
    }
    applier.finish().map_err(ApplyFailure::from)?;
    Ok(begun.and_then(Begun::end))
}

/// A transaction of the cluster, or a user's own prepared one.
enum Begun {
    Cluster(String),
    User(String),
}

impl Begun {
    /// Notes the transaction as recovered, within itself.
    fn new(head: &Head) -> Begun {
        if let Some(name) = &head.users_name {
            return Begun::User(name.clone());
        }
        let name = head.gid.text(shared().cluster_tag());
        recovered::add(&name);
        Begun::Cluster(name)
    }

    fn end(self) -> Option<String> {
        match self {
            Begun::Cluster(name) => {
                process::commit_transaction();
                Some(name)
            }
            Begun::User(name) => {
                twophase::prepare(&name);
                None
            }
        }
    }
}
