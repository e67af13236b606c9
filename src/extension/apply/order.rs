//! Which transactions have to be finished here before another one is applied (architecture.md, "Causal order").

use super::worker::Job;
use crate::pg::apply_error::ApplyFailure;
use crate::pg::process::{self, Wait};
use crate::pg::shared::{WorkerSlot, shared};
use protocol::membership::{Admission, Phase, Standing};
use protocol::{Csn, NodeId, NodeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a worker looks whether what it waits for still counts.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// What a dependency is to those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Settled,
    /// Some node's number that counts is not settled here.
    Open,
    /// Only numbers that do not count are not settled here.
    Foreign,
}

/// Waits until everything that the transaction in hand can have seen is finished here. Without `job` it still runs at its origin, and is applied ahead.
///
/// The number of a node outside of the transaction's members does not count: nobody may be there to tell what it stands for, and other numbers, or
/// recovery, stand for the same (membership.md, "Causal order across generations").
///
/// # Errors
/// When it cannot be prepared here any more, or must not be applied ahead.
pub(super) fn wait_for(
    slot: &WorkerSlot,
    job: Option<&Job>,
    deps: &[(NodeId, Csn)],
) -> Result<(), ApplyFailure> {
    let settled = |node: NodeId| Csn(shared().node(node).settled.load(Ordering::Acquire));
    if order(deps, NodeSet::ALL, settled) == Order::Settled {
        return Ok(());
    }
    let _waiting = Waiting::begin(&slot.waits_for_order);
    loop {
        match counted(job).map(|counted| order(deps, counted, settled)) {
            Err(failure) => return Err(failure),
            Ok(Order::Settled) => return Ok(()),
            Ok(Order::Foreign) if job.is_some() => return Ok(()),
            // What it wrote later may stand under a number that its origin had not given yet.
            Ok(Order::Foreign) => return Err(ApplyFailure::generation_over()),
            Ok(Order::Open) => {}
        }
        process::wait_latch(LOOK_AROUND, Wait::CausalOrder);
        process::check_interrupts();
    }
}

/// Says that the worker waits for others, for as long as it does. An error that ends the wait (a cancel unwinds) must not leave that behind: a worker that seems to
/// wait is found stuck only after twice the time.
struct Waiting<'a>(&'a AtomicBool);

impl Waiting<'_> {
    fn begin(says: &AtomicBool) -> Waiting<'_> {
        says.store(true, Ordering::Release);
        Waiting(says)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Nodes whose numbers count for the transaction in hand.
fn counted(job: Option<&Job>) -> Result<NodeSet, ApplyFailure> {
    match job {
        Some(job) if !job.is_users() => match shared().admit(job.gid) {
            Admission::Apply | Admission::Hold => Ok(job.gid.members),
            _ => Err(ApplyFailure::generation_over()),
        },
        // It is prepared under the generation that is open then.
        _ => counted_in(shared().standing.get()).ok_or_else(ApplyFailure::generation_over),
    }
}

fn counted_in(standing: Standing) -> Option<NodeSet> {
    match standing.phase {
        Phase::Online => Some(standing.current.members),
        Phase::Waiting => Some(NodeSet::ALL),
        Phase::Recovering | Phase::Outside => None,
    }
}

fn order(deps: &[(NodeId, Csn)], counted: NodeSet, settled: impl Fn(NodeId) -> Csn) -> Order {
    let mut order = Order::Settled;
    for (node, csn) in deps {
        if settled(*node) < *csn {
            if counted.contains(*node) {
                return Order::Open;
            }
            order = Order::Foreign;
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u8) -> NodeId {
        NodeId::new(id).expect("a node id")
    }

    #[test]
    fn a_wait_that_is_cancelled_is_over() {
        let says = AtomicBool::new(false);
        let cancelled = std::panic::catch_unwind(|| {
            let _waiting = Waiting::begin(&says);
            assert!(says.load(Ordering::Acquire));
            std::panic::resume_unwind(Box::new("cancelled"));
        });
        assert!(cancelled.is_err());
        assert!(!says.load(Ordering::Acquire));
    }

    #[test]
    fn numbers_of_nodes_outside_do_not_count() {
        let members = NodeSet::EMPTY.with(node(1)).with(node(3));
        let deps = [(node(1), Csn(5)), (node(2), Csn(7)), (node(3), Csn(9))];
        let of = |settled: [u64; 3]| {
            order(&deps, members, |node| {
                Csn(settled[usize::from(node.get()) - 1])
            })
        };
        assert_eq!(of([5, 7, 9]), Order::Settled);
        assert_eq!(of([5, 0, 9]), Order::Foreign);
        assert_eq!(of([5, 7, 8]), Order::Open);
        assert_eq!(of([4, 0, 9]), Order::Open);
    }
}
