//! Which peers count as stuck: their links work, and their databases do not get on, as they say themselves (`health`).
//!
//! A stuck node is not seen by anybody, so the others elect a generation without it. It is seen again when it gets on, but not before some time is over, which doubles with each time that
//! it was stuck: a node that is stuck now and then must not stop the others each time for as long as it takes to notice.

use super::health::Idle;
use protocol::{Millis, NodeId, NodeSet};
use std::collections::BTreeMap;

/// The time away doubles so many times at most.
const DOUBLINGS_MAX: u32 = 5;
/// Who was not stuck for so many timeouts begins anew.
const FORGIVEN_AFTER: u64 = 60;
/// No more than this is taken for a peer's silence between two looks: longer, and this node itself was stopped.
const LOOK_PAUSE_MAX: Millis = 300;

#[derive(Clone, Copy, Debug, Default)]
struct Suspect {
    idle: Option<Idle>,
    /// For how long it has said nothing since.
    unheard_ms: Millis,
    stuck: bool,
    /// How often it was stuck lately.
    times: u32,
    /// When that was found, or was over.
    changed_at: Millis,
}

/// What the peers say of themselves, and what follows from it.
#[derive(Default)]
pub struct Suspects {
    peers: BTreeMap<NodeId, Suspect>,
    judged_at: Millis,
}

/// A change of opinion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub peer: NodeId,
    pub stuck: bool,
    /// What it said last.
    pub idle: Option<Idle>,
}

impl Suspects {
    /// A heartbeat of the peer.
    pub fn heard(&mut self, peer: NodeId, idle: Option<Idle>) {
        let suspect = self.peers.entry(peer).or_default();
        suspect.idle = idle;
        suspect.unheard_ms = 0;
    }

    /// The peer's arbiter cannot be heard any more: what it said no longer holds, and the link's end says enough.
    pub fn lost(&mut self, peer: NodeId) {
        if let Some(suspect) = self.peers.get_mut(&peer) {
            suspect.idle = None;
            suspect.stuck = false;
        }
    }

    /// The peers that count as stuck.
    pub fn stuck(&self) -> NodeSet {
        self.peers
            .iter()
            .filter(|(_, suspect)| suspect.stuck)
            .map(|(peer, _)| *peer)
            .collect()
    }

    /// What changes now. `timeout` is zero when nobody is to be suspected; never more than `most` are stuck at a time, since without a majority nothing is gained.
    pub fn judge(&mut self, now: Millis, timeout: Millis, most: usize) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let pause = now.saturating_sub(self.judged_at).min(LOOK_PAUSE_MAX);
        self.judged_at = now;
        for (peer, suspect) in &mut self.peers {
            suspect.unheard_ms += pause;
            if suspect.stuck && suspect.may_return(now, timeout) {
                suspect.stuck = false;
                suspect.changed_at = now;
                verdicts.push(suspect.verdict(*peer));
            }
        }
        let room = most.saturating_sub(self.stuck().len());
        let mut worst: Vec<(Millis, NodeId)> = self
            .peers
            .iter()
            .filter(|(_, suspect)| timeout > 0 && !suspect.stuck)
            .filter_map(|(peer, suspect)| Some((suspect.idle_now()?.for_ms, *peer)))
            .filter(|(for_ms, _)| *for_ms >= timeout)
            .collect();
        worst.sort_unstable_by(|one, other| other.cmp(one));
        for (_, peer) in worst.into_iter().take(room) {
            if let Some(suspect) = self.peers.get_mut(&peer) {
                suspect.blame(now, timeout);
                verdicts.push(suspect.verdict(peer));
            }
        }
        verdicts
    }
}

impl Suspect {
    fn blame(&mut self, now: Millis, timeout: Millis) {
        if now.saturating_sub(self.changed_at) > timeout * FORGIVEN_AFTER {
            self.times = 0;
        }
        self.stuck = true;
        self.times += 1;
        self.changed_at = now;
    }

    /// What it said, and that it has not said otherwise since: a main thread that hangs soon makes the whole node silent.
    fn idle_now(&self) -> Option<Idle> {
        self.idle.map(|idle| Idle {
            for_ms: idle.for_ms + self.unheard_ms,
            ..idle
        })
    }

    /// Whether it gets on again, and has been away for long enough.
    fn may_return(&self, now: Millis, timeout: Millis) -> bool {
        let away = timeout << self.times.saturating_sub(1).min(DOUBLINGS_MAX);
        let moves = self.idle_now().is_none_or(|idle| idle.for_ms < timeout / 2);
        timeout == 0 || (moves && now.saturating_sub(self.changed_at) >= away)
    }

    fn verdict(&self, peer: NodeId) -> Verdict {
        Verdict {
            peer,
            stuck: self.stuck,
            idle: self.idle_now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::health::Matter;
    use super::*;

    fn node(id: u8) -> NodeId {
        NodeId::new(id).expect("a node id")
    }

    fn idle(for_ms: Millis) -> Option<Idle> {
        Some(Idle {
            for_ms,
            matter: Matter::Finish,
        })
    }

    #[test]
    fn who_returns_too_often_stays_away_for_longer() {
        let mut suspects = Suspects::default();
        let mut now = 0;
        for away in [1_000, 2_000, 4_000] {
            suspects.heard(node(2), idle(1_000));
            assert_eq!(suspects.judge(now, 1_000, 1).len(), 1);
            suspects.heard(node(2), idle(0));
            assert_eq!(suspects.judge(now + away - 1, 1_000, 1), []);
            assert_eq!(suspects.judge(now + away, 1_000, 1).len(), 1);
            now += away;
        }
        now += 61_000;
        suspects.heard(node(2), idle(1_000));
        suspects.judge(now, 1_000, 1);
        suspects.heard(node(2), None);
        assert_eq!(suspects.judge(now + 1_000, 1_000, 1).len(), 1);
    }

    #[test]
    fn who_does_not_get_on_stays_away() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(1_500));
        suspects.judge(0, 1_000, 1);
        assert_eq!(suspects.judge(60_000, 1_000, 1), []);
        suspects.lost(node(2));
        assert_eq!(suspects.stuck(), NodeSet::EMPTY);
    }

    #[test]
    fn who_falls_silent_while_it_does_not_move_still_does_not() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(600));
        suspects.heard(node(3), None);
        suspects.judge(0, 1_000, 1);
        assert_eq!(suspects.judge(300, 1_000, 1), []);
        let verdicts = suspects.judge(400, 1_000, 1);
        assert_eq!(verdicts.len(), 1);
        assert_eq!(suspects.stuck(), NodeSet::EMPTY.with(node(2)));
    }

    #[test]
    fn who_was_stopped_itself_blames_nobody() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(600));
        suspects.judge(0, 1_000, 1);
        assert_eq!(suspects.judge(60_000, 1_000, 1), []);
    }

    #[test]
    fn a_majority_is_never_suspected() {
        let mut suspects = Suspects::default();
        for (peer, for_ms) in [(2, 1_500), (3, 2_500), (4, 500)] {
            suspects.heard(node(peer), idle(for_ms));
        }
        let verdicts = suspects.judge(0, 1_000, 1);
        assert_eq!(verdicts.len(), 1);
        assert_eq!(suspects.stuck(), NodeSet::EMPTY.with(node(3)));
        assert!(suspects.judge(0, 0, 1).iter().all(|verdict| !verdict.stuck));
    }
}
