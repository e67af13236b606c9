//! The arbiter's tokio thread: sockets, timers and the protocol core.
//!
//! It calls nothing of PostgreSQL but `SetLatch`. Facts come in from the other processes (events in shared memory), the peers (mesh) and the main
//! thread (durable batches, look-ups); what the core wants done goes out the same ways. Nothing is decided here.

mod answers;
mod delays;
mod effects;
mod extras;
mod health;
mod history;
mod lease;
mod links;
mod main_link;
mod members;
mod newcomers;
mod referee_watch;
mod stuck;
mod suspects;

pub use lease::SEND_MS_MAX;
pub use main_link::{FromMain, HeartbeatTimes, LogLevel, LogRecord, MainLink, ToMain};

use super::counters::Refusals;
use super::durable::{DurableOrder, Tuples};
use super::early_votes::EarlyVotes;
use super::event::{self, LocalEvent};
use super::finishing::Finishing;
use super::net_config::NetSettings;
use super::start::Decider;
use super::trace;
use super::user_votes::{UserTally, UserVotes, generation_over};
use crate::failpoint::{Failpoint, hit_in_thread};
use crate::pg::records::Places;
use crate::pg::shared::{self, EVENT_BYTES, outcome, shared};
use crate::pg::thread as os_thread;
use delays::Stages;
use mesh::{MeshEvent, MeshHandle};
use protocol::{Core, Effects, Gid, Input, Lsn, Message, Millis, NodeId, NodeSet, Refusal};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How often the core's timers run.
const TICK: Duration = Duration::from_millis(20);
/// A transaction that has ended and whose PREPARE has not come by then is given a place in the stream.
const PLACED_AFTER_MS: Millis = 2000;
/// Local events handled before the sockets get their turn.
const EVENTS_PER_TURN: usize = 256;

/// Everything the thread owns.
pub struct Arbiter {
    pub node: NodeId,
    pub configured: NodeSet,
    pub core: Core,
    pub tuples: Tuples,
    pub places: Places,
    pub main: MainLink,
    pub mesh: MeshHandle,
    started: Instant,
    /// How long this node goes on speaking without a sign of life of its main thread.
    silence: Duration,
    effects: Effects,
    user_votes: UserVotes,
    early_votes: EarlyVotes,
    order: DurableOrder,
    /// Backends that wait for an outcome.
    waiting: BTreeMap<Gid, Waiting>,
    /// Messages of this node to itself.
    to_self: VecDeque<Message>,
    finishing: Finishing,
    linked: NodeSet,
    /// Peers with links that do not count yet.
    newcomers: BTreeMap<NodeId, newcomers::Newcomer>,
    peer_views: BTreeMap<NodeId, NodeSet>,
    leases: lease::LeaseKeeper,
    members: members::Members,
    stuck: stuck::Stuck,
    history: history::History,
    /// Heartbeat times of the peers, as they say.
    peer_times: BTreeMap<NodeId, Option<HeartbeatTimes>>,
    referee: referee_watch::RefereeWatch,
    refusals: Refusals,
}

#[derive(Clone, Copy)]
struct Waiting {
    backend: u32,
    /// It also waits until the peers have finished.
    wait_peers: bool,
    stages: Stages,
}

impl Waiting {
    fn begin(backend: u32, wait_peers: bool) -> Waiting {
        Waiting {
            backend,
            wait_peers,
            stages: Stages::begin(),
        }
    }
}

impl Arbiter {
    pub fn new(
        node: NodeId,
        configured: NodeSet,
        decider: Decider,
        main: MainLink,
        mesh: MeshHandle,
        settings: &NetSettings,
    ) -> Arbiter {
        let timing = settings.times();
        let silence = links::silence(timing);
        let members = members::Members::new(
            node,
            configured,
            settings.referee,
            decider.membership,
            decider.copied_from,
            0,
        );
        let leases = lease::LeaseKeeper::new(node, decider.epoch, configured, timing);
        Arbiter {
            node,
            configured,
            core: decider.core,
            tuples: decider.tuples,
            places: decider.places,
            main,
            mesh,
            started: Instant::now(),
            silence,
            effects: decider.effects,
            user_votes: UserVotes::default(),
            early_votes: EarlyVotes::default(),
            order: DurableOrder::default(),
            waiting: BTreeMap::new(),
            to_self: VecDeque::new(),
            finishing: Finishing::default(),
            linked: NodeSet::default(),
            newcomers: BTreeMap::new(),
            peer_views: BTreeMap::new(),
            leases,
            members,
            stuck: stuck::Stuck::new(settings.slow_ms),
            history: history::History::default(),
            peer_times: BTreeMap::new(),
            referee: referee_watch::RefereeWatch::new(settings.referee, configured.len()),
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
        self.start_members();
        let wake = os_thread::wake_readiness()?;
        // An earlier life of this process may have died between being woken and saying so.
        accept_wakes();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ready = wake.readable() => {
                    let mut ready = ready?;
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
                    Some(FromMain::Stop) | None => {
                        self.say_goodbye().await;
                        return Ok(());
                    }
                    Some(message) => self.on_main(message),
                },
                _ = tick.tick() => self.on_tick(),
            }
            self.take_events();
            self.look_at_barrier();
            self.settle();
        }
    }

    /// Backends that announced themselves to an earlier life of this process and still wait.
    fn adopt_waiting_backends(&mut self) {
        for (index, slot) in shared::backends().iter().enumerate() {
            if let Some(gid) = slot.gid.get()
                && slot.outcome(gid.xid) == outcome::WAITING
            {
                if slot.is_user_prepare() {
                    // Its votes died with that life. Nobody may act on it before its user does, so it can still be rolled back.
                    self.waiting
                        .insert(gid, Waiting::begin(index as u32, false));
                    self.answer_user(gid, UserTally::Refused(votes_lost()));
                    continue;
                }
                self.on_local(LocalEvent::Committing {
                    gid,
                    backend: index as u32,
                    wait_peers: true,
                    fast: false,
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
                fast,
            } => {
                self.waiting
                    .insert(gid, Waiting::begin(backend, wait_peers));
                self.input(Input::Committing {
                    gid,
                    wait_peers,
                    fast,
                });
                self.hand_on_votes(gid);
            }
            LocalEvent::Voted { gid, vote, lsn } => self.input(Input::Voted {
                gid,
                vote,
                prepare_lsn: lsn,
            }),
            LocalEvent::UserPreparing { gid, backend } => {
                self.waiting.insert(gid, Waiting::begin(backend, false));
                if gid.generation < shared().generation() {
                    return self.answer_user(gid, UserTally::Refused(generation_over()));
                }
                self.user_votes.expect(gid, gid.members.without(self.node));
                self.count_early_votes(gid);
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
                self.hand_on_votes(gid);
            }
            LocalEvent::MarkerReached { .. }
            | LocalEvent::RecoveryLevel { .. }
            | LocalEvent::RecoveryLost { .. } => self.on_recovery(&event),
            LocalEvent::Refereed { answer, referee } => self.on_refereed(answer, referee),
            LocalEvent::RefereeSeen { referee } => self.on_referee_seen(referee),
            LocalEvent::RefereeFails { reason } => self.on_referee_fails(&reason),
            LocalEvent::RecoveryFailed { reason } => self.on_recovery_failed(&reason),
            LocalEvent::Ask { number, question } => self.answer(number, &question),
            LocalEvent::MarkStored { node, lsn } => {
                self.input(Input::MarkPassed { origin: node, lsn })
            }
        }
    }

    /// The core knows the transaction, or has to find out what it was.
    fn hand_on_votes(&mut self, gid: Gid) {
        for (from, msg) in self.early_votes.take(gid) {
            self.input(Input::Message { from, msg });
        }
    }

    /// The same for a user's own PREPARE TRANSACTION: the announcement comes first, but by a queue that may be looked at later than the network.
    fn count_early_votes(&mut self, gid: Gid) {
        for (from, msg) in self.early_votes.take(gid) {
            if let Some((gid, tally)) = self.user_votes.count(from, &msg) {
                self.answer_user(gid, tally);
            }
        }
    }

    fn on_main(&mut self, message: FromMain) {
        match message {
            FromMain::Recorded(gids) => {
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
            FromMain::Reconfigure(settings) => self.reconfigure(&settings),
            FromMain::CopyNeeded => self.on_copy_needed(),
            FromMain::Notice(notice) => {
                self.note(notice.node, notice.event, &notice.text, None);
                self.publish();
            }
            FromMain::MembershipDurable => self.on_member_record(),
            FromMain::MarkerWritten(num) => self.on_marker_written(num),
            FromMain::Drained { num, drained } => self.on_drained(num, drained),
            FromMain::Alive => {
                self.mesh.speak_for(Some(self.silence));
                self.stuck.alive(self.now());
            }
            FromMain::Stop => {}
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

    fn on_tick(&mut self) {
        self.tick_members();
        self.tick_stuck();
        self.tick_referee();
        self.refresh_status();
        self.input(Input::Tick);
        for gid in self.early_votes.overdue(Instant::now()) {
            self.hand_on_votes(gid);
        }
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
}

/// From here on a queued event needs a write to the eventfd again.
///
/// A swap, not a store: the look into the queue that follows must not overtake it, or an event queued in between would wake nobody.
fn accept_wakes() {
    shared().wake_pending.swap(false, Ordering::SeqCst);
}

fn votes_lost() -> Refusal {
    Refusal::retry(
        "the arbiter of this node was restarted while the transaction was being prepared",
        "",
    )
}
