//! What nodes say to each other about members.

use serde::{Deserialize, Serialize};

use super::generation::{Elected, Generation};
use crate::types::{GenerationNum, NodeSet};

/// A message between the memberships of two nodes. Any of them may be lost, doubled, late or overtaken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum MembershipMessage {
    /// Vote for this generation. `current` is the latest that the candidate knows; the voter switches to it first.
    RequestVote {
        generation: Generation,
        current: Elected,
    },
    /// The sender has voted for the generation, durably, and was last online in `online_in`.
    Granted {
        generation: Generation,
        online_in: GenerationNum,
    },
    /// No vote for this number: the sender's last vote or its current generation stands against it, or its view of who is connected.
    Denied {
        num: GenerationNum,
        last_vote: GenerationNum,
        current: Elected,
    },
    /// This generation was elected.
    Elected(Elected),
}

/// What every heartbeat says about its sender.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Presence {
    /// The latest generation the sender knows.
    pub current: Elected,
    /// The latest in which it was online.
    pub online_in: GenerationNum,
    /// Whom it sees, itself included.
    pub sees: NodeSet,
    /// It is not online, and level with the most advanced node it sees: it may be made a member.
    pub willing: bool,
    /// It has stopped serving and is about to end.
    pub leaving: bool,
}
