//! From the decision to oblivion: numbering, announcing, finishing, forgetting.
//!
//! - A commit gets its number here (see `causal`), and `visible` is raised before the finish can begin.
//! - The coordinator tells every member until each has said *finished*; so does a node that decided as a resolver or that gave a
//!   commit a number of its own.
//! - The record with the decision precedes the finish in WAL, on every node. So a PREPARE that comes again is recognised, and on the
//!   coordinator *finished without a record* means *finished by all*.
//! - When all members have finished, the coordinator drops its record, durably, and only then says `Forget`: it will never again
//!   announce what somebody may have forgotten. A participant drops its record once its stored mark is beyond the PREPARE, too;
//!   until it hears `Forget` it keeps repeating `Finished`.

use crate::coordinator::Backend;
use crate::effect::{Effect, Outcome, Source};
use crate::message::Message;
use crate::site::Turn;
use crate::txn::{Local, Txn};
use crate::types::{Csn, Decision, Gid, NodeId, NodeSet, Refusal};

impl Txn {
    /// Takes note of the outcome and sets everything in motion that follows from it. `number` is the coordinator's, when it was the
    /// coordinator who said so.
    pub fn decide(
        &mut self,
        turn: &mut Turn,
        decision: Decision,
        source: Source,
        number: Option<Csn>,
    ) {
        assert!(self.is_undecided(), "an outcome never changes");
        self.record.decision = Some(decision);
        self.resolution.stop();
        turn.count(self.gid(), decision, source);
        let voter = self.has_vote(turn.site.node());
        if decision == Decision::Commit && self.announced.csn.is_none() && voter {
            self.number(turn, number);
        }
        if self.own.is_some() || self.announced.csn.is_some() || source == Source::Resolver {
            self.announced.unacked = self.gid().members.without(turn.site.node());
            self.resend_at = turn.resend_at();
            self.announce(turn);
        }
        self.record_decision(turn);
        self.finish(turn);
    }

    /// Gives a commit the number under which transactions of this node depend on it.
    pub fn number(&mut self, turn: &mut Turn, coordinators: Option<Csn>) {
        let (node, csn) = match coordinators {
            Some(csn) => {
                self.record.csn = csn;
                (self.gid().coordinator, csn)
            }
            None => {
                let csn = turn.site.next_csn();
                self.announced.csn = Some(csn);
                (turn.site.node(), csn)
            }
        };
        self.numbers.insert((node, csn));
        turn.raise_visible(node, csn);
    }

    /// The coordinator's number counts no more, since the coordinator has left the generation: gives a commit that it announced a number of this
    /// node. Whoever depends on it names that one from now on.
    ///
    /// Not when the generation has a member that the transaction had not: then every member has finished it, since the donors have drained it before that one came. And
    /// that one would not be told the number, and would take it for one that is still to come.
    pub fn adopt(&mut self, turn: &mut Turn) {
        let coordinator = self.gid().coordinator;
        let members = turn.site.config.members;
        let orphaned = self.own.is_none() && !members.contains(coordinator);
        if !members.difference(self.gid().members).is_empty() {
            return;
        }
        let announced_by_coordinator =
            self.record.decision == Some(Decision::Commit) && self.announced.csn.is_none();
        if !orphaned || !announced_by_coordinator || !self.has_vote(turn.site.node()) {
            return;
        }
        self.number(turn, None);
        if self.is_done()
            && let Some(csn) = self.announced.csn
        {
            let node = turn.site.node();
            self.numbers.remove(&(node, csn));
            turn.settle(node, csn);
        }
        self.announced.unacked = self.gid().members.without(turn.site.node());
        self.resend_at = turn.resend_at();
        self.announce(turn);
        if self.recorded {
            self.write(turn);
        }
    }

    fn record_decision(&mut self, turn: &mut Turn) {
        // The coordinator's own log knows the decision; it is enough that there is a record.
        let known_by_log = self.own.is_some() && self.recorded;
        if !known_by_log && (self.recorded || self.local == Local::Prepared) {
            self.write(turn);
        }
    }

    /// Tells the outcome to the members that have not finished.
    pub fn announce(&self, turn: &mut Turn) {
        for peer in self.announced.unacked.iter() {
            self.tell(turn, peer);
        }
    }

    /// Tells the outcome, if it is known, to one node.
    pub fn tell(&self, turn: &mut Turn, peer: NodeId) {
        if let Some(decision) = self.record.decision {
            turn.out.send(
                peer,
                Message::Decided {
                    gid: self.gid(),
                    decision,
                    csn: self.announced.csn,
                },
            );
        }
    }

    /// Has the local database follow the decision.
    pub fn finish(&mut self, turn: &mut Turn) {
        let Some(decision) = self.record.decision else {
            return;
        };
        let gid = self.gid();
        if self.local == Local::Prepared {
            let csn = self.announced.csn.unwrap_or_default();
            match &mut self.own {
                None => turn.out.push(Effect::Finish { gid, decision }),
                Some(own) => match own.backend {
                    Backend::Waiting => {
                        own.backend = Backend::Finishing;
                        let refusal = own.refusal.clone();
                        turn.out.push(reply(gid, decision, csn, refusal));
                    }
                    Backend::Gone => turn.out.push(Effect::Finish { gid, decision }),
                    Backend::Unknown | Backend::Finishing => {}
                },
            }
        } else {
            self.on_done(turn, decision);
        }
    }

    /// The local database has followed the decision.
    pub fn on_finished_here(&mut self, turn: &mut Turn) {
        let Some(decision) = self.record.decision else {
            if self.on_committed_on_votes(turn) {
                return;
            }
            if self.own.is_some() && turn.site.may_have_ended_before(self.gid()) {
                // An earlier core has told its session how it ended, and the log has that.
                return self.look_up(turn);
            }
            return turn.reject(turn.site.node(), "finished before it was decided");
        };
        let first = self.local != Local::Finished;
        self.local = Local::Finished;
        if first {
            self.on_done(turn, decision);
            self.report_peers(turn);
        }
    }

    fn on_done(&mut self, turn: &mut Turn, decision: Decision) {
        let numbers = std::mem::take(&mut self.numbers);
        for (node, csn) in &numbers {
            turn.settle(*node, *csn);
        }
        let mut tellers = std::mem::take(&mut self.tellers);
        if self.own.is_none() {
            tellers.insert(self.gid().coordinator);
            self.resend_at = turn.resend_at();
        }
        for peer in tellers.iter() {
            let told = numbers.iter().filter(|(node, _)| *node == peer);
            let csn = told.map(|(_, csn)| *csn).max();
            self.say_finished(turn, peer, decision, csn);
        }
    }

    /// `Decided` from a node: the coordinator, a resolver, or one that numbered the commit.
    pub fn on_decided(
        &mut self,
        turn: &mut Turn,
        from: NodeId,
        decision: Decision,
        csn: Option<Csn>,
    ) {
        if self.is_unsure() {
            return;
        }
        if self.contradicts(decision) {
            return turn.reject(from, "its outcome differs from the one known here");
        }
        let asked = self.record.decision.is_none();
        self.tellers.insert(from);
        if let (Decision::Commit, Some(csn)) = (decision, csn) {
            if self.is_done() {
                turn.settle(from, csn);
            } else {
                self.numbers.insert((from, csn));
            }
        }
        if asked {
            // A number of a node outside of the generation would be waited for in vain by the next transactions.
            let member = turn.site.config.members.contains(from);
            let coordinators = csn.filter(|_| member && from == self.gid().coordinator);
            self.decide(turn, decision, Source::Told, coordinators);
        } else if self.is_done() {
            self.tellers.remove(from);
            self.say_finished(turn, from, decision, csn);
        }
    }

    /// A peer has finished, and thereby says the outcome too. It counts once the peer knows this node's number of the commit: without
    /// it `settled` would stop there.
    pub fn on_peer_finished(
        &mut self,
        turn: &mut Turn,
        from: NodeId,
        decision: Decision,
        csn: Option<Csn>,
    ) {
        if from == turn.site.node() {
            return self.on_refused_here(turn);
        }
        if self.is_unsure() {
            return;
        }
        if self.contradicts(decision) {
            return turn.reject(from, "it finished against the outcome known here");
        }
        if self.is_undecided() {
            self.decide(turn, decision, Source::Told, None);
        }
        if csn == self.announced.csn {
            self.announced.unacked.remove(from);
            self.report_peers(turn);
        } else if self.announced.unacked.contains(from) {
            self.tell(turn, from);
        }
    }

    /// Whether an outcome cannot be true by what this node knows. A peer said it, so it is refused and not asserted.
    fn contradicts(&self, decision: Decision) -> bool {
        self.record.decision.is_some_and(|known| known != decision)
    }

    /// `Forget` from the coordinator. A number given to a commit must reach everybody all the same.
    pub fn on_forget(&mut self, turn: &mut Turn, from: NodeId) {
        let without_vote = !self.has_vote(turn.site.node());
        if from != self.gid().coordinator || (self.is_undecided() && !without_vote) {
            return turn.reject(from, "it forgets what is not decided here");
        }
        self.all_finished = true;
        if self.record.decision == Some(Decision::Abort) {
            self.announced.unacked = NodeSet::EMPTY;
        }
    }

    /// Releases the client that waits for its peers. A member that cannot be reached is waited for until it is one no longer: it may serve reads for as long as its lease holds, and not have heard
    /// the outcome.
    pub fn report_peers(&mut self, turn: &mut Turn) {
        let awaited = self
            .announced
            .unacked
            .intersection(turn.site.config.members);
        let gid = self.gid();
        let committed = self.record.decision == Some(Decision::Commit);
        if let Some(own) = &mut self.own
            && own.wait_peers
            && committed
            && awaited.is_empty()
        {
            own.wait_peers = false;
            turn.out.push(Effect::PeersFinished { gid });
        }
    }

    /// Repeats to these nodes what they have not answered.
    pub fn resend_outcome(&self, turn: &mut Turn, to: NodeSet) {
        for peer in self.announced.unacked.intersection(to).iter() {
            self.tell(turn, peer);
        }
        let coordinator = self.gid().coordinator;
        if let Some(decision) = self.record.decision
            && self.own.is_none()
            && self.is_done()
            && !self.all_finished
            && to.contains(coordinator)
        {
            let csn = Some(self.record.csn).filter(|csn| *csn > Csn::ZERO);
            self.say_finished(turn, coordinator, decision, csn);
        }
    }

    pub fn say_finished(&self, turn: &mut Turn, to: NodeId, decision: Decision, csn: Option<Csn>) {
        let gid = self.gid();
        turn.out.send(to, Message::Finished { gid, decision, csn });
    }
}

/// What a client hears of a decision.
pub(crate) fn reply(gid: Gid, decision: Decision, csn: Csn, refusal: Option<Refusal>) -> Effect {
    let outcome = match decision {
        Decision::Commit => Outcome::Commit { csn },
        Decision::Abort => Outcome::Abort(refusal.unwrap_or_else(|| {
            Refusal::retry(
                "transaction was aborted by the cluster",
                "A member could not be reached or had not yet received the transaction when it was resolved.",
            )
        })),
    };
    Effect::Reply { gid, outcome }
}
