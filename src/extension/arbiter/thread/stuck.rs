//! Stuck databases: looks at this server's own, tells the others, and takes in what they say.

use super::super::event_kind::EventKind;
use super::Arbiter;
use super::extras::{self, Extra};
use super::health::{Idle, Matter, Sight, Watches};
use super::main_link::LogLevel;
use super::suspects::{Own, Suspects, Verdict};
use crate::pg::clock;
use crate::pg::shared::{self, outcome, shared, worker};
use protocol::membership::{MembershipInput, Phase};
use protocol::{Millis, NodeId};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use wire::frame::Heartbeat;

/// How often this node looks at itself, milliseconds.
const LOOK_EVERY: Millis = 250;
/// Shorter than this nothing is told.
const TOLD_FROM: Millis = 500;

/// What is known of stuck databases.
#[derive(Default)]
pub struct Stuck {
    watches: Watches,
    looked_at: Millis,
    /// The worst here.
    idle: Option<Idle>,
    /// It was said in the events that this node is stuck.
    said: bool,
    /// Since when this node is a member that does not work yet.
    switching_since: Option<Millis>,
    /// When the main thread gave its last sign of life.
    alive_at: Millis,
    /// Where each peer's WAL ended when its stream was last found to have caught up, at a heartbeat.
    goals: BTreeMap<NodeId, u64>,
    suspects: Suspects,
    /// `multimaster.slow_node_timeout`.
    timeout: Millis,
}

impl Stuck {
    pub fn new(timeout: Millis) -> Stuck {
        Stuck {
            timeout,
            ..Stuck::default()
        }
    }

    /// The setting has changed.
    pub fn set_timeout(&mut self, timeout: Millis) {
        self.timeout = timeout;
    }

    /// Whether what does not move is to be laid to this node.
    pub fn is_own(&self) -> bool {
        self.suspects.is_own()
    }

    /// What heartbeats carry.
    pub fn extra(&self) -> Option<Extra> {
        let idle = self.idle.filter(|idle| idle.for_ms >= TOLD_FROM)?;
        extras::put(extras::IDLE, &idle)
    }

    /// The main thread works.
    pub fn alive(&mut self, now: Millis) {
        self.alive_at = now;
    }

    /// The peer's arbiter cannot be heard any more.
    pub fn lost(&mut self, peer: NodeId) {
        self.goals.remove(&peer);
        self.suspects.lost(peer);
    }

    /// What the heartbeat of a peer says about its database.
    fn hear(&mut self, peer: NodeId, heartbeat: &Heartbeat) {
        let idle = extras::get(heartbeat, extras::IDLE);
        self.suspects.heard(peer, idle);
        let node = shared().node(peer);
        let flushed = node.flushed.load(Ordering::Relaxed);
        let goal = self.goals.entry(peer).or_insert(flushed);
        if node.streamed.load(Ordering::Relaxed) >= *goal {
            *goal = flushed;
        }
    }
}

impl Arbiter {
    /// Looks at this server, and at what the peers have said or no longer say.
    pub(super) fn tick_stuck(&mut self) {
        let now = self.now();
        if now >= self.stuck.looked_at + LOOK_EVERY {
            self.stuck.looked_at = now;
            let found = self.sights(now);
            self.stuck.idle = self.stuck.watches.look(now, found);
            self.publish();
            self.say_if_stuck();
        }
        self.judge_peers();
    }

    /// What the heartbeat of a peer says about its database. Whoever is found stuck holds up the others no longer than until it says so.
    pub(super) fn hear_stuck(&mut self, peer: NodeId, heartbeat: &Heartbeat) {
        self.stuck.hear(peer, heartbeat);
        self.judge_peers();
    }

    fn judge_peers(&mut self) {
        // Of two nodes one can do without the other if the referee says so; if it cannot be asked, both would serve nothing.
        let most = if self.referee.can_be_asked() {
            1
        } else {
            let there = self.linked.with(self.node).len();
            there.saturating_sub(self.configured.majority())
        };
        let (now, timeout) = (self.now(), self.stuck.timeout);
        let own = Own {
            node: self.node,
            idle: self.stuck.idle,
            members: self.members.current(),
        };
        for verdict in self.stuck.suspects.judge(own, now, timeout, most) {
            self.on_verdict(verdict);
        }
    }

    fn on_verdict(&mut self, verdict: Verdict) {
        let Verdict { peer, stuck, idle } = verdict;
        let (event, text) = match idle {
            Some(idle) => (EventKind::Stuck, text_of(idle)),
            None => (
                EventKind::GetsOn,
                "its database makes progress again".to_owned(),
            ),
        };
        if stuck {
            self.history.away(peer, &text);
        } else {
            self.history.seen(peer);
        }
        self.note(peer, event, &text, None);
        let line = format!("node {} {event}: {text}", peer.get());
        self.main.log(LogLevel::Warning, line);
        self.member_input(MembershipInput::Stuck { peer, stuck });
    }

    /// What this node can say of itself it says in its own events, too.
    fn say_if_stuck(&mut self) {
        let timeout = self.stuck.timeout;
        let idle = self
            .stuck
            .idle
            .filter(|idle| timeout > 0 && idle.for_ms >= timeout);
        if idle.is_some() == self.stuck.said {
            return;
        }
        self.stuck.said = idle.is_some();
        let (event, text) = match idle {
            Some(idle) => (EventKind::Stuck, text_of(idle)),
            None => (
                EventKind::GetsOn,
                "everything here makes progress again".to_owned(),
            ),
        };
        self.note(self.node, event, &text, None);
        self.main
            .log(LogLevel::Warning, format!("this node {event}: {text}"));
        self.beat_all();
    }

    /// Everything that should move.
    fn sights(&mut self, now: Millis) -> Vec<(Matter, Sight)> {
        let mut found = worker_sights();
        let waits = found.iter().any(|(_, sight)| sight.waits);
        found.extend(committing_sights());
        if let Some(number) = self.finishing.oldest() {
            found.push((Matter::Finish, thing(number)));
        }
        found.extend(self.stream_sights(waits));
        let switching = self.members.current().contains(self.node) && !shared().is_open();
        self.stuck.switching_since = switching.then_some(self.stuck.switching_since.unwrap_or(now));
        if let Some(since) = self.stuck.switching_since {
            found.push((Matter::Switch, thing(since)));
        }
        found.push((Matter::Records, thing(self.stuck.alive_at)));
        found
    }

    /// Streams of linked peers that have not come as far as their peer's WAL went when they had last done so. Those that are held on purpose are left out.
    fn stream_sights(&self, waits: bool) -> Vec<(Matter, Sight)> {
        let phase = shared().standing.get().phase;
        if !matches!(phase, Phase::Online | Phase::Outside) {
            return Vec::new();
        }
        let mut found = Vec::new();
        for peer in self.linked.iter() {
            let node = shared().node(peer);
            let streamed = node.streamed.load(Ordering::Relaxed);
            if self
                .stuck
                .goals
                .get(&peer)
                .is_some_and(|goal| streamed < *goal)
            {
                let sight = Sight {
                    waits,
                    ..thing(streamed)
                };
                found.push((Matter::Stream(peer), sight));
            }
        }
        found
    }
}

fn thing(thing: u64) -> Sight {
    Sight {
        thing,
        ..Sight::default()
    }
}

/// The apply workers with a transaction in hand. Who waits for more of it waits for its origin: whether that comes, the stream tells.
fn worker_sights() -> Vec<(Matter, Sight)> {
    shared::workers()
        .iter()
        .enumerate()
        .filter(|(index, slot)| {
            slot.state.load(Ordering::Acquire) == worker::BUSY
                && !(slot.fed.load(Ordering::Acquire) && shared::ring(*index).is_empty())
        })
        .map(|(index, slot)| {
            let waits =
                slot.waits_for_order.load(Ordering::Acquire) || slot.process.waits_for_lock();
            let sight = Sight {
                thing: slot.jobs_given.load(Ordering::Acquire),
                cpu_ms: clock::cpu_ms_of(slot.process.pid()),
                waits,
            };
            (Matter::Worker(index as u32), sight)
        })
        .collect()
}

/// The backends that have been told to commit what is prepared, and have not done so.
fn committing_sights() -> Vec<(Matter, Sight)> {
    shared::backends()
        .iter()
        .enumerate()
        .filter_map(|(index, slot)| {
            let gid = slot.gid.get()?;
            let told = slot.outcome(gid.xid) == outcome::COMMIT && !slot.is_user_prepare();
            told.then(|| (Matter::Backend(index as u32), thing(gid.xid)))
        })
        .collect()
}

fn text_of(idle: Idle) -> String {
    format!(
        "{} has made no progress for {} ms",
        idle.matter, idle.for_ms
    )
}
