//! The coordinator's part: counting votes and precommits of its own transactions.
//!
//! Central E3PC. The PREPARE of the client's backend is durable, so the coordinator's own vote counts as given. When every member
//! has voted yes it proposes to precommit under [`Ballot::COORDINATOR`], which needs no promises because nobody else may use it;
//! its own durable acceptance overlaps with the sending. Precommits of a majority of the configured nodes are the decision (D1).
//! A no vote of a member is durable there and final, so it ends the transaction at once.
//!
//! **No lonely abort.** As soon as the PREPARE has left, a resolver may commit without the coordinator. So everything that
//! disturbs the wait (cancel, timeout, a lost link, a restart) starts the resolver, and only its outcome is told.

use crate::config::Fault;
use crate::effect::{Effect, Outcome, Source};
use crate::message::Message;
use crate::outcome::reply;
use crate::record::Record;
use crate::site::Turn;
use crate::txn::{Local, Txn};
use crate::types::{Ballot, Decision, Gid, NodeId, NodeSet, Refusal, Verdict, Vote};

/// The session whose transaction it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Backend {
    /// Not heard of yet: it is between its PREPARE and its announcement, or gone.
    Unknown,
    /// Waits for the outcome.
    Waiting,
    /// Has been told and finishes by itself.
    Finishing,
    /// The core sees to the finish.
    Gone,
}

/// What only the coordinator keeps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Coordination {
    pub backend: Backend,
    /// The own transaction log has been asked.
    pub looking_up: bool,
    pub wait_peers: bool,
    /// The backend asks for rule D2.
    pub fast: bool,
    /// Rule D2: all votes are in, and the COMMIT PREPARED that is under way is the decision.
    pub committing: bool,
    pub yes: NodeSet,
    pub proposed: bool,
    pub precommits: NodeSet,
    pub refusal: Option<Refusal>,
}

impl Coordination {
    const fn new(backend: Backend) -> Self {
        Self {
            backend,
            looking_up: false,
            wait_peers: false,
            fast: false,
            committing: false,
            yes: NodeSet::EMPTY,
            proposed: false,
            precommits: NodeSet::EMPTY,
            refusal: None,
        }
    }
}

impl Txn {
    /// A transaction of this node. Taken for prepared until its log says otherwise: too careful at worst.
    pub fn new_own(gid: Gid, now: u64, backend: Backend) -> Self {
        let mut txn = Self::new(gid, now);
        txn.local = Local::Prepared;
        txn.own = Some(Coordination::new(backend));
        txn
    }

    pub fn look_up(&mut self, turn: &mut Turn) {
        if let Some(own) = &mut self.own
            && !own.looking_up
        {
            own.looking_up = true;
            turn.out.push(Effect::LookUp { gid: self.gid() });
        }
    }

    /// Until the log has answered, or the COMMIT PREPARED that decides is durable, this node cannot say what has become of the transaction.
    pub fn is_unsure(&self) -> bool {
        self.is_committing() || self.own.as_ref().is_some_and(|own| own.looking_up)
    }

    fn is_committing(&self) -> bool {
        self.is_undecided() && self.own.as_ref().is_some_and(|own| own.committing)
    }

    pub fn on_committing(&mut self, turn: &mut Turn, wait_peers: bool, fast: bool) {
        let Some(own) = &mut self.own else { return };
        if own.backend == Backend::Finishing {
            // Announced twice: the shell has found it waiting before it came to its announcement.
            return;
        }
        if self.local == Local::Finished {
            own.wait_peers = wait_peers;
            return self.answer_late(turn);
        }
        own.backend = Backend::Waiting;
        own.wait_peers = wait_peers;
        own.fast = fast && turn.site.config.allows_fast();
        if own.looking_up && turn.site.may_have_ended_before(self.record.gid) {
            // It was prepared; the log says whether it still is.
            return;
        }
        own.looking_up = false;
        self.record.voted_yes = true;
        if !self.is_undecided() {
            self.finish(turn);
            return self.report_peers(turn);
        }
        self.act_on_votes(turn);
        self.resolve_if_over(turn);
    }

    /// It was resolved after a restart, before the backend came to announce it.
    fn answer_late(&mut self, turn: &mut Turn) {
        let (Some(decision), Some(own)) = (self.record.decision, &mut self.own) else {
            return;
        };
        own.backend = Backend::Finishing;
        let csn = self.announced.csn.unwrap_or_default();
        let refusal = own.refusal.clone();
        turn.out.push(reply(self.gid(), decision, csn, refusal));
        self.report_peers(turn);
    }

    pub fn on_vote(&mut self, turn: &mut Turn, from: NodeId, vote: Vote) {
        let Some(own) = &mut self.own else {
            return turn.reject(
                from,
                "it votes at a node that does not coordinate the transaction",
            );
        };
        match vote {
            Vote::Yes => {
                own.yes.insert(from);
            }
            Vote::No(refusal) => {
                own.refusal.get_or_insert(refusal);
            }
        }
        if self.is_undecided() {
            self.act_on_votes(turn);
        } else {
            self.tell(turn, from);
        }
    }

    fn act_on_votes(&mut self, turn: &mut Turn) {
        let refused = self.own.as_ref().is_some_and(|own| own.refusal.is_some());
        if self.is_unsure() {
            return;
        }
        if refused {
            self.decide(turn, Decision::Abort, Source::VotedNo, None);
        } else {
            self.try_precommit(turn);
        }
    }

    fn try_precommit(&mut self, turn: &mut Turn) {
        let members = self.gid().participants();
        let free = self.record.promised <= Ballot::COORDINATOR && self.resolution.running.is_none();
        let Some(own) = &mut self.own else { return };
        if own.proposed || !free || own.backend != Backend::Waiting || !members.is_subset(own.yes) {
            return;
        }
        if own.fast {
            return self.commit_on_votes(turn);
        }
        own.proposed = true;
        self.resend_at = turn.resend_at();
        let gid = self.gid();
        if !turn.site.config.votes_to_all {
            // Otherwise the members have the votes themselves; whoever lacks one is asked when the answer is overdue.
            self.resend_proposal(turn, gid.members);
        }
        self.accept(turn, Ballot::COORDINATOR, Verdict::Precommit);
        turn.out.send(
            turn.site.node(),
            Message::Accepted {
                gid,
                ballot: Ballot::COORDINATOR,
            },
        );
    }

    /// Rule D2. The backend's COMMIT PREPARED is the decision once it is flushed, and nobody is told before. Until then this node
    /// promises nothing and answers nobody, so no majority with it can decide otherwise; one without it is everybody else, and each
    /// of them has durably voted yes.
    ///
    /// The record precedes the COMMIT PREPARED in WAL. When it alone survives a crash it says the same: all votes were in, and this
    /// node has promised nothing since.
    fn commit_on_votes(&mut self, turn: &mut Turn) {
        let Some(own) = &mut self.own else { return };
        own.committing = true;
        own.backend = Backend::Finishing;
        self.number(turn, None);
        self.write_commit(turn);
        let csn = self.announced.csn.unwrap_or_default();
        turn.out
            .push(reply(self.gid(), Decision::Commit, csn, None));
    }

    fn write_commit(&mut self, turn: &mut Turn) {
        self.recorded = true;
        turn.out.push(Effect::Write {
            gid: self.gid(),
            record: Record {
                decision: Some(Decision::Commit),
                ..self.record
            },
        });
    }

    /// The COMMIT PREPARED that decides is durable.
    pub fn on_committed_on_votes(&mut self, turn: &mut Turn) -> bool {
        let committing = self.is_committing();
        if committing {
            self.local = Local::Finished;
            self.decide(turn, Decision::Commit, Source::Fast, None);
            self.report_peers(turn);
        }
        committing
    }

    /// A durable precommit under the coordinator's own ballot. It counts whatever was promised since: accepted by a majority
    /// is accepted by one of every later quorum.
    pub fn on_precommitted(&mut self, turn: &mut Turn, from: NodeId) {
        let Some(own) = &mut self.own else {
            return turn.reject(from, "it precommits at a node that has not asked for it");
        };
        if !own.proposed && !turn.site.config.votes_to_all {
            // An earlier life of this node proposed it, and the answer waited for a slow disk. The resolver of this life hears of it otherwise.
            return;
        }
        own.precommits.insert(from);
        let (proposed, precommits) = (own.proposed, own.precommits);
        let enough = proposed && self.is_quorum(&turn.site.config, precommits);
        if enough && self.is_undecided() {
            self.decide(turn, Decision::Commit, Source::Central, None);
        }
    }

    /// Starts the resolver when the links that are left cannot bring the answers that are awaited.
    pub fn resolve_if_cut_off(&mut self, turn: &mut Turn) {
        let site = &turn.site;
        let Some(own) = &self.own else { return };
        let cut_off = if own.proposed {
            let acceptors = site.reachable().intersection(self.gid().members);
            !acceptors.is_quorum_of(site.config.configured)
        } else {
            let awaited = self.gid().participants().difference(own.yes);
            !awaited.is_subset(site.links.intersection(site.config.members))
        };
        if self.is_undecided() && own.backend == Backend::Waiting && cut_off {
            self.resolve(turn);
        }
    }

    /// Nobody votes on a transaction of an older generation any more.
    pub fn resolve_if_over(&mut self, turn: &mut Turn) {
        let over = self.gid().generation < turn.site.config.generation;
        let Some(own) = &self.own else { return };
        let missing = !self.gid().participants().is_subset(own.yes);
        // Alone, nobody else's precommit is to come either.
        let missing = missing || turn.site.config.is_alone();
        if over && missing && own.backend == Backend::Waiting && self.is_undecided() {
            self.resolve(turn);
        }
        self.resolve_if_cut_off(turn);
    }

    pub fn on_interrupted(&mut self, turn: &mut Turn) {
        if !self.is_undecided() || self.is_unsure() {
            return;
        }
        if turn.site.config.breaks(Fault::LonelyAbort) {
            return self.decide(turn, Decision::Abort, Source::VotedNo, None);
        }
        self.resolve(turn);
    }

    pub fn on_abandoned(&mut self, turn: &mut Turn) {
        let Some(own) = &mut self.own else { return };
        own.backend = Backend::Gone;
        own.wait_peers = false;
        if self.is_committing() {
            // Nobody else can have decided, and this node has not yet: it may go on.
            let gid = self.gid();
            self.write_commit(turn);
            turn.out.push(Effect::Finish {
                gid,
                decision: Decision::Commit,
            });
        } else if !self.is_undecided() {
            if self.local == Local::Prepared {
                // The backend may have been told, and gone before it had written what precedes the finish.
                if self.recorded {
                    self.write(turn);
                }
                self.finish(turn);
            }
        } else if !self.is_unsure() {
            self.resolve(turn);
        }
    }

    /// The own transaction log has answered.
    pub fn on_log(&mut self, turn: &mut Turn, outcome: Option<Decision>) {
        let Some(own) = &mut self.own else { return };
        own.looking_up = false;
        let gone = own.backend == Backend::Gone;
        let waiting = own.backend == Backend::Waiting;
        match outcome {
            Some(_) if !self.is_undecided() => self.on_finished_here(turn),
            Some(decision) => {
                self.local = Local::Finished;
                if self.recorded {
                    self.decide(turn, decision, Source::Log, None);
                } else {
                    // Finished without a record: so has everybody, and whoever asked can be told to forget.
                    self.record.decision = Some(decision);
                }
                if waiting {
                    self.answer_late(turn);
                }
            }
            None if self.is_undecided() => {
                self.record.voted_yes = true;
                self.act_on_votes(turn);
                // As at a start: an interrupt may have been passed over meanwhile, and a link may be down.
                if gone || waiting && turn.site.may_have_ended_before(self.gid()) {
                    self.resolve(turn);
                }
            }
            None => {}
        }
    }

    /// After [`crate::Config::give_up_after_ms`] without a quorum the client is told that the outcome is not known.
    pub fn give_up(&mut self, turn: &mut Turn) {
        let gid = self.gid();
        let overdue = self
            .resolution
            .since
            .is_some_and(|since| turn.now >= since + turn.site.config.give_up_after_ms);
        if let Some(own) = &mut self.own
            && own.backend == Backend::Waiting
            && overdue
        {
            own.backend = Backend::Gone;
            own.wait_peers = false;
            turn.out.push(Effect::Reply {
                gid,
                outcome: Outcome::Unknown,
            });
        }
    }

    /// Proposes to those of these nodes that are members and have not precommitted. Others keep nothing of it that way; members are a quorum.
    pub fn resend_proposal(&self, turn: &mut Turn, to: NodeSet) {
        let Some(own) = &self.own else { return };
        if !own.proposed || self.resolution.running.is_some() {
            return;
        }
        let silent = self
            .gid()
            .participants()
            .intersection(to)
            .difference(own.precommits);
        for peer in silent.iter() {
            let msg = Message::Propose {
                gid: self.gid(),
                ballot: Ballot::COORDINATOR,
                verdict: Verdict::Precommit,
            };
            turn.out.send(peer, msg);
        }
    }
}
