//! The invariants, checked by name while the simulation runs.
//!
//! The checker knows the protocol's rules, not its code: what it is told is what nodes send, what gets to their disks, what their
//! databases do and what clients hear.
//!
//! | name | what must hold |
//! |---|---|
//! | I1 | no node commits what another one aborts |
//! | I2 | a precommit or commit anywhere: every member has prepared |
//! | I3 | one ballot carries one verdict |
//! | I4 | once a quorum holds a verdict, every higher ballot carries the same |
//! | I5 | durable promises and accepted ballots never go back; accepted <= promised |
//! | I6 | an outcome never changes |
//! | I7 | after a promise no lower ballot is joined; after a no, no yes is told |
//! | I8 | prepared or finished, never both; only what is prepared is finished |
//! | I9 | a client was told *committed*: whatever quorum survives, the rule leads to commit |
//! | I10 | after all faults are healed every transaction ends everywhere and everything is forgotten |
//! | CAUSAL | nothing is applied before what it can have seen is finished |
//! | EXACTLY-ONCE | no transaction is applied twice |
//! | TRUTH | what clients were told is what happened |

use crate::members_checker::{MembersChecker, Rows};
use std::collections::{BTreeMap, BTreeSet};

use protocol::membership::MembershipRecord;
use protocol::{Accept, Ballot, Decision, Gid, Message, NodeId, NodeSet, Record, Verdict, Vote};

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Violation {
    pub invariant: &'static str,
    pub detail: String,
}

/// What a node durably says about a transaction.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evidence {
    pub decision: Option<Decision>,
    pub accepted: Option<Accept>,
    pub voted_yes: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Checker {
    configured: NodeSet,
    outcomes: BTreeMap<Gid, (Decision, NodeId)>,
    prepared_once: BTreeMap<Gid, NodeSet>,
    applied: BTreeSet<(NodeId, Gid)>,
    verdicts: BTreeMap<(Gid, Ballot), Verdict>,
    accepted: BTreeMap<(Gid, Ballot), NodeSet>,
    durable: BTreeMap<(NodeId, Gid), Record>,
    promised: BTreeMap<(NodeId, Gid), Ballot>,
    refused: BTreeSet<(NodeId, Gid)>,
    seen_at_prepare: BTreeMap<Gid, BTreeSet<Gid>>,
    /// What clients heard; `None` for *unknown*.
    pub told: BTreeMap<Gid, Option<Decision>>,
    pub members: MembersChecker,
    violation: Option<Violation>,
}

impl Checker {
    pub fn new(configured: NodeSet) -> Self {
        Self {
            configured,
            outcomes: BTreeMap::new(),
            prepared_once: BTreeMap::new(),
            applied: BTreeSet::new(),
            verdicts: BTreeMap::new(),
            accepted: BTreeMap::new(),
            durable: BTreeMap::new(),
            promised: BTreeMap::new(),
            refused: BTreeSet::new(),
            seen_at_prepare: BTreeMap::new(),
            told: BTreeMap::new(),
            members: MembersChecker::default(),
            violation: None,
        }
    }

    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    pub fn demand(
        &mut self,
        holds: bool,
        invariant: &'static str,
        detail: impl FnOnce() -> String,
    ) {
        if !holds && self.violation.is_none() {
            self.violation = Some(Violation {
                invariant,
                detail: detail(),
            });
        }
    }

    /// A PREPARE is durable. On the coordinator, `seen` is what its transaction can have read.
    pub fn on_prepared(&mut self, node: NodeId, gid: Gid, seen: Option<BTreeSet<Gid>>) {
        self.prepared_once.entry(gid).or_default().insert(node);
        self.on_prepare_logged(node, gid);
        if let Some(seen) = seen {
            self.seen_at_prepare.insert(gid, seen);
        }
        let again = self.applied.contains(&(node, gid));
        self.demand(!again, "EXACTLY-ONCE", || {
            format!("{gid} is prepared at {node} after it was committed there")
        });
    }

    pub fn prepared_gids(&self) -> impl Iterator<Item = Gid> + '_ {
        self.prepared_once.keys().copied()
    }

    pub fn is_committed(&self, gid: Gid) -> bool {
        self.outcomes
            .get(&gid)
            .is_some_and(|(decision, _)| *decision == Decision::Commit)
    }

    pub fn was_prepared(&self, node: NodeId, gid: Gid) -> bool {
        self.prepared_once
            .get(&gid)
            .is_some_and(|nodes| nodes.contains(node))
    }

    pub fn on_apply_start(&mut self, node: NodeId, gid: Gid, finished: &BTreeMap<Gid, Decision>) {
        let missing = self
            .seen_at_prepare
            .get(&gid)
            .and_then(|seen| seen.iter().find(|gid| !finished.contains_key(gid)).copied());
        self.demand(missing.is_none(), "CAUSAL", || {
            format!("{gid} is applied at {node} before {missing:?}")
        });
    }

    pub fn on_finished(&mut self, node: NodeId, gid: Gid, decision: Decision) {
        self.on_outcome(node, gid, decision);
        if decision == Decision::Commit {
            let first = self.applied.insert((node, gid));
            self.demand(first, "EXACTLY-ONCE", || {
                format!("{gid} is committed twice at {node}")
            });
        }
    }

    /// A node shows an outcome, in whatever way.
    pub fn on_outcome(&mut self, node: NodeId, gid: Gid, decision: Decision) {
        let (known, by) = *self.outcomes.entry(gid).or_insert((decision, node));
        let invariant = if by == node { "I6" } else { "I1" };
        self.demand(known == decision, invariant, || {
            format!("{gid}: {decision:?} at {node}, {known:?} at {by}")
        });
        if decision == Decision::Commit {
            self.demand_all_prepared(gid, node);
            self.demand_order_of_generations(gid);
        }
    }

    fn demand_all_prepared(&mut self, gid: Gid, node: NodeId) {
        let prepared = self.prepared_once.get(&gid).copied().unwrap_or_default();
        let missing = gid.members.difference(prepared);
        self.demand(missing.is_empty(), "I2", || {
            format!("{gid} goes to commit at {node}, {missing} never prepared it")
        });
    }

    /// A message leaves a node.
    pub fn on_sent(&mut self, from: NodeId, msg: &Message) {
        match msg {
            Message::Propose {
                gid,
                ballot,
                verdict,
            } => self.on_proposed(from, *gid, *ballot, *verdict),
            Message::Promised { gid, ballot, .. } => {
                let shown = self.promised.entry((from, *gid)).or_default();
                *shown = (*shown).max(*ballot);
            }
            Message::Accepted { gid, ballot } => {
                let shown = self
                    .promised
                    .get(&(from, *gid))
                    .copied()
                    .unwrap_or_default();
                self.demand(*ballot >= shown, "I7", || {
                    format!("{from} joins {ballot} of {gid}, promised {shown}")
                });
            }
            Message::Vote {
                gid,
                vote: Vote::Yes,
            } => {
                let refused = self.refused.contains(&(from, *gid));
                self.demand(!refused, "I7", || {
                    format!("{from} votes yes on {gid} after it has refused it")
                });
            }
            Message::Decided { gid, decision, .. } | Message::Finished { gid, decision, .. } => {
                self.on_outcome(from, *gid, *decision);
            }
            _ => {}
        }
    }

    fn on_proposed(&mut self, from: NodeId, gid: Gid, ballot: Ballot, verdict: Verdict) {
        let known = *self.verdicts.entry((gid, ballot)).or_insert(verdict);
        self.demand(known == verdict, "I3", || {
            format!("{gid}: ballot {ballot} of {from} carries {known:?} and {verdict:?}")
        });
        if verdict == Verdict::Precommit {
            self.demand_all_prepared(gid, from);
        }
        self.demand_quorums_kept(gid);
    }

    fn demand_quorums_kept(&mut self, gid: Gid) {
        let of_gid = (gid, Ballot::NONE)
            ..=(
                gid,
                Ballot {
                    term: u32::MAX,
                    node: NodeId::new(protocol::MAX_NODES),
                },
            );
        let chosen = self
            .accepted
            .range(of_gid.clone())
            .find(|(_, by)| by.is_quorum_of(self.configured))
            .map(|((_, ballot), _)| *ballot);
        let Some(chosen) = chosen else { return };
        let Some(verdict) = self.verdicts.get(&(gid, chosen)).copied() else {
            return;
        };
        let other = self
            .verdicts
            .range(of_gid)
            .find(|((_, ballot), other)| *ballot > chosen && **other != verdict);
        let other = other.map(|((_, ballot), _)| *ballot);
        self.demand(other.is_none(), "I4", || {
            format!("{gid}: a quorum holds {verdict:?} of {chosen}, {other:?} differs")
        });
    }

    /// A record has reached the disk.
    pub fn on_durable(&mut self, node: NodeId, record: Record) {
        let gid = record.gid;
        let accepted = record
            .accepted
            .map_or(Ballot::NONE, |accepted| accepted.ballot);
        self.demand(accepted <= record.promised, "I5", || {
            format!("{gid} at {node}: accepted above the promise")
        });
        if let Some(before) = self.durable.insert((node, gid), record) {
            let before_accepted = before
                .accepted
                .map_or(Ballot::NONE, |accepted| accepted.ballot);
            let back = record.promised < before.promised || accepted < before_accepted;
            self.demand(!back, "I5", || {
                format!("{gid} at {node} went back from {before:?} to {record:?}")
            });
            let changed = before.decision.is_some()
                && record.decision.is_some()
                && before.decision != record.decision;
            self.demand(!changed, "I6", || {
                format!("{gid} at {node} was {:?}", before.decision)
            });
        }
        if record.decision == Some(Decision::Abort) && !record.voted_yes {
            self.refused.insert((node, gid));
        }
        if let Some(accept) = record.accepted {
            self.accepted
                .entry((gid, accept.ballot))
                .or_default()
                .insert(node);
            if accept.verdict == Verdict::Precommit {
                self.demand_all_prepared(gid, node);
            }
            self.demand_quorums_kept(gid);
        }
    }

    /// The record is gone from the disk.
    pub fn on_freed(&mut self, node: NodeId, gid: Gid) {
        self.durable.remove(&(node, gid));
    }

    pub fn on_told(&mut self, gid: Gid, outcome: Option<Decision>) {
        self.told.insert(gid, outcome);
        if outcome == Some(Decision::Commit) {
            self.on_answered(gid);
        }
    }

    /// Whose clients heard *committed*.
    pub fn told_committed(&self) -> Vec<Gid> {
        let committed = self
            .told
            .iter()
            .filter(|(_, outcome)| **outcome == Some(Decision::Commit));
        committed.map(|(gid, _)| *gid).collect()
    }

    /// Another disk is in the node's server: what was lost may come again, and what the disk holds is there.
    pub fn on_other_disk(
        &mut self,
        node: NodeId,
        record: Option<MembershipRecord>,
        finished: &BTreeMap<Gid, Decision>,
        rows: Rows,
    ) {
        self.applied.retain(|(other, _)| *other != node);
        let committed = finished
            .iter()
            .filter(|(_, decision)| **decision == Decision::Commit);
        self.applied.extend(committed.map(|(gid, _)| (node, *gid)));
        self.on_other_members(node, record, rows);
    }

    /// I9: every quorum that may be left leads rule R* to commit.
    pub fn demand_commit_survives(&mut self, gid: Gid, evidence: &BTreeMap<NodeId, Evidence>) {
        let majority = self.configured.majority();
        for bits in 0..=self.configured.bits() {
            let quorum = NodeSet::from_bits(bits);
            let speaks = quorum.iter().all(|node| evidence.contains_key(&node));
            if quorum.is_subset(self.configured) && quorum.len() == majority && speaks {
                let led = leads_to_commit(gid.coordinator, gid.members, quorum, evidence);
                self.demand(led, "I9", || {
                    format!("{gid} was answered as committed, {quorum} would abort: {evidence:?}")
                });
            }
        }
    }

    /// TRUTH, once everything has ended.
    pub fn demand_truth(&mut self) {
        for (gid, outcome) in self.told.clone() {
            let happened = self.outcomes.get(&gid).map(|(decision, _)| *decision);
            let true_answer = outcome.is_none() || happened == outcome;
            self.demand(true_answer, "TRUTH", || {
                format!("{gid}: client heard {outcome:?}, it ended {happened:?}")
            });
        }
    }
}

/// Rule R* on the durable states of a quorum.
fn leads_to_commit(
    coordinator: NodeId,
    members: NodeSet,
    quorum: NodeSet,
    evidence: &BTreeMap<NodeId, Evidence>,
) -> bool {
    let answers: Vec<(NodeId, Evidence)> = quorum
        .iter()
        .filter_map(|node| Some((node, *evidence.get(&node)?)))
        .collect();
    if let Some(decision) = answers.iter().find_map(|(_, answer)| answer.decision) {
        return decision == Decision::Commit;
    }
    if let Some(highest) = answers
        .iter()
        .filter_map(|(_, answer)| answer.accepted)
        .max_by_key(|accepted| accepted.ballot)
    {
        return highest.verdict == Verdict::Precommit;
    }
    let voted: NodeSet = answers
        .iter()
        .filter(|(_, answer)| answer.voted_yes)
        .map(|(node, _)| *node)
        .collect();
    !voted.is_empty() && members.is_subset(voted.with(coordinator))
}
