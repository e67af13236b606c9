//! Votes on a user's own PREPARE TRANSACTION.
//!
//! Its outcome is the user's, so the commit protocol takes no part: the coordinator only collects the votes. Nobody may act on the transaction
//! before the user does, so until all have voted yes the coordinator may roll back alone; the ROLLBACK PREPARED travels in the stream.

use protocol::{GenerationNum, Gid, Message, NodeId, NodeSet, Refusal, Vote};
use std::collections::BTreeMap;

/// Why a transaction of an older generation that still awaits votes is rolled back.
pub fn generation_over() -> Refusal {
    Refusal::retry(
        "the set of working nodes changed while the transaction was being prepared",
        "",
    )
}

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
    ///
    /// The gid of a vote tells in which generation the voter has prepared. One that has switched has done so behind its marker, where who recovers from it
    /// does not see it any more.
    pub fn count(&mut self, from: NodeId, msg: &Message) -> Option<(Gid, UserTally)> {
        let Message::Vote { gid, vote } = msg else {
            return None;
        };
        let (begun, _) = self.missing.get_key_value(gid)?;
        let in_time = begun.generation == gid.generation;
        let missing = self.missing.get_mut(gid)?;
        let tally = match vote {
            Vote::Yes if !in_time => UserTally::Refused(generation_over()),
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
        self.drop_where(|_, missing| missing.contains(peer))
    }

    /// The transactions of generations below this, whose votes need not come any more; they are no longer counted.
    pub fn lose_older(&mut self, num: GenerationNum) -> Vec<Gid> {
        self.drop_where(|gid, _| gid.generation < num)
    }

    fn drop_where(&mut self, mut condition: impl FnMut(&Gid, NodeSet) -> bool) -> Vec<Gid> {
        let lost: Vec<Gid> = self
            .missing
            .iter()
            .filter(|(gid, missing)| condition(gid, **missing))
            .map(|(gid, _)| *gid)
            .collect();
        for gid in &lost {
            self.missing.remove(gid);
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(generation: u32) -> Gid {
        Gid {
            coordinator: NodeId::new(1).expect("a node id"),
            xid: 7,
            generation: GenerationNum(generation),
            members: NodeSet::from_bits(0b111),
            started_at: 0,
        }
    }

    fn yes(generation: u32) -> Message {
        Message::Vote {
            gid: gid(generation),
            vote: Vote::Yes,
        }
    }

    fn voters() -> NodeSet {
        gid(1).participants()
    }

    #[test]
    fn all_have_to_prepare_in_one_generation() {
        let (first, second) = {
            let mut nodes = voters().iter();
            (nodes.next().expect("two"), nodes.next().expect("two"))
        };
        let mut votes = UserVotes::default();
        votes.expect(gid(1), voters());
        assert_eq!(
            votes.count(first, &yes(1)),
            Some((gid(1), UserTally::Pending))
        );
        assert_eq!(
            votes.count(second, &yes(1)),
            Some((gid(1), UserTally::Prepared))
        );
        votes.expect(gid(1), voters());
        let late = votes.count(first, &yes(2));
        assert_eq!(late, Some((gid(1), UserTally::Refused(generation_over()))));
        assert_eq!(votes.count(second, &yes(1)), None);
    }

    #[test]
    fn a_switch_ends_the_count_of_older_ones_only() {
        let mut votes = UserVotes::default();
        votes.expect(gid(2), voters());
        assert_eq!(votes.lose_older(GenerationNum(2)), []);
        assert_eq!(votes.lose_older(GenerationNum(3)), [gid(2)]);
        assert_eq!(votes.interrupt(gid(2)), None);
    }
}
