//! One state of the model of members: a [`Cluster`] whose members change.
//!
//! The commit protocol's part is the ordinary model's. Around it: memberships, their durable records, links that break on each side at its own
//! moment, promises, markers, and recovery from a donor. As there, time does not exist. A promise lasts for ever while its giver may make it, and may
//! end at any moment once it may not. Heartbeats arrive at once on whatever works, but what they say of the current generation comes on its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::membership::{
    Elected, Generation, Membership, MembershipConfig, MembershipEffect, MembershipEffects,
    MembershipInput, MembershipMessage, MembershipRecord, Presence,
};
use protocol::{
    Config, Decision, GenerationNum, Gid, Input, Lsn, Millis, NodeId, NodeSet, Refusal, Vote,
};

use crate::change_model::ChangeScope;
use crate::checker::Checker;
use crate::cluster::{Cluster, Node};

/// The moment at which everything happens, after whatever a start waits for.
const NOW: Millis = 1_000;
/// The requests of members beyond these are lost.
const CANDIDATES: u8 = 2;
/// All transactions write this row.
const ROW: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Changing {
    pub(crate) cluster: Cluster,
    pub(crate) members: BTreeMap<NodeId, Member>,
    pub(crate) letters: BTreeSet<Letter>,
    /// Pairs, the lower first, between which messages pass.
    pub(crate) connected: BTreeSet<(NodeId, NodeId)>,
    /// Who has not noticed yet that it has lost whom.
    pub(crate) unnoticed: BTreeSet<(NodeId, NodeId)>,
    pub(crate) gids: BTreeSet<Gid>,
    pub(crate) cuts: u8,
    pub(crate) recovered: bool,
}

/// A node, as far as the ordinary model does not know it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Member {
    /// `None` while it is down.
    pub(crate) membership: Option<Membership>,
    record: Option<MembershipRecord>,
    /// What a recovering node reads here.
    log: Vec<LogItem>,
    pub(crate) open: Option<Generation>,
    draining: Option<GenerationNum>,
    marking: Option<GenerationNum>,
    pub(crate) source: Option<NodeId>,
    pub(crate) withheld: NodeSet,
    /// Whose promise this node holds in its present life.
    pub(crate) promised_by: NodeSet,
    pub(crate) heard: BTreeMap<NodeId, Presence>,
    /// To whom no promise was running at its last tick, and what it withheld then.
    pub(crate) told: Option<(NodeSet, NodeSet)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum LogItem {
    Commit(Gid),
    Marker(GenerationNum),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Letter {
    pub from: NodeId,
    pub to: NodeId,
    pub msg: MembershipMessage,
}

impl Changing {
    /// All nodes run and see each other, in their first generation.
    pub fn new(scope: &ChangeScope) -> Self {
        let configured = scope.configured();
        let nodes = configured.iter().map(|node| (node, Node::default()));
        let members = configured.iter().map(|node| (node, Member::default()));
        let mut changing = Self {
            cluster: Cluster {
                nodes: nodes.collect(),
                network: BTreeSet::new(),
                crashes: 0,
                disturbances: 0,
                resolvers: 0,
                checker: Checker::new(configured),
            },
            members: members.collect(),
            letters: BTreeSet::new(),
            connected: BTreeSet::new(),
            unnoticed: BTreeSet::new(),
            gids: BTreeSet::new(),
            cuts: 0,
            recovered: false,
        };
        for node in configured.iter() {
            changing.boot(scope, node);
        }
        for (a, b) in scope.pairs() {
            changing.connect(a, b);
        }
        changing.settle();
        changing
    }

    pub(crate) fn membership(&self, name: NodeId) -> Option<&Membership> {
        self.members.get(&name)?.membership.as_ref()
    }

    pub(crate) fn is_connected(&self, a: NodeId, b: NodeId) -> bool {
        self.connected.contains(&(a.min(b), a.max(b)))
    }

    /// Starts a node, after all promises of its earlier life are over.
    pub(crate) fn boot(&mut self, scope: &ChangeScope, name: NodeId) {
        self.cluster.boot(name, |epoch| Config {
            resolve_after_ms: 0,
            resolve_step_ms: 0,
            resend_after_ms: 0,
            give_up_after_ms: u64::MAX,
            ..Config::new(name, scope.configured(), epoch)
        });
        for member in self.members.values_mut() {
            member.promised_by.remove(name);
        }
        let Some(member) = self.members.get_mut(&name) else {
            return;
        };
        let config = MembershipConfig {
            campaign_step_ms: 0,
            resend_ms: 0,
            campaign_ms: Millis::MAX / 2,
            promise_ms_max: 0,
            fault: scope.fault,
            ..MembershipConfig::new(name, scope.configured())
        };
        let mut out = MembershipEffects::new();
        let membership = Membership::new(config, member.record, 0, &mut out);
        member.membership = Some(membership);
        let mut inputs = VecDeque::new();
        for effect in out.drain() {
            self.perform(name, effect, &mut inputs);
        }
        self.inputs(name, inputs);
    }

    pub(crate) fn crash(&mut self, name: NodeId) {
        self.cluster.lose_memory(name);
        let Some(member) = self.members.get_mut(&name) else {
            return;
        };
        *member = Member {
            record: member.record,
            log: std::mem::take(&mut member.log),
            ..Member::default()
        };
        self.unnoticed.retain(|(who, _)| *who != name);
        for peer in self.configured().without(name).iter() {
            self.cut(name, peer);
            self.notice(peer, name);
        }
    }

    /// The connection of two nodes breaks; each notices it at its own time.
    pub(crate) fn cut(&mut self, a: NodeId, b: NodeId) {
        if self.connected.remove(&(a.min(b), a.max(b))) {
            for (who, whom) in [(a, b), (b, a)] {
                if self.cluster.is_up(who) {
                    self.unnoticed.insert((who, whom));
                }
            }
        }
    }

    /// Connects the node with all others that run.
    pub(crate) fn connect_all(&mut self, name: NodeId) {
        for peer in self.configured().without(name).iter() {
            if self.cluster.is_up(peer) && !self.is_connected(name, peer) {
                self.connect(name, peer);
            }
        }
    }

    pub(crate) fn notice(&mut self, who: NodeId, whom: NodeId) {
        if self.unnoticed.remove(&(who, whom)) {
            self.cluster.input(who, Input::LinkDown { peer: whom });
            self.members_mut(who).heard.remove(&whom);
            self.input(who, MembershipInput::LinkDown { peer: whom });
        }
    }

    pub(crate) fn connect(&mut self, a: NodeId, b: NodeId) {
        self.connected.insert((a.min(b), a.max(b)));
        for (node, peer) in [(a, b), (b, a)] {
            self.unnoticed.remove(&(node, peer));
            self.members_mut(node).heard.remove(&peer);
            let epoch = self.cluster.epoch(peer);
            self.cluster.input(node, Input::LinkUp { peer, epoch });
            self.input(node, MembershipInput::LinkUp { peer });
        }
    }

    pub(crate) fn members_mut(&mut self, name: NodeId) -> &mut Member {
        self.members.entry(name).or_default()
    }

    pub(crate) fn input(&mut self, name: NodeId, input: MembershipInput) {
        self.inputs(name, VecDeque::from([input]));
    }

    /// Gives these inputs, and those that answer their effects, one after the other.
    fn inputs(&mut self, name: NodeId, mut inputs: VecDeque<MembershipInput>) {
        while let Some(input) = inputs.pop_front() {
            let mut out = MembershipEffects::new();
            if let Some(membership) = &mut self.members_mut(name).membership {
                membership.handle(NOW, input, &mut out);
                membership.reduce();
            }
            for effect in out.drain() {
                self.perform(name, effect, &mut inputs);
            }
        }
    }

    fn perform(
        &mut self,
        name: NodeId,
        effect: MembershipEffect,
        inputs: &mut VecDeque<MembershipInput>,
    ) {
        match effect {
            MembershipEffect::Persist(record) => {
                self.members_mut(name).record = Some(record);
                self.cluster.checker.on_members_durable(name, record);
            }
            MembershipEffect::Send { to, msg } => self.post(name, to, msg),
            MembershipEffect::Withhold { from } => self.members_mut(name).withheld = from,
            MembershipEffect::Close { generation } => {
                let member = self.members_mut(name);
                (member.open, member.draining, member.marking) = (None, None, None);
                self.cluster.input(name, Input::Generation { generation });
                let num = generation.num;
                inputs.push_back(MembershipInput::Closed { num });
            }
            MembershipEffect::Drain { num } => self.members_mut(name).draining = Some(num),
            MembershipEffect::WriteMarker { elected } => {
                self.members_mut(name).marking = Some(elected.generation.num);
            }
            MembershipEffect::Open { generation } => self.open(name, generation),
            MembershipEffect::Recover { from } => self.members_mut(name).source = Some(from),
            MembershipEffect::StopRecovery => self.members_mut(name).source = None,
            MembershipEffect::Beat
            | MembershipEffect::Event(_)
            | MembershipEffect::AskReferee(_) => {}
        }
    }

    /// Which generation is current is left to heartbeats: [`Changing::teach`].
    fn post(&mut self, from: NodeId, to: NodeId, msg: MembershipMessage) {
        let untaught = Elected::default();
        let msg = match msg {
            MembershipMessage::Elected(_) => return,
            // Two candidates are enough for a duel.
            MembershipMessage::RequestVote { .. } if self.is_third(from) => return,
            MembershipMessage::RequestVote { generation, .. } => MembershipMessage::RequestVote {
                generation,
                current: untaught,
            },
            MembershipMessage::Denied { num, last_vote, .. } => MembershipMessage::Denied {
                num,
                last_vote,
                current: untaught,
            },
            granted @ MembershipMessage::Granted { .. } => granted,
        };
        if self.is_connected(from, to) {
            self.letters.insert(Letter { from, to, msg });
        }
    }

    /// A member that goes on with others would be the third candidate.
    fn is_third(&self, name: NodeId) -> bool {
        let current = self.membership(name).map(Membership::current);
        let member = current.is_some_and(|current| current.generation.members.contains(name));
        member && name.get() > CANDIDATES
    }

    fn open(&mut self, name: NodeId, generation: Generation) {
        let elected = generation.members.is_quorum_of(self.configured());
        self.members_mut(name).open = Some(generation);
        let node = &self.cluster.nodes[&name];
        let holds = |gid: Gid| node.prepared.contains(&gid) || node.finished.contains_key(&gid);
        self.cluster
            .checker
            .on_open(name, generation, elected, holds);
        self.cluster.input(name, Input::Generation { generation });
        self.cluster.input(name, Input::Online);
    }

    pub(crate) fn configured(&self) -> NodeSet {
        self.members.keys().copied().collect()
    }

    /// What a heartbeat says about the current generation of its sender.
    pub(crate) fn teach(&mut self, from: NodeId, to: NodeId) {
        if let Some(elected) = self.membership(from).map(Membership::current) {
            let msg = MembershipMessage::Elected(elected);
            self.input(to, MembershipInput::Message { from, msg });
        }
    }

    /// A client of this node commits.
    pub(crate) fn begin(&mut self, name: NodeId, fast: bool) {
        let Some(open) = self.members_mut(name).open else {
            return;
        };
        let gid = Gid {
            coordinator: name,
            // Two that differ in their generation have two names, or states that differ would be taken for one.
            xid: u64::from(open.num.0) * 100 + u64::from(name.get()) * 10 + self.gids.len() as u64,
            generation: open.num,
            members: open.members,
            started_at: self.gids.len() as i64,
        };
        self.gids.insert(gid);
        if let Some(node) = self.cluster.nodes.get_mut(&name) {
            node.prepared.insert(gid);
            node.waiting.insert(gid);
        }
        self.cluster.sync(name);
        self.cluster.checker.on_prepared(name, gid, None);
        let wait_peers = false;
        self.cluster.input(
            name,
            Input::Committing {
                gid,
                wait_peers,
                fast,
            },
        );
    }

    /// The answer of the node's apply.
    pub(crate) fn vote(&mut self, name: NodeId, gid: Gid, yes: bool) {
        let vote = if yes {
            if let Some(node) = self.cluster.nodes.get_mut(&name) {
                node.prepared.insert(gid);
            }
            self.cluster.sync(name);
            self.cluster.checker.on_prepared(name, gid, None);
            Vote::Yes
        } else {
            Vote::No(Refusal::retry("", ""))
        };
        let prepare_lsn = Lsn(1);
        self.cluster.input(
            name,
            Input::Voted {
                gid,
                vote,
                prepare_lsn,
            },
        );
    }

    /// Whether draining or marking can go on.
    pub(crate) fn can_proceed(&self, name: NodeId) -> bool {
        let member = &self.members[&name];
        let drained = member
            .draining
            .is_some_and(|num| self.is_drained(name, num));
        drained || member.marking.is_some()
    }

    fn is_drained(&self, name: NodeId, num: GenerationNum) -> bool {
        let mut prepared = self.cluster.nodes[&name].prepared.iter();
        !prepared.any(|gid| gid.generation < num)
    }

    pub(crate) fn proceed(&mut self, name: NodeId) {
        if let Some(num) = self.members_mut(name).marking.take() {
            self.members_mut(name).log.push(LogItem::Marker(num));
            self.cluster.checker.on_marker(name, num);
            self.input(name, MembershipInput::MarkerWritten { num });
        } else if let Some(num) = self.members_mut(name).draining.take() {
            self.input(name, MembershipInput::Drained { num });
        }
    }

    /// Reads all that its donor has, if nothing here is in doubt.
    pub(crate) fn recover(&mut self, name: NodeId, from: NodeId) {
        let online_in = self.members[&name].record.map(|record| record.online_in);
        for item in self.members[&from].log.clone() {
            let LogItem::Commit(gid) = item else { continue };
            let here = self.cluster.nodes[&name].finished.contains_key(&gid);
            let newer = online_in.is_some_and(|online_in| gid.generation > online_in);
            if newer && !here && gid.coordinator != name {
                if let Some(node) = self.cluster.nodes.get_mut(&name) {
                    node.finished.insert(gid, Decision::Commit);
                }
                self.cluster
                    .checker
                    .on_finished(name, gid, Decision::Commit);
                self.log_commits(name);
                self.recovered = true;
            }
        }
        let level = true;
        self.input(name, MembershipInput::Level { from, level });
        for item in self.members[&from].log.clone() {
            if let LogItem::Marker(num) = item {
                self.input(name, MembershipInput::MarkerReached { from, num });
            }
        }
    }

    /// Puts into the log what was committed since.
    pub(crate) fn log_commits(&mut self, name: NodeId) {
        let finished = self.cluster.nodes[&name].finished.clone();
        for (gid, decision) in finished {
            let item = LogItem::Commit(gid);
            let member = self.members_mut(name);
            if decision == Decision::Commit && !member.log.contains(&item) {
                member.log.push(item);
                self.cluster.checker.on_row_committed(name, ROW, gid);
            }
        }
    }

    /// Those whose promises to the node are not renewed.
    pub(crate) fn ending(&self, to: NodeId) -> NodeSet {
        let promised_by = self.members[&to].promised_by;
        let ends = |giver: &NodeId| {
            self.members[giver].withheld.contains(to) || !self.cluster.is_up(*giver)
        };
        promised_by.iter().filter(ends).collect()
    }

    pub(crate) fn end_promises(&mut self, to: NodeId) {
        let ending = self.ending(to);
        let member = self.members_mut(to);
        member.promised_by = member.promised_by.difference(ending);
    }

    /// The highest generation that anybody has voted for.
    pub(crate) fn highest_vote(&self) -> GenerationNum {
        let votes = self.members.values().filter_map(|member| member.record);
        let nums = votes.map(|record| record.last_vote.num);
        nums.max().unwrap_or_default()
    }

    /// Whether the node has been taken in again: online with everybody in a generation that it has recovered for.
    pub(crate) fn has_come_back(&self) -> bool {
        let all = self.configured();
        self.members.values().any(|member| {
            let record = member.record.filter(|record| record.recovered_to.0 > 1);
            record.is_some() && member.open.is_some_and(|open| open.members == all)
        })
    }
}
