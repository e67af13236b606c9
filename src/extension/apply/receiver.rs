//! The receiver: reads one peer's stream, hands transactions to apply workers (whether at all: [`admission`]), confirms what is safe ([`mark`]), finishes
//! users' prepared transactions ([`users`]).

mod admission;
mod mark;
mod users;

use self::admission::{Answer, generation_over, name_in_use};
use self::mark::STATUS_INTERVAL;
use self::users::{MARK_PAUSE, Users};
use super::ends::take_over;
use super::feed::{self, Feed};
use super::progress::{Fences, Progress, Sections, mark_in};
use super::stream_message::{DATA_HEADER_BYTES, number};
use super::streamed::Streams;
use crate::arbiter::MARK_ROWS;
use crate::arbiter::event::{LocalEvent, submit};
use crate::cluster::{Identity, slot_name};
use crate::failpoint::{Failpoint, hit};
use crate::guc;
use crate::pg::process::{self, SocketWait, Wait};
use crate::pg::records::{self, DurableTable};
use crate::pg::shared::{self, NodeShared, shared};
use crate::pg::walreceiver::{Received, Stream};
use crate::pg::{locks, senders};
use protocol::membership::Phase;
use protocol::{Decision, Gid, Lsn, NodeId, Record, Vote};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use wire::stream::{Message, StreamFrame};

/// Pause before a peer that does not fit is tried again.
const REFUSED_PAUSE_MS: u64 = 5000;
/// How often the receiver makes the walsenders of its own server go on, while transactions come (see `pg::senders`). The more they lag, the more has to
/// be read when this node has a transaction of its own.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How long a server that stops is kept from it while nothing new can be confirmed.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(1);

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
    /// Nobody knows these by gid.
    users: Users,
    /// Where the peer's WAL ended when this process started: up to there its stream may bring again what is here.
    again: Lsn,
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
    /// The mark while the peer, whose arbiter has gone, asks for more, and since when it is there.
    held: Option<(Lsn, Instant)>,
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
    let ends = match process::in_transaction(|| take_over(&target.conninfo, &slot, receiver.stored))
    {
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
    receiver.again = ends.wal;
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
        node.replay.end();
        feed::break_off();
        node.receiver.release();
        shared().wake_arbiter_thread();
        shared().arbiter.wake();
    }
}

impl Receiver {
    fn recover(peer: NodeId, node: &'static NodeShared) -> Receiver {
        // In this order: finishes go on meanwhile, and each writes its record first. What is no longer prepared has its record by then.
        let users = Users::new();
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
        // The one before may have written it for a finish that was not flushed yet, and it is about to be confirmed.
        records::flush_all();
        node.mark.store(stored.0, Ordering::Release);
        node.replay.begin(stored);
        let sections = Sections::new(generation);
        // A copy of a node that has not been online yet lacks, of all that lies behind, what this stream does not show.
        let mut fences = Fences::default();
        fences.put(stored, sections.latest());
        Receiver {
            peer,
            node,
            marks,
            progress: Progress::new(stored),
            fences,
            stored,
            current: Current::None,
            streams: Streams::default(),
            prepared,
            ended,
            users,
            again: Lsn(u64::MAX),
            sections,
            stored_at: Instant::now(),
            told_at: Instant::now(),
            looked_at: Instant::now(),
            seen: stored,
            losses: node.losses.load(Ordering::Acquire),
            reply_wanted: true,
            confirm_now: false,
            told_too_much: false,
            held: None,
        }
    }

    /// Whether the arbiters have lost each other since the stream began.
    fn has_lost_peer(&self) -> bool {
        self.node.losses.load(Ordering::Acquire) != self.losses
    }

    /// Whether they talk again. What was cut may have left this connection dead without telling: it would be noticed only much later.
    fn is_outlived(&self) -> bool {
        self.has_lost_peer() && self.node.linked.load(Ordering::Acquire)
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
            if self
                .held
                .is_some_and(|(_, since)| since.elapsed() >= PATIENCE_AT_STOP)
            {
                pgrx::log!(
                    "multimaster receiver of node {}: lets go of it, since it stops; what is not confirmed comes again",
                    self.peer.get()
                );
                return;
            }
            self.note_level();
            self.write_wanted_mark();
            if self.finish_users() {
                process::wait_latch(MARK_PAUSE, Wait::Stream);
                self.tell_in_time(stream);
                continue;
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
            self.tell_in_time(stream);
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
                let asks = message[17] != 0;
                self.note_stop(end, asks);
                self.reply_wanted |= asks;
                self.told_too_much = true;
            }
            _ => pgrx::error!(
                "multimaster receiver of node {}: unknown replication message",
                self.peer.get()
            ),
        }
    }

    /// A server that stops asks again and again until everything it sent is confirmed. While this node is not online it confirms nothing that it has to
    /// get through a donor, and that may take hours; nor what a process here has in hand that hangs.
    fn note_stop(&mut self, end: Lsn, asks: bool) {
        let mark = self.advance();
        let stops = asks && !self.node.linked.load(Ordering::Acquire) && mark < end;
        let same = self.held.filter(|(held, _)| *held == mark);
        self.held = stops.then(|| same.unwrap_or((mark, Instant::now())));
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
            Current::Feeding(_) => self.pass_on(bytes),
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
                let feed = Feed::claim(|| {
                    self.write_wanted_mark();
                });
                self.current = Current::Feeding(feed);
                false
            }
            (None, Some(streamed)) => {
                let fed = streamed.resume(bytes, may_apply_ahead);
                self.current = Current::Feeding(self.expect_spooled(fed));
                true
            }
        }
    }

    fn pass_on(&mut self, bytes: &[u8]) {
        if let Current::Feeding(feed) = std::mem::replace(&mut self.current, Current::None) {
            // A worker that is gone has voted no: the rest of the transaction is not wanted.
            let _ = feed.write_message(bytes, || {
                self.write_wanted_mark();
            });
            self.current = Current::Feeding(feed);
        }
    }

    fn end(&mut self, at: Lsn) {
        if let Some(name) = self.users.take_expected() {
            self.node.replay.note(name.as_bytes(), at);
        }
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
                    Answer::NoToNamesake => {
                        let vote = Vote::No(name_in_use());
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
                    self.on_finish(finish.name.as_bytes(), finish.commit, beyond, true);
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
            return self.on_finish(name, shared::is_commit(decision), end, false);
        }
        if !self.node.linked.load(Ordering::Acquire) {
            submit(&LocalEvent::StreamOutcome { gid, decision });
        }
        self.progress.pass(end);
    }
}

/// Whether transactions that still run may be applied here. A node that recovers gets what they build on in another way.
fn may_apply_ahead() -> bool {
    guc::stream_in_progress() && shared().standing.get().phase == Phase::Online
}
