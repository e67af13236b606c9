//! Whom to recover from, and when a node is level enough to be made a member again.
//!
//! Outside, any node that was online in a later generation has something that this one lacks: the one that was online in the latest. As a member that is
//! not online yet, only a node that is online in the current generation, or is about to be as its donor, has the marker that ends recovery.
//! A source is kept while it serves. One that failed is tried again after all others.
//!
//! **Which of several equal ones** is as good as random, so that nodes that return together do not all read from one donor, and a node that recovers again does not always load the
//! same: the order of candidates is that of a hash of seed, node, generation and candidate. The seed comes from outside, so that the same inputs still give the same outputs.

use super::effect::{MembershipEffect, MembershipEffects, MembershipEvent};
use super::switch::Stage;
use super::{Membership, Presence};
use crate::types::{GenerationNum, NodeId, NodeSet};

/// The recovery of this node, if it needs one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Recovery {
    source: Option<NodeId>,
    level: bool,
    failed: NodeSet,
    /// The highest marker before which everything is here.
    reached: GenerationNum,
}

impl Recovery {
    pub const fn source(&self) -> Option<NodeId> {
        self.source
    }

    pub fn set_level(&mut self, from: NodeId, level: bool) {
        if self.source == Some(from) {
            self.level = level;
        }
    }

    pub fn reached(&mut self, num: GenerationNum) {
        self.reached = self.reached.max(num);
    }

    pub fn has_reached(&self, num: GenerationNum) -> bool {
        self.reached == num
    }

    pub fn lost(&mut self, from: NodeId) {
        if self.source == Some(from) {
            self.source = None;
            self.failed.insert(from);
        }
    }
}

impl Membership {
    /// Whether this node asks to be made a member: not online, and level with the most advanced node it sees.
    pub(super) fn is_willing(&self) -> bool {
        if self.stage != Stage::Outside || self.leaving {
            return false;
        }
        let ahead = self
            .detector
            .present()
            .any(|(_, presence)| presence.online_in > self.record.online_in);
        if ahead { self.recovery.level } else { true }
    }

    pub(super) fn choose_source(&mut self, out: &mut MembershipEffects) {
        let candidates = self.sources();
        if let Some(source) = self.recovery.source {
            if candidates.contains(source) {
                return;
            }
            out.push(MembershipEffect::StopRecovery);
        }
        let fresh = candidates.difference(self.recovery.failed);
        if fresh.is_empty() {
            self.recovery.failed = NodeSet::EMPTY;
        }
        let next = if fresh.is_empty() { candidates } else { fresh };
        self.recovery.source = next
            .iter()
            .min_by_key(|candidate| self.place_of(*candidate));
        self.recovery.level = false;
        if let Some(from) = self.recovery.source {
            out.push(MembershipEffect::Recover { from });
            out.event(MembershipEvent::RecoveryStarted { from });
        }
    }

    /// The place of a candidate among equal ones: it differs between nodes, generations and seeds, and stays the same within one, so that who failed has not to be
    /// counted to be tried last.
    fn place_of(&self, candidate: NodeId) -> u64 {
        let (node, num) = (self.config.node.get(), self.record.num().0);
        let asked = (num as u64) << 16 | (node as u64) << 8 | candidate.get() as u64;
        mixed(self.config.donor_seed ^ mixed(asked))
    }

    /// Nodes that can serve as a source.
    fn sources(&self) -> NodeSet {
        let current = self.record.current;
        let fresh_copy = self.record.online_in == GenerationNum(0);
        let only = self.config.copied_from.filter(|_| fresh_copy);
        let serves = |(peer, presence): &(NodeId, &Presence)| match self.stage {
            Stage::Recovering => {
                presence.online_in == current.generation.num || current.donors.contains(*peer)
            }
            Stage::Outside => presence.online_in > self.record.online_in,
            // Whether it is needed is known in a moment; what runs already may go on.
            Stage::Closing => self.recovery.source == Some(*peer),
            _ => false,
        };
        let serving: Vec<(NodeId, &Presence)> = self
            .detector
            .present()
            .filter(|(peer, _)| only.is_none_or(|only| only == *peer))
            .filter(serves)
            .collect();
        let latest = serving.iter().map(|(_, presence)| presence.online_in).max();
        let any = self.stage != Stage::Outside;
        serving
            .into_iter()
            .filter(|(_, presence)| any || Some(presence.online_in) == latest)
            .map(|(peer, _)| peer)
            .collect()
    }
}

/// A number of which every bit depends on every bit of the other one: the last step of SplitMix64 (Steele, Lea and Flood 2014). Zero is moved away from itself first.
const fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}
