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
use crate::guc;
use crate::pg::apply_error::{ApplyFailure, attempt};
use crate::pg::process::{self, SocketWait, Wait};
use crate::pg::records::{self, DurableTable};
use crate::pg::recovered;
use crate::pg::shared::shared;
use crate::pg::walreceiver::{Received, Stream};
use crate::pg::{ddl, locks, rows, sequences, twophase};
use protocol::{GenerationNum, Gid, Lsn, NodeId};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use wire::stream::{Marker, Message, StreamFrame};

use super::stream_message::{DATA_HEADER_BYTES, number, status_message};

/// How often the donor hears from us.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before a transaction that failed is tried again, and how often it is.
const RETRY_PAUSE_MS: u64 = 500;
const TRIES: u32 = 5;

/// Whom this process recovers from; for the exit callback.
static DONOR: AtomicU32 = AtomicU32::new(0);

/// Where the process stands.
struct Recovery {
    donor: NodeId,
    /// Transactions of this generation and older are here, or can never commit.
    online_in: GenerationNum,
    /// Names of what has been recovered since.
    known: BTreeSet<String>,
    /// Messages of the transaction that is being received.
    pending: Vec<Vec<u8>>,
    seen: Lsn,
    told_at: Instant,
    was_level: bool,
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
    if let Err(error) = run(donor) {
        pgrx::warning!("multimaster recovery from node {}: {error}", donor.get());
    }
}

fn leave() {
    if shared().recovery.release()
        && let Some(from) = NodeId::new(DONOR.load(Ordering::Relaxed) as u8)
    {
        submit(&LocalEvent::RecoveryLost { from });
        shared().arbiter.wake();
    }
}

fn run(donor: NodeId) -> Result<(), String> {
    let identity = match process::in_transaction(Identity::load) {
        Ok(Some(identity)) => identity,
        Ok(None) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    let Some(target) = identity.nodes.iter().find(|node| node.id == donor) else {
        return Ok(());
    };
    let (mark, known) = process::in_transaction(|| {
        let marks = DurableTable::open(c"marks", MARK_ROWS);
        let mark = Lsn(number_in(&marks.read_all()[donor.get() as usize]));
        (mark, recovered::names())
    });
    let name = format!("multimaster node {} recovers", identity.node_id.get());
    let mut stream = Stream::connect(&target.conninfo, &name).map_err(|error| error.to_string())?;
    let slot = slot_name(identity.tag, identity.node_id);
    let copy = format!("{slot}_recovery_{}", std::process::id());
    stream
        .copy_slot(&slot, &copy)
        .and_then(|()| stream.start_for(&copy, mark, decode::RECOVERY))
        .map_err(|error| error.to_string())?;
    pgrx::log!(
        "multimaster recovers from node {}, from {mark}",
        donor.get()
    );
    let mut recovery = Recovery {
        donor,
        online_in: shared().online_in(),
        known,
        pending: Vec::new(),
        seen: mark,
        told_at: Instant::now(),
        was_level: false,
    };
    recovery.receive_all(&mut stream)
}

impl Recovery {
    /// Until this process is no longer wanted, or the stream ends.
    fn receive_all(&mut self, stream: &mut Stream) -> Result<(), String> {
        let mut waiting = None::<SocketWait>;
        loop {
            process::check_interrupts();
            if shared().recover_from() != Some(self.donor) {
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
                Received::End => return Err("the stream ended".to_owned()),
            }
            if self.told_at.elapsed() >= STATUS_INTERVAL {
                self.tell(stream);
            }
        }
    }

    fn on_message(&mut self, message: &[u8]) -> Result<(), String> {
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
            _ => return Err("unknown replication message".to_owned()),
        }
        self.measure();
        Ok(())
    }

    fn on_data(&mut self, at: Lsn, bytes: &[u8]) -> Result<(), String> {
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
                StreamFrame::CommitPrepared(end) => finish_user(end.name.as_bytes(), true),
                StreamFrame::RollbackPrepared(end) => finish_user(end.name.as_bytes(), false),
                StreamFrame::FinishUser(finish) => {
                    finish_user(finish.name.as_bytes(), finish.commit);
                }
                _ => return Err("a change outside of a transaction".to_owned()),
            }
        }
        self.seen = self.seen.max(at);
        Ok(())
    }

    /// Everything older than the generation lies before: it counts once it is flushed.
    fn on_marker(&self, marker: Marker) {
        records::flush_all();
        submit(&LocalEvent::MarkerReached {
            from: self.donor,
            num: marker.generation,
        });
    }

    /// Applies a transaction, again if that fails: locks of what this node prepared before it went away go when its outcome is known.
    fn commit(&mut self, messages: &[Vec<u8>]) -> Result<(), String> {
        let mut tries = 0;
        loop {
            let result = attempt(|| apply(messages, &self.known, self.online_in));
            match result {
                Ok(Some(name)) => {
                    self.known.insert(name);
                    return Ok(());
                }
                Ok(None) => return Ok(()),
                Err(failure) => {
                    rows::forget_all();
                    process::abort_transaction();
                    tries += 1;
                    pgrx::warning!(
                        "multimaster recovery could not apply a transaction: {} ({})",
                        failure.message,
                        failure.detail
                    );
                    if tries == TRIES {
                        return Err(failure.message);
                    }
                    process::pause_ms(RETRY_PAUSE_MS);
                }
            }
            process::check_interrupts();
        }
    }

    /// How far behind this node is, for the views and for who decides when it may be a member again.
    fn measure(&mut self) {
        let end = shared().node(self.donor).flushed.load(Ordering::Relaxed);
        let lag = end.saturating_sub(self.seen.0);
        shared().recovery_lag.store(lag, Ordering::Relaxed);
        let level = end > 0 && lag <= guc::min_recovery_lag();
        if level != self.was_level {
            self.was_level = level;
            submit(&LocalEvent::RecoveryLevel {
                from: self.donor,
                level,
            });
        }
    }

    /// The copy of the slot is dropped with the connection: nothing needs to be confirmed.
    fn tell(&mut self, stream: &mut Stream) {
        stream.send(&status_message(self.seen, Lsn::ZERO));
        self.told_at = Instant::now();
    }
}

/// One transaction from its first frame to its commit; returns the name under which it is known from now on, if it was not here already.
fn apply(
    messages: &[Vec<u8>],
    known: &BTreeSet<String>,
    online_in: GenerationNum,
) -> Result<Option<String>, ApplyFailure> {
    process::begin_transaction();
    let mut applier = rows::RowApplier::begin();
    let mut begun = None::<Begun>;
    for bytes in messages {
        let message = Message::parse(bytes).map_err(ApplyFailure::malformed)?;
        for frame in message.frames() {
            match frame.map_err(ApplyFailure::malformed)? {
                StreamFrame::Begin(begin) => {
                    let users_name = begin.name.to_string();
                    if is_here(begin.gid, &users_name, known, online_in) {
                        applier.abandon();
                        process::abort_transaction();
                        return Ok(None);
                    }
                    begun = Some(Begun::new(begin.gid, users_name));
                }
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
    fn new(gid: Gid, users_name: String) -> Begun {
        if !users_name.is_empty() {
            return Begun::User(users_name);
        }
        let name = gid.text(shared().cluster_tag());
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

/// Whether there is nothing to do for the transaction. A user's own has a name, and is here when it is prepared.
fn is_here(gid: Gid, users_name: &str, known: &BTreeSet<String>, online_in: GenerationNum) -> bool {
    if !users_name.is_empty() {
        return locks::prepared_names()
            .values()
            .any(|name| name == users_name);
    }
    gid.generation <= online_in || known.contains(&gid.text(shared().cluster_tag()))
}

fn finish_user(name: &[u8], commit: bool) {
    let Ok(name) = std::str::from_utf8(name) else {
        return;
    };
    while twophase::finish(name, commit) == twophase::Finished::Busy {
        process::wait_latch(Duration::from_millis(5), Wait::Work);
        process::check_interrupts();
    }
}
