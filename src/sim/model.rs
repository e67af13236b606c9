//! Every interleaving of a small cluster, by the model checker stateright.
//!
//! Nodes run the shipped core. The network is a set of messages that can be delivered at any time, in any order and any number of
//! times, or never; that covers loss, doubling and reordering. A crash takes away a node's memory, its unflushed WAL and all
//! messages on its links. Time does not exist: with a tick, which may come at any moment, all timers fire.
//! The invariants are those of the simulator's checker, which rides along in the state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use protocol::{
    Config, Core, Decision, Effect, Effects, Fault, GenerationNum, Gid, Input, Lsn, Message,
    NodeId, NodeSet, Record, Recovered, Refusal, Vote,
};
use stateright::{Checker as _, HasDiscoveries, Model, Property};

use crate::checker::{Checker, Evidence};

/// What a search covers. The seeded faults prove that it can find something.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    pub nodes: u8,
    /// Coordinated by nodes 1 and 2; they write the same row.
    pub transactions: u8,
    pub crashes: u8,
    /// How often a participant loses its coordinator or a client is interrupted: each starts a resolver.
    pub disturbances: u8,
    /// Highest term of a ballot to follow.
    pub term_max: u32,
    pub fault: Option<Fault>,
    /// Stop after so many steps, taken or found to lead to a known state.
    pub states_max: usize,
}

/// What a search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Findings {
    /// Different states seen.
    pub states: usize,
    /// The whole scope was searched.
    pub complete: bool,
    /// Invariants that break in some state.
    pub broken: BTreeSet<&'static str>,
    /// Outcomes that some state shows.
    pub reached: BTreeSet<&'static str>,
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extent = if self.complete { "all" } else { "the first" };
        write!(f, "{extent} {} states", self.states)?;
        if self.broken.is_empty() {
            write!(f, ", all invariants hold")
        } else {
            write!(f, ", broken: {:?}", self.broken)
        }
    }
}

/// Names of what must never happen.
const INVARIANTS: [&str; 11] = [
    "I1",
    "I2",
    "I3",
    "I4",
    "I5",
    "I6",
    "I7",
    "I8",
    "I9",
    "EXACTLY-ONCE",
    "TRUTH",
];

/// Searches all states within the scope.
pub fn search(scope: Scope) -> Findings {
    let checker = scope
        .checker()
        .target_state_count(scope.states_max)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let discoveries: BTreeSet<&'static str> = checker.discoveries().into_keys().collect();
    let (broken, reached): (BTreeSet<_>, BTreeSet<_>) = discoveries
        .into_iter()
        .partition(|name| INVARIANTS.contains(name));
    Findings {
        states: checker.unique_state_count(),
        complete: broken.is_empty() && checker.state_count() < scope.states_max,
        broken,
        reached,
    }
}

/// The whole cluster at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cluster {
    nodes: BTreeMap<NodeId, Node>,
    network: BTreeSet<Envelope>,
    crashes: u8,
    disturbances: u8,
    checker: Checker,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Node {
    epoch: u32,
    core: Option<Core>,
    records: BTreeMap<Gid, Record>,
    prepared: BTreeSet<Gid>,
    finished: BTreeMap<Gid, Decision>,
    wal: Vec<WalItem>,
    /// Effects behind a record that is not durable yet.
    gates: BTreeMap<Gid, VecDeque<Effect>>,
    /// Own transactions whose client still waits.
    waiting: BTreeSet<Gid>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum WalItem {
    Record(Record),
    Free(Gid),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Envelope {
    from: NodeId,
    to: NodeId,
    msg: Message,
}

/// One thing that can happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Deliver(usize),
    /// A node's WAL reaches its disk.
    Flush(NodeId),
    /// The backend announces its prepared transaction.
    Announce(Gid),
    Apply(NodeId, Gid),
    Refuse(NodeId, Gid),
    Interrupt(Gid),
    /// The node believes that it has lost the coordinator.
    Suspect(NodeId, Gid),
    /// Every timer of the node fires.
    Tick(NodeId),
    Crash(NodeId),
    Restart(NodeId),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            nodes,
            transactions,
            crashes,
            disturbances,
            term_max,
            ..
        } = self;
        write!(
            f,
            "{nodes} nodes, {transactions} transactions, {crashes} crashes, {disturbances} disturbances, terms to {term_max}"
        )
    }
}

impl Scope {
    /// What is searched by default: a crash, two resolvers, a conflict, and all of them together.
    pub fn standard(states_max: usize) -> Vec<Self> {
        let of = |transactions, crashes, disturbances, term_max| Self {
            nodes: 3,
            transactions,
            crashes,
            disturbances,
            term_max,
            fault: None,
            states_max,
        };
        vec![
            of(1, 0, 0, 2),
            of(1, 1, 0, 2),
            of(1, 0, 2, 3),
            of(1, 1, 2, 3),
            of(2, 0, 0, 2),
            of(2, 1, 1, 3),
        ]
    }

    fn configured(&self) -> NodeSet {
        (1..=self.nodes).filter_map(NodeId::new).collect()
    }

    fn gids(&self) -> impl Iterator<Item = Gid> {
        (1..=self.transactions)
            .filter_map(NodeId::new)
            .map(|coordinator| Gid {
                coordinator,
                xid: u64::from(coordinator.get()),
                generation: GenerationNum(1),
                started_at: i64::from(coordinator.get()),
            })
    }

    fn config(&self, node: NodeId, epoch: u32) -> Config {
        Config {
            resolve_after_ms: 0,
            resolve_step_ms: 0,
            resend_after_ms: 0,
            give_up_after_ms: u64::MAX,
            fault: self.fault,
            ..Config::new(node, self.configured(), epoch)
        }
    }
}

impl Model for Scope {
    type State = Cluster;
    type Action = Step;

    fn init_states(&self) -> Vec<Cluster> {
        let mut cluster = Cluster {
            nodes: self
                .configured()
                .iter()
                .map(|node| (node, Node::default()))
                .collect(),
            network: BTreeSet::new(),
            crashes: 0,
            disturbances: 0,
            checker: Checker::new(self.configured()),
        };
        for gid in self.gids() {
            let node = cluster
                .nodes
                .get_mut(&gid.coordinator)
                .expect("coordinators are configured");
            node.prepared.insert(gid);
            node.waiting.insert(gid);
            cluster.checker.on_prepared(gid.coordinator, gid, None);
        }
        for node in self.configured().iter() {
            cluster.start(self, node, Vec::new());
        }
        vec![cluster]
    }

    fn actions(&self, cluster: &Cluster, steps: &mut Vec<Step>) {
        steps.extend((0..cluster.network.len()).map(Step::Deliver));
        for (name, node) in &cluster.nodes {
            if node.core.is_none() {
                steps.push(Step::Restart(*name));
                continue;
            }
            if !node.wal.is_empty() || !node.gates.is_empty() {
                steps.push(Step::Flush(*name));
            }
            if cluster.crashes < self.crashes {
                steps.push(Step::Crash(*name));
            }
            steps.push(Step::Tick(*name));
            for gid in self.gids() {
                self.actions_on(cluster, *name, node, gid, steps);
            }
        }
    }

    fn next_state(&self, last: &Cluster, step: Step) -> Option<Cluster> {
        let mut cluster = last.clone();
        match step {
            Step::Deliver(place) => {
                let Envelope { from, to, msg } = last.network.iter().nth(place)?.clone();
                cluster.input(to, Input::Message { from, msg });
            }
            Step::Flush(node) => cluster.flush(node),
            Step::Announce(gid) => cluster.input(
                gid.coordinator,
                Input::Committing {
                    gid,
                    wait_peers: false,
                },
            ),
            Step::Apply(node, gid) => {
                cluster.nodes.get_mut(&node)?.prepared.insert(gid);
                cluster.sync(node);
                cluster.checker.on_prepared(node, gid, None);
                cluster.input(
                    node,
                    Input::Voted {
                        gid,
                        vote: Vote::Yes,
                        prepare_lsn: Lsn(1),
                    },
                );
            }
            Step::Refuse(node, gid) => {
                let vote = Vote::No(Refusal::retry("conflict", ""));
                cluster.input(
                    node,
                    Input::Voted {
                        gid,
                        vote,
                        prepare_lsn: Lsn(1),
                    },
                );
            }
            Step::Interrupt(gid) => {
                cluster.disturbances += 1;
                cluster.input(gid.coordinator, Input::Interrupted { gid });
            }
            Step::Suspect(node, gid) => {
                cluster.disturbances += 1;
                cluster.input(
                    node,
                    Input::LinkDown {
                        peer: gid.coordinator,
                    },
                );
                cluster.input(node, Input::Tick);
                cluster.input(
                    node,
                    Input::LinkUp {
                        peer: gid.coordinator,
                        epoch: last.nodes.get(&gid.coordinator)?.epoch,
                    },
                );
            }
            Step::Tick(node) => cluster.input(node, Input::Tick),
            Step::Crash(node) => cluster.crash(node),
            Step::Restart(node) => cluster.restart(self, node),
        }
        (cluster != *last).then_some(cluster)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties: Vec<Property<Self>> = vec![
            Property::sometimes("commits everywhere", |_, cluster: &Cluster| {
                cluster.all_finished(Decision::Commit)
            }),
            Property::sometimes("aborts", |_, cluster: &Cluster| cluster.some_aborted()),
        ];
        macro_rules! never {
            ($($name:literal)*) => { $(properties.push(Property::always($name, |_, cluster: &Cluster| cluster.keeps($name)));)* };
        }
        never!("I1" "I2" "I3" "I4" "I5" "I6" "I7" "I8" "I9" "EXACTLY-ONCE" "TRUTH");
        properties
    }

    fn within_boundary(&self, cluster: &Cluster) -> bool {
        let promised = |node: &Node| {
            node.core
                .as_ref()
                .into_iter()
                .flat_map(|core| core.transactions(0))
                .map(|txn| txn.ballot.term)
                .max()
        };
        cluster
            .nodes
            .values()
            .filter_map(promised)
            .all(|term| term <= self.term_max)
    }
}

impl Scope {
    fn actions_on(
        &self,
        cluster: &Cluster,
        name: NodeId,
        node: &Node,
        gid: Gid,
        steps: &mut Vec<Step>,
    ) {
        let disturb = cluster.disturbances < self.disturbances;
        let open = node.prepared.contains(&gid)
            && node
                .core
                .as_ref()
                .is_some_and(|core| core.decision(gid).is_none());
        if name == gid.coordinator {
            if node.waiting.contains(&gid) {
                steps.push(Step::Announce(gid));
                if open && disturb {
                    steps.push(Step::Interrupt(gid));
                }
            }
            return;
        }
        if open && disturb {
            steps.push(Step::Suspect(name, gid));
        }
        if cluster.checker.was_prepared(name, gid) || node.is_refused(gid) {
            return;
        }
        // All write the same row: the younger dies where the older is prepared, the older waits for the younger.
        match node.prepared.first() {
            None => steps.push(Step::Apply(name, gid)),
            Some(holder) if holder.age() < gid.age() => steps.push(Step::Refuse(name, gid)),
            Some(_) => {}
        }
    }
}

impl Node {
    fn is_refused(&self, gid: Gid) -> bool {
        let written = self.wal.iter().any(|item| matches!(item, WalItem::Record(record) if record.gid == gid && !record.voted_yes));
        written
            || self
                .records
                .get(&gid)
                .is_some_and(|record| record.decision == Some(Decision::Abort))
    }
}

impl Cluster {
    fn keeps(&self, invariant: &str) -> bool {
        self.checker
            .violation()
            .is_none_or(|violation| violation.invariant != invariant)
    }

    fn all_finished(&self, decision: Decision) -> bool {
        self.nodes
            .values()
            .all(|node| node.finished.values().any(|finished| *finished == decision))
    }

    fn some_aborted(&self) -> bool {
        self.nodes.iter().any(|(name, node)| {
            let mut ended = node.finished.iter();
            ended.any(|(gid, decision)| gid.coordinator == *name && *decision == Decision::Abort)
        })
    }

    fn start(&mut self, scope: &Scope, name: NodeId, recovered: Vec<Recovered>) {
        let Some(node) = self.nodes.get_mut(&name) else {
            return;
        };
        node.epoch += 1;
        let epoch = node.epoch;
        let mut out = Effects::new();
        node.core = Some(Core::new(scope.config(name, epoch), recovered, 0, &mut out));
        self.carry_out(name, &mut out);
        let peers: Vec<(NodeId, u32)> = self
            .nodes
            .iter()
            .filter(|(peer, node)| **peer != name && node.core.is_some())
            .map(|(peer, node)| (*peer, node.epoch))
            .collect();
        for (peer, peers_epoch) in peers {
            self.input(
                name,
                Input::LinkUp {
                    peer,
                    epoch: peers_epoch,
                },
            );
            self.input(peer, Input::LinkUp { peer: name, epoch });
        }
    }

    fn restart(&mut self, scope: &Scope, name: NodeId) {
        let Some(node) = self.nodes.get(&name) else {
            return;
        };
        let gids: BTreeSet<Gid> = node.records.keys().chain(&node.prepared).copied().collect();
        let found = |gid| Recovered {
            gid,
            record: node.records.get(&gid).copied(),
            prepared: node.prepared.contains(&gid),
        };
        let recovered = gids.into_iter().map(found).collect();
        self.start(scope, name, recovered);
    }

    fn crash(&mut self, name: NodeId) {
        self.crashes += 1;
        if let Some(node) = self.nodes.get_mut(&name) {
            node.core = None;
            node.wal.clear();
            node.gates.clear();
            node.waiting.clear();
        }
        self.network
            .retain(|envelope| envelope.from != name && envelope.to != name);
        for gid in self.checker.told_committed() {
            self.demand_commit_survives(gid);
        }
        let peers: Vec<NodeId> = self
            .nodes
            .keys()
            .copied()
            .filter(|peer| *peer != name)
            .collect();
        for peer in peers {
            self.input(peer, Input::LinkDown { peer: name });
        }
    }

    fn input(&mut self, name: NodeId, input: Input) {
        let mut out = Effects::new();
        if let Some(core) = self
            .nodes
            .get_mut(&name)
            .and_then(|node| node.core.as_mut())
        {
            core.handle(0, input, &mut out);
        }
        self.carry_out(name, &mut out);
    }

    fn carry_out(&mut self, name: NodeId, out: &mut Effects) {
        for effect in out.drain() {
            self.submit(name, effect);
        }
    }

    fn submit(&mut self, name: NodeId, effect: Effect) {
        let gid = effect.gid();
        let Some(node) = self.nodes.get_mut(&name) else {
            return;
        };
        match gid.and_then(|gid| node.gates.get_mut(&gid)) {
            // The network is a set, so a message that waits already need not wait twice.
            Some(gate) if gate.contains(&effect) => {}
            Some(gate) => gate.push_back(effect),
            None => self.perform(name, effect),
        }
    }

    fn perform(&mut self, name: NodeId, effect: Effect) {
        let Some(node) = self.nodes.get_mut(&name) else {
            return;
        };
        match effect {
            Effect::Send { msg, .. } if is_left_to_simulator(&msg) => {}
            Effect::Send { to, msg } => {
                self.checker.on_sent(name, &msg);
                let reached = self.nodes.get(&to).is_some_and(|node| node.core.is_some());
                if to == name {
                    self.input(name, Input::Message { from: name, msg });
                } else if reached {
                    self.network.insert(Envelope {
                        from: name,
                        to,
                        msg,
                    });
                }
            }
            Effect::Persist { gid, record } => {
                node.wal.push(WalItem::Record(record));
                node.gates.insert(gid, VecDeque::new());
            }
            Effect::Write { record, .. } => node.wal.push(WalItem::Record(record)),
            Effect::Free { gid } => {
                node.wal.push(WalItem::Free(gid));
                node.gates.insert(gid, VecDeque::new());
            }
            Effect::Finish { gid, decision } => self.finish(name, gid, decision),
            Effect::Reply { gid, outcome } => {
                let committed = matches!(outcome, protocol::Outcome::Commit { .. });
                node.waiting.remove(&gid);
                self.checker.on_told(gid, outcome);
                if committed {
                    self.demand_commit_survives(gid);
                }
                let decision = if committed {
                    Decision::Commit
                } else {
                    Decision::Abort
                };
                self.finish(name, gid, decision);
            }
            Effect::LookUp { gid } => {
                let outcome = node.finished.get(&gid).copied();
                self.input(name, Input::CoordinatorOutcome { gid, outcome });
            }
            Effect::Event(protocol::Event::Decided { gid, decision, .. }) => {
                self.checker.on_outcome(name, gid, decision)
            }
            Effect::Visible { .. }
            | Effect::Settled { .. }
            | Effect::PeersFinished { .. }
            | Effect::Event(_) => {}
        }
    }

    fn demand_commit_survives(&mut self, gid: Gid) {
        let of = |node: &Node| {
            let record = node.records.get(&gid);
            Evidence {
                decision: node
                    .finished
                    .get(&gid)
                    .copied()
                    .or(record.and_then(|record| record.decision)),
                accepted: record.and_then(|record| record.accepted),
                voted_yes: node.prepared.contains(&gid),
            }
        };
        let evidence = self
            .nodes
            .iter()
            .map(|(name, node)| (*name, of(node)))
            .collect();
        self.checker.demand_commit_survives(gid, &evidence);
    }

    fn finish(&mut self, name: NodeId, gid: Gid, decision: Decision) {
        self.sync(name);
        let Some(node) = self.nodes.get_mut(&name) else {
            return;
        };
        if node.prepared.remove(&gid) {
            node.finished.insert(gid, decision);
            self.checker.on_finished(name, gid, decision);
        }
        self.input(name, Input::Finished { gid });
    }

    fn flush(&mut self, name: NodeId) {
        self.sync(name);
        let gates = self
            .nodes
            .get_mut(&name)
            .map(|node| std::mem::take(&mut node.gates))
            .unwrap_or_default();
        for effect in gates.into_values().flatten() {
            self.submit(name, effect);
        }
    }

    /// Brings WAL to the disk. Effects that wait for it go with the next [`Step::Flush`].
    fn sync(&mut self, name: NodeId) {
        let Some(node) = self.nodes.get_mut(&name) else {
            return;
        };
        for item in node.wal.drain(..) {
            match item {
                WalItem::Record(record) => {
                    node.records.insert(record.gid, record);
                    self.checker.on_durable(name, record);
                }
                WalItem::Free(gid) => {
                    node.records.remove(&gid);
                    self.checker.on_freed(name, gid);
                }
            }
        }
    }
}

/// Causal order and forgetting are checked by the simulator; here their messages would only multiply states.
const fn is_left_to_simulator(msg: &Message) -> bool {
    matches!(
        msg,
        Message::AskHorizon
            | Message::Horizon { .. }
            | Message::Forget { .. }
            | Message::Finished {
                decision: Decision::Commit,
                ..
            }
    )
}
