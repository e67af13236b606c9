//! The referee: a third voter where two nodes are configured, so that one of them can go on alone.
//!
//! It is no node: it holds no data, votes on no transaction and promises nothing. It keeps one row, the last generation of one node that it has
//! granted. Such a generation is elected by its node's own vote and this grant, never by the vote of the other node: a grant has to be known where
//! the other node would ask for one.
//!
//! **Rule.** A node that asks for number n and was last online in o is granted {node} n if
//! 1. o lies above every number that the *other* node was ever granted: whoever has been online in a generation of both nodes since then holds
//!    everything that was committed alone; and
//! 2. n is above every number granted so far, or is what was granted last, word for word (an answer was lost).
//!
//! Rule 1 holds for the node that was granted the last number, too. Another server may speak in its name: an old disk of a node that was replaced by a
//! copy since, or an old image of its machine. Such a one was online before the other node went on alone, or there would have been no copy.
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
    /// The number granted last; zero before the first.
    pub num: GenerationNum,
    pub node: Option<NodeId>,
    /// The last number granted to the other node; zero before the first.
    pub others: GenerationNum,
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
        let others = if own { self.others } else { self.num };
        let holds_all = online_in > others;
        let again = holds_all && own && num == self.num;
        let newer = holds_all && num > self.num;
        if newer {
            *self = Self {
                num,
                node: Some(node),
                others,
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
    /// Whether this node can have these members elected.
    pub(super) fn is_electable(&self, members: NodeSet) -> bool {
        members.is_subset(self.configured)
            && (members.is_quorum_of(self.configured) || self.needs_referee(members))
    }

    /// Whether somebody can have had them elected: the other node may have a referee that this one was not told of.
    pub(super) fn may_be_elected(&self, members: NodeSet) -> bool {
        let referee = true;
        Self { referee, ..*self }.is_electable(members)
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

    /// Whether this node may hold everything that was committed, as far as it knows itself: it is online in the current generation, or elected as
    /// one that would be. Who knows better does not ask the referee, which may be a new one that knows of no grant. A copy of another node does not
    /// before it has been online.
    pub(super) fn may_hold_all(&self) -> bool {
        let current = self.record.current;
        self.record.online_in == current.generation.num || current.donors.contains(self.config.node)
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
