//! What a core knows beside its transactions: links, marks, numbers, counters.

use std::collections::{BTreeMap, VecDeque};

use crate::causal::Causal;
use crate::config::{Config, FORGOTTEN_MAX};
use crate::effect::{Effect, Effects, Event, Source};
use crate::types::{Csn, Decision, Gid, Lsn, Millis, NodeId, NodeSet};
use crate::view::Counters;
use crate::votes::EarlyVotes;

/// This node, as far as all its transactions share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Site {
    pub config: Config,
    /// Peers whose link works.
    pub links: NodeSet,
    epochs: BTreeMap<NodeId, u32>,
    marks: BTreeMap<NodeId, Lsn>,
    last_csn: Csn,
    pub causal: Causal,
    /// Peers of whose current epoch no horizon is known yet.
    pub horizon_missing: NodeSet,
    /// Nodes that have asked for this node's horizon.
    pub horizon_askers: BTreeMap<NodeId, Asked>,
    pub horizon_ask_at: Millis,
    pub forgotten: Forgotten,
    pub early_votes: EarlyVotes,
    pub counters: Counters,
}

/// What a node that has asked for this node's horizon waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    /// The last number given out when it asked: it is answered once it has finished all up to there. What it acknowledged before a restart would otherwise leave a
    /// gap that nobody fills.
    pub wanted: Csn,
    /// The same for the latest time that it asked while unanswered. It may have come online in between, and is owed an answer to that one; the first one is kept
    /// all the same, or who asks again and again under load would never be answered.
    pub again: Csn,
}

/// One call of the core: the node, the time and the effects so far.
pub(crate) struct Turn<'a> {
    pub site: &'a mut Site,
    pub now: Millis,
    pub out: &'a mut Effects,
}

impl Site {
    pub fn new(config: Config) -> Self {
        let last_csn = Csn::start_of(config.epoch);
        let asked = Asked {
            wanted: last_csn,
            again: last_csn,
        };
        let horizon_askers = BTreeMap::from([(config.node, asked)]);
        Self {
            config,
            links: NodeSet::EMPTY,
            epochs: BTreeMap::new(),
            marks: BTreeMap::new(),
            last_csn,
            causal: Causal::default(),
            horizon_missing: NodeSet::EMPTY,
            horizon_askers,
            horizon_ask_at: 0,
            forgotten: Forgotten::default(),
            early_votes: EarlyVotes::default(),
            counters: Counters::default(),
        }
    }

    pub const fn node(&self) -> NodeId {
        self.config.node
    }

    /// Configured nodes to which messages can go, this one included.
    pub fn reachable(&self) -> NodeSet {
        self.links
            .with(self.node())
            .intersection(self.config.configured)
    }

    pub fn epoch_of(&self, peer: NodeId) -> Option<u32> {
        self.epochs.get(&peer).copied()
    }

    pub fn set_epoch(&mut self, peer: NodeId, epoch: u32) {
        self.epochs.insert(peer, epoch);
    }

    pub const fn last_csn(&self) -> Csn {
        self.last_csn
    }

    pub fn next_csn(&mut self) -> Csn {
        self.last_csn = self.last_csn.next();
        self.last_csn
    }

    /// Notes that the node wants to know this node's horizon.
    pub fn ask_horizon(&mut self, asker: NodeId) {
        let (wanted, again) = (self.last_csn, self.last_csn);
        self.horizon_askers
            .entry(asker)
            .and_modify(|asked| asked.again = again)
            .or_insert(Asked { wanted, again });
    }

    /// See [`crate::Core::reduce`].
    pub fn reduce(&mut self) {
        self.counters = Counters::default();
        self.causal = Causal::default();
        self.epochs.clear();
        self.horizon_missing = NodeSet::EMPTY;
        self.horizon_askers.clear();
    }

    /// Whether an own transaction that this core does not know may have been resolved and forgotten, by an earlier core or by this one: only
    /// what was left prepared by an earlier one is resolved before its backend speaks.
    pub const fn may_have_ended_before(&self, gid: Gid) -> bool {
        gid.xid < self.config.first_xid
    }

    pub fn raise_mark(&mut self, origin: NodeId, lsn: Lsn) {
        let mark = self.marks.entry(origin).or_default();
        *mark = (*mark).max(lsn);
    }

    /// Whether a PREPARE that ends at `lsn` of the origin's stream can no longer come.
    pub fn mark_covers(&self, origin: NodeId, lsn: Lsn) -> bool {
        lsn > Lsn::ZERO && self.marks.get(&origin).is_some_and(|mark| *mark >= lsn)
    }
}

impl Turn<'_> {
    pub fn count(&mut self, gid: Gid, decision: Decision, source: Source) {
        let own = gid.coordinator == self.site.node();
        self.site.counters.count(own, decision, source);
        self.out.event(Event::Decided {
            gid,
            decision,
            source,
        });
    }

    pub fn reject(&mut self, from: NodeId, reason: &'static str) {
        self.out.event(Event::Rejected { from, reason });
    }

    /// Notes that a commit announced by `node` is finished here.
    pub fn settle(&mut self, node: NodeId, csn: Csn) {
        if !self.site.causal.finished(node, csn, self.out) {
            self.out.event(Event::TableFull {
                table: "finished commits",
            });
            if node == self.site.node() {
                self.site.ask_horizon(node);
            } else {
                self.site.horizon_missing.insert(node);
            }
        }
    }

    pub fn raise_visible(&mut self, node: NodeId, csn: Csn) {
        self.out.push(Effect::Visible { node, csn });
    }

    /// When something that is unanswered by then is sent again.
    pub const fn resend_at(&self) -> Millis {
        self.now + self.site.config.resend_after_ms
    }
}

/// The last transactions that were forgotten, and how they ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Forgotten {
    decisions: BTreeMap<Gid, Decision>,
    order: VecDeque<Gid>,
}

impl Forgotten {
    pub fn insert(&mut self, gid: Gid, decision: Decision) {
        if self.decisions.insert(gid, decision).is_none() {
            self.order.push_back(gid);
        }
        while self.order.len() > FORGOTTEN_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.decisions.remove(&oldest);
            }
        }
    }

    pub fn get(&self, gid: Gid) -> Option<Decision> {
        self.decisions.get(&gid).copied()
    }
}
