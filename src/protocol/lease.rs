//! Leases: the right of a node to serve reads, on the monotonic clocks of two nodes that are never compared.
//!
//! A node that was cut off does not know that the others go on without it. If it went on answering, it would show rows that a commit, answered
//! meanwhile on the other side, has changed. So:
//!
//! 1. Every heartbeat says when it was sent, by the sender's clock. Whoever hears it repeats that time in its own heartbeats, with a duration:
//!    *I take no part in excluding you for so long after I have heard this*.
//! 2. The sender counts the duration from the moment of **sending**, which lies before the hearing. While such promises of a majority
//!    (itself included) hold, nobody can have gone on without it, and it serves reads.
//! 3. Who is about to vote for a member set without some node first stops promising to that node, and votes when the last promise is over.
//!
//! Any majority that votes shares a node with the majority that promised. Times are milliseconds; the promising side counts a fiftieth more for
//! clocks of different speed. A node that says good-bye has stopped serving before and is waited for by nobody.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::types::{Millis, NodeId, NodeSet};

/// Added to the promising side's duration, so that rounding never shortens it.
const ROUNDING_MS: Millis = 10;

/// For how long a promise of this duration binds its giver, who counts from hearing and by a clock that may be the faster one.
pub(crate) const fn binding(lasts: Millis) -> Millis {
    lasts + lasts / 50 + ROUNDING_MS
}

/// A promise as it travels in a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    pub to: NodeId,
    /// Life of the receiver in which it sent that heartbeat.
    pub epoch: u32,
    /// When it did, by its own clock.
    pub sent: Millis,
    /// For how long after that it may count on the sender of this.
    pub lasts: Millis,
}

/// Promises given by a node, and those it was given.
#[derive(Clone, Debug)]
pub struct Leases {
    node: NodeId,
    epoch: u32,
    configured: NodeSet,
    lasts: Millis,
    given: BTreeMap<NodeId, Given>,
    /// End of each peer's promise.
    until: BTreeMap<NodeId, Millis>,
    withheld: NodeSet,
}

#[derive(Clone, Copy, Debug)]
struct Given {
    grant: Grant,
    /// End of the longest promise so far: an earlier one, of a longer duration, still holds.
    binds_until: Millis,
}

impl Leases {
    /// No promises yet. `lasts` is the duration of those that this node will give.
    pub fn new(node: NodeId, epoch: u32, configured: NodeSet, lasts: Millis) -> Leases {
        Leases {
            node,
            epoch,
            configured,
            lasts,
            given: BTreeMap::new(),
            until: BTreeMap::new(),
            withheld: NodeSet::EMPTY,
        }
    }

    /// Promises from now on last so long; those given before keep their duration.
    pub fn set_duration(&mut self, lasts: Millis) {
        self.lasts = lasts;
    }

    /// A heartbeat of a peer was heard at `now`, which the peer sent at `sent` by its clock.
    pub fn heard(&mut self, from: NodeId, epoch: u32, sent: Millis, now: Millis) {
        if self.withheld.contains(from) {
            return;
        }
        let grant = Grant {
            to: from,
            epoch,
            sent,
            lasts: self.lasts,
        };
        let ends = now + binding(self.lasts);
        let before = self.given.get(&from).map_or(0, |given| given.binds_until);
        let binds_until = ends.max(before);
        self.given.insert(from, Given { grant, binds_until });
    }

    /// What the next heartbeats promise.
    pub fn grants(&self) -> impl Iterator<Item = Grant> + '_ {
        self.given
            .iter()
            .filter(|(to, _)| !self.withheld.contains(**to))
            .map(|(_, given)| given.grant)
    }

    /// A peer's heartbeat made these promises.
    pub fn on_grants(&mut self, from: NodeId, grants: &[Grant]) {
        let mine = grants
            .iter()
            .find(|grant| grant.to == self.node && grant.epoch == self.epoch);
        if let Some(grant) = mine {
            let until = self.until.entry(from).or_default();
            *until = (*until).max(grant.sent.saturating_add(grant.lasts));
        }
    }

    /// Until when this node may serve reads, by its own clock: a majority has promised that much.
    pub fn until(&self) -> Millis {
        let needed = self.configured.len() / 2;
        let mut ends: Vec<Millis> = self.until.values().copied().collect();
        ends.sort_unstable_by(|one, other| other.cmp(one));
        match needed.checked_sub(1) {
            None => Millis::MAX,
            Some(last) => ends.get(last).copied().unwrap_or(0),
        }
    }

    /// Only `members` are promised anything from now on.
    pub fn withhold_from_all_but(&mut self, members: NodeSet) {
        self.withheld = self.configured.difference(members);
    }

    /// When the promises to all of `nodes` are over, by this node's clock; zero when there is none.
    pub fn bound_until(&self, nodes: NodeSet) -> Millis {
        nodes
            .iter()
            .filter_map(|node| self.given.get(&node))
            .map(|given| given.binds_until)
            .max()
            .unwrap_or(0)
    }

    /// The peer has said that it serves nothing any more.
    pub fn released_by(&mut self, peer: NodeId) {
        self.given.remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u8) -> NodeId {
        NodeId::new(id).expect("a node id")
    }

    fn set(ids: &[u8]) -> NodeSet {
        ids.iter().map(|id| node(*id)).collect()
    }

    fn leases(id: u8, nodes: &[u8]) -> Leases {
        Leases::new(node(id), 7, set(nodes), 500)
    }

    fn grant(to: u8, sent: Millis) -> Grant {
        Grant {
            to: node(to),
            epoch: 7,
            sent,
            lasts: 500,
        }
    }

    #[test]
    fn a_majority_of_promises_counts_from_sending() {
        let mut five = leases(1, &[1, 2, 3, 4, 5]);
        five.on_grants(node(2), &[grant(1, 100)]);
        assert_eq!(five.until(), 0);
        five.on_grants(node(3), &[grant(1, 300), grant(2, 900)]);
        assert_eq!(five.until(), 600);
        five.on_grants(node(4), &[grant(1, 200)]);
        assert_eq!(five.until(), 700);
    }

    #[test]
    fn promises_to_an_earlier_life_or_to_others_do_not_count() {
        let mut three = leases(1, &[1, 2, 3]);
        three.on_grants(
            node(2),
            &[
                Grant {
                    epoch: 6,
                    ..grant(1, 100)
                },
                grant(3, 100),
            ],
        );
        assert_eq!(three.until(), 0);
    }

    #[test]
    fn a_late_promise_never_shortens_the_lease() {
        let mut three = leases(1, &[1, 2, 3]);
        three.on_grants(node(2), &[grant(1, 300)]);
        three.on_grants(node(2), &[grant(1, 100)]);
        assert_eq!(three.until(), 800);
    }

    #[test]
    fn promises_bind_longer_than_they_last() {
        let mut giver = leases(2, &[1, 2, 3]);
        giver.heard(node(1), 3, 40, 1000);
        assert_eq!(
            giver.grants().collect::<Vec<_>>(),
            [Grant {
                to: node(1),
                epoch: 3,
                sent: 40,
                lasts: 500
            }]
        );
        assert_eq!(giver.bound_until(set(&[1])), 1520);
        assert_eq!(giver.bound_until(set(&[3])), 0);
    }

    #[test]
    fn a_shorter_duration_does_not_end_what_was_promised_before() {
        let mut giver = leases(2, &[1, 2, 3]);
        let mut taker = leases(1, &[1, 2, 3]);
        for (duration, now) in [(2_000, 1_000), (100, 1_050)] {
            giver.set_duration(duration);
            giver.heard(node(1), 7, now, now);
            taker.on_grants(node(2), &giver.grants().collect::<Vec<_>>());
        }
        assert_eq!(taker.until(), 3_000);
        assert!(giver.bound_until(set(&[1])) >= taker.until());
    }

    #[test]
    fn what_is_withheld_is_not_renewed_but_still_binds() {
        let mut giver = leases(2, &[1, 2, 3]);
        giver.heard(node(1), 3, 40, 1000);
        giver.withhold_from_all_but(set(&[2, 3]));
        giver.heard(node(1), 3, 240, 1200);
        assert_eq!(giver.grants().count(), 0);
        assert_eq!(giver.bound_until(set(&[1])), 1520);
    }
}
