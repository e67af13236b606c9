//! A numbered set of members.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::{GenerationNum, NodeSet};

/// The nodes whose votes a transaction of this number needs. One number has one set (G6).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Generation {
    pub num: GenerationNum,
    pub members: NodeSet,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {{{}}}", self.num, self.members)
    }
}

/// A generation together with the members that held every older transaction when it was elected.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Elected {
    pub generation: Generation,
    /// Not empty, and members (G5).
    pub donors: NodeSet,
}

impl Elected {
    /// Whether a correct node can have elected it, as far as it can be told without knowing what can be elected here.
    pub const fn is_valid(&self) -> bool {
        self.generation.num.0 > 0
            && self.donors.is_subset(self.generation.members)
            && !self.donors.is_empty()
    }
}
