//! Votes: for which generation, and when not.
//!
//! A vote is a promise: never to come online in a generation below it. That freezes `online_in`, which the vote tells, and makes the donors'
//! claim true. It also ends what this node promised to those that are dropped, so it waits for the end of those promises; until then it is silent
//! and will be asked again. It is silent, too, while its view of the links differs from the candidate's.

use super::Membership;
use super::effect::{MembershipEffects, MembershipEvent};
use super::generation::Generation;
use super::message::MembershipMessage;
use crate::types::{Millis, NodeId};

/// What a request deserves.
enum Answer {
    Yes,
    /// It was given already.
    Again,
    No,
    /// Not now.
    Silence,
}

impl Membership {
    pub(super) fn on_request(
        &mut self,
        now: Millis,
        from: NodeId,
        generation: Generation,
        out: &mut MembershipEffects,
    ) {
        let configured = self.config.configured;
        let possible = generation.members.is_subset(configured)
            && generation.members.is_quorum_of(configured)
            && generation.members.contains(from);
        if !possible {
            let reason = "its proposal cannot be elected";
            return out.event(MembershipEvent::Rejected { from, reason });
        }
        let granted = match self.answer(now, from, generation) {
            Answer::Again => true,
            Answer::Yes => {
                self.lose(out);
                self.record.last_vote = generation;
                self.persist(out);
                self.leave_unless_online();
                let candidate = from;
                out.event(MembershipEvent::Voted {
                    generation,
                    candidate,
                });
                true
            }
            Answer::No => false,
            Answer::Silence => return,
        };
        let msg = if granted {
            MembershipMessage::Granted {
                generation,
                online_in: self.record.online_in,
            }
        } else {
            MembershipMessage::Denied {
                num: generation.num,
                last_vote: self.record.last_vote.num,
                current: self.record.current,
            }
        };
        out.send(from, msg);
    }

    fn answer(&self, now: Millis, from: NodeId, generation: Generation) -> Answer {
        let last = self.record.last_vote;
        if self.record.num() >= generation.num {
            return Answer::No;
        }
        if last == generation {
            return Answer::Again;
        }
        if last.num >= generation.num {
            return Answer::No;
        }
        let clique = self.detector.clique();
        let current = self.record.current.generation.members;
        let added = generation.members.difference(current);
        let connected = generation.members.is_subset(clique);
        let fair = current.intersection(clique).is_subset(generation.members);
        let asked = added.is_subset(self.willing().with(from));
        let keeps_itself = !self.is_online() || generation.members.contains(self.config.node);
        let unbound = self.is_unbound_but_to(now, generation.members);
        if connected && fair && asked && keeps_itself && unbound && !self.leaving {
            Answer::Yes
        } else {
            Answer::Silence
        }
    }
}
