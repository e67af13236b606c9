//! Names of transactions, and their age.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::nodes::{NodeId, NodeSet};
use crate::types::{ClusterTag, GenerationNum};

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
    /// Members of that generation: the nodes whose yes it needs.
    pub members: NodeSet,
    /// Start of the transaction, in microseconds since 2000-01-01, by the coordinator's clock.
    pub started_at: i64,
}

impl Gid {
    /// The name as PostgreSQL stores it: `mtm-<tag>-<node>-<xid>-<generation>-<members>-<started_at>`, the members as hexadecimal bits.
    pub fn text(&self, tag: ClusterTag) -> String {
        format!(
            "mtm-{tag}-{}-{}-{}-{:x}-{}",
            self.coordinator,
            self.xid,
            self.generation,
            self.members.bits(),
            self.started_at
        )
    }

    /// Reads what [`Gid::text`] writes, and nothing else: exactly one text names a transaction.
    pub fn parse(text: &str) -> Option<(ClusterTag, Self)> {
        let mut parts = text.strip_prefix("mtm-")?.splitn(6, '-');
        let tag = ClusterTag(u32::from_str_radix(parts.next()?, 16).ok()?);
        let gid = Self {
            coordinator: NodeId::new(parts.next()?.parse().ok()?)?,
            xid: parts.next()?.parse().ok()?,
            generation: GenerationNum(parts.next()?.parse().ok()?),
            members: NodeSet::from_bits(u16::from_str_radix(parts.next()?, 16).ok()?),
            started_at: parts.next()?.parse().ok()?,
        };
        (gid.text(tag) == text).then_some((tag, gid))
    }

    /// Members other than the coordinator: those whose vote is asked for.
    pub const fn participants(&self) -> NodeSet {
        self.members.without(self.coordinator)
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
