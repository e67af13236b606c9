//! The receiver: reads one peer's stream, hands transactions to apply workers, confirms what is safe.

use super::ends::ends_of;
use super::feed::{self, Feed};
use super::progress::{Fences, Progress, Sections, body_of_mark, mark_in};
use super::stream_message::{DATA_HEADER_BYTES, number, status_message};
use super::streamed::Streams;
use crate::arbiter::MARK_ROWS;
use crate::arbiter::event::{LocalEvent, submit};
use crate::cluster::{Identity, slot_name};
use crate::failpoint::{Failpoint, hit};
use crate::guc;
use crate::pg::process::{self, SocketWait, Wait};
use crate::pg::records::{self, Body, DurableTable};
use crate::pg::shared::{self, NodeShared, shared};
use crate::pg::twophase;
use crate::pg::walreceiver::{Received, Stream};
use crate::pg::{locks, senders};
use protocol::membership::{Admission, Phase};
use protocol::{Decision, GenerationNum, Gid, Lsn, NodeId, Record, Refusal, Vote};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use wire::stream::{Begin, Message, StreamFrame};

/// Pause before a peer that does not fit is tried again.
const REFUSED_PAUSE_MS: u64 = 5000;
/// How often a receiver looks whether a transaction may be applied now.
const HOLD_PAUSE: Duration = Duration::from_millis(10);
/// How often the mark is stored and the peer is told, while it moves.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// The same while the peer asks for an answer.
const STATUS_INTERVAL_ASKED: Duration = Duration::from_millis(10);
/// How often the receiver makes the walsenders of its own server go on, while transactions come (see `pg::senders`). The more they lag, the more has to
/// be read when this node has a transaction of its own.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How often the mark is stored while no transaction has come, only WAL that concerns nobody here: storing a mark makes WAL too, and the peers would keep each other
/// awake.
const STATUS_INTERVAL_IDLE: Duration = Duration::from_secs(5);
/// How often the peer is asked how far its WAL goes, when nothing else has come; well below any sensible wal_sender_timeout.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// So far ahead of what has been seen the peer hears that its WAL was received.
///
/// A walsender that goes to sleep tells the receiver where it stands, each time, unless the receiver has that already. With every transaction of the
/// cluster that would cost each stream three messages that nobody needs. What is said about flushed and applied WAL, on which the slot
/// and the peer's shutdown depend, is always the truth.
const UNSAID_BYTES: u64 = 16 * 1024 * 1024;

/// What is done with the transaction that is just being received.
enum Current {
    None,
    Feeding(Feed),
    /// It came before: its frames are dropped, and a vote that is still wanted is sent again.
    Skipping {
        gid: Gid,
        answer: Answer,
    },
}

/// What is said about a transaction that is skipped, when it has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is prepared here: yes, again.
    Yes,
    /// Its generation is over.
    No,
    /// The same, to a user's own PREPARE TRANSACTION.
    NoToUser,
    Nothing,
    /// It comes through a donor: the mark stays before it.
    SetAside,
}

/// State of one stream.
struct Receiver {
    peer: NodeId,
    node: &'static NodeShared,
    marks: DurableTable,
    progress: Progress,
    fences: Fences,
    stored: Lsn,
    current: Current,
    /// Transactions that still run there.
    streams: Streams,
    /// Transactions of this peer that this server knows already; what is not in here and comes is new.
    prepared: BTreeSet<Gid>,
    ended: BTreeSet<Gid>,
    /// Names of users' prepared transactions found at the start, or when this node had last recovered; nobody knows them by gid.
    of_users: BTreeSet<String>,
    recovered_to: GenerationNum,
    /// The generations that the peer's WAL is in, as its markers say.
    sections: Sections,
    stored_at: Instant,
    told_at: Instant,
    /// When the walsenders of this server were last looked after.
    looked_at: Instant,
    seen: Lsn,
    /// Losses of the peer when this process began.
    losses: u64,
    reply_wanted: bool,
    /// A user waits at the peer for what has just been done here.
    confirm_now: bool,
    /// The peer tells of each step, because it was asked, and can stop now.
    told_too_much: bool,
}

/// Body of the background worker `multimaster receiver <peer>`.
pub fn main(peer: NodeId) {
    process::attach_signals();
    process::stay_local();
    let node = shared().node(peer);
    // The one before may have been slow to come up, and a second one was asked for.
    if !node.receiver.claim() {
        return;
    }
    RECEIVED_FROM.store(u32::from(peer.get()), Ordering::Relaxed);
    process::at_exit(leave);
    process::connect_to_cluster();
    process::tag_as_applied();
    // Workers may still be busy with what an earlier life of this receiver gave them: only then is it known what has come before.
    feed::drain(peer);
    let identity = match process::in_transaction(Identity::load) {
        Ok(Some(identity)) => identity,
        Ok(None) => return,
        Err(error) => return pgrx::warning!("multimaster cannot read its catalog: {error}"),
    };
    let Some(target) = identity.nodes.iter().find(|other| other.id == peer) else {
        return;
    };
    let mut receiver = Receiver::recover(peer, node);
    let slot = slot_name(identity.tag, identity.node_id);
    let ends = match process::in_transaction(|| ends_of(&target.conninfo, &slot)) {
        Ok(ends) => ends,
        Err(error) => {
            return pgrx::log!("multimaster receiver of node {}: {error}", peer.get());
        }
    };
    if let Err(error) = ends.check(receiver.stored) {
        pgrx::warning!("multimaster receiver of node {}: {error}", peer.get());
        return process::pause_ms(REFUSED_PAUSE_MS);
    }
    node.peer_end.store(ends.wal.0, Ordering::Release);
    let mut stream = match Stream::connect(
        &target.conninfo,
        &format!("multimaster node {}", identity.node_id.get()),
    ) {
        Ok(stream) => stream,
        Err(error) => return pgrx::log!("multimaster receiver of node {}: {error}", peer.get()),
    };
    if let Err(error) = stream.start(&slot, receiver.stored) {
        return pgrx::warning!("multimaster receiver of node {}: {error}", peer.get());
    }
    node.receiving.store(true, Ordering::Release);
    shared().wake_arbiter_thread();
    receiver.run(&mut stream);
}

/// Which peer this process receives from; for the exit callback.
static RECEIVED_FROM: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

fn leave() {
    if let Some(peer) = NodeId::new(RECEIVED_FROM.load(Ordering::Relaxed) as u8) {
        let node = shared().node(peer);
        node.receiving.store(false, Ordering::Release);
        feed::break_off();
        node.receiver.release();
        shared().wake_arbiter_thread();
        shared().arbiter.wake();
    }
}

impl Receiver {
    fn recover(peer: NodeId, node: &'static NodeShared) -> Receiver {
        // In this order: finishes go on meanwhile, and each writes its record first. What is no longer prepared has its record by then.
        let names = locks::prepared_names();
        let prepared: BTreeSet<Gid> = names
            .into_values()
            .filter_map(|name| Gid::parse(&name))
            .map(|(_, gid)| gid)
            .filter(|gid| gid.coordinator == peer)
            .collect();
        let (marks, stored, generation, ended) = process::in_transaction(|| {
            let marks = DurableTable::open(c"marks", MARK_ROWS);
            let (stored, generation) = mark_in(&marks.read_all()[peer.get() as usize]);
            let ended = DurableTable::open(c"records", 0)
                .read_all()
                .iter()
                .filter_map(|body| Record::from_bytes(body).ok())
                .filter(|record| record.gid.coordinator == peer)
                .filter(|record| record.decision.is_some() || !record.voted_yes)
                .map(|record| record.gid)
                .collect();
            (marks, stored, generation, ended)
        });
        node.mark.store(stored.0, Ordering::Release);
        Receiver {
            peer,
            node,
            marks,
            progress: Progress::new(stored),
            fences: Fences::default(),
            stored,
            current: Current::None,
            streams: Streams::default(),
            prepared,
            ended,
            of_users: names_of_users(),
            recovered_to: shared().standing.get().recovered_to,
            sections: Sections::new(generation),
            stored_at: Instant::now(),
            told_at: Instant::now(),
            looked_at: Instant::now(),
            seen: stored,
            losses: node.losses.load(Ordering::Acquire),
            reply_wanted: true,
            confirm_now: false,
            told_too_much: false,
        }
    }

    /// Whether the arbiters have lost each other since the stream began and talk again. What was cut may have left this connection dead without
    /// telling: it would be noticed only much later.
    fn is_outlived(&self) -> bool {
        self.node.losses.load(Ordering::Acquire) != self.losses
            && self.node.linked.load(Ordering::Acquire)
    }

    fn run(&mut self, stream: &mut Stream) {
        let mut waiting = None::<SocketWait>;
        loop {
            process::check_interrupts();
            if self.is_outlived() {
                pgrx::log!(
                    "multimaster receiver of node {}: connects anew, as the arbiters did",
                    self.peer.get()
                );
                return;
            }
            match stream.receive() {
                Received::Message(message) => self.on_message(message),
                Received::Nothing { socket } => {
                    let gone_on = self.streams.go_on(may_apply_ahead());
                    self.expect_spooled(gone_on);
                    self.tell(stream);
                    let wait = waiting.take().filter(|wait| wait.socket() == socket);
                    waiting
                        .insert(wait.unwrap_or_else(|| SocketWait::new(socket)))
                        .wait(STATUS_INTERVAL, Wait::Stream);
                }
                Received::End => {
                    pgrx::log!(
                        "multimaster receiver of node {}: the stream ended",
                        self.peer.get()
                    );
                    return;
                }
            }
            if self.confirm_now || self.told_at.elapsed() >= STATUS_INTERVAL {
                self.tell(stream);
            }
            if self.looked_at.elapsed() >= LOOK_INTERVAL {
                self.looked_at = Instant::now();
                senders::wake_if_behind();
            }
        }
    }

    fn on_message(&mut self, message: &[u8]) {
        match message.first() {
            Some(b'w') if message.len() > DATA_HEADER_BYTES => {
                let at = Lsn(number(message, 1));
                self.see(Lsn(number(message, 9)));
                self.on_data(at, &message[DATA_HEADER_BYTES..]);
            }
            Some(b'k') if message.len() >= 18 => {
                let end = Lsn(number(message, 1));
                self.see(end);
                if matches!(self.current, Current::None) {
                    self.progress.pass(end);
                }
                self.reply_wanted |= message[17] != 0;
                self.told_too_much = true;
            }
            _ => pgrx::error!(
                "multimaster receiver of node {}: unknown replication message",
                self.peer.get()
            ),
        }
    }

    /// The peer's WAL reaches this far.
    fn see(&mut self, end: Lsn) {
        self.seen = self.seen.max(end);
        self.node.received.fetch_max(self.seen.0, Ordering::AcqRel);
        self.node.streamed.store(self.seen.0, Ordering::Relaxed);
    }

    /// `at` is the end of the PREPARE for the message that ends a transaction.
    fn on_data(&mut self, at: Lsn, bytes: &[u8]) {
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(error) => pgrx::error!("multimaster receiver of node {}: {error}", self.peer.get()),
        };
        if message.is_piece() {
            return self.add_piece(&message, bytes);
        }
        if message.begins() && self.begin(&message, bytes) {
            return;
        }
        match &self.current {
            Current::None => return self.outside_transaction(&message),
            Current::Feeding(feed) => self.pass_on(feed, bytes),
            Current::Skipping { .. } => {}
        }
        if message.ends() {
            self.end(at);
        }
    }

    /// Part of a transaction that still runs.
    fn add_piece(&mut self, message: &Message<'_>, bytes: &[u8]) {
        let Some(Ok(StreamFrame::Piece(piece))) = message.frames().next() else {
            pgrx::error!(
                "multimaster receiver of node {}: a piece without its head",
                self.peer.get()
            );
        };
        let added = self.streams.add(&piece, bytes, may_apply_ahead());
        self.expect_spooled(added);
    }

    /// Ends this process when a temporary file does not do what it should: the stream comes again.
    fn expect_spooled<T>(&self, result: std::io::Result<T>) -> T {
        result.unwrap_or_else(|error| {
            pgrx::error!(
                "multimaster receiver of node {}: cannot keep a running transaction in a temporary file: {error}",
                self.peer.get()
            )
        })
    }

    /// A transaction's head has come. True when the message has been passed on already.
    fn begin(&mut self, message: &Message<'_>, bytes: &[u8]) -> bool {
        let (begin, streamed) = match message.frames().next() {
            Some(Ok(StreamFrame::Begin(begin))) => (begin, None),
            Some(Ok(StreamFrame::Resume(resume))) => (resume.begin, self.streams.take(resume.top)),
            _ => pgrx::error!(
                "multimaster receiver of node {}: a transaction without its head",
                self.peer.get()
            ),
        };
        let gid = begin.gid;
        hit(Failpoint::ReceiverBegins);
        match (self.answer_at_once(&begin), streamed) {
            (Some(answer), streamed) => {
                if let Some(streamed) = streamed {
                    streamed.drop_all();
                }
                self.current = Current::Skipping { gid, answer };
                false
            }
            (None, None) => {
                self.current = Current::Feeding(Feed::claim(|| ()));
                false
            }
            (None, Some(streamed)) => {
                let fed = streamed.resume(bytes, may_apply_ahead);
                self.current = Current::Feeding(self.expect_spooled(fed));
                true
            }
        }
    }

    /// What to do with a transaction that is not to be applied; none when it is.
    fn answer_at_once(&mut self, begin: &Begin<'_>) -> Option<Answer> {
        let gid = begin.gid;
        let name = begin.name.as_bytes();
        if !name.starts_with(b"mtm-") {
            self.admit_users(gid, name)
        } else if self.prepared.contains(&gid) {
            Some(Answer::Yes)
        } else if self.ended.contains(&gid) {
            Some(Answer::Nothing)
        } else {
            admit(gid)
        }
    }

    /// A user's own PREPARE TRANSACTION. The number in its gid is that of whoever decoded it; which generation it is of, the markers before it
    /// tell, also those before the mark at which this process has started.
    fn admit_users(&mut self, gid: Gid, name: &[u8]) -> Option<Answer> {
        let gid = Gid {
            generation: self.sections.latest(),
            ..gid
        };
        let answer = admit(gid);
        let recovered_to = shared().standing.get().recovered_to;
        if self.recovered_to != recovered_to {
            self.recovered_to = recovered_to;
            self.of_users = names_of_users();
        }
        let is_here = std::str::from_utf8(name).is_ok_and(|name| self.of_users.remove(name));
        match answer {
            _ if is_here => Some(Answer::Nothing),
            Some(Answer::No) => Some(Answer::NoToUser),
            answer => answer,
        }
    }

    fn pass_on(&self, feed: &Feed, bytes: &[u8]) {
        // A worker that is gone has voted no: the rest of the transaction is not wanted.
        let _ = feed.write_message(bytes);
    }

    fn end(&mut self, at: Lsn) {
        match std::mem::replace(&mut self.current, Current::None) {
            Current::Feeding(feed) => {
                self.progress.hand(at, feed.index, feed.job);
                hit(Failpoint::ReceiverHands);
                feed.end();
            }
            Current::Skipping { gid, answer } => {
                hit(Failpoint::ReceiverSkips);
                let vote = match answer {
                    Answer::Yes => Some(Vote::Yes),
                    Answer::No => Some(Vote::No(generation_over())),
                    Answer::NoToUser => {
                        let vote = Vote::No(generation_over());
                        submit(&LocalEvent::UserVoted { gid, vote });
                        None
                    }
                    Answer::Nothing => None,
                    Answer::SetAside => {
                        // The mark may be anywhere before the transaction's end.
                        self.fences.put(Lsn(at.0.saturating_sub(1)), gid.generation);
                        None
                    }
                };
                if let Some(vote) = vote {
                    submit(&LocalEvent::Voted { gid, vote, lsn: at });
                }
                self.progress.pass(at);
            }
            Current::None => {}
        }
    }

    fn outside_transaction(&mut self, message: &Message<'_>) {
        for frame in message.frames() {
            match frame {
                Ok(StreamFrame::CommitPrepared(end)) => {
                    self.on_outcome(end.gid, end.name.as_bytes(), Decision::Commit, end.end_lsn)
                }
                Ok(StreamFrame::RollbackPrepared(end)) => {
                    self.on_outcome(end.gid, end.name.as_bytes(), Decision::Abort, end.end_lsn)
                }
                Ok(StreamFrame::FinishUser(finish)) => {
                    // The message begins there: only a mark beyond it says that this was done.
                    let beyond = Lsn(finish.lsn.0 + 1);
                    self.finish_user(finish.name.as_bytes(), finish.commit, beyond);
                    self.confirm_now = true;
                }
                Ok(StreamFrame::Marker(marker)) => {
                    self.sections.mark(marker.lsn, marker.generation);
                    self.fences.put(marker.lsn, marker.generation);
                }
                Ok(StreamFrame::Undo(undo)) => self.streams.undo(undo),
                Ok(_) => pgrx::error!(
                    "multimaster receiver of node {}: a change outside of a transaction",
                    self.peer.get()
                ),
                Err(error) => {
                    pgrx::error!("multimaster receiver of node {}: {error}", self.peer.get())
                }
            }
        }
    }

    /// The outcome travels by message; the stream is the fallback while the link is down.
    fn on_outcome(&mut self, gid: Gid, name: &[u8], decision: Decision, end: Lsn) {
        if !name.starts_with(b"mtm-") {
            return self.finish_user(name, shared::is_commit(decision), end);
        }
        if !self.node.linked.load(Ordering::Acquire) {
            submit(&LocalEvent::StreamOutcome { gid, decision });
        }
        self.progress.pass(end);
    }

    /// A user's COMMIT or ROLLBACK PREPARED. Its PREPARE came earlier in some stream; where that is still under way, it is waited for.
    ///
    /// Such transactions have no record. Instead the mark behind the PREPARE precedes the finish in WAL, so that it does not come again.
    fn finish_user(&mut self, name: &[u8], commit: bool, end: Lsn) {
        let mut mark = self.advance();
        while !self.progress.is_idle() {
            process::wait_latch(Duration::from_millis(5), Wait::Worker);
            process::check_interrupts();
            mark = self.advance();
        }
        hit(Failpoint::UserBeforeMark);
        if mark > self.stored {
            let row = self.row_of(mark);
            process::in_transaction(|| self.marks.write(&mut [row]));
        }
        hit(Failpoint::UserBeforeFinish);
        if let Ok(name) = std::str::from_utf8(name) {
            while twophase::finish(name, commit) == twophase::Finished::Busy {
                process::wait_latch(Duration::from_millis(5), Wait::Work);
                process::check_interrupts();
            }
        }
        hit(Failpoint::UserAfterFinish);
        self.progress.pass(end);
    }

    /// How far everything is safe here.
    fn advance(&mut self) -> Lsn {
        let mark = self
            .progress
            .advance(|worker| shared::workers()[worker].jobs_done.load(Ordering::Acquire));
        // In this order: a job that was lost is called lost before it is called done.
        if feed::lost_one() {
            pgrx::error!(
                "an apply worker went away; the stream of node {} starts again from {}",
                self.peer.get(),
                self.stored
            );
        }
        self.fences.limit(mark, shared().standing.get())
    }

    /// Stores the mark if it has moved, and tells the peer.
    fn tell(&mut self, stream: &mut Stream) {
        let mark = self.advance();
        let quiet = self.told_at.elapsed();
        let now = std::mem::take(&mut self.confirm_now);
        if mark > self.stored && (now || self.stored_at.elapsed() >= self.store_pause()) {
            self.store(mark);
        } else if !self.reply_wanted
            && quiet < ASK_INTERVAL
            && (!self.told_too_much || quiet < STATUS_INTERVAL_ASKED)
        {
            return;
        }
        // A peer that asks, or is asked, hears the truth.
        let written = if self.reply_wanted || quiet >= ASK_INTERVAL || self.stored == Lsn::ZERO {
            self.seen
        } else {
            Lsn(self.seen.0 + UNSAID_BYTES)
        };
        stream.send(&status_message(written, self.stored));
        hit(Failpoint::MarkAfterConfirm);
        self.reply_wanted = false;
        self.told_too_much = false;
        self.told_at = Instant::now();
    }

    /// How old the stored mark may become.
    fn store_pause(&self) -> Duration {
        if self.reply_wanted {
            // A walsender that stops with its server asks again and again until everything it sent is confirmed.
            STATUS_INTERVAL_ASKED
        } else if self.progress.has_done_work() {
            STATUS_INTERVAL
        } else {
            STATUS_INTERVAL_IDLE
        }
    }

    /// The durable row of a mark.
    fn row_of(&mut self, mark: Lsn) -> (u32, Body) {
        let generation = self.sections.at(mark);
        (u32::from(self.peer.get()), body_of_mark(mark, generation))
    }

    fn store(&mut self, mark: Lsn) {
        let row = self.row_of(mark);
        hit(Failpoint::MarkBeforeStore);
        let end = process::in_transaction(|| self.marks.write(&mut [row]));
        hit(Failpoint::MarkBeforeFlush);
        records::flush(end);
        hit(Failpoint::MarkBeforeConfirm);
        self.stored = mark;
        self.stored_at = Instant::now();
        self.progress.stored();
        self.node.mark.store(mark.0, Ordering::Release);
        submit(&LocalEvent::MarkStored {
            node: self.peer,
            lsn: mark,
        });
    }
}

/// Names of the prepared transactions that are users' own.
fn names_of_users() -> BTreeSet<String> {
    let names = locks::prepared_names().into_values();
    names.filter(|name| Gid::parse(name).is_none()).collect()
}

/// Whether transactions that still run may be applied here. A node that recovers gets what they build on in another way.
fn may_apply_ahead() -> bool {
    guc::stream_in_progress() && shared().standing.get().phase == Phase::Online
}

/// Waits until it is known what to do with a transaction that is new here; none when it is to be applied.
fn admit(gid: Gid) -> Option<Answer> {
    loop {
        match shared().admit(gid) {
            Admission::Apply => return None,
            Admission::Refuse => return Some(Answer::No),
            Admission::Skip => return Some(Answer::Nothing),
            Admission::SetAside => return Some(Answer::SetAside),
            Admission::Hold => {
                process::wait_latch(HOLD_PAUSE, Wait::Stream);
                process::check_interrupts();
            }
        }
    }
}

fn generation_over() -> Refusal {
    Refusal::retry(
        "the set of working nodes changed while the transaction was on its way",
        "",
    )
}
