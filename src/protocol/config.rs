//! What the core is told at its start, and the bounds of its tables.

use crate::record::Record;
use crate::types::{GenerationNum, Gid, NodeId, NodeSet};

/// Most transactions a core keeps; beyond it nothing new is taken up on a peer's word.
pub const TRANSACTIONS_MAX: usize = 65_536;

/// How many forgotten transactions a core still recognises, so that a message that was overtaken does no harm.
pub const FORGOTTEN_MAX: usize = 8_192;

/// Most finished commits of one peer a core keeps while an earlier commit of that peer is open.
pub const AHEAD_MAX: usize = 65_536;

/// Most configured nodes with which the coordinator may decide on the votes alone (rule D2): a majority that lacks the coordinator is then
/// everybody else, and proves every vote. PROTOCOL.md 7.3; the model finds a split with five.
pub const FAST_NODES_MAX: usize = 4;

/// Most transactions whose votes a core keeps before it has their PREPARE.
pub const EARLY_VOTES_MAX: usize = 4_096;

/// What the core is told once, at its start.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    pub node: NodeId,
    pub configured: NodeSet,
    /// The current generation; replaced by [`crate::Input::Generation`]. Which votes a transaction needs stands in its gid.
    pub members: NodeSet,
    pub generation: GenerationNum,
    /// Grows at every start of this node, durably. Starts at 1.
    pub epoch: u32,
    /// This node's transactions below this `xid` may have begun before this core did, which may therefore have been told of their end by an
    /// earlier one and not know it. The server's next xid, read before its prepared transactions are.
    pub first_xid: u64,
    /// The generation in which this node was copied from another one, or 0. What an earlier server of its name knew of transactions of this generation
    /// and older ones is lost.
    pub copied_in: GenerationNum,
    /// Yes votes go to all members, and each precommits when it has all of them: a delay less than by way of the coordinator. All nodes of a cluster say
    /// the same. `new` takes it where rule D2 is not allowed, which needs no precommits at all.
    pub votes_to_all: bool,
    /// How long a participant's link to the coordinator is down before it resolves.
    pub resolve_after_ms: u64,
    /// How long a competing resolver waits per place in the order of nodes; more than a round trip.
    pub resolve_step_ms: u64,
    /// How long an unanswered message waits before it is sent again.
    pub resend_after_ms: u64,
    /// How long a resolver looks for a quorum before the client is told that the outcome is unknown.
    pub give_up_after_ms: u64,
    /// A rule broken on purpose, to prove that a checker finds it. `None` outside the checkers' own tests.
    pub fault: Option<Fault>,
}

impl Config {
    /// A cluster in which all configured nodes are members, with intervals that suit a local network.
    pub const fn new(node: NodeId, configured: NodeSet, epoch: u32) -> Self {
        Self {
            node,
            configured,
            members: configured,
            generation: GenerationNum(1),
            epoch,
            first_xid: 0,
            copied_in: GenerationNum(0),
            votes_to_all: configured.len() > FAST_NODES_MAX,
            resolve_after_ms: 1_000,
            resolve_step_ms: 100,
            resend_after_ms: 200,
            give_up_after_ms: 3_000,
            fault: None,
        }
    }

    /// The other configured nodes.
    pub(crate) const fn peers(&self) -> NodeSet {
        self.configured.without(self.node)
    }

    /// Whether a decision, or the promises that precede one, need no more nodes than these: a majority of the configured ones.
    ///
    /// Or this node alone, where two are configured and it is the only member of the current generation. Of what both had to vote on, nobody can have
    /// decided without this node: its vote, its promise or its acceptance were needed. And nobody else decides alone before everything older has
    /// ended on both. See `docs/membership.md`, *Two nodes and a referee*.
    pub(crate) fn is_quorum(&self, nodes: NodeSet) -> bool {
        nodes.is_quorum_of(self.configured) || self.is_alone() && nodes.contains(self.node)
    }

    /// Whether the referee has let this node go on alone.
    pub(crate) fn is_alone(&self) -> bool {
        self.configured.len() == 2 && self.members == NodeSet::EMPTY.with(self.node)
    }

    /// How many configured nodes go before this one when several want to resolve.
    pub(crate) fn rank(&self) -> u64 {
        self.rank_among(self.configured)
    }

    /// How many of these nodes go before this one.
    pub(crate) fn rank_among(&self, nodes: NodeSet) -> u64 {
        nodes.iter().take_while(|node| *node < self.node).count() as u64
    }

    /// Whether the coordinator may decide on the votes alone.
    pub(crate) fn allows_fast(&self) -> bool {
        self.configured.len() <= FAST_NODES_MAX || self.breaks(Fault::FastBeyondFour)
    }

    pub(crate) fn breaks(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }
}

/// Rules whose absence a checker must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Resolvers choose terms without adding their node.
    SharedBallots,
    /// An accepted verdict is acknowledged before it is durable.
    UndurableAccept,
    /// An interrupted coordinator aborts by itself.
    LonelyAbort,
    /// Decides on the votes alone whatever the number of nodes.
    FastBeyondFour,
    /// A node that goes on alone commits only what was precommitted, as if the other one could not have decided on the votes.
    AloneAborts,
    /// A member precommits when it has a majority of the votes.
    MostVotes,
}

/// What the server finds at its start: a durable record, a prepared transaction, or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Recovered {
    pub gid: Gid,
    pub record: Option<Record>,
    pub prepared: bool,
}
