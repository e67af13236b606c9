//! Who sees whom, and the largest set of nodes that all see each other.

use std::collections::BTreeMap;

use crate::types::{NodeId, NodeSet};

/// The connectivity matrix: whom each node says it sees.
pub(crate) type Matrix = BTreeMap<NodeId, NodeSet>;

/// The largest set of nodes of which every two see each other, both ways; of several the one whose lowest nodes are lowest. All nodes that know
/// the same matrix find the same set.
pub(crate) fn greatest(matrix: &Matrix) -> NodeSet {
    let nodes: Vec<NodeId> = matrix.keys().copied().collect();
    let mut best = NodeSet::EMPTY;
    extend(matrix, &nodes, NodeSet::EMPTY, &mut best);
    best
}

/// Tries the nodes in order, each first in and then out: so of equal cliques the one with the lowest nodes is found first.
fn extend(matrix: &Matrix, rest: &[NodeId], chosen: NodeSet, best: &mut NodeSet) {
    if chosen.len() + rest.len() <= best.len() {
        return;
    }
    let Some((node, rest)) = rest.split_first() else {
        *best = chosen;
        return;
    };
    if chosen.iter().all(|other| is_edge(matrix, *node, other)) {
        extend(matrix, rest, chosen.with(*node), best);
    }
    extend(matrix, rest, chosen, best);
}

fn is_edge(matrix: &Matrix, one: NodeId, other: NodeId) -> bool {
    let sees = |who: NodeId, whom: NodeId| matrix.get(&who).is_some_and(|row| row.contains(whom));
    sees(one, other) && sees(other, one)
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

    fn matrix(rows: &[(u8, &[u8])]) -> Matrix {
        rows.iter()
            .map(|(id, sees)| (node(*id), set(sees)))
            .collect()
    }

    #[test]
    fn one_cut_link_of_three_leaves_the_lower_pair() {
        let cut = matrix(&[(1, &[1, 2, 3]), (2, &[1, 2]), (3, &[1, 3])]);
        assert_eq!(greatest(&cut), set(&[1, 2]));
    }

    #[test]
    fn five_split_into_two_and_three_leave_the_three() {
        let split = matrix(&[
            (1, &[1, 2]),
            (2, &[1, 2]),
            (3, &[3, 4, 5]),
            (4, &[3, 4, 5]),
            (5, &[3, 4, 5]),
        ]);
        assert_eq!(greatest(&split), set(&[3, 4, 5]));
    }

    #[test]
    fn a_link_that_works_one_way_does_not_count() {
        let one_way = matrix(&[(1, &[1, 2, 3]), (2, &[1, 2, 3]), (3, &[2, 3])]);
        assert_eq!(greatest(&one_way), set(&[1, 2]));
    }

    #[test]
    fn sixteen_nodes_that_see_each_other_are_one_clique() {
        let all: NodeSet = (1..=16).map(node).collect();
        let matrix: Matrix = all.iter().map(|node| (node, all)).collect();
        assert_eq!(greatest(&matrix), all);
    }

    #[test]
    fn a_ring_of_sixteen_is_searched_quickly() {
        let row = |id: u8| set(&[id, id % 16 + 1, (id + 14) % 16 + 1]);
        let ring: Matrix = (1..=16).map(|id| (node(id), row(id))).collect();
        assert_eq!(greatest(&ring), set(&[1, 2]));
    }
}
