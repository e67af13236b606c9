//! Nodes and sets of nodes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most nodes a cluster can be configured with.
pub const MAX_NODES: u8 = 16;

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
    /// Every node that there can be.
    pub const ALL: Self = Self(u16::MAX);

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
