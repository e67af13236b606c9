//! Votes on a user's own PREPARE TRANSACTION.
//!
//! Its outcome is the user's, so the commit protocol takes no part: the coordinator only collects the votes. Nobody may act on the transaction
//! before the user does, so until all have voted yes the coordinator may roll back alone; the ROLLBACK PREPARED travels in the stream.

use protocol::{Gid, Message, NodeId, NodeSet, Refusal, Vote};
use std::collections::BTreeMap;

/// Where the count stands.
#[derive(Debug, PartialEq)]
pub enum UserTally {
    Pending,
    Prepared,
    Refused(Refusal),
}

/// The transactions being counted, with the nodes that have not voted yet.
#[derive(Default)]
pub struct UserVotes {
    missing: BTreeMap<Gid, NodeSet>,
}

impl UserVotes {
    /// Starts to count.
    pub fn expect(&mut self, gid: Gid, voters: NodeSet) {
        self.missing.insert(gid, voters);
    }

    /// Counts a message if it is a vote on one of these; the count is over when the answer is not `Pending`.
    pub fn count(&mut self, from: NodeId, msg: &Message) -> Option<(Gid, UserTally)> {
        let Message::Vote { gid, vote } = msg else {
            return None;
        };
        let missing = self.missing.get_mut(gid)?;
        let tally = match vote {
            Vote::Yes => {
                missing.remove(from);
                if missing.is_empty() {
                    UserTally::Prepared
                } else {
                    UserTally::Pending
                }
            }
            Vote::No(refusal) => UserTally::Refused(refusal.clone()),
        };
        if tally != UserTally::Pending {
            self.missing.remove(gid);
        }
        Some((*gid, tally))
    }

    /// The user cancelled: the transaction is rolled back. None when it is not one of these.
    pub fn interrupt(&mut self, gid: Gid) -> Option<UserTally> {
        self.missing.remove(&gid)?;
        Some(UserTally::Refused(Refusal::new(
            *b"57014",
            "canceling PREPARE TRANSACTION due to user request",
            "",
        )))
    }

    /// The transactions that wait for a node that is gone; they are no longer counted.
    pub fn lose(&mut self, peer: NodeId) -> Vec<Gid> {
        let lost: Vec<Gid> = self
            .missing
            .iter()
            .filter(|(_, missing)| missing.contains(peer))
            .map(|(gid, _)| *gid)
            .collect();
        for gid in &lost {
            self.missing.remove(gid);
        }
        lost
    }
}
