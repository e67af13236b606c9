//! Which peers count as stuck: their links work, and their databases do not get on, as they say themselves (`health`).
//!
//! A stuck node is not seen by anybody, so the others elect a generation without it. It is seen again when it gets on, but not before some time is over, which doubles with each time that
//! it was stuck: a node that is stuck now and then must not stop the others each time for as long as it takes to notice.
//!
//! A stream that does not move is told by the node that waits for it, and either end can be the cause. It is the source that hangs if the source says itself that something there does
//! not move, or if another node waits for it, too; else it is the node that tells.

use super::health::{Idle, Matter};
use protocol::{Millis, NodeId, NodeSet};
use std::cmp::Reverse;
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
    /// It was stuck when its arbiter was lost, and has not said otherwise since: the same standstill counts once.
    still: bool,
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

/// The node that judges.
#[derive(Clone, Copy)]
pub struct Own {
    pub node: NodeId,
    /// What it says of itself.
    pub idle: Option<Idle>,
    /// Members of its generation.
    pub members: NodeSet,
}

/// The longest standstill that is laid to each node.
type Claims = BTreeMap<NodeId, Idle>;

/// A change of opinion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub peer: NodeId,
    pub stuck: bool,
    /// What makes no progress, if it is stuck.
    pub idle: Option<Idle>,
}

impl Suspects {
    /// A heartbeat of the peer.
    pub fn heard(&mut self, peer: NodeId, idle: Option<Idle>) {
        let suspect = self.peers.entry(peer).or_default();
        suspect.idle = idle;
        suspect.unheard_ms = 0;
        suspect.still &= idle.is_some();
    }

    /// The peer's arbiter cannot be heard any more: what it said no longer holds, and the link's end says enough.
    pub fn lost(&mut self, peer: NodeId) {
        if let Some(suspect) = self.peers.get_mut(&peer) {
            suspect.idle = None;
            suspect.still |= suspect.stuck;
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
    pub fn judge(&mut self, own: Own, now: Millis, timeout: Millis, most: usize) -> Vec<Verdict> {
        let pause = now.saturating_sub(self.judged_at).min(LOOK_PAUSE_MAX);
        self.judged_at = now;
        for suspect in self.peers.values_mut() {
            suspect.unheard_ms += pause;
        }
        let claims = self.claims(own);
        let mut verdicts = self.acquit(&claims, now, timeout);
        let exceeds = |idle: &Idle| timeout > 0 && idle.for_ms >= timeout;
        // Who is stuck itself leaves it to the others to go on without it.
        let own_stuck = claims.get(&own.node).is_some_and(exceeds);
        let room = most.saturating_sub(self.stuck().len() + usize::from(own_stuck));
        let mut worst: Vec<(NodeId, Idle)> = claims
            .into_iter()
            .filter(|(_, idle)| exceeds(idle))
            .collect();
        worst.sort_unstable_by_key(|(peer, idle)| Reverse((idle.for_ms, *peer)));
        let blamed = worst
            .into_iter()
            .filter(|(peer, _)| self.peers.get(peer).is_some_and(|suspect| !suspect.stuck))
            .take(room);
        for (peer, idle) in blamed.collect::<Vec<_>>() {
            if let Some(suspect) = self.peers.get_mut(&peer) {
                suspect.blame(now, timeout);
                verdicts.push(Verdict {
                    peer,
                    stuck: true,
                    idle: Some(idle),
                });
            }
        }
        verdicts
    }

    /// Those that get on again.
    fn acquit(&mut self, claims: &Claims, now: Millis, timeout: Millis) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for (peer, suspect) in &mut self.peers {
            let moves = claims
                .get(peer)
                .is_none_or(|idle| idle.for_ms < timeout / 2);
            if suspect.stuck && suspect.may_return(moves, now, timeout) {
                suspect.stuck = false;
                suspect.changed_at = now;
                verdicts.push(Verdict {
                    peer: *peer,
                    stuck: false,
                    idle: None,
                });
            }
        }
        verdicts
    }

    /// The longest standstill that is laid to each node.
    fn claims(&self, own: Own) -> Claims {
        let peers = self
            .peers
            .iter()
            .map(|(peer, suspect)| (*peer, suspect.idle_now()));
        let said: Vec<(NodeId, Idle)> = peers
            .chain([(own.node, own.idle)])
            .filter_map(|(node, idle)| Some((node, idle?)))
            .collect();
        let mut claims = Claims::new();
        for (teller, idle) in &said {
            let worst = claims
                .entry(culprit(&said, own.members, *teller, *idle))
                .or_insert(*idle);
            if idle.for_ms > worst.for_ms {
                *worst = *idle;
            }
        }
        claims
    }
}

/// Whose fault it is that something does not move at the node that tells so. Nobody waits for the stream of a node that is no member.
fn culprit(said: &[(NodeId, Idle)], members: NodeSet, teller: NodeId, idle: Idle) -> NodeId {
    let Matter::Stream(source) = idle.matter else {
        return teller;
    };
    let confirmed = said.iter().any(|(node, other)| {
        *node != teller
            && other.for_ms >= idle.for_ms / 2
            && (*node == source || other.matter == idle.matter)
    });
    if confirmed || !members.contains(source) {
        source
    } else {
        teller
    }
}

impl Suspect {
    fn blame(&mut self, now: Millis, timeout: Millis) {
        self.stuck = true;
        if std::mem::take(&mut self.still) {
            return;
        }
        if now.saturating_sub(self.changed_at) > timeout * FORGIVEN_AFTER {
            self.times = 0;
        }
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

    /// Whether it has been away for long enough, if it `moves`.
    fn may_return(&self, moves: bool, now: Millis, timeout: Millis) -> bool {
        let away = timeout << self.times.saturating_sub(1).min(DOUBLINGS_MAX);
        timeout == 0 || (moves && now.saturating_sub(self.changed_at) >= away)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Millis = 1_000;

    fn node(id: u8) -> NodeId {
        NodeId::new(id).expect("a node id")
    }

    fn idle(for_ms: Millis) -> Option<Idle> {
        Some(Idle {
            for_ms,
            matter: Matter::Finish,
        })
    }

    fn no_stream(from: u8, for_ms: Millis) -> Option<Idle> {
        Some(Idle {
            for_ms,
            matter: Matter::Stream(node(from)),
        })
    }

    fn own(idle: Option<Idle>) -> Own {
        Own {
            node: node(1),
            idle,
            members: [1, 2, 3].map(node).into_iter().collect(),
        }
    }

    fn judge(suspects: &mut Suspects, now: Millis) -> Vec<Verdict> {
        suspects.judge(own(None), now, TIMEOUT, 1)
    }

    /// The nodes that are found stuck by what the three nodes say of themselves.
    fn stuck_of(said: [Option<Idle>; 3]) -> NodeSet {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), said[1]);
        suspects.heard(node(3), said[2]);
        suspects.judge(own(said[0]), 0, TIMEOUT, 1);
        suspects.stuck()
    }

    #[test]
    fn who_returns_too_often_stays_away_for_longer() {
        let mut suspects = Suspects::default();
        let mut now = 0;
        for away in [1_000, 2_000, 4_000] {
            suspects.heard(node(2), idle(1_000));
            assert_eq!(judge(&mut suspects, now).len(), 1);
            suspects.heard(node(2), idle(0));
            assert_eq!(judge(&mut suspects, now + away - 1), []);
            assert_eq!(judge(&mut suspects, now + away).len(), 1);
            now += away;
        }
        now += 61_000;
        suspects.heard(node(2), idle(1_000));
        judge(&mut suspects, now);
        suspects.heard(node(2), None);
        assert_eq!(judge(&mut suspects, now + 1_000).len(), 1);
    }

    #[test]
    fn who_does_not_get_on_stays_away() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(1_500));
        judge(&mut suspects, 0);
        assert_eq!(judge(&mut suspects, 60_000), []);
        suspects.lost(node(2));
        assert_eq!(suspects.stuck(), NodeSet::EMPTY);
    }

    #[test]
    fn one_standstill_counts_once() {
        let mut suspects = Suspects::default();
        for now in [0, 600] {
            suspects.heard(node(2), idle(1_500));
            assert_eq!(judge(&mut suspects, now).len(), 1);
            suspects.lost(node(2));
        }
        suspects.heard(node(2), idle(1_500));
        assert_eq!(judge(&mut suspects, 900).len(), 1);
        suspects.heard(node(2), None);
        assert_eq!(judge(&mut suspects, 1_000).len(), 1);
        assert_eq!(suspects.stuck(), NodeSet::EMPTY);
    }

    #[test]
    fn who_falls_silent_while_it_does_not_move_still_does_not() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(600));
        suspects.heard(node(3), None);
        judge(&mut suspects, 0);
        assert_eq!(judge(&mut suspects, 300), []);
        assert_eq!(judge(&mut suspects, 400).len(), 1);
        assert_eq!(suspects.stuck(), NodeSet::EMPTY.with(node(2)));
    }

    #[test]
    fn who_was_stopped_itself_blames_nobody() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(600));
        judge(&mut suspects, 0);
        assert_eq!(judge(&mut suspects, 60_000), []);
    }

    #[test]
    fn a_majority_is_never_suspected() {
        assert_eq!(
            stuck_of([None, idle(1_500), idle(2_500)]),
            NodeSet::EMPTY.with(node(3))
        );
        assert_eq!(stuck_of([idle(1_000), idle(1_500), None]), NodeSet::EMPTY);
        let mut suspects = Suspects::default();
        suspects.heard(node(2), idle(1_500));
        assert_eq!(suspects.judge(own(None), 0, 0, 1), []);
    }

    #[test]
    fn a_stream_that_stands_still_is_laid_to_the_end_that_hangs() {
        let two = NodeSet::EMPTY.with(node(2));
        let three = NodeSet::EMPTY.with(node(3));
        // Only the node that waits for it tells of it.
        assert_eq!(stuck_of([None, None, no_stream(2, 1_000)]), three);
        // Its source hangs, and says so, or is soon to say so.
        assert_eq!(stuck_of([None, idle(600), no_stream(2, 1_000)]), two);
        // Two nodes wait for it.
        assert_eq!(
            stuck_of([no_stream(2, 700), None, no_stream(2, 1_000)]),
            two
        );
        assert_eq!(
            stuck_of([None, no_stream(1, 900), no_stream(1, 1_000)]),
            NodeSet::EMPTY
        );
    }

    #[test]
    fn nobody_waits_for_the_stream_of_a_node_outside() {
        let mut suspects = Suspects::default();
        suspects.heard(node(2), no_stream(3, 1_000));
        suspects.heard(node(3), None);
        let outside = Own {
            members: [1, 2].map(node).into_iter().collect(),
            ..own(None)
        };
        suspects.judge(outside, 0, TIMEOUT, 1);
        assert_eq!(suspects.stuck(), NodeSet::EMPTY.with(node(3)));
    }
}
