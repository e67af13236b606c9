//! The participant's part: votes, promises, accepted verdicts.
//!
//! - A yes vote is told once the PREPARE is durable, and again until the outcome comes.
//! - A no vote is durable before it is told. It is a decision too: nothing commits without the yes of every member.
//! - A member that is asked about a transaction it has never heard of bars it, durably: it will vote no whatever comes later (I7).
//!   That also is a decision. A PREPARE that comes all the same is finished by a rollback.
//! - A promise or an accepted verdict is durable before it is acknowledged (I5).

use crate::effect::{Effect, Event, Source};
use crate::message::Message;
use crate::site::Turn;
use crate::txn::{Local, Txn};
use crate::types::{Ballot, Decision, Lsn, NodeId, NodeSet, Refusal, Verdict, Vote};

impl Txn {
    /// This node's apply worker has answered the PREPARE.
    pub fn on_voted(&mut self, turn: &mut Turn, vote: Vote, prepare_lsn: Lsn) {
        self.record.prepare_lsn = prepare_lsn;
        match (self.record.decision, vote) {
            (None, Vote::Yes) => self.vote_yes(turn),
            (None, Vote::No(refusal)) if !self.record.voted_yes => self.vote_no(turn, refusal),
            (None, Vote::No(_)) => turn.reject(turn.site.node(), "no after yes"),
            (Some(Decision::Abort), Vote::Yes) => {
                self.local = Local::Prepared;
                turn.out.push(Effect::Finish {
                    gid: self.gid(),
                    decision: Decision::Abort,
                });
            }
            (Some(_), _) => {}
        }
    }

    fn vote_yes(&mut self, turn: &mut Turn) {
        self.record.voted_yes = true;
        self.local = Local::Prepared;
        self.resend_at = turn.resend_at();
        let gid = self.gid();
        let others = gid.members.without(turn.site.node());
        let to = if turn.site.config.votes_to_all {
            others
        } else {
            NodeSet::EMPTY.with(gid.coordinator)
        };
        for peer in to.iter() {
            let vote = Vote::Yes;
            turn.out.send(peer, Message::Vote { gid, vote });
        }
        self.watch_coordinator(turn);
        self.precommit_on_votes(turn);
    }

    fn vote_no(&mut self, turn: &mut Turn, refusal: Refusal) {
        self.refuse(turn);
        let gid = self.gid();
        turn.out.send(
            gid.coordinator,
            Message::Vote {
                gid,
                vote: Vote::No(refusal),
            },
        );
    }

    /// Decides to abort because this member will not vote yes. That holds from the moment when it is durable; the message to this node
    /// itself says so.
    fn refuse(&mut self, turn: &mut Turn) {
        self.record.decision = Some(Decision::Abort);
        self.refusing = true;
        self.resend_at = turn.resend_at();
        self.resolution.stop();
        self.persist(turn);
        self.say_finished(turn, turn.site.node(), Decision::Abort, None);
    }

    /// The refusal is durable.
    pub fn on_refused_here(&mut self, turn: &mut Turn) {
        if std::mem::take(&mut self.refusing) {
            turn.count(self.gid(), Decision::Abort, Source::Refused);
        }
    }

    /// Gives up the right to vote yes on a transaction this node has not heard of.
    pub fn bar(&mut self, turn: &mut Turn, by: NodeId) {
        let gid = self.gid();
        self.refuse(turn);
        turn.site.counters.barred += 1;
        turn.out.event(Event::Barred { gid, by });
        let finished = Message::Finished {
            gid,
            decision: Decision::Abort,
            csn: None,
        };
        if by != gid.coordinator {
            turn.out.send(gid.coordinator, finished.clone());
        }
        turn.out.send(by, finished);
    }

    /// Phase 1a of a resolver.
    pub fn on_status(&mut self, turn: &mut Turn, from: NodeId, ballot: Ballot) {
        if !self.is_undecided() {
            return self.tell(turn, from);
        }
        if self.is_unsure() {
            return;
        }
        if ballot < self.record.promised {
            return self.refuse_ballot(turn, from);
        }
        if ballot > self.record.promised {
            self.record.promised = ballot;
            self.yield_to(turn, from, ballot);
            self.persist(turn);
        }
        turn.out.send(from, self.promised());
    }

    pub fn promised(&self) -> Message {
        let Txn { record, .. } = self;
        Message::Promised {
            gid: record.gid,
            ballot: record.promised,
            accepted: record.accepted,
            voted_yes: record.voted_yes,
        }
    }

    /// PRECOMMIT of the coordinator, or phase 2a of a resolver.
    pub fn on_propose(&mut self, turn: &mut Turn, from: NodeId, ballot: Ballot, verdict: Verdict) {
        if !self.is_undecided() {
            return self.tell(turn, from);
        }
        if self.is_unsure() {
            return;
        }
        if ballot < self.record.promised {
            return self.refuse_ballot(turn, from);
        }
        if self
            .record
            .accepted
            .is_none_or(|accepted| accepted.ballot != ballot)
        {
            self.accept(turn, ballot, verdict);
            self.yield_to(turn, from, ballot);
        }
        turn.out.send(
            from,
            Message::Accepted {
                gid: self.gid(),
                ballot,
            },
        );
    }

    fn refuse_ballot(&self, turn: &mut Turn, from: NodeId) {
        turn.out.send(
            from,
            Message::Refused {
                gid: self.gid(),
                promised: self.record.promised,
            },
        );
    }

    /// Asks the coordinator again how it ended.
    pub fn resend_vote(&self, turn: &mut Turn, to: NodeSet) {
        let gid = self.gid();
        if self.own.is_some() || !to.contains(gid.coordinator) {
            return;
        }
        let msg = if self.record.voted_yes && self.has_vote(turn.site.node()) {
            Message::Vote {
                gid,
                vote: Vote::Yes,
            }
        } else {
            Message::Query { gid }
        };
        turn.out.send(gid.coordinator, msg);
    }

    /// A bound serves as well as the position itself, and need not be durable: the next start brings another one.
    pub const fn on_prepare_before(&mut self, lsn: Lsn) {
        if self.record.prepare_lsn.0 == 0 {
            self.record.prepare_lsn = lsn;
        }
    }

    /// COMMIT or ROLLBACK PREPARED in the coordinator's stream. While the link works, the outcome with its number is on its way.
    pub fn on_stream_outcome(&mut self, turn: &mut Turn, decision: Decision) {
        let linked = turn.site.links.contains(self.gid().coordinator);
        if self.is_undecided() && self.own.is_none() && !linked {
            self.decide(turn, decision, Source::Stream, None);
        }
    }
}
