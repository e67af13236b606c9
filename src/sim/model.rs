//! Every interleaving of a small cluster, by the model checker stateright.
//!
//! Nodes run the shipped core. The network is a set of messages that can be delivered at any time, in any order and any number of
//! times, or never; that covers loss, doubling and reordering. A crash takes away a node's memory, its unflushed WAL and all
//! messages on its links. Time does not exist: with a tick, which may come at any moment, all timers fire.
//! The invariants are those of the simulator's checker, which rides along in the state.

use std::collections::BTreeSet;
use std::fmt;

use protocol::{
    Config, Decision, Fault, GenerationNum, Gid, Input, Lsn, NodeId, NodeSet, Refusal, Vote,
};
use stateright::{Checker as _, HasDiscoveries, Model, Property};

use crate::checker::Checker;
pub use crate::cluster::Cluster;
use crate::cluster::{Envelope, Node};

/// What a search covers. The seeded faults prove that it can find something.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    pub nodes: u8,
    /// Coordinated by nodes 1 and 2; they write the same row.
    pub transactions: u8,
    pub crashes: u8,
    /// How often a participant loses its coordinator or a client is interrupted: each starts a resolver.
    pub disturbances: u8,
    /// Attempts to resolve to follow: those that disturbances start, those of a restart, and those of nodes that were outvoted.
    pub resolvers: u8,
    /// Coordinators that ask for rule D2, by their place among the transactions: bit 0 is the first.
    pub fast: u8,
    /// Votes go to all members, as with more nodes than a search can have.
    pub votes_to_all: bool,
    pub fault: Option<Fault>,
    /// Stop after so many steps, taken or found to lead to a known state.
    pub states_max: usize,
}

/// Which of the two transactions' coordinators ask for rule D2.
const D1: u8 = 0b00;
const D1_AND_D2: u8 = 0b01;
const D2: u8 = 0b11;

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
        .finish_when(HasDiscoveries::AnyFailures);
    // What waits to be searched are whole clusters: breadth first they fill the memory. But a fault is found sooner that way.
    let (discoveries, unique, steps) = if scope.fault.is_some() {
        summary(&checker.spawn_bfs().join())
    } else {
        summary(&checker.spawn_dfs().join())
    };
    let (broken, reached): (BTreeSet<_>, BTreeSet<_>) = discoveries
        .into_iter()
        .partition(|name| INVARIANTS.contains(name));
    Findings {
        states: unique,
        complete: broken.is_empty() && steps < scope.states_max,
        broken,
        reached,
    }
}

/// Names of what was found; states seen; steps taken.
pub(crate) fn summary<M>(
    checker: &impl stateright::Checker<M>,
) -> (BTreeSet<&'static str>, usize, usize)
where
    M: Model<State: Clone + fmt::Debug + PartialEq, Action: Clone + fmt::Debug + PartialEq>,
{
    (
        checker.discoveries().into_keys().collect(),
        checker.unique_state_count(),
        checker.state_count(),
    )
}

/// One thing that can happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Deliver(usize),
    /// A node's WAL reaches its disk.
    Flush(NodeId),
    /// The backend announces its prepared transaction.
    Announce(Gid),
    /// The backend that has been told the outcome finishes.
    Finish(Gid),
    Apply(NodeId, Gid),
    Refuse(NodeId, Gid),
    Interrupt(Gid),
    /// The node believes that it has lost the coordinator.
    Suspect(NodeId, Gid),
    /// Every timer of the node fires.
    Tick(NodeId),
    /// The node loses its memory and what was not flushed, and starts again.
    Crash(NodeId),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            nodes,
            transactions,
            crashes,
            disturbances,
            resolvers,
            fast,
            votes_to_all,
            ..
        } = self;
        let all = (1 << transactions) - 1;
        let rule = match fast & all {
            0 if *votes_to_all => "D1 with votes to all",
            0 => "D1",
            rule if rule == all => "D2",
            _ => "D1 and D2",
        };
        write!(
            f,
            "{nodes} nodes, {transactions} transactions, {crashes} crashes, {disturbances} disturbances, {resolvers} resolvers, {rule}"
        )
    }
}

impl Scope {
    /// What is searched to the end within a minute: both ways of deciding, a crash, a resolver, both together, conflicts.
    pub fn quick() -> Vec<Self> {
        vec![
            Self::of([1, 0, 0, 0], D1),
            Self::of([1, 0, 0, 0], D2),
            Self::of([2, 0, 0, 0], D1),
            Self::of([2, 0, 0, 0], D1_AND_D2),
            Self::of([2, 0, 0, 0], D2),
            Self::of([1, 1, 0, 1], D1),
            Self::of([1, 1, 0, 1], D2),
            Self::of([1, 0, 1, 1], D1),
            Self::of([1, 0, 1, 1], D2),
            Self::of([1, 1, 1, 1], D2),
            Self::with_votes_to_all([1, 0, 0, 0]),
            Self::with_votes_to_all([1, 1, 0, 1]),
            Self::with_votes_to_all([1, 0, 1, 1]),
        ]
    }

    /// What takes minutes more.
    pub fn large(states_max: usize) -> Vec<Self> {
        let scopes = [
            Self::of([2, 1, 0, 1], D1),
            Self::of([2, 0, 1, 1], D1_AND_D2),
            Self::of([2, 1, 0, 1], D2),
            Self::of([1, 1, 1, 1], D1),
            Self::of([1, 0, 2, 2], D2),
            Self::of([1, 0, 2, 2], D1),
            Self::with_votes_to_all([2, 0, 0, 0]),
            Self::with_votes_to_all([1, 1, 1, 1]),
        ];
        scopes
            .map(|scope| Self {
                states_max,
                ..scope
            })
            .into()
    }

    const fn with_votes_to_all(scope: [u8; 4]) -> Self {
        Self {
            votes_to_all: true,
            ..Self::of(scope, D1)
        }
    }

    const fn of([transactions, crashes, disturbances, resolvers]: [u8; 4], fast: u8) -> Self {
        Self {
            nodes: 3,
            transactions,
            crashes,
            disturbances,
            resolvers,
            fast,
            votes_to_all: false,
            fault: None,
            states_max: usize::MAX,
        }
    }

    pub(crate) fn configured(&self) -> NodeSet {
        (1..=self.nodes).filter_map(NodeId::new).collect()
    }

    pub(crate) fn gids(&self) -> impl Iterator<Item = Gid> {
        (1..=self.transactions)
            .filter_map(NodeId::new)
            .map(|coordinator| Gid {
                members: self.configured(),
                coordinator,
                xid: u64::from(coordinator.get()),
                generation: GenerationNum(1),
                started_at: i64::from(coordinator.get()),
            })
    }

    fn is_fast(&self, gid: Gid) -> bool {
        self.fast & (1 << (gid.coordinator.get() - 1)) != 0
    }

    pub(crate) fn config(&self, node: NodeId, epoch: u32) -> Config {
        Config {
            resolve_after_ms: 0,
            resolve_step_ms: 0,
            resend_after_ms: 0,
            give_up_after_ms: u64::MAX,
            fault: self.fault,
            votes_to_all: self.votes_to_all,
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
            resolvers: 0,
            checker: Checker::new(self.configured()),
        };
        for node in self.configured().iter() {
            cluster.start(self, node);
        }
        for gid in self.gids() {
            let node = cluster
                .nodes
                .get_mut(&gid.coordinator)
                .expect("coordinators are configured");
            node.prepared.insert(gid);
            node.waiting.insert(gid);
            cluster.checker.on_prepared(gid.coordinator, gid, None);
        }
        vec![cluster]
    }

    fn actions(&self, cluster: &Cluster, steps: &mut Vec<Step>) {
        steps.extend((0..cluster.network.len()).map(Step::Deliver));
        for (name, node) in &cluster.nodes {
            if !node.wal.is_empty() {
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
            Step::Flush(node) => cluster.sync(node),
            Step::Announce(gid) => cluster.input(
                gid.coordinator,
                Input::Committing {
                    gid,
                    wait_peers: false,
                    fast: self.is_fast(gid),
                },
            ),
            Step::Finish(gid) => cluster.finish_by_backend(gid.coordinator, gid),
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
            Step::Crash(node) => {
                cluster.crash(node);
                cluster.start(self, node);
            }
        }
        cluster.drop_vain();
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
        cluster.resolvers <= self.resolvers
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
            if node.finishing.contains_key(&gid) {
                steps.push(Step::Finish(gid));
            }
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
