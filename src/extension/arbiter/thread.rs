//! The arbiter's tokio thread: sockets, timers and the protocol core.
//!
//! It calls nothing of PostgreSQL but `SetLatch`. Facts come in from the other processes (events in shared memory), the peers (mesh) and the main
//! thread (durable batches, look-ups); what the core wants done goes out the same ways. Nothing is decided here.

use super::durable::{Batch, DurableOrder, Tuples};
use super::event::{self, FinishOrder, LocalEvent};
use crate::pg::shared::{self, EVENT_BYTES, NodeStatus, outcome, shared};
use mesh::{MeshEvent, MeshHandle};
use protocol::{Core, Decision, Effect, Effects, Gid, Input, Lsn, Message, Millis, NodeId, NodeSet, Outcome, Vote};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How often the core's timers run.
const TICK: Duration = Duration::from_millis(20);
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
    Info,
    Warning,
}

/// What the main thread answers.
pub enum FromMain {
    Durable(Vec<Gid>),
    Outcome { gid: Gid, outcome: Option<Decision> },
    /// Settings were read again.
    Reconfigure { send_ms: u64, recv_ms: u64 },
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
    /// Names of prepared transactions that are not their gid's text.
    pub names: BTreeMap<Gid, String>,
    pub started: Instant,
    order: DurableOrder,
    /// Backends that wait for an outcome.
    waiting: BTreeMap<Gid, Waiting>,
    /// Messages of this node to itself.
    to_self: VecDeque<Message>,
    /// Finishes that found the queue full.
    delayed: VecDeque<FinishOrder>,
    linked: NodeSet,
    peer_views: BTreeMap<NodeId, NodeSet>,
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
        core: Core,
        tuples: Tuples,
        main: MainLink,
        mesh: MeshHandle,
        names: BTreeMap<Gid, String>,
    ) -> Arbiter {
        Arbiter {
            node,
            configured,
            core,
            tuples,
            main,
            mesh,
            names,
            started: Instant::now(),
            order: DurableOrder::default(),
            waiting: BTreeMap::new(),
            to_self: VecDeque::new(),
            delayed: VecDeque::new(),
            linked: NodeSet::default(),
            peer_views: BTreeMap::new(),
        }
    }

    /// Runs until the main thread says stop or goes away.
    pub async fn run(
        mut self,
        mut mesh_events: mpsc::Receiver<MeshEvent>,
        mut from_main: mpsc::UnboundedReceiver<FromMain>,
    ) -> std::io::Result<()> {
        let wake = tokio::io::unix::AsyncFd::new(WakeFd)?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ready = wake.readable() => {
                    let mut ready = ready?;
                    WakeFd.clear();
                    ready.clear_ready();
                    shared().wake_pending.store(false, Ordering::Release);
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

    fn now(&self) -> Millis {
        Millis(self.started.elapsed().as_millis() as u64)
    }

    fn input(&mut self, input: Input) {
        let mut effects = Effects::default();
        self.core.handle(self.now(), input, &mut effects);
        self.carry_out(effects);
    }

    /// Messages to ourselves, then the batch of records.
    fn settle(&mut self) {
        while let Some(msg) = self.to_self.pop_front() {
            self.input(Input::Message { from: self.node, msg });
        }
        if let Some(batch) = self.order.take_batch() {
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
        match event {
            LocalEvent::Committing { gid, backend, wait_peers, explicit } => {
                self.waiting.insert(gid, Waiting { backend, since: Instant::now() });
                self.input(Input::Committing { gid, wait_peers, explicit });
            }
            LocalEvent::Voted { gid, vote, lsn, name } => {
                if let Some(name) = name {
                    self.names.insert(gid, name);
                }
                self.input(Input::Voted { gid, vote, lsn });
            }
            LocalEvent::StreamOutcome { gid, decision } => self.input(Input::StreamOutcome { gid, decision }),
            LocalEvent::Finished { gid } => {
                self.names.remove(&gid);
                self.input(Input::Finished { gid });
            }
            LocalEvent::Interrupted { gid } => self.input(Input::Interrupted { gid }),
            LocalEvent::Abandoned { gid } => {
                self.waiting.remove(&gid);
                self.input(Input::Abandoned { gid });
            }
            LocalEvent::MarkStored { node, lsn } => self.input(Input::MarkStored { node, lsn }),
        }
    }

    fn on_mesh(&mut self, event: MeshEvent) {
        match event {
            MeshEvent::Up { peer, epoch, .. } => {
                self.linked.insert(peer);
                self.link_changed(peer, true);
                self.main.log(LogLevel::Info, format!("arbiter connected to node {}", peer.get()));
                self.input(Input::LinkUp { peer, epoch });
            }
            MeshEvent::Down { peer, reason } => {
                self.linked.remove(peer);
                self.peer_views.remove(&peer);
                self.link_changed(peer, false);
                self.main.log(LogLevel::Warning, format!("arbiter lost node {}: {reason}", peer.get()));
                self.input(Input::LinkDown { peer });
            }
            MeshEvent::Messages { from, batch } => {
                for msg in batch {
                    self.note_vote_delay(from, &msg);
                    self.stop_hopeless_apply(&msg);
                    self.input(Input::Message { from, msg });
                }
            }
            MeshEvent::Heartbeat { from, hb } => {
                let node = shared().node(from);
                node.heartbeats.fetch_add(1, Ordering::Relaxed);
                node.connectivity.store(u32::from(hb.connectivity.bits()), Ordering::Relaxed);
                self.peer_views.insert(from, hb.connectivity);
                self.refresh_status();
            }
            MeshEvent::Refused { addr, reason } => {
                self.main.log(LogLevel::Warning, format!("arbiter refused a connection from {addr}: {reason}"));
            }
        }
    }

    fn link_changed(&mut self, peer: NodeId, up: bool) {
        let node = shared().node(peer);
        node.linked.store(up, Ordering::Release);
        node.last_change_us.store(postgres_now_us(), Ordering::Relaxed);
        self.refresh_status();
    }

    fn note_vote_delay(&self, from: NodeId, msg: &Message) {
        if let Message::Vote { gid, vote: Vote::Yes } = msg
            && let Some(waiting) = self.waiting.get(gid)
        {
            let node = shared().node(from);
            node.vote_delay_us.fetch_add(waiting.since.elapsed().as_micros() as u64, Ordering::Relaxed);
            node.vote_delays.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A transaction that is already aborted elsewhere need not be applied to its end.
    fn stop_hopeless_apply(&self, msg: &Message) {
        if let Message::Decided { gid, decision: Decision::Abort, .. } = msg {
            super::conflict::cancel_apply(*gid);
        }
    }

    fn on_main(&mut self, message: FromMain) {
        match message {
            FromMain::Durable(gids) => {
                for gid in gids {
                    let held = self.order.release(gid);
                    self.carry_out(held.into_iter().collect());
                }
            }
            FromMain::Outcome { gid, outcome } => self.input(Input::CoordinatorOutcome { gid, outcome }),
            FromMain::Reconfigure { send_ms, recv_ms } => self.mesh.reconfigure(send_ms, recv_ms),
            FromMain::Stop => {}
        }
    }

    fn on_tick(&mut self) {
        self.refresh_status();
        self.input(Input::Tick);
        while let Some(order) = self.delayed.pop_front() {
            if !order.push() {
                self.delayed.push_front(order);
                break;
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
        self.mesh.set_connectivity(view);
        let complete = self.configured.iter().all(|peer| {
            peer == self.node
                || (view.contains(peer) && self.peer_views.get(&peer).is_some_and(|theirs| theirs.contains(self.node)))
        });
        let status = match (complete, shared().status()) {
            (true, _) => NodeStatus::Online,
            (false, NodeStatus::Starting) => NodeStatus::Starting,
            (false, _) => NodeStatus::Degraded,
        };
        if status != shared().status() {
            self.main.log(LogLevel::Info, format!("this node is now {}", status.name()));
            shared().set_status(status);
        }
    }

    fn carry_out(&mut self, effects: Effects) {
        let mut effects = effects.into_iter().peekable();
        let mut pending_record: Option<(Gid, u32, crate::pg::records::Body)> = None;
        while let Some(effect) = effects.next() {
            if let Some(gid) = effect.gid()
                && self.order.holds(gid)
            {
                self.order.hold(gid, effect);
                continue;
            }
            match effect {
                Effect::Persist { gid, record } => match self.tuples.of(gid) {
                    Some(tuple) => self.order.persist(gid, tuple, record.to_bytes()),
                    None => self.out_of_records(gid),
                },
                Effect::Write { gid, record } => match self.tuples.of(gid) {
                    // A finish that follows carries the record, so that the process that finishes writes it first.
                    Some(tuple) if matches!(effects.peek(), Some(Effect::Finish { gid: next, .. }) if *next == gid) => {
                        pending_record = Some((gid, tuple, record.to_bytes()));
                    }
                    Some(tuple) => self.order.write(tuple, record.to_bytes()),
                    None => self.out_of_records(gid),
                },
                Effect::Finish { gid, decision, csn } => {
                    let record = pending_record.take().filter(|(owner, ..)| *owner == gid);
                    self.finish(gid, decision, csn, record.map(|(_, tuple, body)| (tuple, body.to_vec())));
                }
                other => self.carry_out_simple(other),
            }
        }
    }

    fn carry_out_simple(&mut self, effect: Effect) {
        match effect {
            Effect::Send { to, msg } if to == self.node => self.to_self.push_back(msg),
            Effect::Send { to, msg } => self.mesh.send(to, msg),
            Effect::Free { gid } => self.tuples.free(gid),
            Effect::Reply { gid, outcome } => self.reply(gid, outcome),
            Effect::PeersFinished { gid } => {
                if let Some(waiting) = self.waiting.remove(&gid) {
                    let slot = &shared::backends()[waiting.backend as usize];
                    slot.peers_finished.store(true, Ordering::Release);
                    shared::wake_proc(waiting.backend as usize);
                }
            }
            Effect::LookUp { gid } => self.main.send(ToMain::LookUp(gid)),
            Effect::Settled { node, csn } => self.settled(node, csn),
            Effect::Event(event) => self.main.log(LogLevel::Info, event.to_string()),
            Effect::Persist { .. } | Effect::Write { .. } | Effect::Finish { .. } => {
                unreachable!("carried out by carry_out")
            }
        }
    }

    /// Every tuple is taken by a transaction that some node has not finished: stop rather than break the order of records.
    fn out_of_records(&self, gid: Gid) {
        self.main.log(LogLevel::Warning, format!("no durable record is free for transaction {gid:?}"));
        panic!("all {} durable records are in use", super::durable::RECORDS_MAX);
    }

    fn finish(&mut self, gid: Gid, decision: Decision, csn: Option<protocol::Csn>, record: Option<(u32, Vec<u8>)>) {
        if let Some(csn) = csn {
            shared().raise_visible(gid.coordinator, csn);
        }
        let order = FinishOrder { gid, name: self.names.get(&gid).cloned(), decision, csn, record };
        if !self.delayed.is_empty() || !order.push() {
            self.delayed.push_back(order);
        }
    }

    fn reply(&mut self, gid: Gid, result: Outcome) {
        let Some(waiting) = self.waiting.get(&gid).copied() else { return };
        let slot = &shared::backends()[waiting.backend as usize];
        if slot.gid.get() != Some(gid) {
            self.waiting.remove(&gid);
            return;
        }
        let code = match result {
            Outcome::Commit { csn } => {
                shared().raise_visible(gid.coordinator, csn);
                outcome::COMMIT
            }
            Outcome::Prepared => outcome::COMMIT,
            Outcome::Abort(refusal) => {
                slot.refusal.set(&refusal);
                self.waiting.remove(&gid);
                outcome::ABORT
            }
            Outcome::Unknown => outcome::UNKNOWN,
        };
        slot.outcome.store(code, Ordering::Release);
        shared::wake_proc(waiting.backend as usize);
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

/// Position in a stream that is not known.
pub const NO_LSN: Lsn = Lsn(0);

/// Microseconds since 2000-01-01 by the system clock; for display only.
fn postgres_now_us() -> i64 {
    const POSTGRES_EPOCH_S: u64 = 946_684_800;
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH_S))
        .unwrap_or_default();
    since.as_micros() as i64
}

/// The eventfd as tokio wants it.
struct WakeFd;

impl WakeFd {
    fn clear(&self) {
        crate::pg::thread::drain_wake_fd();
    }
}

impl std::os::fd::AsRawFd for WakeFd {
    fn as_raw_fd(&self) -> i32 {
        shared::wake_fd()
    }
}
