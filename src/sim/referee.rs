//! The third voter of two nodes: a row on another machine, and a way to it that breaks.
//!
//! Questions and answers are lost, doubled and late by far more than messages between nodes: a question may arrive after whatever it was about. The
//! referee can be away for one node or for both, and stays away after the storm in every other simulation.

use std::collections::BTreeSet;

use protocol::membership::{
    MembershipFault, MembershipInput, Referee, RefereeAnswer, RefereeRequest,
};
use protocol::{GenerationNum, Millis, NodeId, NodeSet};

use crate::event::Event;
use crate::world::World;

/// A question or an answer may be under way for so long.
const LATE_MS: Millis = 2_000;
/// Most questions are under way for so long.
const USUAL_MS: Millis = 20;
/// Permille of questions and answers that are late, lost, doubled.
const LATE: u64 = 100;
const LOST: u64 = 100;
const DOUBLED: u64 = 100;
/// Times that the way to the referee breaks in a storm, at most.
const BREAKS: u64 = 6;
const BROKEN_MS: Millis = 1_200;
/// Permille of storms in which one of the nodes has not been told of the referee.
const UNAWARE: u64 = 200;

/// What is beyond the nodes.
#[derive(Debug, Default)]
pub(crate) struct RefereeHost {
    row: Referee,
    cut_off: NodeSet,
    /// Nodes that were not told of it.
    pub unaware: NodeSet,
    /// Every grant ever given.
    pub granted: BTreeSet<(GenerationNum, NodeId)>,
}

impl World {
    /// The weather between the nodes and their referee.
    pub fn plan_referee(&mut self, storm_ms: Millis) {
        if self.referee.is_none() {
            return;
        }
        // Who has lost the other one's disk needs it.
        if self.rng.permille(UNAWARE) && !self.clones.are_planned() {
            let node = self.some_node();
            if let Some(host) = &mut self.referee {
                host.unaware.insert(node);
            }
        }
        for _ in 0..self.rng.between(0, BREAKS) {
            let whom = self.rng.between(1, 3);
            let nodes: NodeSet = self
                .configured
                .iter()
                .filter(|node| u64::from(node.get()) & whom != 0)
                .collect();
            self.later(100, storm_ms, Event::LoseReferee { nodes });
        }
    }

    pub fn lose_referee(&mut self, nodes: NodeSet) {
        if let Some(host) = &mut self.referee {
            host.cut_off = host.cut_off.union(nodes);
            self.later(50, BROKEN_MS, Event::FindReferee { nodes });
        }
    }

    pub fn find_referee(&mut self, nodes: NodeSet) {
        if let Some(host) = &mut self.referee {
            host.cut_off = host.cut_off.difference(nodes);
        }
    }

    /// Both nodes must do without it, or both have it.
    pub fn heal_referee(&mut self) {
        if self.referee.is_none() {
            return;
        }
        let away = self.rng.permille(500) && !self.clones.are_planned();
        let configured = self.configured;
        if let Some(host) = &mut self.referee {
            host.cut_off = if away { configured } else { NodeSet::EMPTY };
        }
    }

    /// Whether the other one of two nodes would be let go on without this one.
    pub fn can_do_without(&self, node: NodeId) -> bool {
        let Some(host) = &self.referee else {
            return true;
        };
        let others = self.configured.without(node);
        let holds_all = |other: NodeId| {
            let record = self.servers.get(&other).and_then(|it| it.disk.members);
            record.is_some_and(|record| record.online_in > host.row.num)
        };
        host.row.node != Some(node) || others.iter().all(holds_all)
    }

    /// Whether the node's settings name it.
    pub fn knows_referee(&self, node: NodeId) -> bool {
        let host = self.referee.as_ref();
        host.is_some_and(|host| !host.unaware.contains(node))
    }

    pub fn ask_referee(&mut self, node: NodeId, request: RefereeRequest) {
        let life = self.life(node);
        self.by_post(|| Event::AskReferee {
            node,
            life,
            request,
        });
    }

    /// The question arrives, even if the node is gone by now.
    pub fn on_asked(&mut self, node: NodeId, life: u32, request: RefereeRequest) {
        // A grant for somebody who is gone for good would keep the other one out for good.
        if self.clones.are_planned() && life != self.life(node) {
            return;
        }
        let any = self.members_fault == Some(MembershipFault::AnyGrant);
        let Some(host) = self.referee.as_mut() else {
            return;
        };
        if host.cut_off.contains(node) {
            return;
        }
        let answer = if any && request.num > host.row.num {
            host.row = Referee {
                num: request.num,
                node: Some(node),
                ..host.row
            };
            RefereeAnswer {
                num: request.num,
                granted: true,
                latest: request.num,
            }
        } else {
            host.row.answer(request)
        };
        if answer.granted {
            host.granted.insert((answer.num, node));
        }
        self.by_post(|| Event::Members {
            node,
            life,
            input: MembershipInput::Referee(answer),
        });
    }

    fn by_post(&mut self, event: impl Fn() -> Event) {
        if self.rng.permille(LOST) {
            return;
        }
        let copies = 1 + u64::from(self.rng.permille(DOUBLED));
        for _ in 0..copies {
            let slowest = if self.rng.permille(LATE) {
                LATE_MS
            } else {
                USUAL_MS
            };
            self.later(1, slowest, event());
        }
    }

    /// Whether nobody can go on without this node, whoever promises it anything.
    pub fn is_alone(&self, node: NodeId) -> bool {
        let open = self.open_generation(node);
        self.changing && open.is_some_and(|open| open.members == NodeSet::EMPTY.with(node))
    }
}
