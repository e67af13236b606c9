//! One state of the model: nodes, network, and the checker that rides along.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{
    Config, Core, Decision, Effect, Effects, Gid, Input, Message, NodeId, Outcome, Record,
    Recovered,
};

use crate::checker::{Checker, Evidence};
use crate::model::Scope;

/// The whole cluster at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cluster {
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) network: BTreeSet<Envelope>,
    pub(crate) crashes: u8,
    pub(crate) disturbances: u8,
    /// Attempts to resolve that were started, by any node for any transaction.
    pub(crate) resolvers: u8,
    pub(crate) checker: Checker,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    pub(crate) epoch: u32,
    pub(crate) core: Option<Core>,
    pub(crate) records: BTreeMap<Gid, Record>,
    pub(crate) prepared: BTreeSet<Gid>,
    pub(crate) finished: BTreeMap<Gid, Decision>,
    pub(crate) wal: Vec<WalItem>,
    /// Own transactions whose client still waits.
    pub(crate) waiting: BTreeSet<Gid>,
    /// Own transactions whose backend has been told and is about to finish.
    pub(crate) finishing: BTreeMap<Gid, Decision>,
    /// Records of commits that the backend has been told of and writes itself.
    pub(crate) handed: BTreeMap<Gid, Record>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum WalItem {
    Record(Record),
    Free(Gid),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Envelope {
    pub(crate) from: NodeId,
    pub(crate) to: NodeId,
    pub(crate) msg: Message,
}

impl Node {
    pub(crate) fn is_refused(&self, gid: Gid) -> bool {
        let written = self.wal.iter().any(|item| matches!(item, WalItem::Record(record) if record.gid == gid && !record.voted_yes));
        written
            || self
                .records
                .get(&gid)
                .is_some_and(|record| record.decision == Some(Decision::Abort))
    }
}

impl Node {
    /// The transaction has an outcome here that no crash takes back.
    fn has_ended(&self, gid: Gid) -> bool {
        let decided = self
            .records
            .get(&gid)
            .is_some_and(|record| record.decision.is_some());
        self.finished.contains_key(&gid) || (decided && !self.prepared.contains(&gid))
    }
}

impl Cluster {
    pub(crate) fn keeps(&self, invariant: &str) -> bool {
        self.checker
            .violation()
            .is_none_or(|violation| violation.invariant != invariant)
    }

    pub(crate) fn all_finished(&self, decision: Decision) -> bool {
        self.nodes
            .values()
            .all(|node| node.finished.values().any(|finished| *finished == decision))
    }

    pub(crate) fn some_aborted(&self) -> bool {
        self.nodes.iter().any(|(name, node)| {
            let mut ended = node.finished.iter();
            ended.any(|(gid, decision)| gid.coordinator == *name && *decision == Decision::Abort)
        })
    }

    /// Starts the node with what is on its disk. It has no links yet.
    pub(crate) fn boot(&mut self, name: NodeId, config: impl FnOnce(u32) -> Config) {
        let Some(node) = self.nodes.get_mut(&name) else {
            return;
        };
        node.epoch += 1;
        let gids: BTreeSet<Gid> = node.records.keys().chain(&node.prepared).copied().collect();
        let found = |gid| Recovered {
            gid,
            record: node.records.get(&gid).copied(),
            prepared: node.prepared.contains(&gid),
        };
        let recovered = gids.into_iter().map(found).collect();
        let mut out = Effects::new();
        let mut core = Core::new(config(node.epoch), recovered, 0, &mut out);
        core.reduce();
        node.core = Some(core);
        self.carry_out(name, &mut out);
    }

    /// Starts the node and links it with every other one that runs.
    pub(crate) fn start(&mut self, scope: &Scope, name: NodeId) {
        self.boot(name, |epoch| scope.config(name, epoch));
        let epoch = self.epoch(name);
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

    /// How often the node has been started.
    pub(crate) fn epoch(&self, name: NodeId) -> u32 {
        self.nodes.get(&name).map_or(0, |node| node.epoch)
    }

    pub(crate) fn is_up(&self, name: NodeId) -> bool {
        self.nodes
            .get(&name)
            .is_some_and(|node| node.core.is_some())
    }

    pub(crate) fn crash(&mut self, name: NodeId) {
        self.lose_memory(name);
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

    /// Takes away the node's memory, what it had not flushed, and what is on its links.
    pub(crate) fn lose_memory(&mut self, name: NodeId) {
        self.crashes += 1;
        if let Some(node) = self.nodes.get_mut(&name) {
            node.core = None;
            node.wal.clear();
            node.waiting.clear();
            node.finishing.clear();
            node.handed.clear();
        }
        self.network
            .retain(|envelope| envelope.from != name && envelope.to != name);
        for gid in self.checker.told_committed() {
            self.demand_commit_survives(gid);
        }
    }

    pub(crate) fn input(&mut self, name: NodeId, input: Input) {
        let mut out = Effects::new();
        if let Some(core) = self
            .nodes
            .get_mut(&name)
            .and_then(|node| node.core.as_mut())
        {
            core.handle(0, input, &mut out);
            core.reduce();
        }
        self.carry_out(name, &mut out);
    }

    fn carry_out(&mut self, name: NodeId, out: &mut Effects) {
        for effect in out.drain() {
            self.perform(name, effect);
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
            Effect::Persist { record, .. } => {
                node.wal.push(WalItem::Record(record));
                self.sync(name);
            }
            Effect::Write { gid, record } => {
                if record.decision == Some(Decision::Commit) && node.waiting.contains(&gid) {
                    node.handed.insert(gid, record);
                } else {
                    node.wal.push(WalItem::Record(record));
                }
            }
            Effect::Free { gid } => {
                node.wal.push(WalItem::Free(gid));
                self.sync(name);
            }
            Effect::Finish { gid, decision } => self.finish(name, gid, decision),
            Effect::Reply { gid, outcome } => {
                node.waiting.remove(&gid);
                match outcome {
                    Outcome::Commit { .. } => {
                        node.finishing.insert(gid, Decision::Commit);
                    }
                    Outcome::Abort(_) => {
                        node.finishing.insert(gid, Decision::Abort);
                    }
                    Outcome::Unknown => self.checker.on_told(gid, None),
                }
            }
            Effect::LookUp { gid } => {
                let outcome = node.finished.get(&gid).copied();
                self.input(name, Input::CoordinatorOutcome { gid, outcome });
            }
            Effect::Event(protocol::Event::Decided { gid, decision, .. }) => {
                self.checker.on_outcome(name, gid, decision)
            }
            Effect::Event(protocol::Event::ResolverStarted { .. }) => self.resolvers += 1,
            Effect::Visible { .. }
            | Effect::Settled { .. }
            | Effect::PeersFinished { .. }
            | Effect::Event(_) => {}
        }
    }

    /// Drops messages that can no longer make a difference. A node that has durably ended a transaction does nothing about it any
    /// more but tell the outcome to those who ask, and only nodes without an outcome ask.
    pub(crate) fn drop_vain(&mut self) {
        let ended = |node: NodeId, gid: Gid| {
            self.nodes
                .get(&node)
                .is_some_and(|node| node.has_ended(gid))
        };
        let mut network = std::mem::take(&mut self.network);
        network.retain(|envelope| {
            let Some(gid) = envelope.msg.gid() else {
                return true;
            };
            let asks = matches!(
                envelope.msg,
                Message::Vote { .. }
                    | Message::Query { .. }
                    | Message::Status { .. }
                    | Message::Propose { .. }
            );
            !ended(envelope.to, gid) || (asks && !ended(envelope.from, gid))
        });
        self.network = network;
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

    /// The backend that was told finishes, durably, and answers its client.
    pub(crate) fn finish_by_backend(&mut self, name: NodeId, gid: Gid) {
        let finishing = self
            .nodes
            .get_mut(&name)
            .and_then(|node| node.finishing.remove(&gid));
        if let Some(decision) = finishing {
            if let Some(node) = self.nodes.get_mut(&name)
                && let Some(record) = node.handed.remove(&gid)
            {
                node.wal.push(WalItem::Record(record));
            }
            self.finish(name, gid, decision);
            self.checker.on_told(gid, Some(decision));
            if decision == Decision::Commit {
                self.demand_commit_survives(gid);
            }
        }
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

    /// Brings WAL to the disk.
    pub(crate) fn sync(&mut self, name: NodeId) {
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

/// Causal order and forgetting are checked by the simulator; here their messages would only multiply states. So would what only saves time: a
/// resolver that is refused stops, as one whose messages are lost does, and who queries is told what a decided node tells anyway.
const fn is_left_to_simulator(msg: &Message) -> bool {
    matches!(
        msg,
        Message::AskHorizon
            | Message::Horizon { .. }
            | Message::Forget { .. }
            | Message::Refused { .. }
            | Message::Query { .. }
            | Message::Finished {
                decision: Decision::Commit,
                ..
            }
    )
}
