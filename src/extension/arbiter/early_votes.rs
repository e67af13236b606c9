//! Votes that are here before the backend has announced its transaction.
//!
//! The peers see a PREPARE as soon as it is flushed, and may be faster than its own backend. To the core such a vote is about a transaction that it does not
//! know, and it would have this node's transaction log asked how that one ended. So the vote is kept back until the backend has spoken, which it
//! does in a moment or when it goes away. To the protocol a message that is kept back is one that was slow.

use protocol::{Gid, Message, NodeId, Vote};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// After this the core gets the vote as it is: it may be about a transaction that ended long ago.
const PATIENCE: Duration = Duration::from_millis(500);
/// Transactions whose votes are kept at once.
const KEPT_MAX: usize = 1024;

/// The votes kept back.
#[derive(Default)]
pub struct EarlyVotes {
    kept: BTreeMap<Gid, Kept>,
}

struct Kept {
    since: Instant,
    votes: Vec<(NodeId, Vote)>,
}

impl EarlyVotes {
    /// Keeps a message back if it is a vote and there is room; else gives it back.
    pub fn keep(&mut self, from: NodeId, msg: Message, now: Instant) -> Option<Message> {
        let Message::Vote { gid, vote } = msg else {
            return Some(msg);
        };
        if self.kept.len() >= KEPT_MAX && !self.kept.contains_key(&gid) {
            return Some(Message::Vote { gid, vote });
        }
        let kept = self.kept.entry(gid).or_insert(Kept {
            since: now,
            votes: Vec::new(),
        });
        // Votes are repeated, and none takes back an earlier one.
        if kept.votes.iter().all(|(voter, _)| *voter != from) {
            kept.votes.push((from, vote));
        }
        None
    }

    /// The votes on a transaction, which is known now.
    pub fn take(&mut self, gid: Gid) -> impl Iterator<Item = (NodeId, Message)> + use<> {
        let kept = self.kept.remove(&gid).map(|kept| kept.votes);
        kept.into_iter()
            .flatten()
            .map(move |(from, vote)| (from, Message::Vote { gid, vote }))
    }

    /// Transactions that nobody has announced in time.
    pub fn overdue(&self, now: Instant) -> Vec<Gid> {
        let is_overdue = |kept: &Kept| now.duration_since(kept.since) >= PATIENCE;
        self.kept
            .iter()
            .filter(|(_, kept)| is_overdue(kept))
            .map(|(gid, _)| *gid)
            .collect()
    }
}
