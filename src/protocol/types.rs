//! The words every crate shares: nodes, transactions, ballots, votes, decisions.
//!
//! Each is a newtype, so that two bare numbers never travel side by side, and each refuses values that cannot be
//! right when it is decoded: what a peer or a disk says is checked here once.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

/// Most nodes a cluster can be configured with.
pub const MAX_NODES: u8 = 16;

/// Most bytes of each text of a [`Refusal`].
pub const REFUSAL_TEXT_BYTES_MAX: usize = 400;

/// A value that arrived from outside and cannot be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidValue {
    #[error("node id {0} is not within 1..={MAX_NODES}")]
    NodeId(u8),
}

/// A configured node, 1 to [`MAX_NODES`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct NodeId(u8);

impl NodeId {
    /// The node with this number, or `None` when no cluster can have it.
    pub const fn new(id: u8) -> Option<Self> {
        if id >= 1 && id <= MAX_NODES {
            Some(Self(id))
        } else {
            None
        }
    }

    pub const fn get(self) -> u8 {
        self.0
    }

    /// Position in arrays of [`MAX_NODES`] elements.
    pub const fn index(self) -> usize {
        self.0 as usize - 1
    }
}

impl TryFrom<u8> for NodeId {
    type Error = InvalidValue;

    fn try_from(id: u8) -> Result<Self, InvalidValue> {
        Self::new(id).ok_or(InvalidValue::NodeId(id))
    }
}

impl From<NodeId> for u8 {
    fn from(node: NodeId) -> u8 {
        node.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// A set of nodes, iterated in the order of their numbers.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeSet(u16);

impl NodeSet {
    pub const EMPTY: Self = Self(0);

    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u16 {
        self.0
    }

    pub const fn contains(self, node: NodeId) -> bool {
        self.0 & Self::bit(node) != 0
    }

    /// Adds the node; says whether it is new.
    pub fn insert(&mut self, node: NodeId) -> bool {
        let new = !self.contains(node);
        self.0 |= Self::bit(node);
        new
    }

    /// Takes the node out; says whether it was there.
    pub fn remove(&mut self, node: NodeId) -> bool {
        let there = self.contains(node);
        self.0 &= !Self::bit(node);
        there
    }

    pub const fn with(self, node: NodeId) -> Self {
        Self(self.0 | Self::bit(node))
    }

    pub const fn without(self, node: NodeId) -> Self {
        Self(self.0 & !Self::bit(node))
    }

    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub const fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// How many nodes of this set any two of which share one: more than half.
    pub const fn majority(self) -> usize {
        self.len() / 2 + 1
    }

    /// Whether this set holds a majority of `configured`.
    pub const fn is_quorum_of(self, configured: Self) -> bool {
        self.intersection(configured).len() >= configured.majority()
    }

    pub fn iter(self) -> impl Iterator<Item = NodeId> {
        (1..=MAX_NODES)
            .filter_map(NodeId::new)
            .filter(move |node| self.contains(*node))
    }

    const fn bit(node: NodeId) -> u16 {
        1 << node.index()
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> Self {
        nodes.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, node) in self.iter().enumerate() {
            let separator = if position == 0 { "" } else { "," };
            write!(f, "{separator}{node}")?;
        }
        Ok(())
    }
}

/// Number of a member set. A higher number replaces a lower one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct GenerationNum(pub u32);

impl fmt::Display for GenerationNum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Keeps the transactions of two clusters apart; part of every transaction's name.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct ClusterTag(pub u32);

impl fmt::Display for ClusterTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// A position in one node's WAL, in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lsn(pub u64);

impl Lsn {
    /// No position: before all of WAL.
    pub const ZERO: Self = Self(0);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Commit sequence number: place of a commit in the order of one node's announcements, `epoch << 40 | counter`.
///
/// Within an epoch the counter has no gaps. The epoch grows at every start of the announcing node.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Csn(pub u64);

impl Csn {
    pub const ZERO: Self = Self(0);
    /// Beyond all that any node announces.
    pub const MAX: Self = Self(u64::MAX);
    const COUNTER_BITS: u32 = 40;

    /// The number before the first commit of an epoch.
    pub const fn start_of(epoch: u32) -> Self {
        Self((epoch as u64) << Self::COUNTER_BITS)
    }

    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The number before this one.
    pub const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    pub const fn epoch(self) -> u32 {
        (self.0 >> Self::COUNTER_BITS) as u32
    }

    pub const fn counter(self) -> u64 {
        self.0 & ((1 << Self::COUNTER_BITS) - 1)
    }
}

impl fmt::Display for Csn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch(), self.counter())
    }
}

impl fmt::Debug for Csn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A point on the shell's monotonic clock, in milliseconds.
pub type Millis = u64;

/// Name of a transaction in the whole cluster.
///
/// `coordinator` and `xid` identify it and alone are compared; the rest rides along, so that a prepared transaction
/// explains itself on every node after any crash.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Gid {
    pub coordinator: NodeId,
    /// The coordinator's full 64-bit transaction id.
    pub xid: u64,
    pub generation: GenerationNum,
    /// Start of the transaction, in microseconds since 2000-01-01, by the coordinator's clock.
    pub started_at: i64,
}

impl Gid {
    /// The name as PostgreSQL stores it: `mtm-<tag>-<node>-<xid>-<generation>-<started_at>`.
    pub fn text(&self, tag: ClusterTag) -> String {
        format!(
            "mtm-{tag}-{}-{}-{}-{}",
            self.coordinator, self.xid, self.generation, self.started_at
        )
    }

    /// Reads what [`Gid::text`] writes, and nothing else: exactly one text names a transaction.
    pub fn parse(text: &str) -> Option<(ClusterTag, Self)> {
        let mut parts = text.strip_prefix("mtm-")?.splitn(5, '-');
        let tag = ClusterTag(u32::from_str_radix(parts.next()?, 16).ok()?);
        let gid = Self {
            coordinator: NodeId::new(parts.next()?.parse().ok()?)?,
            xid: parts.next()?.parse().ok()?,
            generation: GenerationNum(parts.next()?.parse().ok()?),
            started_at: parts.next()?.parse().ok()?,
        };
        (gid.text(tag) == text).then_some((tag, gid))
    }

    /// Place in the order of the conflict rule.
    pub const fn age(&self) -> Age {
        Age {
            started_at: self.started_at,
            coordinator: self.coordinator,
            xid: self.xid,
        }
    }

    const fn identity(&self) -> (NodeId, u64) {
        (self.coordinator, self.xid)
    }
}

impl PartialEq for Gid {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for Gid {}

impl PartialOrd for Gid {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Gid {
    fn cmp(&self, other: &Self) -> Ordering {
        self.identity().cmp(&other.identity())
    }
}

impl Hash for Gid {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.coordinator, self.xid)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Age of a transaction: the smaller is the older and wins a conflict. Total, and the same on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age {
    started_at: i64,
    coordinator: NodeId,
    xid: u64,
}

/// Number of an attempt to decide one transaction; the higher outvotes the lower.
///
/// The node makes it unique: two resolvers that choose the same term still have two ballots.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ballot {
    pub term: u32,
    pub node: Option<NodeId>,
}

impl Ballot {
    /// No ballot: below all others.
    pub const NONE: Self = Self {
        term: 0,
        node: None,
    };
    /// The coordinator's own, which needs no promises because only the coordinator may use it.
    pub const COORDINATOR: Self = Self {
        term: 1,
        node: None,
    };

    /// The lowest ballot of `node` above this one.
    pub const fn above(self, node: NodeId) -> Self {
        let term = if self.term < Self::COORDINATOR.term {
            Self::COORDINATOR.term
        } else {
            self.term
        };
        Self {
            term: term.saturating_add(1),
            node: Some(node),
        }
    }
}

impl fmt::Display for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.node.map_or(0, NodeId::get))
    }
}

impl fmt::Debug for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a ballot proposes; can be outvoted by a higher ballot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Verdict {
    Precommit,
    Preabort,
}

impl Verdict {
    /// The decision once a quorum has accepted this verdict.
    pub const fn decision(self) -> Decision {
        match self {
            Self::Precommit => Decision::Commit,
            Self::Preabort => Decision::Abort,
        }
    }
}

/// The end of a transaction; final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Decision {
    Commit,
    Abort,
}

/// A participant's answer to a PREPARE.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Vote {
    /// The transaction is durably prepared here.
    Yes,
    /// It is not and never will be.
    No(Refusal),
}

/// Why a transaction cannot commit, in the words its client will read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "RefusalText")]
pub struct Refusal {
    sqlstate: [u8; 5],
    message: String,
    detail: String,
}

impl Refusal {
    /// Texts longer than [`REFUSAL_TEXT_BYTES_MAX`] are cut between two characters; a SQLSTATE outside `0-9A-Z` becomes `XX000`.
    pub fn new(sqlstate: [u8; 5], message: impl Into<String>, detail: impl Into<String>) -> Self {
        let legal = sqlstate
            .iter()
            .all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase());
        Self {
            sqlstate: if legal { sqlstate } else { *b"XX000" },
            message: cut(message.into()),
            detail: cut(detail.into()),
        }
    }

    /// Nothing happened and the client may try again.
    pub fn retry(message: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(*b"40001", message, detail)
    }

    pub const fn sqlstate(&self) -> [u8; 5] {
        self.sqlstate
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    pub fn detail(&self) -> &str {
        &self.detail
    }
}

/// A [`Refusal`] as it arrives: not yet cut to its bounds.
#[derive(Deserialize)]
struct RefusalText {
    sqlstate: [u8; 5],
    message: String,
    detail: String,
}

impl From<RefusalText> for Refusal {
    fn from(text: RefusalText) -> Self {
        Self::new(text.sqlstate, text.message, text.detail)
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(REFUSAL_TEXT_BYTES_MAX));
    text
}
