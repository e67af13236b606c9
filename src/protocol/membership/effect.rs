//! What goes into the membership and what comes out of it.

use super::generation::{Elected, Generation};
use super::message::{MembershipMessage, Presence};
use super::record::MembershipRecord;
use super::referee::{RefereeAnswer, RefereeRequest};
use crate::types::{GenerationNum, NodeId, NodeSet};

/// Something that happened, told to the membership by its shell.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MembershipInput {
    /// The link to a peer works.
    LinkUp { peer: NodeId },
    /// The link to a peer is lost: closed, or silent for too long.
    LinkDown { peer: NodeId },
    /// The peer's link works but its database does not vote (or does again).
    Stuck { peer: NodeId, stuck: bool },
    /// A peer's heartbeat.
    Presence { from: NodeId, presence: Presence },
    /// A message of an authenticated peer.
    Message {
        from: NodeId,
        msg: MembershipMessage,
    },
    /// Answer to [`MembershipEffect::Close`]: nobody is preparing under an older generation.
    Closed { num: GenerationNum },
    /// Answer to [`MembershipEffect::Drain`]: no transaction of an older generation is prepared here.
    Drained { num: GenerationNum },
    /// Answer to [`MembershipEffect::WriteMarker`]: it is flushed.
    MarkerWritten { num: GenerationNum },
    /// In the recovery stream of `from`, everything before that node's marker of the generation is applied and flushed here.
    MarkerReached { from: NodeId, num: GenerationNum },
    /// While recovering: whether this node is level with its donor but for a small rest.
    Level { from: NodeId, level: bool },
    /// The recovery stream of `from` has ended; another donor may serve.
    RecoveryLost { from: NodeId },
    /// What the referee has said to [`MembershipEffect::AskReferee`]. May come late, twice, or never.
    Referee(RefereeAnswer),
    /// This node has stopped serving and is about to end.
    Leave,
    /// Time has passed. `unbound` are the nodes to which no promise of this node is still running.
    Tick { unbound: NodeSet },
}

/// Something the shell has to do. Effects are carried out in order, and nothing behind a [`MembershipEffect::Persist`] before the record
/// is durable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MembershipEffect {
    /// Write and flush the record before anything that follows.
    Persist(MembershipRecord),
    /// Send to a peer; dropped while there is no link.
    Send { to: NodeId, msg: MembershipMessage },
    /// Promise nothing to these nodes from now on; all others may be promised. Carried out at once, also while a record is on its way.
    Withhold { from: NodeSet },
    /// Let nobody prepare under a generation older than this, nor serve, and tell the commit core ([`crate::Input::Generation`]). Answered by
    /// `Closed`.
    Close { generation: Generation },
    /// Wait until no transaction of an older generation is prepared here, users' own excepted. Answered by `Drained`.
    Drain { num: GenerationNum },
    /// Write the marker of the generation to WAL and flush it. Answered by `MarkerWritten`.
    WriteMarker { elected: Elected },
    /// This node is online: prepare, apply and vote under this generation, and serve while the lease lasts. Ask the peers for their horizons
    /// ([`crate::Input::Online`]).
    Open { generation: Generation },
    /// Ask the referee. Dropped when it cannot be reached: it is said again.
    AskReferee(RefereeRequest),
    /// Recover from this node; replaces an earlier one.
    Recover { from: NodeId },
    /// Stop recovering.
    StopRecovery,
    /// The presence has changed in a way that others wait for: send a heartbeat soon.
    Beat,
    /// For logs and `mtm.events`.
    Event(MembershipEvent),
}

/// Something an operator wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MembershipEvent {
    CampaignStarted {
        generation: Generation,
    },
    CampaignLost {
        generation: Generation,
    },
    Voted {
        generation: Generation,
        candidate: NodeId,
    },
    /// This node knows a new generation.
    Switched {
        from: Generation,
        to: Elected,
    },
    /// This node is online.
    Online {
        generation: Generation,
    },
    /// This node is not a member.
    Excluded {
        generation: Generation,
    },
    RecoveryStarted {
        from: NodeId,
    },
    /// A peer said what it cannot have meant; ignored.
    Rejected {
        from: NodeId,
        reason: &'static str,
    },
}

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Online, and all members are seen.
    Online,
    /// Online, and some member is not seen.
    Isolated,
    /// Member, and about to be online.
    Switching,
    /// Member; others already wait for this node.
    Recovery,
    /// Not a member; recovers from a donor.
    Catchup,
    /// Not a member, and nobody to recover from.
    Disabled,
}

/// What an apply does with a PREPARE of another node that is not prepared here yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Admission {
    /// Apply it and vote.
    Apply,
    /// Vote no: its generation is over.
    Refuse,
    /// It is here already or can never commit: the mark may pass.
    Skip,
    /// It comes through the donor: leave it out; the mark stays before it.
    SetAside,
    /// Wait until that has changed.
    Hold,
}

/// Effects in the order in which they have to be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MembershipEffects(Vec<MembershipEffect>);

impl MembershipEffects {
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    pub fn push(&mut self, effect: MembershipEffect) {
        self.0.push(effect);
    }

    /// Takes all effects out, leaving the allocation for the next input.
    pub fn drain(&mut self) -> impl Iterator<Item = MembershipEffect> + '_ {
        self.0.drain(..)
    }

    pub fn as_slice(&self) -> &[MembershipEffect] {
        &self.0
    }

    pub(crate) fn send(&mut self, to: NodeId, msg: MembershipMessage) {
        self.push(MembershipEffect::Send { to, msg });
    }

    pub(crate) fn event(&mut self, event: MembershipEvent) {
        self.push(MembershipEffect::Event(event));
    }
}
