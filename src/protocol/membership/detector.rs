//! Who is there: links, what peers say about theirs, and the clique that follows from both.

use std::collections::BTreeMap;

use super::clique::{Matrix, greatest};
use super::message::Presence;
use crate::types::{NodeId, NodeSet};

/// Configured nodes of which neither is a majority.
const TWO: usize = 2;

/// What this node knows of the others right now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Detector {
    node: NodeId,
    configured: NodeSet,
    links: NodeSet,
    stuck: NodeSet,
    /// The last heartbeat of each peer with a link.
    presences: BTreeMap<NodeId, Presence>,
    clique: NodeSet,
}

impl Detector {
    pub fn new(node: NodeId, configured: NodeSet) -> Self {
        let mut detector = Self {
            node,
            configured,
            links: NodeSet::EMPTY,
            stuck: NodeSet::EMPTY,
            presences: BTreeMap::new(),
            clique: NodeSet::EMPTY,
        };
        detector.update();
        detector
    }

    pub fn link_up(&mut self, peer: NodeId) {
        self.presences.remove(&peer);
        self.stuck.remove(peer);
        self.links.insert(peer);
        self.update();
    }

    pub fn link_down(&mut self, peer: NodeId) {
        self.presences.remove(&peer);
        self.stuck.remove(peer);
        self.links.remove(peer);
        self.update();
    }

    pub fn stuck(&mut self, peer: NodeId, stuck: bool) {
        if stuck {
            self.stuck.insert(peer);
        } else {
            self.stuck.remove(peer);
        }
        self.update();
    }

    pub fn heard(&mut self, from: NodeId, presence: Presence) {
        let before = self.presences.insert(from, presence);
        let moved = before.is_none_or(|before| {
            (before.sees, before.leaving) != (presence.sees, presence.leaving)
        });
        if moved {
            self.update();
        }
    }

    /// Whom this node sees, itself included.
    pub fn sees(&self) -> NodeSet {
        self.links
            .difference(self.stuck)
            .difference(self.leaving())
            .with(self.node)
    }

    /// The largest set of nodes that all see each other, as far as this node can know.
    pub const fn clique(&self) -> NodeSet {
        self.clique
    }

    /// Peers with a link that are not about to end, and what they said last.
    pub fn present(&self) -> impl Iterator<Item = (NodeId, &Presence)> {
        self.presences
            .iter()
            .filter(|(_, presence)| !presence.leaving)
            .map(|(peer, presence)| (*peer, presence))
    }

    pub const fn linked(&self) -> NodeSet {
        self.links
    }

    /// Peers that have said good-bye on their present link.
    pub fn leaving(&self) -> NodeSet {
        self.presences
            .iter()
            .filter(|(_, presence)| presence.leaving)
            .map(|(peer, _)| *peer)
            .collect()
    }

    fn update(&mut self) {
        let mut matrix: Matrix = self
            .present()
            .map(|(peer, presence)| (peer, presence.sees.intersection(self.configured)))
            .collect();
        matrix.insert(self.node, self.sees());
        let clique = greatest(&matrix);
        // Of two nodes that do not see each other, either may go on: that is for the referee to say, not for the order of nodes.
        let own = self.configured.len() == TWO && !clique.contains(self.node);
        self.clique = if own {
            NodeSet::EMPTY.with(self.node)
        } else {
            clique
        };
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

    #[test]
    fn each_of_two_nodes_judges_for_itself() {
        let mut detector = Detector::new(node(2), set(&[1, 2]));
        detector.link_up(node(1));
        detector.heard(node(1), seeing(&[1, 2]));
        assert_eq!(detector.clique(), set(&[1, 2]));
        detector.stuck(node(1), true);
        assert_eq!(detector.clique(), set(&[2]));
        detector.stuck(node(1), false);
        detector.heard(node(1), seeing(&[1]));
        assert_eq!(detector.clique(), set(&[2]));
    }

    fn seeing(ids: &[u8]) -> Presence {
        Presence {
            sees: set(ids),
            ..Presence::default()
        }
    }

    #[test]
    fn a_link_alone_is_no_edge() {
        let mut detector = Detector::new(node(1), set(&[1, 2, 3]));
        detector.link_up(node(2));
        assert_eq!(detector.clique(), set(&[1]));
        detector.heard(node(2), seeing(&[2]));
        assert_eq!(detector.clique(), set(&[1]));
        detector.heard(node(2), seeing(&[1, 2]));
        assert_eq!(detector.clique(), set(&[1, 2]));
    }

    #[test]
    fn who_is_stuck_or_leaves_or_is_cut_off_is_not_seen() {
        let mut detector = Detector::new(node(1), set(&[1, 2, 3]));
        for peer in [2, 3] {
            detector.link_up(node(peer));
            detector.heard(node(peer), seeing(&[1, 2, 3]));
        }
        assert_eq!(detector.clique(), set(&[1, 2, 3]));
        detector.stuck(node(2), true);
        assert_eq!(detector.clique(), set(&[1, 3]));
        detector.stuck(node(2), false);
        let leaving = Presence {
            leaving: true,
            ..seeing(&[1, 2, 3])
        };
        detector.heard(node(3), leaving);
        assert_eq!(detector.clique(), set(&[1, 2]));
        detector.link_down(node(2));
        assert_eq!((detector.clique(), detector.sees()), (set(&[1]), set(&[1])));
    }
}
