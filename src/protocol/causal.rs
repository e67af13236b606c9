//! Causal order: which commits of each node are finished here, without a gap.
//!
//! A transaction may use what another one wrote as soon as that one is finished on its node; on a third node it must not be
//! applied before the other one is finished there. Every node therefore numbers the commits that it announces (see [`Csn`]),
//! remembers for each node the highest number whose effects its sessions may have seen (`visible`), ships that with its
//! transactions, and applies a transaction only once `settled` has reached it for every node.
//!
//! Which number a commit has:
//! - The coordinator numbers each of its own commits when it learns the outcome, and says the number with it.
//! - A node that learns of a commit in another way (its own resolver, another node, the stream) gives it a number *of its own* and
//!   announces that to all members. So every commit that is visible anywhere is covered by a number there, and nobody
//!   waits for a coordinator that is gone.
//! - A number is taken from the coordinator's own announcement only, since after a crash a node can account for its own
//!   transactions and for its durable records, but not for what others once heard from it about third ones.
//!
//! When `settled` moves: numbers of one epoch have no gaps, so it follows the finished ones one by one; messages may be lost,
//! doubled or overtaken. The start of an epoch comes from the announcing node (`Horizon`), which says it only when everything
//! that it may have announced in earlier epochs is known to be finished by the asking node: its own prepared transactions and
//! its recorded commits, which it numbers and announces again. That also serves a node that restarted and lost its `settled`.
//!
//! Invariant CAUSAL, checked by the simulator: when an apply of T2 from node O may start at R, every commit that was finished at O
//! before T2 was prepared there is finished at R.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::AHEAD_MAX;
use crate::effect::{Effect, Effects};
use crate::types::{Csn, NodeId};

/// What is finished here of each node's commits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Causal {
    settled: BTreeMap<NodeId, Csn>,
    /// Finished commits beyond `settled`.
    ahead: BTreeMap<NodeId, BTreeSet<Csn>>,
}

impl Causal {
    pub fn settled(&self, node: NodeId) -> Csn {
        self.settled.get(&node).copied().unwrap_or(Csn::ZERO)
    }

    /// Notes that the node's commit of this number is finished here. `false` when there is no room: the horizon has to be
    /// asked for again.
    pub fn finished(&mut self, node: NodeId, csn: Csn, out: &mut Effects) -> bool {
        if csn <= self.settled(node) {
            return true;
        }
        let ahead = self.ahead.entry(node).or_default();
        ahead.insert(csn);
        let fits = ahead.len() <= AHEAD_MAX;
        if !fits {
            ahead.clear();
        }
        self.advance(node, self.settled(node), out);
        fits
    }

    /// Notes that every commit of the node up to this number is finished here.
    pub fn horizon(&mut self, node: NodeId, csn: Csn, out: &mut Effects) {
        if csn > self.settled(node) {
            self.advance(node, csn, out);
        }
    }

    fn advance(&mut self, node: NodeId, from: Csn, out: &mut Effects) {
        let mut settled = from;
        if let Some(ahead) = self.ahead.get_mut(&node) {
            *ahead = ahead.split_off(&settled.next());
            while ahead.remove(&settled.next()) {
                settled = settled.next();
            }
            if ahead.is_empty() {
                self.ahead.remove(&node);
            }
        }
        if settled > self.settled(node) {
            self.settled.insert(node, settled);
            out.push(Effect::Settled { node, csn: settled });
        }
    }
}
