//! An arbiter that ends and starts again beside living sessions, workers and receivers, as after SIGTERM or an error of that process alone.
//!
//! What is in shared memory outlives it: sessions with the records that they were handed, orders to finish, applies, how far streams were read, what was set
//! aside, the barrier as it was left, the lease, and what the other processes have to tell. The core, the membership, effects that waited for the disk and
//! links do not. Its next life waits until sessions that were told to commit and orders to finish are done; then it reads records and prepared transactions,
//! and takes over the sessions that wait.

use std::collections::VecDeque;

use protocol::membership::{MembershipInput, MembershipRecord};
use protocol::{Config, Effects, Gid, Input, Millis, NodeId};

use crate::event::Event;
use crate::rng::Rng;
use crate::server::Session;
use crate::world::{TICK_MS, World};

/// Times that an arbiter ends in a storm, at most.
const DEATHS: u64 = 5;
/// The pause before it is started again.
const GONE_MS: Millis = 300;
/// Or it is so short that sessions are still at their commits.
const AT_ONCE_MS: Millis = 8;
/// Between two looks whether the last life's commits are done.
const LOOK_MS: Millis = 5;

/// What other processes have to tell an arbiter that is not there.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    Core(Input),
    Members(MembershipInput),
}

impl World {
    /// Draws from a source of its own: the storm without them stays what it was.
    pub fn plan_arbiters(&mut self, seed: u64, storm_ms: Millis) {
        let mut rng = Rng::new(seed ^ 0xA5B1_7E45_0000_D1E5);
        for _ in 0..rng.between(1, DEATHS) {
            let at = self.now + rng.between(100, storm_ms);
            let place = rng.between(0, self.configured.len() as u64 - 1) as usize;
            if let Some(node) = self.configured.iter().nth(place) {
                self.agenda.plan(at, Event::ArbiterEnds { node });
            }
        }
    }

    pub fn end_arbiter(&mut self, node: NodeId) {
        let half = self.rng.permille(500);
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let Some(memory) = &mut server.memory else {
            return;
        };
        let leaves = memory.members.as_ref().is_some_and(|members| members.left);
        if memory.unheard.is_some() || leaves {
            return;
        }
        memory.unheard = Some(VecDeque::new());
        memory.gates.clear();
        let storing = memory
            .members
            .as_mut()
            .and_then(|members| members.die())
            .filter(|_| half);
        if let Some(record) = storing {
            server.disk.members = Some(record);
            checker.on_members_durable(node, record);
        }
        for peer in self.configured.without(node).iter() {
            self.cut_link(node, peer);
        }
        let life = self.life(node);
        let gone = if half { AT_ONCE_MS } else { GONE_MS };
        self.later(1, gone, Event::ArbiterStarts { node, life });
    }

    /// Whether the arbiter is there to take something in; keeps for its next life what reaches it through shared memory.
    pub fn hears(&mut self, node: NodeId, told: Told) -> Option<Told> {
        let unheard = self.memory_mut(node)?.unheard.as_mut();
        let Some(unheard) = unheard else {
            return Some(told);
        };
        let survives = match &told {
            Told::Core(input) => matches!(
                input,
                Input::Committing { .. }
                    | Input::Voted { .. }
                    | Input::StreamOutcome { .. }
                    | Input::Finished { .. }
                    | Input::Interrupted { .. }
                    | Input::Abandoned { .. }
                    | Input::MarkPassed { .. }
            ),
            Told::Members(input) => matches!(
                input,
                MembershipInput::MarkerReached { .. } | MembershipInput::Level { .. }
            ),
        };
        if survives {
            unheard.push_back(told);
        }
        None
    }

    pub fn has_arbiter(&self, node: NodeId) -> bool {
        self.memory(node)
            .is_some_and(|memory| memory.unheard.is_none())
    }

    pub fn start_arbiter(&mut self, node: NodeId) {
        let Some(memory) = self.memory(node) else {
            return;
        };
        let commits =
            |session: &Session| *session == Session::Finishing(protocol::Decision::Commit);
        if memory.orders > 0 || memory.sessions.values().any(commits) {
            let life = self.life(node);
            let at = self.now + LOOK_MS;
            return self.agenda.plan(at, Event::ArbiterStarts { node, life });
        }
        let mut out = Effects::new();
        let (now, clock, epoch) = (self.now, self.clock(node), self.life(node) + 1);
        let config = self.config_beside(node, epoch);
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        // The epoch is counted durably, and with it all that lies before in WAL.
        server.flush_all(checker);
        server.disk.epoch = epoch;
        server.restart_core(config, clock, &mut out);
        self.carry_out(node, &mut out);
        self.take_over(node);
        self.start_members(node);
        self.hear_what_was_told(node);
        self.agenda
            .plan(now + TICK_MS, Event::Tick { node, life: epoch });
        for peer in self.configured.without(node).iter() {
            self.later(1, 200, Event::Connect { a: node, b: peer });
        }
    }

    /// Like that of a server's start, but the server goes on: what it has begun may have ended without this life's knowing.
    fn config_beside(&self, node: NodeId, epoch: u32) -> Config {
        let config = Config {
            first_xid: self.xids + 1,
            ..self.config(node, epoch)
        };
        let record = self
            .servers
            .get(&node)
            .and_then(|server| server.disk.members);
        match record {
            Some(MembershipRecord { current, .. }) => Config {
                members: current.generation.members,
                generation: current.generation.num,
                ..config
            },
            None => config,
        }
    }

    /// Sessions that wait, whether or not they have announced themselves.
    fn take_over(&mut self, node: NodeId) {
        let Some(memory) = self.memory(node) else {
            return;
        };
        let waiting: Vec<Gid> = memory
            .sessions
            .iter()
            .filter(|(_, session)| **session == Session::Waiting)
            .map(|(gid, _)| *gid)
            .collect();
        for gid in waiting {
            let (wait_peers, fast) = (true, false);
            let input = Input::Committing {
                gid,
                wait_peers,
                fast,
            };
            self.input(node, input);
        }
    }

    /// In the order in which it was said; marks come last, as the start itself tells them again.
    fn hear_what_was_told(&mut self, node: NodeId) {
        let told = self
            .memory_mut(node)
            .map(|memory| std::mem::take(&mut memory.told));
        for told in told.into_iter().flatten() {
            match told {
                Told::Core(input) => self.input(node, input),
                Told::Members(input) => self.members(node, input),
            }
        }
        let marks = self
            .servers
            .get(&node)
            .map(|server| server.disk.marks.clone());
        for (origin, lsn) in marks.into_iter().flatten() {
            self.input(node, Input::MarkPassed { origin, lsn });
        }
    }

    /// Whether an event belongs to a process that outlives the arbiter.
    pub fn outlives(event: &Event) -> bool {
        matches!(
            event,
            Event::Session { .. }
                | Event::Apply { .. }
                | Event::Finish { .. }
                | Event::Prepared { .. }
                | Event::Flushed { .. }
                | Event::StoreMarks { .. }
                | Event::MarkStored { .. }
        )
    }
}
