//! Resolution: deciding transactions whose coordinator is gone or was disturbed.
//!
//! A prepared transaction holds its locks until it is decided, so one lost coordinator could block every node.
//! Any configured node may resolve instead, by rule R*:
//!
//! 1. Choose a ballot above all seen, promise it durably, and ask the configured nodes what they know. Who knows an outcome says so, and
//!    that is the end. Who has never heard of the transaction bars it, which is an outcome.
//! 2. From a quorum of promises take the first line that applies: the verdict of the highest accepted ballot above the
//!    coordinator's; precommit, if every member's yes is proven (a precommit under the coordinator's ballot proves all, a member's
//!    yes proves its own and the coordinator's, which came with the PREPARE); preabort.
//! 3. Propose it under that ballot. Acceptance by a quorum makes it the decision.
//!
//! For the last line the resolver waits until everybody it can reach has answered, or for one interval: more answers may
//! prove more votes.
//!
//! Invariants, checked by `sim`:
//! - I3, I4  a ballot carries one value, and keeps the value that a lower ballot may have decided;
//! - I5      promises never go back, not even across a restart.
//!
//! Competing resolvers: whoever sees a higher ballot stops and waits for a time that grows with its place in the order of nodes and
//! with its attempts, so that somebody is eventually alone.

use std::collections::BTreeMap;

use crate::config::{Config, Fault};
use crate::effect::{Event, Source};
use crate::message::{Accept, Message};
use crate::site::Turn;
use crate::txn::Txn;
use crate::types::{Ballot, Decision, Millis, NodeId, NodeSet, Verdict};

/// Beyond this many attempts the pause between them no longer doubles.
const BACKOFF_DOUBLINGS_MAX: u32 = 6;

/// What a node knows about attempts to resolve one transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Resolution {
    /// When to start (again), unless it is decided by then.
    pub at: Option<Millis>,
    /// When the first attempt began, of this node or of another one.
    pub since: Option<Millis>,
    pub running: Option<Resolver>,
    /// The highest ballot heard of.
    seen: Ballot,
    attempts: u32,
}

impl Resolution {
    /// See [`crate::Core::reduce`].
    pub const fn reduce(&mut self) {
        self.since = None;
        self.attempts = 0;
    }

    pub fn stop(&mut self) {
        self.at = None;
        self.running = None;
    }
}

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Resolver {
    ballot: Ballot,
    promises: BTreeMap<NodeId, Promise>,
    proposal: Option<Proposal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Promise {
    accepted: Option<Accept>,
    voted_yes: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Proposal {
    verdict: Verdict,
    accepted_by: NodeSet,
}

impl Resolver {
    /// Who has not answered what was last asked.
    pub fn silent(&self, configured: NodeSet) -> NodeSet {
        let answered = match &self.proposal {
            Some(proposal) => proposal.accepted_by,
            None => self.promised_by(),
        };
        configured.difference(answered)
    }

    fn promised_by(&self) -> NodeSet {
        self.promises.keys().copied().collect()
    }

    /// Lines 2 to 4 of R*.
    fn verdict(&self, coordinator: NodeId, members: NodeSet) -> Choice {
        let accepted = self
            .promises
            .values()
            .filter_map(|promise| promise.accepted)
            .max_by_key(|accepted| accepted.ballot);
        if let Some(accepted) = accepted {
            // Under the coordinator's ballot only precommit is proposed, and only after every vote.
            return Choice::Forced(accepted.verdict);
        }
        let voted: NodeSet = self
            .promises
            .iter()
            .filter(|(_, promise)| promise.voted_yes)
            .map(|(node, _)| *node)
            .collect();
        let proven = if voted.is_empty() {
            voted
        } else {
            voted.with(coordinator)
        };
        if members.is_subset(proven) {
            Choice::Forced(Verdict::Precommit)
        } else {
            Choice::Free
        }
    }
}

/// What the answers leave to the resolver.
enum Choice {
    Forced(Verdict),
    /// Nothing can have been decided, and not every vote is proven.
    Free,
}

impl Txn {
    /// Starts an attempt, unless one is running.
    pub fn resolve(&mut self, turn: &mut Turn) {
        if self.resolution.running.is_some() || !self.is_undecided() || self.is_unsure() {
            return;
        }
        // Members may have finished and forgotten it: they would take the question of a stranger for one before any vote.
        if !self.has_vote(turn.site.node()) {
            return self.resolution.stop();
        }
        let gid = self.gid();
        let node = turn.site.node();
        let ballot = self.next_ballot(&turn.site.config);
        self.resolution.at = None;
        self.resolution.since.get_or_insert(turn.now);
        self.resolution.attempts = self.resolution.attempts.saturating_add(1);
        self.resolution.running = Some(Resolver {
            ballot,
            promises: BTreeMap::new(),
            proposal: None,
        });
        self.record.promised = ballot;
        self.resend_at = turn.resend_at();
        turn.site.counters.resolvers_started += 1;
        turn.out.event(Event::ResolverStarted { gid, ballot });
        // Durable before anybody hears of the ballot, or a restart could use it a second time.
        self.persist(turn);
        self.broadcast(turn, &Message::Status { gid, ballot });
        turn.out.send(node, self.promised());
    }

    fn next_ballot(&self, config: &Config) -> Ballot {
        let ballot = self
            .record
            .promised
            .max(self.resolution.seen)
            .above(config.node);
        if config.breaks(Fault::SharedBallots) {
            Ballot {
                node: None,
                ..ballot
            }
        } else {
            ballot
        }
    }

    /// Phase 1b.
    pub fn on_promised(
        &mut self,
        turn: &mut Turn,
        from: NodeId,
        ballot: Ballot,
        accepted: Option<Accept>,
        voted_yes: bool,
    ) {
        if let Some(resolver) = &mut self.resolution.running
            && resolver.ballot == ballot
            && resolver.proposal.is_none()
        {
            resolver.promises.insert(
                from,
                Promise {
                    accepted,
                    voted_yes,
                },
            );
            self.choose(turn, false);
        }
    }

    /// Proposes once the promises allow it; `overdue` when the missing ones have had their time.
    pub fn choose(&mut self, turn: &mut Turn, overdue: bool) {
        let gid = self.gid();
        let config = &turn.site.config;
        let Some(resolver) = &mut self.resolution.running else {
            return;
        };
        let promised_by = resolver.promised_by();
        if resolver.proposal.is_some() || !config.is_quorum(promised_by) {
            return;
        }
        let all_heard = turn.site.reachable().is_subset(promised_by);
        let unproven = config.is_alone() && config.breaks(Fault::AloneAborts);
        let verdict = match resolver.verdict(gid.coordinator, gid.members) {
            Choice::Forced(_) if unproven => Verdict::Preabort,
            Choice::Forced(verdict) => verdict,
            Choice::Free if all_heard || overdue => Verdict::Preabort,
            Choice::Free => return,
        };
        let ballot = resolver.ballot;
        resolver.proposal = Some(Proposal {
            verdict,
            accepted_by: NodeSet::EMPTY,
        });
        self.resend_at = turn.resend_at();
        turn.out.event(Event::VerdictProposed {
            gid,
            ballot,
            verdict,
        });
        self.broadcast(
            turn,
            &Message::Propose {
                gid,
                ballot,
                verdict,
            },
        );
        self.accept(turn, ballot, verdict);
        turn.out
            .send(turn.site.node(), Message::Accepted { gid, ballot });
    }

    /// Phase 2b, or PRECOMMITTED when the ballot is the coordinator's.
    pub fn on_accepted(&mut self, turn: &mut Turn, from: NodeId, ballot: Ballot) {
        if ballot == Ballot::COORDINATOR {
            return self.on_precommitted(turn, from);
        }
        let Some(resolver) = &mut self.resolution.running else {
            return;
        };
        let Some(proposal) = &mut resolver.proposal else {
            return;
        };
        if resolver.ballot != ballot {
            return;
        }
        proposal.accepted_by.insert(from);
        if turn.site.config.is_quorum(proposal.accepted_by) {
            let decision: Decision = proposal.verdict.decision();
            self.decide(turn, decision, Source::Resolver, None);
        }
    }

    /// Somebody has promised a higher ballot than the one this node used.
    pub fn on_refused(&mut self, turn: &mut Turn, promised: Ballot) {
        self.resolution.seen = self.resolution.seen.max(promised);
        let outvoted = match &self.resolution.running {
            Some(resolver) => promised > resolver.ballot,
            None => self.own.is_some() && self.resolution.at.is_none(),
        };
        if outvoted && self.is_undecided() {
            self.step_back(turn, promised);
        }
    }

    /// This node has just promised `ballot` to, or accepted it from, another node's attempt.
    pub fn yield_to(&mut self, turn: &mut Turn, from: NodeId, ballot: Ballot) {
        if from != turn.site.node() && ballot > Ballot::COORDINATOR {
            self.step_back(turn, ballot);
        }
    }

    fn step_back(&mut self, turn: &mut Turn, promised: Ballot) {
        if self.resolution.running.take().is_some() {
            turn.out.event(Event::ResolverOutvoted {
                gid: self.gid(),
                promised,
            });
        }
        self.resolution.since.get_or_insert(turn.now);
        let config = &turn.site.config;
        let doublings = self.resolution.attempts.min(BACKOFF_DOUBLINGS_MAX);
        let pause =
            config.resolve_after_ms + ((config.rank() + 1) << doublings) * config.resolve_step_ms;
        self.resolution.at = Some(turn.now + pause);
    }

    /// A participant in doubt resolves some time after it has lost its coordinator.
    pub fn watch_coordinator(&mut self, turn: &mut Turn) {
        let site = &turn.site;
        if self.is_undecided()
            && self.own.is_none()
            && self.has_vote(site.node())
            && self.resolution.at.is_none()
            && !site.links.contains(self.gid().coordinator)
        {
            let pause =
                site.config.resolve_after_ms + site.config.rank() * site.config.resolve_step_ms;
            self.resolution.at = Some(turn.now + pause);
        }
    }

    /// Its coordinator is outside of the generation, and whoever is left decides: the first of them at once, each other one after what it takes those before it.
    pub fn resolve_orphan(&mut self, turn: &mut Turn) {
        let config = &turn.site.config;
        let orphaned = self.own.is_none() && !config.members.contains(self.gid().coordinator);
        if orphaned
            && self.is_undecided()
            && self.has_vote(config.node)
            && self.resolution.running.is_none()
        {
            let left = config.members.intersection(self.gid().members);
            let at = turn.now + config.rank_among(left) * config.resolve_step_ms;
            self.resolution.at = Some(self.resolution.at.map_or(at, |before| before.min(at)));
        }
    }

    /// The coordinator can be asked again, so there is no need to resolve; unless somebody has begun to.
    pub fn trust_coordinator(&mut self) {
        if self.own.is_none() && self.record.promised <= Ballot::COORDINATOR {
            self.resolution.at = None;
        }
    }

    /// Repeats what the resolver has asked to those of these nodes that have not answered.
    pub fn resend_resolver(&self, turn: &mut Turn, to: NodeSet) {
        let gid = self.gid();
        let Some(resolver) = &self.resolution.running else {
            return;
        };
        let ballot = resolver.ballot;
        let msg = match &resolver.proposal {
            Some(proposal) => Message::Propose {
                gid,
                ballot,
                verdict: proposal.verdict,
            },
            None => Message::Status { gid, ballot },
        };
        let silent = resolver
            .silent(turn.site.config.configured)
            .intersection(to);
        for peer in silent.iter() {
            turn.out.send(peer, msg.clone());
        }
    }
}
