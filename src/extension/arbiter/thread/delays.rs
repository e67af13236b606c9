//! Notes how long the nodes take (`crate::latency`): what only this thread sees.

use super::Arbiter;
use crate::latency::Phase;
use crate::pg::shared::shared;
use protocol::{Ballot, Gid, Message, NodeId, Vote};
use std::time::{Duration, Instant};

/// When a commit of this node reached its stages.
#[derive(Clone, Copy)]
pub(super) struct Stages {
    /// It is prepared here, and waits for votes.
    announced: Instant,
    /// All votes are in.
    voted: Option<Instant>,
    /// It is decided.
    decided: Option<Instant>,
}

impl Stages {
    pub(super) fn begin() -> Stages {
        Stages {
            announced: Instant::now(),
            voted: None,
            decided: None,
        }
    }
}

impl Arbiter {
    /// A message came from a peer.
    pub(super) fn note_delay(&self, from: NodeId, msg: &Message) {
        match msg {
            Message::Vote {
                gid,
                vote: Vote::Yes,
            } if gid.coordinator == self.node => {
                let took = match self.waiting.get(gid) {
                    Some(waiting) => waiting.stages.announced.elapsed(),
                    // It was faster than this node's own backend.
                    None if self.core.decision(*gid).is_none() => Duration::ZERO,
                    None => return,
                };
                shared().latencies.note_vote(from, took);
            }
            Message::Finished { gid, .. } => {
                if let Some(decided) = self
                    .waiting
                    .get(gid)
                    .and_then(|waiting| waiting.stages.decided)
                {
                    shared().latencies.note_peer_commit(from, decided.elapsed());
                }
            }
            _ => {}
        }
    }

    /// A message is about to leave: the first proposal of a coordinator says that all votes are in.
    pub(super) fn note_proposal(&mut self, msg: &Message) {
        if let Message::Propose {
            gid,
            ballot: Ballot::COORDINATOR,
            ..
        } = msg
            && let Some(waiting) = self.waiting.get_mut(gid)
            && waiting.stages.voted.is_none()
        {
            let stages = &mut waiting.stages;
            stages.voted = Some(Instant::now());
            let took = stages.announced.elapsed();
            shared().latencies.note(Phase::Vote, took);
        }
    }

    /// The transaction will commit. Where nothing was proposed, the votes alone have decided.
    pub(super) fn note_commit(&mut self, gid: Gid) {
        let Some(waiting) = self.waiting.get_mut(&gid) else {
            return;
        };
        let stages = &mut waiting.stages;
        let (phase, since) = match stages.voted {
            Some(voted) => (Phase::Precommit, voted),
            None => (Phase::Vote, stages.announced),
        };
        stages.decided = Some(Instant::now());
        shared().latencies.note(phase, since.elapsed());
    }
}
