//! The simulated cluster: time, network, and the shells around the cores.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use protocol::membership::MembershipFault;
use protocol::{
    Config, Effect, Effects, Fault, GenerationNum, Gid, Input, Message, Millis, NodeId, NodeSet,
    Source,
};

use crate::arbiter::Told;
use crate::checker::{Checker, Evidence};
use crate::event::{Agenda, Event};
use crate::faults::Climate;
use crate::hazards::Hazards;
use crate::referee::RefereeHost;
use crate::rng::Rng;
use crate::server::{Gate, Memory, Server};

/// Time between two ticks of a core.
pub(crate) const TICK_MS: Millis = 20;

/// What the clients of all nodes do, by transaction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// The one row it writes.
    pub key: u32,
}

/// Two links between a pair of nodes: the arbiters' and, per direction, the stream.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    /// Grows with every new connection; what belongs to an earlier one never arrives.
    pub number: u32,
    pub up: bool,
}

#[derive(Debug, Default)]
pub(crate) struct StreamConnection {
    pub number: u32,
    pub up: bool,
    pub sent: usize,
    pub last_arrival: Millis,
}

pub(crate) struct World {
    pub now: Millis,
    pub rng: Rng,
    pub agenda: Agenda,
    pub servers: BTreeMap<NodeId, Server>,
    pub configured: NodeSet,
    pub links: BTreeMap<(NodeId, NodeId), Link>,
    pub streams: BTreeMap<(NodeId, NodeId), StreamConnection>,
    pub plans: BTreeMap<Gid, Plan>,
    pub checker: Checker,
    pub climate: Climate,
    pub fault: Option<Fault>,
    /// Whether members change.
    pub changing: bool,
    pub members_fault: Option<MembershipFault>,
    pub hazards: Hazards,
    /// Generations in which somebody came online.
    pub generations: BTreeSet<GenerationNum>,
    pub recovered: u64,
    /// Chance in the choice of donors.
    pub donor_seed: u64,
    /// Where two nodes have one.
    pub referee: Option<RefereeHost>,
    pub xids: u64,
    pub committed_by: BTreeMap<Source, u64>,
    digest: DefaultHasher,
    pub log: Option<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, nodes: u8, fault: Option<Fault>, log: bool) -> Self {
        let mut rng = Rng::new(seed);
        let configured: NodeSet = (1..=nodes).filter_map(NodeId::new).collect();
        Self {
            now: 1_000,
            climate: Climate::draw(&mut rng),
            rng,
            agenda: Agenda::default(),
            servers: configured
                .iter()
                .map(|node| (node, Server::new(node)))
                .collect(),
            configured,
            links: BTreeMap::new(),
            streams: BTreeMap::new(),
            plans: BTreeMap::new(),
            checker: Checker::new(configured),
            fault,
            changing: false,
            members_fault: None,
            hazards: Hazards::default(),
            generations: BTreeSet::new(),
            recovered: 0,
            donor_seed: Rng::new(!seed).next(),
            referee: None,
            xids: 0,
            committed_by: BTreeMap::new(),
            digest: DefaultHasher::new(),
            log: log.then(Vec::new),
        }
    }

    /// Lets things happen until this time, or until an invariant breaks.
    pub fn run_until(&mut self, end: Millis) {
        while self.checker.violation().is_none() {
            let Some((at, event)) = self.agenda.next(end) else {
                break;
            };
            self.now = at;
            event.hash(&mut self.digest);
            self.note(|| format!("{event:?}"));
            self.happen(event);
        }
        self.now = self.now.max(end);
    }

    /// A number that two runs share only if they were the same run.
    pub fn digest(&self) -> u64 {
        self.digest.finish()
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(log) = &mut self.log {
            log.push(format!("{now:>6} {}", line()));
        }
    }

    /// Plans something `low` to `high` milliseconds from now.
    pub fn later(&mut self, low: u64, high: u64, event: Event) {
        let at = self.now + self.rng.between(low, high);
        self.agenda.plan(at, event);
    }

    pub fn config(&self, node: NodeId, epoch: u32) -> Config {
        Config {
            resolve_after_ms: 300,
            resolve_step_ms: 60,
            resend_after_ms: 80,
            give_up_after_ms: 1_000,
            fault: self.fault,
            ..Config::new(node, self.configured, epoch)
        }
    }

    /// Whether the event is of a life that goes on: the server's, or its arbiter's.
    pub fn is_alive(&self, node: NodeId, life: u32, event: &Event) -> bool {
        let current = self.life(node);
        self.memory(node).is_some_and(|memory| {
            life == current && memory.unheard.is_none()
                || life >= memory.born && Self::outlives(event)
        })
    }

    pub fn life(&self, node: NodeId) -> u32 {
        self.servers
            .get(&node)
            .map_or(0, |server| server.disk.epoch)
    }

    pub fn memory(&self, node: NodeId) -> Option<&Memory> {
        self.servers.get(&node)?.memory.as_ref()
    }

    pub fn memory_mut(&mut self, node: NodeId) -> Option<&mut Memory> {
        self.servers.get_mut(&node)?.memory.as_mut()
    }

    /// Splits the borrow: a server and the checker that watches its disk.
    pub fn disk(&mut self, node: NodeId) -> Option<(&mut Server, &mut Checker)> {
        Some((self.servers.get_mut(&node)?, &mut self.checker))
    }

    /// Gives an input to a node's core and carries out what it asks for.
    pub fn input(&mut self, node: NodeId, input: Input) {
        let now = self.clock(node);
        let mut out = Effects::new();
        let Some(Told::Core(input)) = self.hears(node, Told::Core(input)) else {
            return;
        };
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        memory.core.handle(now, input, &mut out);
        self.carry_out(node, &mut out);
    }

    pub fn carry_out(&mut self, node: NodeId, out: &mut Effects) {
        for effect in out.drain() {
            self.note(|| format!("  {node:?} {effect:?}"));
            self.submit(node, effect);
        }
    }

    /// Holds back what has to wait for an earlier record of its transaction.
    fn submit(&mut self, node: NodeId, effect: Effect) {
        let held = effect.gid();
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        match held.and_then(|gid| memory.gates.get_mut(&gid)) {
            Some(gate) => gate.queue.push_back(effect),
            None => self.perform(node, effect),
        }
    }

    /// Holds back what follows for this transaction until WAL is flushed up to here.
    fn close_gate(&mut self, node: NodeId, gid: Gid, upto: u64, slowest: Millis) {
        let life = self.life(node);
        if let Some(memory) = self.memory_mut(node) {
            memory.gates.insert(
                gid,
                Gate {
                    upto,
                    ..Gate::default()
                },
            );
        }
        self.later(1, slowest, Event::Flushed { node, life, upto });
    }

    /// Lets the effects go whose record has become durable.
    pub fn open_gates(&mut self, node: NodeId, flushed: u64) {
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        let open: Vec<Gid> = memory
            .gates
            .iter()
            .filter(|(_, gate)| gate.upto <= flushed)
            .map(|(gid, _)| *gid)
            .collect();
        for gid in open {
            let gate = self
                .memory_mut(node)
                .and_then(|memory| memory.gates.remove(&gid));
            for effect in gate.into_iter().flat_map(|gate| gate.queue) {
                self.submit(node, effect);
            }
        }
    }

    fn perform(&mut self, node: NodeId, effect: Effect) {
        let life = self.life(node);
        match effect {
            Effect::Send { to, msg } => self.send(node, to, msg),
            Effect::Persist { gid, record } => {
                let Some(server) = self.servers.get_mut(&node) else {
                    return;
                };
                let upto = server.write_record(record);
                self.close_gate(node, gid, upto, self.hazards.disk_max_ms);
            }
            Effect::Write { gid, record } => {
                if let Some(server) = self.servers.get_mut(&node)
                    && !server.hand_over(gid, record)
                {
                    server.write_record(record);
                }
            }
            Effect::Free { gid } => {
                let Some(server) = self.servers.get_mut(&node) else {
                    return;
                };
                let upto = server.write_free(gid);
                self.close_gate(node, gid, upto, 60);
            }
            Effect::Visible { node: whose, csn } => {
                if let Some(memory) = self.memory_mut(node) {
                    let visible = memory.visible.entry(whose).or_default();
                    *visible = (*visible).max(csn);
                }
            }
            Effect::Settled { .. } => self.start_applies(node),
            Effect::Finish { gid, decision } => {
                if let Some(memory) = self.memory_mut(node) {
                    memory.orders += 1;
                }
                self.later(
                    1,
                    10,
                    Event::Finish {
                        node,
                        life,
                        gid,
                        decision,
                    },
                );
            }
            Effect::Reply { gid, outcome } => self.on_reply(node, gid, outcome),
            Effect::PeersFinished { .. } => {}
            Effect::LookUp { gid } => self.later(0, 5, Event::LookUp { node, life, gid }),
            Effect::Event(event) => self.on_core_event(node, &event),
        }
    }

    fn on_core_event(&mut self, node: NodeId, event: &protocol::Event) {
        match event {
            protocol::Event::Decided {
                gid,
                decision,
                source,
            } => {
                self.checker.on_outcome(node, *gid, *decision);
                if gid.coordinator == node && *decision == protocol::Decision::Commit {
                    *self.committed_by.entry(*source).or_default() += 1;
                }
            }
            protocol::Event::Rejected { from, reason } if self.fault.is_none() => {
                self.checker.demand(false, "I6", || {
                    format!("{node} refuses what {from} says: {reason}")
                });
            }
            _ => {}
        }
    }

    pub fn send(&mut self, from: NodeId, to: NodeId, msg: Message) {
        self.checker.on_sent(from, &msg);
        if from == to {
            let life = self.life(from);
            return self.agenda.plan(
                self.now,
                Event::Loop {
                    node: from,
                    life,
                    msg,
                },
            );
        }
        let link = self.links.get(&pair(from, to)).copied().unwrap_or_default();
        if !link.up || self.rng.permille(self.climate.loss_permille) {
            return;
        }
        if self.muted(from, to).is_some() {
            return;
        }
        let slowest = self.climate.delay_max_ms;
        if self.rng.permille(self.climate.double_permille) {
            self.later(
                1,
                slowest * 4,
                Event::Deliver {
                    link: link.number,
                    from,
                    to,
                    msg: msg.clone(),
                },
            );
        }
        self.later(
            1,
            slowest,
            Event::Deliver {
                link: link.number,
                from,
                to,
                msg,
            },
        );
    }

    /// What the disks of all nodes say about a transaction.
    pub fn evidence(&self, gid: Gid) -> BTreeMap<NodeId, Evidence> {
        let of = |server: &Server| {
            let record = server.disk.records.get(&gid);
            Evidence {
                decision: server
                    .disk
                    .finished
                    .get(&gid)
                    .copied()
                    .or(record.and_then(|record| record.decision)),
                accepted: record.and_then(|record| record.accepted),
                voted_yes: server.disk.prepared.contains(&gid),
            }
        };
        self.servers
            .iter()
            .map(|(node, server)| (*node, of(server)))
            .collect()
    }

    pub fn demand_commits_survive(&mut self, gids: &[Gid]) {
        for gid in gids {
            let evidence = self.evidence(*gid);
            self.checker.demand_commit_survives(*gid, &evidence);
        }
    }
}

pub(crate) fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}
