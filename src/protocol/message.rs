//! What nodes say to each other about a transaction.

use serde::{Deserialize, Serialize};

use crate::membership::MembershipMessage;
use crate::types::{Ballot, Csn, Decision, Gid, Verdict, Vote};

/// A message between the cores of two nodes. Any of them may be lost, doubled, late or overtaken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Message {
    /// Participant to coordinator: how it answers the PREPARE. Sent again, it also asks for the outcome.
    Vote { gid: Gid, vote: Vote },
    /// Accept this verdict. PRECOMMIT or PREABORT of E3PC, phase 2a of Paxos.
    Propose {
        gid: Gid,
        ballot: Ballot,
        verdict: Verdict,
    },
    /// The sender has accepted the ballot's verdict durably. PRECOMMITTED; phase 2b.
    Accepted { gid: Gid, ballot: Ballot },
    /// The ballot comes too late: the sender has promised a higher one.
    Refused { gid: Gid, promised: Ballot },
    /// A resolver asks for a promise and for what the receiver knows. Phase 1a.
    Status { gid: Gid, ballot: Ballot },
    /// The sender will ignore lower ballots, durably. Phase 1b.
    Promised {
        gid: Gid,
        ballot: Ballot,
        accepted: Option<Accept>,
        voted_yes: bool,
    },
    /// The outcome. `csn` is the sender's own number for a commit; the sender repeats it until it hears [`Message::Finished`].
    Decided {
        gid: Gid,
        decision: Decision,
        csn: Option<Csn>,
    },
    /// The sender's database has finished the transaction this way, durably, or will never hold it. `csn` repeats the receiver's own
    /// number, if the sender has been told.
    Finished {
        gid: Gid,
        decision: Decision,
        csn: Option<Csn>,
    },
    /// From the coordinator: every member has finished; nobody will ask about it again.
    Forget { gid: Gid },
    /// How did it end? From a node that has no vote to repeat.
    Query { gid: Gid },
    /// Up to which of your commits have I finished? Asked once per epoch of the receiver.
    AskHorizon,
    /// You have finished every commit that I announced up to this number.
    Horizon { csn: Csn },
    /// About members: for [`crate::membership::Membership`], not for the core.
    Membership(MembershipMessage),
}

/// A verdict together with the ballot under which it was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Accept {
    pub ballot: Ballot,
    pub verdict: Verdict,
}

impl Message {
    /// The transaction it is about; `None` for what concerns a whole link.
    pub const fn gid(&self) -> Option<Gid> {
        match self {
            Self::Vote { gid, .. }
            | Self::Propose { gid, .. }
            | Self::Accepted { gid, .. }
            | Self::Refused { gid, .. }
            | Self::Status { gid, .. }
            | Self::Promised { gid, .. }
            | Self::Decided { gid, .. }
            | Self::Finished { gid, .. }
            | Self::Forget { gid }
            | Self::Query { gid } => Some(*gid),
            Self::AskHorizon | Self::Horizon { .. } | Self::Membership(_) => None,
        }
    }
}
