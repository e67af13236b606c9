//! What views and counters show of a core.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::effect::Source;
use crate::site::Site;
use crate::txn::{Local, Txn};
use crate::types::{Ballot, Decision, Gid, NodeSet, Verdict};

/// How often transactions ended in which way on this node since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counters {
    own: BTreeMap<(Decision, Source), u64>,
    foreign: BTreeMap<(Decision, Source), u64>,
    pub resolvers_started: u64,
    pub barred: u64,
}

impl Counters {
    pub(crate) fn count(&mut self, own: bool, decision: Decision, source: Source) {
        let table = if own {
            &mut self.own
        } else {
            &mut self.foreign
        };
        *table.entry((decision, source)).or_default() += 1;
    }

    /// Transactions of this node's clients.
    pub fn own(&self) -> impl Iterator<Item = (Decision, Source, u64)> + '_ {
        self.own
            .iter()
            .map(|((decision, source), count)| (*decision, *source, *count))
    }

    /// Transactions of other nodes.
    pub fn foreign(&self) -> impl Iterator<Item = (Decision, Source, u64)> + '_ {
        self.foreign
            .iter()
            .map(|((decision, source), count)| (*decision, *source, *count))
    }
}

/// Where a transaction stands on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Asked about before its own backend has announced it.
    Unannounced,
    /// The coordinator counts votes.
    Voting,
    /// Voted yes and waiting: `w` of E3PC.
    Prepared,
    /// This node has only promised; it has no vote.
    Promised,
    /// The last accepted verdict is to commit: `pc`.
    Precommitted,
    /// The last accepted verdict is to abort: `pa`.
    Preaborted,
    /// Decided and still prepared here; or all votes are in and the coordinator's COMMIT PREPARED is the decision.
    Committing,
    Aborting,
    /// Finished here, not yet by all members.
    Committed,
    Aborted,
}

impl State {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unannounced => "unannounced",
            Self::Voting => "voting",
            Self::Prepared => "prepared",
            Self::Promised => "promised",
            Self::Precommitted => "precommitted",
            Self::Preaborted => "preaborted",
            Self::Committing => "committing",
            Self::Aborting => "aborting",
            Self::Committed => "committed",
            Self::Aborted => "aborted",
        }
    }
}

/// One line of the view of transactions in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionView {
    pub gid: Gid,
    pub state: State,
    /// The highest ballot promised.
    pub ballot: Ballot,
    /// Whether this node is resolving it right now.
    pub resolving: bool,
    /// Since this node knows of it, or since its restart.
    pub age_ms: u64,
    /// Nodes whose vote, precommit, answer or finish this node waits for; itself when it has to finish.
    pub missing: NodeSet,
}

impl TransactionView {
    pub(crate) fn of(txn: &Txn, site: &Site, now: u64) -> Self {
        Self {
            gid: txn.gid(),
            state: state(txn),
            ballot: txn.record.promised,
            resolving: txn.resolution.running.is_some(),
            age_ms: now.saturating_sub(txn.since),
            missing: missing(txn, &site.config),
        }
    }
}

fn state(txn: &Txn) -> State {
    match (txn.record.decision, txn.local) {
        (Some(Decision::Commit), Local::Prepared) => return State::Committing,
        (Some(Decision::Abort), Local::Prepared) => return State::Aborting,
        (Some(Decision::Commit), _) => return State::Committed,
        (Some(Decision::Abort), _) => return State::Aborted,
        (None, _) => {}
    }
    if txn.own.as_ref().is_some_and(|own| own.committing) {
        return State::Committing;
    }
    match (
        txn.record.accepted.map(|accepted| accepted.verdict),
        &txn.own,
    ) {
        (Some(Verdict::Precommit), _) => State::Precommitted,
        (Some(Verdict::Preabort), _) => State::Preaborted,
        (None, Some(own)) if own.looking_up => State::Unannounced,
        (None, Some(own)) if !own.proposed => State::Voting,
        (None, _) if txn.record.voted_yes => State::Prepared,
        (None, _) => State::Promised,
    }
}

fn missing(txn: &Txn, config: &Config) -> NodeSet {
    if txn.record.decision.is_some() {
        return unfinished(txn, config);
    }
    if let Some(resolver) = &txn.resolution.running {
        return resolver.silent(config.configured);
    }
    match &txn.own {
        Some(own) if own.committing => NodeSet::EMPTY.with(config.node),
        Some(own) if own.proposed => txn.gid().members.difference(own.precommits),
        Some(own) => txn.gid().participants().difference(own.yes),
        None => NodeSet::EMPTY.with(txn.gid().coordinator),
    }
}

/// Of a decided transaction: who has not finished it; where nobody has to tell this node so, who tells that all have.
fn unfinished(txn: &Txn, config: &Config) -> NodeSet {
    let coordinator = txn.gid().coordinator;
    let peers = txn.announced.unacked;
    match txn.local {
        Local::Prepared => peers.with(config.node),
        _ if peers.is_empty() && coordinator != config.node => NodeSet::EMPTY.with(coordinator),
        _ => peers,
    }
}
