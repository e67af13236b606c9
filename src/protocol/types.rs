//! The words every crate shares: positions, numbers, ballots, votes, decisions; with `nodes` and `gid`.
//!
//! Each is a newtype, so that two bare numbers never travel side by side, and each refuses values that cannot be
//! right when it is decoded: what a peer or a disk says is checked here once.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::gid::{Age, Gid};
pub use crate::nodes::{InvalidValue, MAX_NODES, NodeId, NodeSet};

/// Most bytes of each text of a [`Refusal`].
pub const REFUSAL_TEXT_BYTES_MAX: usize = 400;

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
