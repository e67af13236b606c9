//! Every interleaving of a small cluster whose members change: the commit protocol and membership together, as they ship.
//!
//! A node crashes or is cut off, is excluded, comes back, recovers, and is taken in, while a transaction is under way. What a state is and what it leaves
//! out is told in `changing`; the invariants are those of both simulations.

use std::collections::BTreeSet;
use std::fmt;

use protocol::membership::{Admission, Membership, MembershipFault, MembershipInput};
use protocol::{Decision, Gid, Input, NodeId, NodeSet};
use stateright::{Checker as _, HasDiscoveries, Model, Property};

use crate::changing::{Changing, Letter};
use crate::cluster::Envelope;
use crate::model::{Findings, summary};

/// What a search covers.
#[derive(Clone, Copy, Debug)]
pub struct ChangeScope {
    pub nodes: u8,
    /// Begins when node 3 is down and the others have gone on without it, in generation 2.
    pub excluded: bool,
    pub transactions: u8,
    /// How often a node crashes; it may stay down.
    pub crashes: u8,
    /// How often a node is cut off from all others, or with `partial` two nodes from each other; they may stay so.
    pub cuts: u8,
    pub partial: bool,
    /// The highest generation that anybody votes for.
    pub generations: u32,
    /// Attempts to resolve.
    pub resolvers: u8,
    /// Rule D2.
    pub fast: bool,
    pub fault: Option<MembershipFault>,
    pub states_max: usize,
}

/// How the coordinators decide.
const D1: bool = false;
const D2: bool = true;

/// Names of what must never happen.
const INVARIANTS: [&str; 22] = [
    "I1",
    "I2",
    "I3",
    "I4",
    "I5",
    "I6",
    "I7",
    "I8",
    "I9",
    "I10",
    "EXACTLY-ONCE",
    "TRUTH",
    "G1",
    "G2",
    "G3",
    "G4",
    "G5",
    "G6",
    "G7",
    "G8",
    "G9",
    "LEASE",
];

/// Searches all states within the scope, depth first: what is seldom reached needs many steps.
pub fn search_changes(scope: ChangeScope) -> Findings {
    let checker = scope
        .checker()
        .target_state_count(scope.states_max)
        .finish_when(HasDiscoveries::AnyFailures);
    let (discoveries, unique, steps) = summary(&checker.spawn_dfs().join());
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

/// One thing that can happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// A message of the commit protocol, or of the membership.
    Deliver(usize),
    DeliverLetter(usize),
    /// A heartbeat tells the second node the first one's generation.
    Teach(NodeId, NodeId),
    /// A client's transaction is prepared on its own node.
    Begin(NodeId),
    Finish(Gid),
    Apply(NodeId, Gid),
    Refuse(NodeId, Gid),
    Flush(NodeId),
    /// Every timer of the node's core fires.
    Tick(NodeId),
    Crash(NodeId),
    Restart(NodeId),
    Cut(NodeId, NodeSet),
    Notice(NodeId, NodeId),
    Connect(NodeId, NodeId),
    /// The node has drained, or its marker is durable.
    Proceed(NodeId),
    Recover(NodeId, NodeId),
    /// All promises to the node end that are not renewed.
    EndPromises(NodeId),
}

impl fmt::Display for ChangeScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cuts = if self.partial {
            "cut links"
        } else {
            "nodes cut off"
        };
        let rule = if self.fast { "D2" } else { "D1" };
        let start = if self.excluded {
            "one of them excluded, "
        } else {
            ""
        };
        write!(
            f,
            "{} nodes, {start}{} transactions, {} crashes, {} {cuts}, generation {} at most, {} resolvers, {rule}",
            self.nodes,
            self.transactions,
            self.crashes,
            self.cuts,
            self.generations,
            self.resolvers
        )
    }
}

/// Faults of a scope: how often nodes crash, are cut off, lose one link.
#[derive(Clone, Copy)]
enum Weather {
    Calm,
    Crash,
    CutOff,
    LinkLost,
}

impl ChangeScope {
    /// What is searched to the end within a minute: a node that is lost in each way while a transaction is under way, and its return.
    pub fn quick() -> Vec<Self> {
        vec![
            Self::leaving(Weather::Crash, [0, 0], 3, D1),
            Self::leaving(Weather::CutOff, [0, 0], 3, D1),
            Self::leaving(Weather::Crash, [1, 1], 2, D2),
            Self::leaving(Weather::CutOff, [1, 0], 2, D2),
            Self::returning(Weather::Calm, [1, 0], D1),
            Self::returning(Weather::Calm, [1, 0], D2),
        ]
    }

    /// What takes minutes more.
    pub fn large(states_max: usize) -> Vec<Self> {
        let scopes = [
            Self::leaving(Weather::Crash, [1, 1], 2, D1),
            Self::leaving(Weather::CutOff, [1, 0], 2, D1),
            Self::leaving(Weather::CutOff, [1, 1], 2, D2),
            Self::leaving(Weather::LinkLost, [1, 0], 2, D2),
            Self::returning(Weather::Calm, [1, 1], D1),
            Self::returning(Weather::Calm, [1, 1], D2),
            Self::returning(Weather::Calm, [2, 0], D2),
            Self::returning(Weather::Crash, [1, 0], D2),
        ];
        scopes
            .map(|scope| Self {
                states_max,
                ..scope
            })
            .into()
    }

    /// Three nodes, of which one is lost. Whoever was excluded in generation 2 may come back in generation 3.
    const fn leaving(
        weather: Weather,
        [transactions, resolvers]: [u8; 2],
        generations: u32,
        fast: bool,
    ) -> Self {
        let (crashes, cuts) = match weather {
            Weather::Calm => (0, 0),
            Weather::Crash => (1, 0),
            Weather::CutOff | Weather::LinkLost => (0, 1),
        };
        Self {
            nodes: 3,
            excluded: false,
            transactions,
            crashes,
            cuts,
            partial: matches!(weather, Weather::LinkLost),
            generations,
            resolvers,
            fast,
            fault: None,
            states_max: usize::MAX,
        }
    }

    /// Node 3 is out, and comes back while transactions are under way.
    const fn returning(weather: Weather, scope: [u8; 2], fast: bool) -> Self {
        Self {
            excluded: true,
            ..Self::leaving(weather, scope, 3, fast)
        }
    }

    pub(crate) fn configured(&self) -> NodeSet {
        (1..=self.nodes).filter_map(NodeId::new).collect()
    }

    /// All pairs, the lower node first.
    pub(crate) fn pairs(&self) -> Vec<(NodeId, NodeId)> {
        let all = self.configured();
        all.iter()
            .flat_map(|a| all.iter().filter(move |b| *b > a).map(move |b| (a, b)))
            .collect()
    }

    /// Node 1 coordinates the first transaction; what can happen to node 2 can happen to node 3.
    const fn is_victim(&self, name: NodeId) -> bool {
        name.get() != 2
    }

    /// Node 3 goes down, and the others go on without it.
    fn exclude(&self, mut state: Changing) -> Changing {
        let lost = NodeId::new(3).expect("three nodes");
        state.crash(lost);
        state.settle();
        loop {
            let mut steps = Vec::new();
            steps.extend((0..state.letters.len()).map(Change::DeliverLetter));
            self.of_members(&state, &mut steps);
            let next = steps
                .into_iter()
                .find_map(|step| self.next_state(&state, step));
            match next {
                Some(next) => state = next,
                None => break,
            }
        }
        state.cluster.crashes = 0;
        state
    }

    fn faults(&self, state: &Changing, steps: &mut Vec<Change>) {
        for name in self.configured().iter() {
            if !state.cluster.is_up(name) {
                steps.push(Change::Restart(name));
            } else if state.cluster.crashes < self.crashes && self.is_victim(name) {
                steps.push(Change::Crash(name));
            }
            let others = self.configured().without(name);
            if state.cuts < self.cuts && !self.partial && self.is_victim(name) {
                steps.push(Change::Cut(name, others));
            }
        }
        for (a, b) in self.pairs() {
            let connected = state.is_connected(a, b);
            if connected && self.partial && state.cuts < self.cuts {
                steps.push(Change::Cut(a, NodeSet::EMPTY.with(b)));
            }
            if !connected && state.cluster.is_up(a) && state.cluster.is_up(b) {
                steps.push(Change::Connect(a, b));
                if !self.partial {
                    steps.push(Change::Connect(b, a));
                }
            }
        }
        steps.extend(state.unnoticed.iter().map(|(a, b)| Change::Notice(*a, *b)));
    }

    fn of_members(&self, state: &Changing, steps: &mut Vec<Change>) {
        for name in self.configured().iter() {
            let member = &state.members[&name];
            if !state.ending(name).is_empty() {
                steps.push(Change::EndPromises(name));
            }
            for peer in self.configured().without(name).iter() {
                let num = |node| state.membership(node).map(Membership::current);
                if state.is_connected(name, peer) && num(name) > num(peer) {
                    steps.push(Change::Teach(name, peer));
                }
            }
            if state.can_proceed(name) {
                steps.push(Change::Proceed(name));
            }
            let settled = state.cluster.nodes[&name].prepared.is_empty();
            if let Some(source) = member.source
                && settled
                && state.is_connected(name, source)
            {
                steps.push(Change::Recover(name, source));
            }
        }
    }

    fn of_transactions(&self, state: &Changing, steps: &mut Vec<Change>) {
        for (name, node) in &state.cluster.nodes {
            if node.core.is_none() {
                continue;
            }
            if !node.wal.is_empty() {
                steps.push(Change::Flush(*name));
            }
            steps.push(Change::Tick(*name));
            let open = state.members[name].open.is_some();
            let may_begin = state.gids.len() < usize::from(self.transactions);
            let first = !state.gids.is_empty() || name.get() == 1;
            if open && may_begin && first && node.prepared.is_empty() {
                steps.push(Change::Begin(*name));
            }
            steps.extend(node.finishing.keys().map(|gid| Change::Finish(*gid)));
            for gid in &state.gids {
                steps.extend(self.answer(state, *name, *gid));
            }
        }
    }

    /// What the node's apply does when the PREPARE comes, or comes again.
    fn answer(&self, state: &Changing, name: NodeId, gid: Gid) -> Option<Change> {
        let node = &state.cluster.nodes[&name];
        let comes = name != gid.coordinator && state.is_connected(name, gid.coordinator);
        if !comes || state.cluster.checker.was_prepared(name, gid) || node.is_refused(gid) {
            return None;
        }
        let holder = node.prepared.first();
        let open = state.members[&name].open.is_some();
        match state.membership(name)?.admit(gid) {
            Admission::Refuse if open => Some(Change::Refuse(name, gid)),
            Admission::Apply if open => match holder {
                None => Some(Change::Apply(name, gid)),
                Some(holder) if holder.age() < gid.age() => Some(Change::Refuse(name, gid)),
                Some(_) => None,
            },
            _ => None,
        }
    }
}

impl Model for ChangeScope {
    type State = Changing;
    type Action = Change;

    fn init_states(&self) -> Vec<Changing> {
        let start = Changing::new(self);
        vec![if self.excluded {
            self.exclude(start)
        } else {
            start
        }]
    }

    fn actions(&self, state: &Changing, steps: &mut Vec<Change>) {
        steps.extend((0..state.cluster.network.len()).map(Change::Deliver));
        steps.extend((0..state.letters.len()).map(Change::DeliverLetter));
        self.faults(state, steps);
        self.of_members(state, steps);
        self.of_transactions(state, steps);
    }

    fn next_state(&self, last: &Changing, step: Change) -> Option<Changing> {
        let mut state = last.clone();
        match step {
            Change::Deliver(place) => {
                let Envelope { from, to, msg } = last.cluster.network.iter().nth(place)?.clone();
                state.cluster.input(to, Input::Message { from, msg });
            }
            Change::DeliverLetter(place) => {
                let Letter { from, to, msg } = last.letters.iter().nth(place)?.clone();
                state.input(to, MembershipInput::Message { from, msg });
            }
            Change::Teach(from, to) => state.teach(from, to),
            Change::Begin(node) => state.begin(node, self.fast),
            Change::Finish(gid) => state.cluster.finish_by_backend(gid.coordinator, gid),
            Change::Apply(node, gid) => state.vote(node, gid, true),
            Change::Refuse(node, gid) => state.vote(node, gid, false),
            Change::Flush(node) => state.cluster.sync(node),
            Change::Tick(node) => state.cluster.input(node, Input::Tick),
            Change::Crash(node) => state.crash(node),
            Change::Restart(node) => {
                state.boot(self, node);
                if !self.partial {
                    state.connect_all(node);
                }
            }
            Change::Cut(node, peers) => {
                state.cuts += 1;
                for peer in peers.iter() {
                    state.cut(node, peer);
                }
                if !self.partial {
                    peers.iter().for_each(|peer| state.notice(node, peer));
                }
            }
            Change::Notice(who, whom) => state.notice(who, whom),
            Change::Connect(a, b) if self.partial => state.connect(a, b),
            Change::Connect(a, _) => state.connect_all(a),
            Change::Proceed(node) => state.proceed(node),
            Change::Recover(node, from) => state.recover(node, from),
            Change::EndPromises(to) => state.end_promises(to),
        }
        state.settle();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties: Vec<Property<Self>> = vec![
            Property::sometimes("commits everywhere", |_, state: &Changing| {
                state.cluster.all_finished(Decision::Commit)
            }),
            Property::sometimes("aborts", |_, state: &Changing| state.cluster.some_aborted()),
            Property::sometimes("recovers", |_, state: &Changing| state.recovered),
            Property::sometimes("comes back", |_, state: &Changing| state.has_come_back()),
        ];
        macro_rules! never {
            ($($name:literal)*) => { $(properties.push(Property::always($name, |_, state: &Changing| state.cluster.keeps($name)));)* };
        }
        never!("I1" "I2" "I3" "I4" "I5" "I6" "I7" "I8" "I9" "I10" "EXACTLY-ONCE" "TRUTH");
        never!("G1" "G2" "G3" "G4" "G5" "G6" "G7" "G8" "G9" "LEASE");
        properties
    }

    fn within_boundary(&self, state: &Changing) -> bool {
        state.cluster.resolvers <= self.resolvers && state.highest_vote().0 <= self.generations
    }
}
