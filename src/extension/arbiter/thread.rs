//! The arbiter's tokio thread: sockets, timers and the protocol core.
//!
//! It calls nothing of PostgreSQL but `SetLatch`. Facts come in from the other processes (events in shared memory), the peers (mesh) and the main
//! thread (durable batches, look-ups); what the core wants done goes out the same ways. Nothing is decided here.

use super::counters::{self, Refusals};
use super::durable::{Batch, DurableOrder, Tuples};
use super::event::{self, Fate, FinishOrder, InFlight, LocalEvent, Question};
use super::finishing::Finishing;
use super::start::Decider;
use super::trace;
use super::user_votes::{UserTally, UserVotes};
use crate::failpoint::{self, Failpoint, hit_in_thread};
use crate::pg::shared::{self, EVENT_BYTES, NodeStatus, outcome, shared};
use crate::pg::thread as os_thread;
use mesh::{MeshEvent, MeshHandle};
use protocol::{
    Ballot, Core, Decision, Effect, Effects, Event, Gid, Input, Lsn, Message, Millis, NodeId,
    NodeSet, Outcome, Refusal, Source, Vote,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use wire::frame::Heartbeat;

/// How often the core's timers run.
const TICK: Duration = Duration::from_millis(20);
/// Transactions in flight that a view shows at most; they fit the board.
const IN_FLIGHT_SHOWN: usize = 2000;
/// A transaction that has ended and whose PREPARE has not come by then is given a place in the stream.
const PLACED_AFTER_MS: Millis = 2000;
/// Local events handled before the sockets get their turn.
const EVENTS_PER_TURN: usize = 256;

/// What the main thread is asked to do.
pub enum ToMain {
    /// Write the records, flush if somebody waits, and answer with `FromMain::Durable`.
    Write(Batch),
    /// Look into pg_xact for the outcome of a transaction of this node.
    LookUp(Gid),
    /// Something for the server log.
    Log(LogRecord),
}

/// A line for the server log.
pub struct LogRecord {
    pub level: LogLevel,
    pub text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// A step of one transaction.
    Debug,
    Info,
    Warning,
}

/// What the main thread answers.
pub enum FromMain {
    Durable(Vec<Gid>),
    Outcome {
        gid: Gid,
        outcome: Option<Decision>,
    },
    /// The main thread works: this node may speak to its peers for another while.
    Alive,
    /// Settings were read again.
    Reconfigure {
        send_ms: u64,
        recv_ms: u64,
    },
    Stop,
}

/// Sends to the main thread and wakes it.
pub struct MainLink {
    pub queue: crossbeam_channel::Sender<ToMain>,
}

impl MainLink {
    fn send(&self, request: ToMain) {
        if self.queue.send(request).is_ok() {
            shared().arbiter.wake();
        }
    }

    fn log(&self, level: LogLevel, text: String) {
        self.send(ToMain::Log(LogRecord { level, text }));
    }
}

/// Everything the thread owns.
pub struct Arbiter {
    pub node: NodeId,
    pub configured: NodeSet,
    pub core: Core,
    pub tuples: Tuples,
    pub main: MainLink,
    pub mesh: MeshHandle,
    started: Instant,
    /// How long this node goes on speaking without a sign of life of its main thread.
    silence: Duration,
    effects: Effects,
    user_votes: UserVotes,
    order: DurableOrder,
    /// Backends that wait for an outcome.
    waiting: BTreeMap<Gid, Waiting>,
    /// Messages of this node to itself.
    to_self: VecDeque<Message>,
    finishing: Finishing,
    linked: NodeSet,
    peer_views: BTreeMap<NodeId, NodeSet>,
    refusals: Refusals,
}

#[derive(Clone, Copy)]
struct Waiting {
    backend: u32,
    since: Instant,
}

impl Arbiter {
    pub fn new(
        node: NodeId,
        configured: NodeSet,
        decider: Decider,
        main: MainLink,
        mesh: MeshHandle,
        silence: Duration,
    ) -> Arbiter {
        Arbiter {
            node,
            configured,
            core: decider.core,
            tuples: decider.tuples,
            main,
            mesh,
            started: Instant::now(),
            silence,
            effects: decider.effects,
            user_votes: UserVotes::default(),
            order: DurableOrder::default(),
            waiting: BTreeMap::new(),
            to_self: VecDeque::new(),
            finishing: Finishing::default(),
            linked: NodeSet::default(),
            peer_views: BTreeMap::new(),
            refusals: Refusals::default(),
        }
    }

    /// Runs until the main thread says stop or goes away.
    pub async fn run(
        mut self,
        mut mesh_events: mpsc::Receiver<MeshEvent>,
        mut from_main: mpsc::UnboundedReceiver<FromMain>,
    ) -> std::io::Result<()> {
        let mut first = std::mem::take(&mut self.effects);
        hit_in_thread(Failpoint::StartBeforeEffects);
        self.carry_out(first.drain());
        hit_in_thread(Failpoint::StartAfterEffects);
        self.adopt_waiting_backends();
        let wake = os_thread::wake_readiness()?;
        // An earlier life of this process may have died between draining the descriptor and saying so.
        accept_wakes();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ready = wake.readable() => {
                    let mut ready = ready?;
                    os_thread::drain_wake_fd();
                    ready.clear_ready();
                    accept_wakes();
                }
                Some(event) = mesh_events.recv() => {
                    self.on_mesh(event);
                    while let Ok(event) = mesh_events.try_recv() {
                        self.on_mesh(event);
                    }
                }
                message = from_main.recv() => match message {
                    Some(FromMain::Stop) | None => return Ok(()),
                    Some(message) => self.on_main(message),
                },
                _ = tick.tick() => self.on_tick(),
            }
            self.take_events();
            self.settle();
        }
    }

    /// Backends that announced themselves to an earlier life of this process and still wait.
    fn adopt_waiting_backends(&mut self) {
        for (index, slot) in shared::backends().iter().enumerate() {
            if let Some(gid) = slot.gid.get()
                && slot.outcome.load(Ordering::Acquire) == outcome::WAITING
            {
                if slot.user_prepare.load(Ordering::Relaxed) {
                    // Its votes died with that life. Nobody may act on it before its user does, so it can still be rolled back.
                    self.waiting.insert(
                        gid,
                        Waiting {
                            backend: index as u32,
                            since: Instant::now(),
                        },
                    );
                    self.answer_user(gid, UserTally::Refused(votes_lost()));
                    continue;
                }
                self.on_local(LocalEvent::Committing {
                    gid,
                    backend: index as u32,
                    wait_peers: true,
                });
            }
        }
    }

    fn now(&self) -> Millis {
        self.started.elapsed().as_millis() as Millis
    }

    fn input(&mut self, input: Input) {
        let mut effects = std::mem::take(&mut self.effects);
        self.core.handle(self.now(), input, &mut effects);
        self.carry_out(effects.drain());
        self.effects = effects;
    }

    /// Messages to ourselves, then the batch of records.
    fn settle(&mut self) {
        while let Some(msg) = self.to_self.pop_front() {
            self.input(Input::Message {
                from: self.node,
                msg,
            });
        }
        self.send_batch(false);
    }

    fn send_batch(&mut self, overdue: bool) {
        if let Some(batch) = self.order.take_batch(overdue) {
            self.main.send(ToMain::Write(batch));
        }
    }

    fn take_events(&mut self) {
        let mut buffer = [0u8; EVENT_BYTES];
        for _ in 0..EVENTS_PER_TURN {
            match event::take(&mut buffer) {
                Some(event) => self.on_local(event),
                None => return,
            }
        }
        // More is there: come back after the sockets had their turn.
        shared().wake_arbiter_thread();
    }

    fn on_local(&mut self, event: LocalEvent) {
        self.trace(|| trace::event(&event));
        match event {
            LocalEvent::Committing {
                gid,
                backend,
                wait_peers,
            } => {
                self.waiting.insert(
                    gid,
                    Waiting {
                        backend,
                        since: Instant::now(),
                    },
                );
                self.input(Input::Committing { gid, wait_peers });
            }
            LocalEvent::Voted { gid, vote, lsn } => self.input(Input::Voted {
                gid,
                vote,
                prepare_lsn: lsn,
            }),
            LocalEvent::UserPreparing { gid, backend } => {
                self.waiting.insert(
                    gid,
                    Waiting {
                        backend,
                        since: Instant::now(),
                    },
                );
                self.user_votes
                    .expect(gid, self.configured.without(self.node));
            }
            LocalEvent::UserVoted { gid, vote } => {
                self.send(gid.coordinator, &Message::Vote { gid, vote })
            }
            LocalEvent::StreamOutcome { gid, decision } => {
                self.input(Input::StreamOutcome { gid, decision })
            }
            LocalEvent::Finished { gid } => {
                if self.finishing.finished(gid) {
                    self.input(Input::Finished { gid });
                }
            }
            LocalEvent::FinishLost { gid } => self.finishing.lost(gid),
            LocalEvent::Interrupted { gid } => match self.user_votes.interrupt(gid) {
                Some(tally) => self.answer_user(gid, tally),
                None => self.input(Input::Interrupted { gid }),
            },
            LocalEvent::Abandoned { gid } => {
                self.waiting.remove(&gid);
                self.input(Input::Abandoned { gid });
            }
            LocalEvent::Ask { number, question } => self.answer(number, &question),
            LocalEvent::MarkStored { node, lsn } => {
                self.input(Input::MarkPassed { origin: node, lsn })
            }
        }
    }

    fn on_mesh(&mut self, event: MeshEvent) {
        match event {
            MeshEvent::Up { peer, epoch, .. } => {
                self.linked.insert(peer);
                self.link_changed(peer, true);
                self.main.log(
                    LogLevel::Info,
                    format!("arbiter connected to node {}", peer.get()),
                );
                self.input(Input::LinkUp { peer, epoch });
            }
            MeshEvent::Down { peer, reason } => {
                self.linked.remove(peer);
                self.peer_views.remove(&peer);
                self.link_changed(peer, false);
                self.main.log(
                    LogLevel::Warning,
                    format!("arbiter lost node {}: {reason}", peer.get()),
                );
                for gid in self.user_votes.lose(peer) {
                    self.answer_user(gid, UserTally::Refused(unreachable_peer(peer)));
                }
                self.input(Input::LinkDown { peer });
            }
            MeshEvent::Messages { from, batch } => {
                for msg in batch {
                    self.trace_message(&msg, "from", from);
                    self.note_vote_delay(from, &msg);
                    self.stop_hopeless_apply(&msg);
                    match self.user_votes.count(from, &msg) {
                        Some((gid, tally)) => self.answer_user(gid, tally),
                        None => self.input(Input::Message { from, msg }),
                    }
                }
            }
            MeshEvent::Heartbeat { from, heartbeat } => {
                let node = shared().node(from);
                node.heartbeats.fetch_add(1, Ordering::Relaxed);
                node.connectivity
                    .store(u32::from(heartbeat.connected.bits()), Ordering::Relaxed);
                self.peer_views.insert(from, view_of(&heartbeat));
                self.refresh_status();
            }
            MeshEvent::Refused {
                peer: Some(peer),
                reason,
                ..
            } => {
                self.main.log(
                    LogLevel::Info,
                    format!("arbiter cannot connect to node {}: {reason}", peer.get()),
                );
            }
            MeshEvent::Refused {
                addr,
                reason,
                unreported,
                ..
            } => {
                let who =
                    addr.map_or_else(|| "an unknown address".to_owned(), |addr| addr.to_string());
                let text = format!(
                    "arbiter refused a connection from {who}: {reason} ({unreported} more not reported)"
                );
                self.main.log(LogLevel::Warning, text);
            }
        }
    }

    fn link_changed(&mut self, peer: NodeId, up: bool) {
        let node = shared().node(peer);
        node.linked.store(up, Ordering::Release);
        node.last_change_us
            .store(postgres_now_us(), Ordering::Relaxed);
        self.refresh_status();
    }

    fn note_vote_delay(&self, from: NodeId, msg: &Message) {
        if let Message::Vote {
            gid,
            vote: Vote::Yes,
        } = msg
            && let Some(waiting) = self.waiting.get(gid)
        {
            let node = shared().node(from);
            node.vote_delay_us.fetch_add(
                waiting.since.elapsed().as_micros() as u64,
                Ordering::Relaxed,
            );
            node.vote_delays.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A transaction that is already aborted elsewhere need not be applied to its end.
    fn stop_hopeless_apply(&self, msg: &Message) {
        if let Message::Decided {
            gid,
            decision: Decision::Abort,
            ..
        } = msg
        {
            crate::conflict::cancel_apply(*gid);
        }
    }

    fn on_main(&mut self, message: FromMain) {
        match message {
            FromMain::Durable(gids) => {
                for gid in gids {
                    self.trace(|| Some((gid, "record is durable".to_owned())));
                    let (held, emptied) = self.order.release(gid);
                    if emptied {
                        self.tuples.free(gid);
                    }
                    self.carry_out(held.into_iter());
                }
            }
            FromMain::Outcome { gid, outcome } => {
                self.input(Input::CoordinatorOutcome { gid, outcome })
            }
            FromMain::Reconfigure { send_ms, recv_ms } => {
                self.silence = Duration::from_millis(recv_ms);
                self.reconfigure(send_ms, recv_ms);
            }
            FromMain::Alive => self.mesh.speak_for(Some(self.silence)),
            FromMain::Stop => {}
        }
    }

    fn on_tick(&mut self) {
        self.refresh_status();
        self.input(Input::Tick);
        self.place();
        self.finishing.push_delayed();
        self.send_batch(true);
    }

    /// Places ended transactions whose PREPARE is not sent again. Whoever knew of one knew it after its PREPARE was flushed, so it lies before the
    /// end that the peer's WAL had when our receiver connected, or has come through the receiver since.
    fn place(&mut self) {
        let unplaced: Vec<Gid> = self.core.unplaced(self.now(), PLACED_AFTER_MS).collect();
        for gid in unplaced {
            let node = shared().node(gid.coordinator);
            let end = node.peer_end.load(Ordering::Acquire);
            if end > 0 {
                let lsn = Lsn(end.max(node.received.load(Ordering::Acquire)));
                self.input(Input::PrepareBefore { gid, lsn });
            }
        }
    }

    /// The nodes whose arbiter we talk to and whose stream we receive.
    fn view(&self) -> NodeSet {
        self.linked
            .iter()
            .filter(|peer| shared().node(*peer).receiving.load(Ordering::Acquire))
            .chain(std::iter::once(self.node))
            .collect()
    }

    /// Online while every node is connected with this one in both directions.
    fn refresh_status(&mut self) {
        let view = self.view();
        self.publish_view(view);
        let complete = self.configured.iter().all(|peer| {
            peer == self.node
                || (view.contains(peer)
                    && self
                        .peer_views
                        .get(&peer)
                        .is_some_and(|theirs| theirs.contains(self.node)))
        });
        let status = match (complete, shared().status()) {
            (true, _) => NodeStatus::Online,
            (false, NodeStatus::Starting) => NodeStatus::Starting,
            (false, _) => NodeStatus::Degraded,
        };
        if status != shared().status() {
            self.main.log(
                LogLevel::Info,
                format!("this node is now {}", status.name()),
            );
            shared().set_status(status);
        }
    }

    /// Tells a step of a transaction, while somebody wants to read it.
    fn trace(&self, step: impl FnOnce() -> Option<(Gid, String)>) {
        if !trace::enabled() {
            return;
        }
        if let Some((gid, text)) = step() {
            let line = trace::line(self.node, shared().cluster_tag(), gid, &text);
            self.main.log(LogLevel::Debug, line);
        }
    }

    /// The same for a message and whom it comes from or goes to.
    fn trace_message(&self, msg: &Message, direction: &str, peer: NodeId) {
        self.trace(|| {
            let text = format!("{} {direction} n{}", trace::message(msg), peer.get());
            Some((msg.gid()?, text))
        });
    }

    fn send(&self, to: NodeId, msg: &Message) {
        self.trace_message(msg, "to", to);
        let around = failpoint::around(msg);
        around
            .into_iter()
            .for_each(|(before, _)| hit_in_thread(before));
        if let Err(error) = self.mesh.send(to, msg) {
            self.main.log(
                LogLevel::Warning,
                format!("a message to node {} was not sent: {error}", to.get()),
            );
        }
        around
            .into_iter()
            .for_each(|(_, after)| failpoint::hit_after_sending(after));
    }

    fn reconfigure(&self, send_ms: u64, recv_ms: u64) {
        if let Err(error) = self.mesh.reconfigure(send_ms, recv_ms) {
            self.main.log(
                LogLevel::Warning,
                format!("the heartbeat settings were not taken: {error}"),
            );
        }
    }

    /// Tells the peers whose streams we receive.
    fn publish_view(&self, view: NodeSet) {
        let heartbeat = Heartbeat {
            generation: shared().generation(),
            online_generation: shared().generation(),
            received: self
                .configured
                .iter()
                .filter(|peer| *peer != self.node)
                .map(|peer| {
                    (
                        peer,
                        protocol::Lsn(shared().node(peer).mark.load(Ordering::Relaxed)),
                    )
                })
                .collect(),
            extras: vec![(RECEIVING_TAG, view.bits().to_le_bytes().to_vec())],
            ..Heartbeat::default()
        };
        if let Err(error) = self.mesh.heartbeat_info(heartbeat) {
            self.main.log(
                LogLevel::Warning,
                format!("the heartbeat was not changed: {error}"),
            );
        }
    }

    fn carry_out(&mut self, effects: impl Iterator<Item = Effect>) {
        let mut effects = effects.peekable();
        let mut pending_record: Option<(Gid, u32, crate::pg::records::Body)> = None;
        while let Some(effect) = effects.next() {
            if let Some(gid) = gid_of(&effect)
                && self.order.holds(gid)
            {
                self.order.hold(gid, effect);
                continue;
            }
            self.trace(|| trace::effect(&effect));
            match effect {
                Effect::Persist { gid, record } => match self.tuples.of(gid) {
                    Some(tuple) => self.order.persist(gid, tuple, record.to_bytes()),
                    None => self.out_of_records(gid),
                },
                Effect::Write { gid, record } => match self.tuples.of(gid) {
                    // A finish that follows carries the record, so that the process that finishes writes it first.
                    Some(tuple) if matches!(effects.peek(), Some(Effect::Finish { gid: next, .. }) if *next == gid) =>
                    {
                        pending_record = Some((gid, tuple, record.to_bytes()));
                    }
                    // The backend that hears the outcome finishes at once: the record must be durable before.
                    Some(tuple) if matches!(effects.peek(), Some(Effect::Reply { gid: next, .. }) if *next == gid) =>
                    {
                        self.order.persist(gid, tuple, record.to_bytes());
                    }
                    Some(tuple) => self.order.write(tuple, record.to_bytes()),
                    None => self.out_of_records(gid),
                },
                Effect::Finish { gid, decision } => {
                    let record = pending_record.take().filter(|(owner, ..)| *owner == gid);
                    self.finish(
                        gid,
                        decision,
                        record.map(|(_, tuple, body)| (tuple, body.to_vec())),
                    );
                }
                other => self.carry_out_simple(other),
            }
        }
    }

    fn carry_out_simple(&mut self, effect: Effect) {
        match effect {
            Effect::Send { to, msg } if to == self.node => self.to_self.push_back(msg),
            Effect::Send { to, msg } => self.send(to, &msg),
            Effect::Free { gid } => {
                if let Some(tuple) = self.tuples.taken_by(gid) {
                    self.order.clear(gid, tuple);
                }
            }
            Effect::Reply { gid, outcome } => self.reply(gid, outcome),
            Effect::PeersFinished { gid } => {
                if let Some(waiting) = self.waiting.remove(&gid) {
                    let slot = &shared::backends()[waiting.backend as usize];
                    slot.peers_finished.store(gid.xid, Ordering::Release);
                    shared::wake_proc(waiting.backend as usize);
                }
            }
            Effect::LookUp { gid } => self.main.send(ToMain::LookUp(gid)),
            Effect::Visible { node, csn } => shared().raise_visible(node, csn),
            Effect::Settled { node, csn } => self.settled(node, csn),
            Effect::Event(event) => self.report(&event),
            Effect::Persist { .. } | Effect::Write { .. } | Effect::Finish { .. } => {
                unreachable!("carried out by carry_out")
            }
        }
    }

    /// Every tuple is taken by a transaction that some node has not finished: stop rather than break the order of records.
    fn out_of_records(&self, gid: Gid) {
        self.main.log(
            LogLevel::Warning,
            format!("no durable record is free for transaction {gid:?}"),
        );
        panic!(
            "all {} durable records are in use",
            super::durable::RECORDS_MAX
        );
    }

    fn finish(&mut self, gid: Gid, decision: Decision, record: Option<(u32, Vec<u8>)>) {
        let order = FinishOrder {
            gid,
            decision,
            record,
        };
        hit_in_thread(Failpoint::BeforeFinishOrder);
        self.finishing.give(order);
        hit_in_thread(Failpoint::AfterFinishOrder);
    }

    fn reply(&mut self, gid: Gid, result: Outcome) {
        let Some(waiting) = self.waiting.get(&gid).copied() else {
            return;
        };
        let slot = &shared::backends()[waiting.backend as usize];
        if slot.gid.get() != Some(gid) {
            self.waiting.remove(&gid);
            return;
        }
        let code = match result {
            Outcome::Commit { .. } => outcome::COMMIT,
            Outcome::Abort(refusal) => {
                self.refusals.count(&refusal);
                slot.refusal.set(&refusal);
                self.waiting.remove(&gid);
                outcome::ABORT
            }
            Outcome::Unknown => outcome::UNKNOWN,
        };
        hit_in_thread(Failpoint::BeforeReply);
        slot.outcome.store(code, Ordering::Release);
        shared::wake_proc(waiting.backend as usize);
        hit_in_thread(Failpoint::AfterReply);
    }

    /// The votes on a user's PREPARE TRANSACTION are in.
    fn answer_user(&mut self, gid: Gid, tally: UserTally) {
        let result = match tally {
            UserTally::Pending => return,
            UserTally::Prepared => Outcome::Commit {
                csn: protocol::Csn::ZERO,
            },
            UserTally::Refused(refusal) => Outcome::Abort(refusal),
        };
        self.reply(gid, result);
        self.waiting.remove(&gid);
    }

    fn report(&self, event: &Event) {
        match event {
            // Every transaction has one, and conflicts are ordinary: not for the log.
            Event::Decided {
                source: Source::Central | Source::Told | Source::VotedNo | Source::Refused,
                ..
            } => {}
            event => self.main.log(LogLevel::Info, format!("{event:?}")),
        }
    }

    /// Answers a view.
    fn answer(&self, number: u64, question: &Question) {
        match question {
            Question::Transactions => {
                let rows: Vec<InFlight> = self
                    .core
                    .transactions(self.now())
                    .take(IN_FLIGHT_SHOWN)
                    .map(|view| InFlight {
                        gid: view.gid,
                        state: view.state.as_str().to_owned(),
                        ballot: (view.ballot != Ballot::NONE).then(|| view.ballot.to_string()),
                        resolving: view.resolving,
                        age_ms: view.age_ms,
                        missing: view.missing,
                    })
                    .collect();
                shared().board.answer(number, &rows);
            }
            Question::Counters => {
                let rows = counters::rows(self.core.counters(), &self.refusals);
                shared().board.answer(number, &rows);
            }
            Question::Fate { gid } => {
                let fate = match self.core.decision(*gid) {
                    Some(decision) => Fate::Decided(decision),
                    None if self.core.promised(*gid).is_some() => Fate::InFlight,
                    None => Fate::Unknown,
                };
                shared().board.answer(number, &fate);
            }
        }
    }

    fn settled(&self, node: NodeId, csn: protocol::Csn) {
        shared().node(node).settled.store(csn.0, Ordering::Release);
        for slot in shared::workers() {
            if slot.waits_for_order.load(Ordering::Acquire) {
                slot.process.wake();
            }
        }
    }
}

/// From here on a queued event needs a write to the eventfd again.
///
/// A swap, not a store: the look into the queue that follows must not overtake it, or an event queued in between would wake nobody.
fn accept_wakes() {
    shared().wake_pending.swap(false, Ordering::SeqCst);
}

/// Tag of a heartbeat's extra: the nodes that the sender talks to and whose streams it receives, as a bit set.
const RECEIVING_TAG: u16 = 1;

fn view_of(heartbeat: &Heartbeat) -> NodeSet {
    heartbeat
        .extras
        .iter()
        .find(|(tag, _)| *tag == RECEIVING_TAG)
        .and_then(|(_, bytes)| {
            Some(NodeSet::from_bits(u16::from_le_bytes(
                bytes.as_slice().try_into().ok()?,
            )))
        })
        .unwrap_or_default()
}

fn votes_lost() -> Refusal {
    Refusal::retry(
        "the arbiter of this node was restarted while the transaction was being prepared",
        "",
    )
}

fn unreachable_peer(peer: NodeId) -> Refusal {
    Refusal::retry(
        format!(
            "node {} was lost while the transaction was being prepared",
            peer.get()
        ),
        "",
    )
}

/// The transaction an effect is ordered by.
fn gid_of(effect: &Effect) -> Option<Gid> {
    match effect {
        Effect::Send { msg, .. } => msg.gid(),
        Effect::Persist { gid, .. }
        | Effect::Write { gid, .. }
        | Effect::Free { gid }
        | Effect::Finish { gid, .. }
        | Effect::Reply { gid, .. }
        | Effect::PeersFinished { gid }
        | Effect::LookUp { gid } => Some(*gid),
        Effect::Visible { .. } | Effect::Settled { .. } | Effect::Event(_) => None,
    }
}

/// Microseconds since 2000-01-01 by the system clock; for display only.
fn postgres_now_us() -> i64 {
    const POSTGRES_EPOCH_S: u64 = 946_684_800;
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH_S))
        .unwrap_or_default();
    since.as_micros() as i64
}
