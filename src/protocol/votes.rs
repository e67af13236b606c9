//! Votes to all: each member counts the votes itself and precommits when it has all of them.
//!
//! Used where the coordinator may not decide on the votes alone (more than [`crate::FAST_NODES_MAX`] nodes): a commit then takes three
//! delays instead of four, votes, precommits, outcome (PROTOCOL.md 7.2). It is the central protocol with the same ballot, the same value and the same
//! condition: whoever holds the PREPARE knows the coordinator's yes, and a yes is durable before it is told, so all of
//! them prove what the coordinator's proposal would have said. Nobody may propose anything else under [`Ballot::COORDINATOR`]. What a member
//! lacks, a lost vote or one from before its restart, the coordinator's proposal replaces when the precommit is overdue.

use std::collections::BTreeMap;

use crate::config::{EARLY_VOTES_MAX, Fault};
use crate::message::Message;
use crate::site::Turn;
use crate::txn::Txn;
use crate::types::{Ballot, Gid, Millis, NodeId, NodeSet, Verdict};

/// Votes on transactions whose PREPARE has not come yet. To lose one costs a delay, no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct EarlyVotes {
    votes: BTreeMap<Gid, (NodeSet, Millis)>,
}

impl EarlyVotes {
    pub fn keep(&mut self, gid: Gid, from: NodeId, now: Millis) {
        if self.votes.len() < EARLY_VOTES_MAX || self.votes.contains_key(&gid) {
            self.votes
                .entry(gid)
                .or_insert((NodeSet::EMPTY, now))
                .0
                .insert(from);
        }
    }

    pub fn take(&mut self, gid: Gid) -> NodeSet {
        self.votes
            .remove(&gid)
            .map_or(NodeSet::EMPTY, |kept| kept.0)
    }

    /// Those whose PREPARE has not come by now have ended here before, or never come.
    pub fn drop_older(&mut self, before: Millis) {
        self.votes.retain(|_, (_, since)| *since >= before);
    }
}

impl Txn {
    /// Another participant's yes.
    pub fn on_fellow_vote(&mut self, turn: &mut Turn, from: NodeId) {
        self.votes.insert(from);
        self.precommit_on_votes(turn);
    }

    /// Accepts what the coordinator would propose, once it is known to be able to.
    pub fn precommit_on_votes(&mut self, turn: &mut Turn) {
        let gid = self.gid();
        let config = &turn.site.config;
        let votes = self.votes.with(config.node).with(gid.coordinator);
        let enough = gid.members.is_subset(votes)
            || config.breaks(Fault::MostVotes) && votes.is_quorum_of(gid.members);
        let free = self.record.promised < Ballot::COORDINATOR && self.record.accepted.is_none();
        if !config.votes_to_all
            || self.own.is_some()
            || !self.record.voted_yes
            || !self.is_undecided()
            || !enough
            || !free
        {
            return;
        }
        self.accept(turn, Ballot::COORDINATOR, Verdict::Precommit);
        let ballot = Ballot::COORDINATOR;
        turn.out
            .send(gid.coordinator, Message::Accepted { gid, ballot });
    }
}
