//! The invariants of membership, checked by name like the others (see `checker`).
//!
//! | name | what must hold |
//! |---|---|
//! | G1 | whoever comes online in n holds every transaction of an older generation that ever commits |
//! | G2 | on no node a transaction that ever commits is prepared behind the marker of a later generation |
//! | G3 | commits of one row and one generation are in one order on all nodes |
//! | G9 | so are commits of one row in different generations |
//! | G4 | `last_vote >= current >= online_in`, and none goes back |
//! | G5 | every generation has a donor, and donors are members |
//! | G6 | two generations of one number are equal |
//! | G7 | who voted n never comes online in m < n |
//! | G8 | whoever is online, its generation is a majority, or granted by the referee |
//! | LEASE | whoever serves holds, prepared or finished, every commit that was answered |

use std::collections::BTreeMap;

use protocol::membership::{Elected, Generation, MembershipRecord};
use protocol::{GenerationNum, Gid, NodeId};

use crate::checker::Checker;

/// Commits of each row in the order in which a node has made them.
pub(crate) type Rows = BTreeMap<u32, Vec<Gid>>;

/// What the checker has seen of members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct MembersChecker {
    durable: BTreeMap<NodeId, MembershipRecord>,
    elected: BTreeMap<GenerationNum, Elected>,
    /// Transactions that must never commit, with the reason.
    doomed: BTreeMap<Gid, (&'static str, NodeId, GenerationNum)>,
    /// The last marker on each node's WAL.
    markers: BTreeMap<NodeId, GenerationNum>,
    rows: BTreeMap<(u32, NodeId), Vec<Gid>>,
    /// Commits in the order in which clients heard of them, and how many of them each node was found to hold.
    answered: Vec<Gid>,
    seen: BTreeMap<NodeId, usize>,
}

impl Checker {
    /// A node's record has reached its disk.
    pub fn on_members_durable(&mut self, node: NodeId, record: MembershipRecord) {
        let num = record.num();
        let ordered = record.last_vote.num >= num && num >= record.online_in;
        self.demand(ordered, "G4", || format!("{node}: {record:?}"));
        self.on_elected(record.current);
        let before = self.members.durable.insert(node, record);
        let Some(before) = before else { return };
        let back = record.last_vote.num < before.last_vote.num
            || num < before.num()
            || record.online_in < before.online_in;
        self.demand(!back, "G4", || {
            format!("{node} went back from {before:?} to {record:?}")
        });
        let broken = record.online_in > before.online_in && record.online_in < before.last_vote.num;
        self.demand(!broken, "G7", || {
            format!("{node} comes online by {record:?} after {before:?}")
        });
    }

    fn on_elected(&mut self, elected: Elected) {
        let Elected { generation, donors } = elected;
        let valid = !donors.is_empty() && donors.is_subset(generation.members);
        self.demand(valid, "G5", || format!("{elected:?}"));
        let known = *self
            .members
            .elected
            .entry(generation.num)
            .or_insert(elected);
        self.demand(known == elected, "G6", || {
            format!("{known:?} and {elected:?}")
        });
    }

    /// A node comes online and holds, prepared or finished, what `holds` says. `elected` says that its generation may have somebody online.
    pub fn on_open(
        &mut self,
        node: NodeId,
        generation: Generation,
        elected: bool,
        holds: impl Fn(Gid) -> bool,
    ) {
        self.demand(elected, "G8", || {
            format!("{node} is online in {generation}")
        });
        let missing: Vec<Gid> = self
            .prepared_gids()
            .filter(|gid| gid.generation < generation.num && !holds(*gid))
            .collect();
        for gid in missing {
            self.doom(gid, ("G1", node, generation.num));
        }
    }

    /// A marker is on a node's WAL.
    pub fn on_marker(&mut self, node: NodeId, num: GenerationNum) {
        let marker = self.members.markers.entry(node).or_default();
        *marker = (*marker).max(num);
    }

    /// A PREPARE is on a node's WAL.
    pub fn on_prepare_logged(&mut self, node: NodeId, gid: Gid) {
        let marker = self.members.markers.get(&node).copied();
        if let Some(num) = marker
            && gid.generation < num
        {
            self.doom(gid, ("G2", node, num));
        }
    }

    fn doom(&mut self, gid: Gid, reason: (&'static str, NodeId, GenerationNum)) {
        self.members.doomed.entry(gid).or_insert(reason);
        if self.is_committed(gid) {
            self.demand_order_of_generations(gid);
        }
    }

    pub(crate) fn demand_order_of_generations(&mut self, gid: Gid) {
        if let Some((invariant, node, num)) = self.members.doomed.get(&gid).copied() {
            self.demand(false, invariant, || {
                format!(
                    "{gid} of generation {} commits; {node} missed it when it came online in {num}",
                    gid.generation
                )
            });
        }
    }

    /// A commit of this row is visible on the node.
    pub fn on_row_committed(&mut self, node: NodeId, row: u32, gid: Gid) {
        self.members.rows.entry((row, node)).or_default().push(gid);
    }

    /// G3 and G9, of any two nodes: the rows' commits that both have are in one order.
    pub fn demand_one_order(&mut self) {
        let rows = self.members.rows.clone();
        for ((row, node), order) in &rows {
            let others = rows
                .range((*row, *node)..)
                .take_while(|((other, _), _)| other == row);
            for ((_, other), theirs) in others {
                let both = |gid: &&Gid| order.contains(gid) && theirs.contains(gid);
                let mine: Vec<&Gid> = order.iter().filter(both).collect();
                let its: Vec<&Gid> = theirs.iter().filter(both).collect();
                let detail = || format!("row {row}: {node} has {order:?}, {other} has {theirs:?}");
                let kept = mine == its;
                self.demand(kept || one_order_in_each(&mine, &its), "G3", detail);
                self.demand(kept, "G9", detail);
            }
        }
    }

    /// The node's rows, in the order of their commits.
    pub fn rows_of(&self, node: NodeId) -> Rows {
        let of_node = |((row, other), order): (&(u32, NodeId), &Vec<Gid>)| {
            (*other == node).then(|| (*row, order.clone()))
        };
        self.members.rows.iter().filter_map(of_node).collect()
    }

    /// The same, when its disk is taken away.
    pub fn take_rows(&mut self, node: NodeId) -> Rows {
        let rows = self.rows_of(node);
        self.members.rows.retain(|(_, other), _| *other != node);
        rows
    }

    /// What another disk of the node says of members and rows.
    pub fn on_other_members(&mut self, node: NodeId, record: Option<MembershipRecord>, rows: Rows) {
        match record {
            Some(record) => self.members.durable.insert(node, record),
            None => self.members.durable.remove(&node),
        };
        self.members.seen.remove(&node);
        self.members.rows.retain(|(_, other), _| *other != node);
        let rows = rows.into_iter().map(|(row, order)| ((row, node), order));
        self.members.rows.extend(rows);
    }

    /// A client has heard of this commit.
    pub fn on_answered(&mut self, gid: Gid) {
        self.members.answered.push(gid);
    }

    /// A node could answer a read now: it holds, prepared or finished, whatever was answered. What it held once it holds for ever.
    pub fn on_serving(&mut self, node: NodeId, holds: impl Fn(Gid) -> bool) {
        let seen = self.members.seen.get(&node).copied().unwrap_or(0);
        let missing = self.members.answered[seen..]
            .iter()
            .find(|gid| !holds(**gid))
            .copied();
        let answered = self.members.answered.len();
        self.members.seen.insert(node, answered);
        self.demand(missing.is_none(), "LEASE", || {
            format!("{node} serves without {missing:?}, which was answered")
        });
    }
}

/// Whether two orders of the same commits differ at most between generations.
fn one_order_in_each(mine: &[&Gid], its: &[&Gid]) -> bool {
    let of = |order: &[&Gid], num| -> Vec<Gid> {
        let of_num = order.iter().filter(|gid| gid.generation == num);
        of_num.map(|gid| **gid).collect()
    };
    mine.iter()
        .all(|gid| of(mine, gid.generation) == of(its, gid.generation))
}
