//! The switch to a new generation: stop the old one, prove that everything older is here, go on.
//!
//! - Closing: nobody prepares under an older generation any more (G2).
//! - A donor holds everything older. If somebody has to recover, it finishes what is prepared first, so that its marker lies behind all
//!   outcomes; then marker, then `online_in`, then work.
//! - A member that is no donor recovers up to the marker of a node that is online.
//! - Everybody else is outside: catches up and asks to be a member.
//!
//! Whoever votes for a higher generation before it is online in this one never comes online in this one (G7).

use super::effect::{MembershipEffect, MembershipEffects, MembershipEvent};
use super::generation::Elected;
use super::{Membership, MembershipFault};
use crate::types::{GenerationNum, NodeId};

/// Where a node is between learning of a generation and being online in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Stage {
    /// Waits until nobody prepares under an older generation.
    Closing,
    /// A donor; waits until what is older has ended here.
    Draining,
    /// Holds everything; waits until its marker is durable.
    Marking {
        recovered: bool,
    },
    Online,
    /// Member, not yet level.
    Recovering,
    /// Not a member, or has voted for a higher generation.
    Outside,
}

impl Membership {
    /// Takes up the current generation, at a start or a switch.
    pub(super) fn start_stage(&mut self, out: &mut MembershipEffects) {
        let generation = self.record.current.generation;
        if self.record.online_in == generation.num {
            // Its marker went to disk before that.
            self.go_online(out);
        } else {
            self.stage = Stage::Closing;
            out.push(MembershipEffect::Close { generation });
        }
    }

    /// Somebody knows this generation.
    pub(super) fn consider(&mut self, from: NodeId, elected: Elected, out: &mut MembershipEffects) {
        if elected.generation.num < self.record.num() {
            return;
        }
        if !elected.is_valid() || !self.config.may_be_elected(elected.generation.members) {
            let reason = "no quorum can have elected its generation";
            return out.event(MembershipEvent::Rejected { from, reason });
        }
        if elected.generation.num > self.record.num() {
            self.switch(elected, out);
        } else if elected != self.record.current {
            let reason = "its generation differs from the one of this number known here";
            out.event(MembershipEvent::Rejected { from, reason });
        }
    }

    pub(super) fn switch(&mut self, elected: Elected, out: &mut MembershipEffects) {
        let before = self.record.current.generation;
        self.record.current = elected;
        if self.record.last_vote.num < elected.generation.num {
            self.record.last_vote = elected.generation;
        }
        self.campaign.stop();
        self.persist(out);
        out.event(MembershipEvent::Switched {
            from: before,
            to: elected,
        });
        self.start_stage(out);
    }

    pub(super) fn on_closed(&mut self, num: GenerationNum, out: &mut MembershipEffects) {
        if self.stage != Stage::Closing || num != self.record.num() {
            return;
        }
        let Elected { generation, donors } = self.record.current;
        let node = self.config.node;
        let donor = donors.contains(node) || self.config.breaks(MembershipFault::EverybodyDonor);
        if !generation.members.contains(node) || self.is_barred() {
            self.stage = Stage::Outside;
            out.event(MembershipEvent::Excluded { generation });
        } else if !donor {
            self.stage = Stage::Recovering;
            self.end_recovery(out);
        } else if donors == generation.members {
            self.mark(false, out);
        } else {
            self.stage = Stage::Draining;
            out.push(MembershipEffect::Drain { num });
        }
    }

    pub(super) fn on_drained(&mut self, num: GenerationNum, out: &mut MembershipEffects) {
        if self.stage == Stage::Draining && num == self.record.num() {
            self.mark(false, out);
        }
    }

    pub(super) fn on_marker_reached(
        &mut self,
        from: NodeId,
        num: GenerationNum,
        out: &mut MembershipEffects,
    ) {
        if self.recovery.source() == Some(from) {
            self.recovery.reached(num);
            self.end_recovery(out);
        }
    }

    /// The marker may have been reached before this node knew the generation.
    fn end_recovery(&mut self, out: &mut MembershipEffects) {
        if self.stage == Stage::Recovering && self.recovery.has_reached(self.record.num()) {
            self.mark(true, out);
        }
    }

    fn mark(&mut self, recovered: bool, out: &mut MembershipEffects) {
        self.stage = Stage::Marking { recovered };
        let elected = self.record.current;
        out.push(MembershipEffect::WriteMarker { elected });
    }

    pub(super) fn on_marker_written(&mut self, num: GenerationNum, out: &mut MembershipEffects) {
        let Stage::Marking { recovered } = self.stage else {
            return;
        };
        if num != self.record.num() {
            return;
        }
        assert!(!self.is_barred(), "who voted higher does not come online");
        self.record.online_in = num;
        if recovered {
            self.record.recovered_to = num;
        }
        self.persist(out);
        self.go_online(out);
    }

    fn go_online(&mut self, out: &mut MembershipEffects) {
        let generation = self.record.current.generation;
        self.stage = Stage::Online;
        // Who has said good-bye has released its peers from their promises.
        if !self.leaving {
            out.push(MembershipEffect::Open { generation });
            out.event(MembershipEvent::Online { generation });
        }
    }

    /// This node has just voted for a higher generation.
    pub(super) fn leave_unless_online(&mut self) {
        let leaves = !matches!(self.stage, Stage::Online | Stage::Closing);
        if leaves && self.is_barred() {
            self.stage = Stage::Outside;
        }
    }

    /// Whether a vote for a higher generation keeps this node from coming online in the current one.
    pub(super) fn is_barred(&self) -> bool {
        self.record.last_vote.num > self.record.num()
            && !self.config.breaks(MembershipFault::VoteForgotten)
    }
}
