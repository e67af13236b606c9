//! Whether this server's database gets on: what has been in hand, and for how long without a step forward.
//!
//! A node whose arbiter answers heartbeats but whose database does not vote holds up everybody. Only the node itself can tell a stuck process from one that has a lot to do, so
//! each says in its heartbeats how long the worst of its things has not moved, and all nodes draw the same conclusion (`suspects`).
//!
//! A step forward of a process is processor time spent, or another thing in hand; of a stream, bytes. What waits for a lock or for the outcome of another transaction may
//! wait for one that is stuck *elsewhere*: it counts half, so that the culprit is found first.

use protocol::{Millis, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// A process that has used less than this part of the time since the last look has not worked: it may have looked around.
const WORK_PARTS: u64 = 100;
/// A look that comes this much later than the one before says that this process itself was stopped; what it sees is not old.
const PAUSE_MAX: Millis = 2_000;

/// What does not move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Matter {
    /// An apply worker, with a transaction in hand.
    Worker(u32),
    /// A backend that has been told to finish its transaction.
    Backend(u32),
    /// The oldest order to finish a prepared transaction.
    Finish,
    /// The stream of changes from this node.
    Stream(NodeId),
    /// The way to being online in a generation that counts on this node.
    Switch,
    /// The arbiter's main thread, which writes its records.
    Records,
}

impl fmt::Display for Matter {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Matter::Worker(index) => write!(out, "apply worker {}", index + 1),
            Matter::Backend(_) => out.write_str("a session that is to finish its commit"),
            Matter::Finish => out.write_str("the finishing of a prepared transaction"),
            Matter::Stream(node) => write!(out, "the stream of changes from node {node}"),
            Matter::Switch => out.write_str("the switch to the current generation"),
            Matter::Records => out.write_str("the writing of the arbiter's records"),
        }
    }
}

/// What a look at something has found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sight {
    /// Which thing is in hand: another number is another thing.
    pub thing: u64,
    /// Processor time used so far, milliseconds.
    pub cpu_ms: u64,
    /// It waits for another transaction.
    pub waits: bool,
}

/// The worst of what does not move, as heartbeats tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idle {
    pub for_ms: Millis,
    pub matter: Matter,
}

#[derive(Clone, Copy, Debug)]
struct Watch {
    sight: Sight,
    since: Millis,
    looked_at: Millis,
}

/// Everything that is in hand.
#[derive(Default)]
pub struct Watches {
    watches: BTreeMap<Matter, Watch>,
    looked_at: Millis,
}

impl Watches {
    /// Takes in a look at everything; returns the worst.
    pub fn look(
        &mut self,
        now: Millis,
        found: impl IntoIterator<Item = (Matter, Sight)>,
    ) -> Option<Idle> {
        let pause = now.saturating_sub(self.looked_at);
        if pause > PAUSE_MAX {
            self.watches.clear();
        }
        self.looked_at = now;
        for (matter, sight) in found {
            let watch = self.watches.entry(matter).or_insert(Watch {
                sight,
                since: now,
                looked_at: now,
            });
            let worked = sight.cpu_ms.saturating_sub(watch.sight.cpu_ms) * WORK_PARTS > pause;
            if watch.sight.thing != sight.thing || worked {
                watch.since = now;
            }
            watch.sight = sight;
            watch.looked_at = now;
        }
        self.watches.retain(|_, watch| watch.looked_at == now);
        let idle = self.watches.iter().map(|(matter, watch)| Idle {
            for_ms: (now - watch.since) / if watch.sight.waits { 2 } else { 1 },
            matter: *matter,
        });
        idle.max_by_key(|idle| idle.for_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: Matter = Matter::Worker(0);

    fn sight(thing: u64, cpu_ms: u64) -> (Matter, Sight) {
        (
            WORKER,
            Sight {
                thing,
                cpu_ms,
                waits: false,
            },
        )
    }

    fn idle_ms(watches: &mut Watches, now: Millis, found: (Matter, Sight)) -> Millis {
        watches.look(now, [found]).map_or(0, |idle| idle.for_ms)
    }

    #[test]
    fn work_and_another_thing_are_steps_forward() {
        let mut watches = Watches::default();
        assert_eq!(idle_ms(&mut watches, 1_000, sight(1, 50)), 0);
        // It has looked around.
        assert_eq!(idle_ms(&mut watches, 2_000, sight(1, 51)), 1_000);
        assert_eq!(idle_ms(&mut watches, 3_000, sight(1, 90)), 0);
        assert_eq!(idle_ms(&mut watches, 4_000, sight(1, 90)), 1_000);
        assert_eq!(idle_ms(&mut watches, 5_000, sight(2, 90)), 0);
    }

    #[test]
    fn what_is_no_longer_in_hand_is_forgotten() {
        let mut watches = Watches::default();
        idle_ms(&mut watches, 1_000, sight(1, 0));
        assert_eq!(watches.look(2_000, []), None);
        assert_eq!(idle_ms(&mut watches, 3_000, sight(1, 0)), 0);
    }

    #[test]
    fn who_waits_for_another_counts_half() {
        let mut watches = Watches::default();
        let (matter, waiting) = sight(1, 0);
        let waiting = Sight {
            waits: true,
            ..waiting
        };
        let other = (Matter::Finish, Sight::default());
        watches.look(500, [(matter, waiting)]);
        watches.look(1_000, [(matter, waiting), other]);
        let worst = watches.look(2_000, [(matter, waiting), other]);
        let expected = Idle {
            for_ms: 1_000,
            matter: Matter::Finish,
        };
        assert_eq!(worst, Some(expected));
    }

    #[test]
    fn a_watcher_that_was_stopped_itself_blames_nobody() {
        let mut watches = Watches::default();
        idle_ms(&mut watches, 1_000, sight(1, 0));
        assert_eq!(idle_ms(&mut watches, 60_000, sight(1, 0)), 0);
    }
}
