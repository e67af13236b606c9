//! Links that do not count yet: whoever answers has to show first that it holds what its node has held.
//!
//! An old copy of a node knows nothing of what the node has promised, voted and committed since, and must not be asked (membership.md, "A node is its memory"). Two
//! things tell it from the node, each in the first heartbeat of a link, which leaves before all messages:
//!
//! - its mark of this node's stream. A node tells a mark when it is stored, so it never tells a lower one again. What it has told is noted here with each stored mark;
//! - the end of its WAL. A node sends what it has flushed, so that is never behind what has been received of it.
//!
//! A heartbeat can say less than is true by now. So one that falls short proves nothing, and the next one is looked at; an old copy falls short for as long as it gets nothing.

use super::Arbiter;
use super::links::{is_older, mark_of};
use crate::pg::shared::shared;
use mesh::MeshEvent;
use protocol::{Lsn, Message, NodeId};
use std::sync::atomic::Ordering;
use wire::frame::Heartbeat;

/// The heartbeat with which one that still falls short is called an old copy. The first ones may have been put together a moment too early.
const TOLD_AT: u32 = 5;
/// Batches of messages kept until the link counts. More are dropped: to the protocol they are lost, as any message may be.
const HELD_BATCHES_MAX: usize = 256;

/// A peer whose arbiter answers, of which that is all that is known.
pub struct Newcomer {
    /// The life of its arbiter.
    epoch: u32,
    /// What had been received of its WAL when the link came up.
    received: Lsn,
    /// Up to where its node has held this node's stream.
    held: Lsn,
    heartbeats: u32,
    /// What it has said meanwhile.
    batches: Vec<Vec<Message>>,
}

impl Newcomer {
    fn begin(epoch: u32, received: Lsn, held: Lsn) -> Newcomer {
        Newcomer {
            epoch,
            received,
            held,
            heartbeats: 0,
            batches: Vec::new(),
        }
    }

    /// Whether it holds, as it says to this node, what its node has held.
    fn is_proven(&self, heartbeat: &Heartbeat, to: NodeId) -> bool {
        mark_of(heartbeat, to).is_some_and(|mark| mark >= self.held)
            && heartbeat.flushed >= self.received
    }
}

impl Arbiter {
    /// A link has come up.
    pub(super) fn meet(&mut self, peer: NodeId, epoch: u32) {
        let node = shared().node(peer);
        let newcomer = Newcomer::begin(
            epoch,
            Lsn(node.mark.load(Ordering::Acquire)),
            Lsn(node.held.load(Ordering::Acquire)),
        );
        self.newcomers.insert(peer, newcomer);
    }

    /// Takes what a newcomer says, and gives back what concerns none.
    pub(super) fn hear_newcomer(&mut self, event: MeshEvent) -> Option<MeshEvent> {
        match event {
            MeshEvent::Heartbeat { from, heartbeat } if self.newcomers.contains_key(&from) => {
                self.judge(from, &heartbeat);
                None
            }
            MeshEvent::Messages { from, batch } => match self.newcomers.get_mut(&from) {
                Some(newcomer) => {
                    if newcomer.batches.len() < HELD_BATCHES_MAX {
                        newcomer.batches.push(batch);
                    }
                    None
                }
                None => Some(MeshEvent::Messages { from, batch }),
            },
            event => Some(event),
        }
    }

    /// The link counts from the first heartbeat that proves it.
    fn judge(&mut self, peer: NodeId, heartbeat: &Heartbeat) {
        let Some(mut newcomer) = self.newcomers.remove(&peer) else {
            return;
        };
        // A copy of it may have been begun since the link came up.
        if newcomer.is_proven(heartbeat, self.node) && !is_older(peer, newcomer.epoch) {
            self.count_link(peer, newcomer.epoch);
            self.on_heartbeat(peer, heartbeat);
            for batch in newcomer.batches {
                self.on_messages(peer, batch);
            }
            return;
        }
        newcomer.heartbeats += 1;
        let is_told = newcomer.heartbeats == TOLD_AT;
        self.newcomers.insert(peer, newcomer);
        if is_told {
            self.tell_old_copy(peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u8) -> NodeId {
        NodeId::new(id).expect("a node id")
    }

    fn heartbeat(flushed: u64, mark: u64) -> Heartbeat {
        Heartbeat {
            flushed: Lsn(flushed),
            received: vec![(node(1), Lsn(mark)), (node(2), Lsn(99))],
            ..Heartbeat::default()
        }
    }

    #[test]
    fn who_holds_less_than_its_node_did_is_not_heard() {
        let newcomer = Newcomer::begin(3, Lsn(50), Lsn(20));
        let proven = |flushed, mark| newcomer.is_proven(&heartbeat(flushed, mark), node(1));
        assert!(proven(50, 20));
        assert!(proven(70, 30));
        assert!(!proven(49, 20));
        assert!(!proven(50, 19));
        assert!(!newcomer.is_proven(&Heartbeat::default(), node(1)));
    }
}
