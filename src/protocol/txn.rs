//! One transaction on one node: what it has said, heard and still owes.

use std::collections::BTreeSet;

use crate::config::{Config, Fault};
use crate::coordinator::Coordination;
use crate::effect::Effect;
use crate::message::{Accept, Message};
use crate::record::Record;
use crate::resolver::Resolution;
use crate::site::{Site, Turn};
use crate::types::{Ballot, Csn, Gid, Lsn, Millis, NodeId, NodeSet, Verdict};

/// Whether this node's database holds the transaction prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Local {
    /// Not here, or not yet.
    Absent,
    Prepared,
    Finished,
}

/// What this node tells the members about an outcome until they have finished.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Announced {
    /// This node's number of the commit.
    pub csn: Option<Csn>,
    pub unacked: NodeSet,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Txn {
    /// The durable part, as it was last given out or will be next.
    pub record: Record,
    /// A durable record of it exists.
    pub recorded: bool,
    /// Refused here, and that is not durable yet.
    pub refusing: bool,
    /// Found at this node's start.
    pub recovered: bool,
    pub local: Local,
    pub since: Millis,
    pub resend_at: Millis,
    /// Present on the coordinator.
    pub own: Option<Coordination>,
    pub resolution: Resolution,
    /// Participants whose yes has come here; empty on the coordinator, which keeps its own.
    pub votes: NodeSet,
    pub announced: Announced,
    /// Numbers under which the commit was announced, to be settled when it is finished here.
    pub numbers: BTreeSet<(NodeId, Csn)>,
    /// Who waits to hear that it is finished here.
    pub tellers: NodeSet,
    /// The coordinator said that every member has finished.
    pub all_finished: bool,
}

impl Txn {
    pub fn new(gid: Gid, now: Millis) -> Self {
        Self {
            record: Record {
                gid,
                promised: Ballot::NONE,
                accepted: None,
                voted_yes: false,
                decision: None,
                csn: Csn::ZERO,
                prepare_lsn: Lsn::ZERO,
            },
            recorded: false,
            refusing: false,
            recovered: false,
            local: Local::Absent,
            since: now,
            resend_at: now,
            own: None,
            resolution: Resolution::default(),
            votes: NodeSet::EMPTY,
            announced: Announced::default(),
            numbers: BTreeSet::new(),
            tellers: NodeSet::EMPTY,
            all_finished: false,
        }
    }

    /// See [`crate::Core::reduce`].
    pub fn reduce(&mut self, config: &Config) {
        self.resolution.reduce();
        self.tellers = NodeSet::EMPTY;
        self.numbers.clear();
        if !self.announced.unacked.is_empty() {
            self.announced.unacked = config.peers();
        }
    }

    pub const fn gid(&self) -> Gid {
        self.record.gid
    }

    /// Whether this node's yes is needed. Without a vote a node has no part in the transaction but its promises.
    pub const fn has_vote(&self, node: NodeId) -> bool {
        self.gid().members.contains(node)
    }

    pub const fn is_undecided(&self) -> bool {
        self.record.decision.is_none()
    }

    /// Decided, and nothing left to do for this node's database.
    pub fn is_done(&self) -> bool {
        self.record.decision.is_some() && self.local != Local::Prepared
    }

    /// Whether a decision, or the promises that precede one, need no more nodes than these.
    ///
    /// Of a transaction of which this node is the only member nobody else decides anything: strangers do not resolve. So it waits for nobody, also when the other one of two nodes has come
    /// back since, perhaps as a copy that says nothing about that time.
    pub fn is_quorum(&self, config: &Config, nodes: NodeSet) -> bool {
        let alone = self.gid().members == NodeSet::EMPTY.with(config.node);
        config.is_quorum(nodes) || alone && nodes.contains(config.node)
    }

    /// The promise or verdict is about to be shown to others and must survive a crash first.
    pub fn persist(&mut self, turn: &mut Turn) {
        self.recorded = true;
        turn.out.push(Effect::Persist {
            gid: self.gid(),
            record: self.record,
        });
    }

    /// The outcome only has to precede the finish in WAL.
    pub fn write(&mut self, turn: &mut Turn) {
        self.recorded = true;
        turn.out.push(Effect::Write {
            gid: self.gid(),
            record: self.record,
        });
    }

    /// Accepts a verdict whose ballot is not below the promise.
    pub fn accept(&mut self, turn: &mut Turn, ballot: Ballot, verdict: Verdict) {
        assert!(
            ballot >= self.record.promised,
            "a verdict below the promise must not be accepted"
        );
        self.record.promised = ballot;
        self.record.accepted = Some(Accept { ballot, verdict });
        if turn.site.config.breaks(Fault::UndurableAccept) {
            self.write(turn);
        } else {
            self.persist(turn);
        }
    }

    /// Sends to the other configured nodes.
    pub fn broadcast(&self, turn: &mut Turn, msg: &Message) {
        for peer in turn.site.config.configured.without(turn.site.node()).iter() {
            turn.out.send(peer, msg.clone());
        }
    }

    /// Every member has finished, so nobody will ask about it; and no PREPARE of it can come again, since the stored mark of the
    /// coordinator's stream is beyond it.
    pub fn is_forgettable(&self, site: &Site) -> bool {
        if !self.has_vote(site.node()) {
            return self.all_finished;
        }
        if !self.is_done() || !self.announced.unacked.is_empty() {
            return false;
        }
        let passed = site.mark_covers(self.gid().coordinator, self.record.prepare_lsn);
        self.own.is_some() || (self.all_finished && passed)
    }
}
