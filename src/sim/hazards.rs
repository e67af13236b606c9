//! Faults that matter to members beside crashes and cuts: links that work one way, splits into two groups, nodes that stand still while their clock
//! goes on, clocks of different speed, slow disks, nodes that say good-bye, nodes whose apply stands still, and recovered transactions that a crash
//! takes back.

use std::collections::BTreeMap;

use protocol::membership::MembershipInput;
use protocol::{Millis, NodeId, NodeSet};

use crate::event::Event;
use crate::rng::Rng;
use crate::world::World;

/// After so long without a heartbeat a node gives a link up.
const SILENCE_MS: Millis = 200;
/// What a disk takes for a flush when it is not slow.
const DISK_MS: Millis = 8;
/// Clocks differ from the world's by so many parts in a million at most; two of them by less than the fiftieth that promises allow for.
const DRIFT_PPM_MAX: u64 = 9_000;
/// Between a good-bye and the end of the server.
const LEAVING_MS: Millis = 60;

/// The faults of one simulation, and what of them lasts at the moment.
#[derive(Clone, Debug)]
pub(crate) struct Hazards {
    /// The longest that a flush takes.
    pub disk_max_ms: Millis,
    /// Recovered transactions are committed without waiting for the disk.
    pub lazy_recovery: bool,
    /// Parts in a million by which each node's clock is fast, and what it shows at the beginning.
    clocks: BTreeMap<NodeId, (i64, Millis)>,
    /// Until when nothing passes from the first node to the second.
    mute: BTreeMap<(NodeId, NodeId), Millis>,
    paused: BTreeMap<NodeId, Millis>,
    /// Until when the node's apply stands still.
    stalled: BTreeMap<NodeId, Millis>,
    /// The end of the storm, when all of them are over.
    end: Millis,
}

impl Default for Hazards {
    /// None at all.
    fn default() -> Self {
        Self {
            disk_max_ms: DISK_MS,
            lazy_recovery: false,
            clocks: BTreeMap::new(),
            mute: BTreeMap::new(),
            paused: BTreeMap::new(),
            stalled: BTreeMap::new(),
            end: 0,
        }
    }
}

impl Hazards {
    /// What lasts beyond the storm: clocks.
    pub const fn calm(&mut self) {
        self.disk_max_ms = DISK_MS;
        self.lazy_recovery = false;
    }
}

#[derive(Clone, Copy, Debug, Hash)]
pub(crate) enum Hazard {
    /// Nothing passes from one to the other; the way back works.
    OneWay {
        from: NodeId,
        to: NodeId,
        lasts: Millis,
    },
    /// Nothing passes between these nodes and the others.
    Split { group: NodeSet, lasts: Millis },
    /// The node stands still; its clock goes on.
    Pause { node: NodeId, lasts: Millis },
    /// The node's server is stopped.
    Leave { node: NodeId },
    /// The node applies nothing, though its links work.
    Stall { node: NodeId, lasts: Millis },
}

impl World {
    /// Draws hazards from a source of their own: the storm without them stays what it was.
    pub fn plan_hazards(&mut self, seed: u64, storm_ms: Millis) {
        let mut rng = Rng::new(seed ^ 0x5EED_0F0D_D5EA_5075);
        self.hazards.end = self.now + storm_ms;
        self.hazards.lazy_recovery = rng.permille(700);
        if rng.permille(300) {
            self.hazards.disk_max_ms = rng.between(20, 250);
        }
        if rng.permille(600) {
            for node in self.configured.iter() {
                let ppm = rng.between(0, 2 * DRIFT_PPM_MAX) as i64 - DRIFT_PPM_MAX as i64;
                let clock = (ppm, rng.between(0, 5_000));
                self.hazards.clocks.insert(node, clock);
            }
        }
        for _ in 0..rng.between(0, 5) {
            let at = self.now + rng.between(100, storm_ms);
            let hazard = self.draw_hazard(&mut rng);
            self.agenda.plan(at, Event::Strike(hazard));
        }
    }

    fn draw_hazard(&self, rng: &mut Rng) -> Hazard {
        let count = self.configured.len() as u64;
        let some = |rng: &mut Rng| {
            let place = rng.between(0, count - 1) as usize;
            self.configured
                .iter()
                .nth(place)
                .expect("a configured node")
        };
        let node = some(rng);
        let lasts = rng.between(20, 1_500);
        match rng.between(0, 4) {
            0 => Hazard::OneWay {
                from: node,
                to: some(rng),
                lasts,
            },
            1 => {
                let of_half = |_: &NodeId| rng.permille(500);
                let group = self.configured.iter().filter(of_half).collect();
                Hazard::Split { group, lasts }
            }
            2 => Hazard::Pause { node, lasts },
            3 => Hazard::Leave { node },
            _ => Hazard::Stall { node, lasts },
        }
    }

    pub fn strike(&mut self, hazard: Hazard) {
        let until = |lasts: Millis| (self.now + lasts).min(self.hazards.end);
        match hazard {
            Hazard::OneWay { from, to, lasts } if from != to => self.mute(from, to, until(lasts)),
            Hazard::OneWay { .. } => {}
            Hazard::Split { group, lasts } => {
                let until = until(lasts);
                for a in group.iter() {
                    for b in self.configured.difference(group).iter() {
                        self.mute(a, b, until);
                        self.mute(b, a, until);
                    }
                }
            }
            Hazard::Pause { node, lasts } => {
                let until = until(lasts);
                // A shorter pause within a longer one would let later events overtake those that wait for the end of the longer.
                let pause = self.hazards.paused.entry(node).or_default();
                *pause = until.max(*pause);
                self.plan_silence(node);
            }
            Hazard::Leave { node } => self.leave(node),
            Hazard::Stall { node, lasts } => self.stall(node, until(lasts)),
        }
    }

    fn mute(&mut self, from: NodeId, to: NodeId, until: Millis) {
        let before = self.hazards.mute.entry((from, to)).or_default();
        *before = until.max(*before);
        self.break_stream(from, to, until);
        self.agenda.plan(until, Event::Audible { from, to });
        let at = self.now + SILENCE_MS;
        self.agenda.plan(at, Event::Silence { from, to });
    }

    pub fn unmute(&mut self, from: NodeId, to: NodeId) {
        let now = self.now;
        self.hazards.mute.retain(|_, until| *until > now);
        self.agenda
            .plan(now, Event::ConnectStream { origin: from, to });
    }

    /// Until when nothing passes that way.
    pub fn muted(&self, from: NodeId, to: NodeId) -> Option<Millis> {
        let until = self.hazards.mute.get(&(from, to)).copied();
        until.filter(|until| *until > self.now)
    }

    fn plan_silence(&mut self, from: NodeId) {
        for to in self.configured.without(from).iter() {
            let at = self.now + SILENCE_MS;
            self.agenda.plan(at, Event::Silence { from, to });
        }
    }

    pub fn on_silence(&mut self, from: NodeId, to: NodeId) {
        let silent = self.muted(from, to).is_some() || self.is_paused(from);
        if silent && !self.is_paused(to) {
            self.cut(from, to, false);
        }
    }

    pub fn is_paused(&self, node: NodeId) -> bool {
        self.paused_until(node).is_some()
    }

    fn paused_until(&self, node: NodeId) -> Option<Millis> {
        let until = self.hazards.paused.get(&node).copied();
        until.filter(|until| *until > self.now && self.memory(node).is_some())
    }

    /// Until when an event has to wait because its node stands still, or the way is barred.
    pub fn postponed(&self, event: &Event) -> Option<Millis> {
        let paused = |node: &NodeId| self.paused_until(*node);
        match event {
            Event::Deliver { to, .. } | Event::Stream { to, .. } | Event::Heartbeat { to, .. } => {
                paused(to)
            }
            Event::Connect { a, b } => {
                [paused(a), paused(b), self.muted(*a, *b), self.muted(*b, *a)]
                    .into_iter()
                    .flatten()
                    .max()
            }
            Event::ConnectStream { origin, to } => {
                let ways = [paused(origin), paused(to), self.muted(*origin, *to)];
                ways.into_iter().flatten().max()
            }
            Event::Apply { node, .. } => paused(node).max(self.stalled_until(*node)),
            Event::Loop { node, .. }
            | Event::Prepared { node, .. }
            | Event::Tick { node, .. }
            | Event::Flushed { node, .. }
            | Event::Session { node, .. }
            | Event::Finish { node, .. }
            | Event::LookUp { node, .. }
            | Event::StoreMarks { node, .. }
            | Event::MarkStored { node, .. }
            | Event::Client { node }
            | Event::LinkDown { node, .. }
            | Event::Members { node, .. }
            | Event::MembersStored { node, .. }
            | Event::WriteMarker { node, .. }
            | Event::Beat { node, .. }
            | Event::Recover { node, .. }
            | Event::Judge { node, .. } => paused(node),
            // The referee is on a machine of its own.
            Event::AskReferee { .. }
            | Event::LoseReferee { .. }
            | Event::FindReferee { .. }
            | Event::Crash { .. }
            | Event::Restart { .. }
            | Event::DiskLost { .. }
            | Event::Clone { .. }
            | Event::OldDisk { .. }
            | Event::OldDiskEnds { .. }
            | Event::ArbiterEnds { .. }
            | Event::ArbiterStarts { .. }
            | Event::Cut { .. }
            | Event::Strike(_)
            | Event::Silence { .. }
            | Event::Audible { .. } => None,
        }
    }

    /// What the node's own clock shows.
    pub fn clock(&self, node: NodeId) -> Millis {
        let (ppm, start) = self.hazards.clocks.get(&node).copied().unwrap_or_default();
        let now = self.now as i64;
        (now + now * ppm / 1_000_000) as Millis + start
    }

    /// It stops serving, says so, and ends.
    fn leave(&mut self, node: NodeId) {
        let Some(members) = self
            .memory_mut(node)
            .and_then(|memory| memory.members.as_mut())
        else {
            return;
        };
        members.left = true;
        self.members(node, MembershipInput::Leave);
        self.agenda
            .plan(self.now + LEAVING_MS, Event::Crash { node });
    }

    /// The others come to find it stuck, each for itself, and later that it is not.
    fn stall(&mut self, node: NodeId, until: Millis) {
        self.hazards.stalled.insert(node, until);
        for judge in self.configured.without(node).iter() {
            let life = self.life(judge);
            let found = self.now + self.rng.between(100, 700);
            for at in [found.min(until), until] {
                let peer = node;
                let event = Event::Judge {
                    node: judge,
                    life,
                    peer,
                };
                self.agenda.plan(at, event);
            }
        }
    }

    pub fn is_stalled(&self, node: NodeId) -> bool {
        self.stalled_until(node).is_some()
    }

    fn stalled_until(&self, node: NodeId) -> Option<Millis> {
        let until = self.hazards.stalled.get(&node).copied();
        until.filter(|until| *until > self.now)
    }
}
