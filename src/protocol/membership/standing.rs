//! Where a node stands, for the processes that apply: they ask for each PREPARE what to do with it.

use super::Membership;
use super::effect::Admission;
use super::generation::Generation;
use super::switch::Stage;
use crate::types::{GenerationNum, Gid, NodeId};

/// What of the membership decides on a PREPARE and on a mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Standing {
    pub current: Generation,
    pub online_in: GenerationNum,
    pub recovered_to: GenerationNum,
    pub phase: Phase,
}

/// The part of a node's stage that matters to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Between two generations.
    #[default]
    Waiting,
    Online,
    /// Member, not yet level.
    Recovering,
    Outside,
}

impl Standing {
    /// See [`Membership::admit`]; `node` is this one.
    pub fn admit(&self, node: NodeId, gid: Gid) -> Admission {
        let current = self.current.num;
        match self.phase {
            _ if gid.generation > current => Admission::Hold,
            Phase::Online if !gid.members.contains(node) => Admission::Skip,
            Phase::Online if gid.generation == current => Admission::Apply,
            Phase::Online if gid.generation < self.recovered_to => Admission::Skip,
            Phase::Online => Admission::Refuse,
            Phase::Outside => Admission::SetAside,
            Phase::Recovering if gid.generation < current => Admission::SetAside,
            _ => Admission::Hold,
        }
    }

    /// Whether the mark of a peer's stream may pass a marker of this number, or what was set aside under it.
    pub fn may_pass(&self, num: GenerationNum) -> bool {
        num <= self.online_in
    }
}

impl Membership {
    /// See [`Standing`].
    pub fn standing(&self) -> Standing {
        Standing {
            current: self.record.current.generation,
            online_in: self.record.online_in,
            recovered_to: self.record.recovered_to,
            phase: match self.stage {
                Stage::Closing | Stage::Draining | Stage::Marking { .. } => Phase::Waiting,
                Stage::Online => Phase::Online,
                Stage::Recovering => Phase::Recovering,
                Stage::Outside => Phase::Outside,
            },
        }
    }
}
