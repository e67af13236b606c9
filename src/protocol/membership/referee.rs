//! The referee: a third voter where two nodes are configured, so that one of them can go on alone.
//!
//! It is no node: it holds no data, votes on no transaction and promises nothing. It keeps one row, the last generation of one node that it has
//! granted. Such a generation is elected by its node's own vote and this grant, never by the vote of the other node: a grant has to be known where
//! the other node would ask for one.
//!
//! **Rule.** A node that asks for number n and was last online in o is granted {node} n if
//! 1. it is what was granted last, word for word (an answer was lost); or
//! 2. n is above the number granted last, and that was granted to the node itself, or lies below o: whoever has been online in a generation of both
//!    nodes since then holds everything that was committed alone.
//!
//! No grant is ever given back. It loses its force when the other node has recovered; a grant that was asked for and never used does as well.

use serde::{Deserialize, Serialize};

use super::campaign::Running;
use super::effect::{MembershipEffect, MembershipEffects};
use super::{Membership, MembershipConfig};
use crate::types::{GenerationNum, Millis, NodeId, NodeSet};

/// Number of configured nodes with which there is a referee.
const NODES: usize = 2;

/// A node asks to go on alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RefereeRequest {
    pub node: NodeId,
    pub num: GenerationNum,
    /// The latest generation in which the node was online. It has voted for `num`, so that stays so until then.
    pub online_in: GenerationNum,
}

/// What the referee says to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RefereeAnswer {
    /// The number that was asked for.
    pub num: GenerationNum,
    pub granted: bool,
    /// The number granted last, to whomever.
    pub latest: GenerationNum,
}

/// What the referee keeps, durably before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Referee {
    /// Zero before the first.
    pub num: GenerationNum,
    pub node: Option<NodeId>,
}

impl Referee {
    /// The rule of the module's head. `sql/multimaster_referee--0.1.0.sql` says the same.
    pub fn answer(&mut self, request: RefereeRequest) -> RefereeAnswer {
        let RefereeRequest {
            node,
            num,
            online_in,
        } = request;
        let own = self.node == Some(node);
        let again = own && num == self.num;
        let newer = num > self.num && (self.node.is_none() || own || online_in > self.num);
        if newer {
            *self = Self {
                num,
                node: Some(node),
            };
        }
        RefereeAnswer {
            num,
            granted: again || newer,
            latest: self.num,
        }
    }
}

impl MembershipConfig {
    /// Whether these members can be elected at all.
    pub(super) fn is_electable(&self, members: NodeSet) -> bool {
        members.is_subset(self.configured)
            && (members.is_quorum_of(self.configured) || self.needs_referee(members))
    }

    /// Whether it takes the referee to elect these members.
    pub(super) fn needs_referee(&self, members: NodeSet) -> bool {
        self.referee
            && self.configured.len() == NODES
            && members.len() == 1
            && members.is_subset(self.configured)
    }
}

impl Membership {
    /// Whether this node is the only member: nobody can go on without it, so it needs nobody's promise to serve.
    pub fn is_alone(&self) -> bool {
        let alone = NodeSet::EMPTY.with(self.config.node);
        self.is_online() && self.record.current.generation.members == alone
    }

    /// Not before a copy of another node has come online with it: what the copied node committed alone, it may lack, and a referee that is new
    /// knows of no grant.
    pub(super) const fn has_been_online(&self) -> bool {
        self.record.online_in.0 > 0
    }

    pub(super) fn ask_referee(&self, running: &Running, out: &mut MembershipEffects) {
        if !running.granted {
            out.push(MembershipEffect::AskReferee(RefereeRequest {
                node: self.config.node,
                num: running.generation.num,
                online_in: self.record.online_in,
            }));
        }
    }

    pub(super) fn on_referee(
        &mut self,
        now: Millis,
        answer: RefereeAnswer,
        out: &mut MembershipEffects,
    ) {
        self.campaign.granted_elsewhere(answer);
        let config = self.config;
        let running = self.campaign.running.as_mut();
        let Some(running) = running.filter(|running| {
            running.generation.num == answer.num && config.needs_referee(running.generation.members)
        }) else {
            return;
        };
        if answer.granted {
            running.granted = true;
            self.conclude(out);
        } else {
            self.lose(out);
            self.pause(now);
        }
    }
}
