//! The shell around a node's membership: its effects, heartbeats with leases, and recovery from a donor.

use std::collections::{BTreeMap, VecDeque};

use protocol::membership::{
    Admission, Generation, Membership, MembershipConfig, MembershipEffect, MembershipEffects,
    MembershipInput, MembershipRecord,
};
use protocol::{GenerationNum, Gid, Input, Leases, Message, Millis, NodeId, NodeSet, Vote};

use crate::apply::refusal;
use crate::arbiter::Told;
use crate::event::{Beat, Event};
use crate::referee::RefereeHost;
use crate::server::{Applying, StreamItem};
use crate::world::{World, pair};

const BEAT_MS: Millis = 40;
const LEASE_MS: Millis = 240;

/// The volatile part of a node's membership.
#[derive(Debug)]
pub(crate) struct Members {
    pub membership: Membership,
    leases: Leases,
    /// Until when sessions may serve; outlives the arbiter.
    lease: Millis,
    /// The record that is on its way to the disk, and what waits for it.
    storing: Option<MembershipRecord>,
    queue: VecDeque<MembershipEffect>,
    /// The generation under which this node prepares.
    pub open: Option<Generation>,
    /// It has said good-bye.
    pub left: bool,
    draining: Option<GenerationNum>,
    /// The donor, and up to where its WAL has been read.
    pub cursor: Option<(NodeId, usize)>,
    pub recoveries: u64,
    /// PREPAREs that are not applied now.
    pub aside: BTreeMap<Gid, Applying>,
    /// The highest fence or marker on this node's WAL.
    pub fenced: GenerationNum,
}

impl Members {
    /// The arbiter ends; gives back the record that it was writing.
    pub fn die(&mut self) -> Option<MembershipRecord> {
        self.queue.clear();
        self.draining = None;
        self.cursor = None;
        self.storing.take()
    }

    /// Takes over from an earlier life of the arbiter what outlives it.
    fn follow(self, before: Option<Self>) -> Self {
        let Some(before) = before else {
            return self;
        };
        Self {
            lease: before.lease,
            open: before.open,
            recoveries: before.recoveries,
            aside: before.aside,
            fenced: before.fenced,
            ..self
        }
    }

    /// Whether a PREPARE of this transaction may go on.
    pub fn applies(&self, gid: Gid) -> bool {
        self.open.is_some_and(|open| open.num == gid.generation)
    }
}

impl World {
    pub fn start_members(&mut self, node: NodeId) {
        if !self.changing {
            return;
        }
        let (life, now, configured) = (self.life(node), self.clock(node), self.configured);
        let config = MembershipConfig {
            fault: self.members_fault,
            promise_ms_max: LEASE_MS * 2,
            referee: self.knows_referee(node),
            donor_seed: self.donor_seed ^ u64::from(life),
            ..MembershipConfig::new(node, configured)
        };
        let mut out = MembershipEffects::new();
        let Some(server) = self.servers.get_mut(&node) else {
            return;
        };
        let record = server.disk.members;
        let fenced = server.disk.stream.iter().rev().find_map(|item| match item {
            StreamItem::Marker(num) | StreamItem::Fence(num) => Some(*num),
            _ => None,
        });
        let members = Members {
            membership: Membership::new(config, record, now, &mut out),
            leases: Leases::new(node, life, configured, LEASE_MS),
            lease: 0,
            storing: None,
            queue: VecDeque::new(),
            open: None,
            left: false,
            draining: None,
            cursor: None,
            recoveries: 0,
            aside: BTreeMap::new(),
            fenced: fenced.unwrap_or_default(),
        };
        if let Some(memory) = self.memory_mut(node) {
            let before = memory.members.take();
            memory.members = Some(members.follow(before));
        }
        self.queue_effects(node, out);
        self.agenda.plan(self.now, Event::Beat { node, life });
    }

    pub fn members_of(&self, node: NodeId) -> Option<&Members> {
        self.memory(node)?.members.as_ref()
    }

    pub fn members_mut(&mut self, node: NodeId) -> Option<&mut Members> {
        self.memory_mut(node)?.members.as_mut()
    }

    /// The generation under which transactions begin here.
    pub fn open_generation(&self, node: NodeId) -> Option<Generation> {
        if !self.changing {
            let (num, members) = (GenerationNum(1), self.configured);
            return Some(Generation { num, members });
        }
        self.members_of(node).filter(|members| !members.left)?.open
    }

    pub fn may_prepare(&self, node: NodeId, gid: Gid) -> bool {
        self.open_generation(node)
            .is_some_and(|open| open.num == gid.generation)
    }

    /// The client hears an error; nothing happened.
    pub fn drop_session(&mut self, node: NodeId, gid: Gid) {
        if let Some(memory) = self.memory_mut(node) {
            memory.sessions.remove(&gid);
            memory.locks.retain(|_, holder| *holder != gid);
        }
    }

    /// Gives an input to a node's membership and carries out what it asks for.
    pub fn members(&mut self, node: NodeId, input: MembershipInput) {
        let now = self.clock(node);
        let mut out = MembershipEffects::new();
        let Some(Told::Members(input)) = self.hears(node, Told::Members(input)) else {
            return;
        };
        let Some(members) = self.members_mut(node) else {
            return;
        };
        members.membership.handle(now, input, &mut out);
        self.queue_effects(node, out);
    }

    fn queue_effects(&mut self, node: NodeId, mut out: MembershipEffects) {
        let configured = self.configured;
        if let Some(members) = self.members_mut(node) {
            for effect in out.drain() {
                if let MembershipEffect::Withhold { from } = effect {
                    let kept = configured.difference(from);
                    members.leases.withhold_from_all_but(kept);
                } else {
                    members.queue.push_back(effect);
                }
            }
        }
        self.carry_on(node);
    }

    /// Carries out effects until one waits for the disk.
    fn carry_on(&mut self, node: NodeId) {
        while let Some(members) = self.members_mut(node)
            && members.storing.is_none()
            && let Some(effect) = members.queue.pop_front()
        {
            self.note(|| format!("  {node:?} {effect:?}"));
            self.perform_members(node, effect);
        }
    }

    fn perform_members(&mut self, node: NodeId, effect: MembershipEffect) {
        let life = self.life(node);
        match effect {
            MembershipEffect::Persist(record) => {
                if let Some(members) = self.members_mut(node) {
                    members.storing = Some(record);
                }
                self.later(
                    1,
                    self.hazards.disk_max_ms,
                    Event::MembersStored { node, life },
                );
            }
            MembershipEffect::Send { to, msg } => self.send(node, to, Message::Membership(msg)),
            MembershipEffect::Close { generation } => self.close(node, generation),
            MembershipEffect::Drain { num } => {
                if let Some(members) = self.members_mut(node) {
                    members.draining = Some(num);
                }
            }
            MembershipEffect::WriteMarker { elected } => {
                let num = elected.generation.num;
                let slowest = self.hazards.disk_max_ms;
                self.later(1, slowest, Event::WriteMarker { node, life, num });
            }
            MembershipEffect::Open { generation } => self.open(node, generation),
            MembershipEffect::AskReferee(request) => self.ask_referee(node, request),
            MembershipEffect::Recover { from } => self.recover(node, from),
            MembershipEffect::StopRecovery => {
                if let Some(members) = self.members_mut(node) {
                    members.cursor = None;
                }
            }
            MembershipEffect::Beat => self.beat(node, false),
            MembershipEffect::Event(_) | MembershipEffect::Withhold { .. } => {}
        }
    }

    pub fn members_stored(&mut self, node: NodeId) {
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let stored = server
            .memory
            .as_mut()
            .and_then(|memory| memory.members.as_mut())
            .and_then(|members| members.storing.take());
        if let Some(record) = stored {
            server.disk.members = Some(record);
            checker.on_members_durable(node, record);
        }
        self.carry_on(node);
    }

    fn close(&mut self, node: NodeId, generation: Generation) {
        let life = self.life(node);
        if let Some(members) = self.members_mut(node) {
            members.open = None;
            members.draining = None;
            members.lease = members.leases.until();
        }
        self.set_aside_old(node);
        self.input(node, Input::Generation { generation });
        let input = MembershipInput::Closed {
            num: generation.num,
        };
        self.agenda
            .plan(self.now, Event::Members { node, life, input });
    }

    /// Stops applies of generations that are not open.
    pub fn set_aside_old(&mut self, node: NodeId) {
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        let Some(members) = &mut memory.members else {
            return;
        };
        let mut old: Vec<Gid> = memory.applying.keys().copied().collect();
        old.retain(|gid| !members.applies(*gid));
        for gid in old {
            if let Some(applying) = memory.applying.remove(&gid) {
                memory.locks.retain(|_, holder| *holder != gid);
                let holds_lock = false;
                let applying = Applying {
                    holds_lock,
                    ..applying
                };
                members.aside.insert(gid, applying);
            }
        }
    }

    fn open(&mut self, node: NodeId, generation: Generation) {
        let elected = self.may_be_elected(node, generation);
        self.set_aside_old(node);
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let disk = &server.disk;
        let holds = |gid: Gid| disk.prepared.contains(&gid) || disk.finished.contains_key(&gid);
        checker.on_open(node, generation, elected, holds);
        self.generations.insert(generation.num);
        let Some(members) = self.members_mut(node) else {
            return;
        };
        members.open = Some(generation);
        members.cursor = None;
        let aside = std::mem::take(&mut members.aside);
        self.input(node, Input::Generation { generation });
        self.input(node, Input::Online);
        // As if it came again: it may have been refused meanwhile.
        for (gid, applying) in aside {
            self.on_prepare(node, gid, applying.lsn, applying.deps);
        }
        self.check_serving();
    }

    /// G8: by a majority, or by the referee.
    fn may_be_elected(&self, node: NodeId, generation: Generation) -> bool {
        let alone = generation.members == NodeSet::EMPTY.with(node);
        let granted = |host: &RefereeHost| host.granted.contains(&(generation.num, node));
        generation.members.is_quorum_of(self.configured)
            || alone && self.referee.as_ref().is_some_and(granted)
    }

    /// Does with a PREPARE what the membership says.
    pub fn admit(&mut self, node: NodeId, gid: Gid, applying: Applying) {
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        let admission = match &memory.members {
            None => Admission::Apply,
            Some(members) if members.open.is_none() => match members.membership.admit(gid) {
                // Its record is not durable yet.
                Admission::Apply | Admission::Refuse | Admission::Skip => Admission::Hold,
                other => other,
            },
            Some(members) => members.membership.admit(gid),
        };
        let lsn = applying.lsn;
        self.note(|| format!("  {node:?} {admission:?} {gid:?} at {lsn}"));
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        match admission {
            Admission::Apply => {
                memory.applying.insert(gid, applying);
                self.start_apply(node, gid);
            }
            Admission::Refuse => {
                let no = Vote::No(refusal("its generation is over"));
                self.vote(node, gid, lsn, no);
            }
            Admission::Skip => {
                memory.dealt.insert((gid.coordinator, lsn));
                self.input(node, Input::PrepareBefore { gid, lsn });
            }
            Admission::SetAside | Admission::Hold => {
                if let Some(members) = &mut memory.members {
                    members.aside.insert(gid, applying);
                }
            }
        }
    }

    pub fn write_marker(&mut self, node: NodeId, num: GenerationNum) {
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        server.flush_all(checker);
        server.disk.log(StreamItem::Marker(num));
        checker.on_marker(node, num);
        if let Some(members) = self.members_mut(node) {
            members.fenced = members.fenced.max(num);
        }
        self.pump_all(node);
        self.members(node, MembershipInput::MarkerWritten { num });
    }

    pub fn tick_members(&mut self, node: NodeId) {
        let (now, configured) = (self.clock(node), self.configured);
        let Some(server) = self.servers.get_mut(&node) else {
            return;
        };
        let Some(members) = server
            .memory
            .as_mut()
            .and_then(|memory| memory.members.as_mut())
        else {
            return;
        };
        let drained = members.draining.filter(|num| {
            let mut prepared = server.disk.prepared.iter();
            !prepared.any(|gid| gid.generation < *num)
        });
        if drained.is_some() {
            members.draining = None;
        }
        let free = |peer: &NodeId| {
            let one = [*peer].into_iter().collect();
            members.leases.bound_until(one) <= now
        };
        let unbound = configured.iter().filter(free).collect();
        self.members(node, MembershipInput::Tick { unbound });
        if let Some(num) = drained {
            self.members(node, MembershipInput::Drained { num });
        }
        self.check_serving();
    }

    /// Sends a heartbeat to every peer.
    pub fn beat(&mut self, node: NodeId, again: bool) {
        let (life, now, slowest) = (self.life(node), self.clock(node), self.climate.delay_max_ms);
        let Some(members) = self.members_of(node) else {
            return;
        };
        let beat = Beat {
            sent: now,
            epoch: life,
            presence: members.membership.presence(),
            grants: members.leases.grants().collect(),
        };
        for peer in self.configured.without(node).iter() {
            let link = self.links.get(&pair(node, peer)).copied();
            let Some(link) = link.filter(|link| link.up && self.muted(node, peer).is_none()) else {
                continue;
            };
            let event = Event::Heartbeat {
                link: link.number,
                from: node,
                to: peer,
                beat: beat.clone(),
            };
            self.later(1, slowest, event);
        }
        if again {
            self.agenda
                .plan(self.now + BEAT_MS, Event::Beat { node, life });
        }
    }

    pub fn on_heartbeat(&mut self, link: u32, from: NodeId, to: NodeId, beat: &Beat) {
        let now = self.clock(to);
        let current = self.links.get(&pair(from, to)).copied().unwrap_or_default();
        if !current.up || current.number != link {
            return;
        }
        let presence = beat.presence;
        if let Some(members) = self.members_mut(to) {
            members.leases.heard(from, beat.epoch, beat.sent, now);
            members.leases.on_grants(from, &beat.grants);
            members.lease = members.lease.max(members.leases.until());
            if presence.leaving {
                members.leases.released_by(from);
            }
        }
        self.members(to, MembershipInput::Presence { from, presence });
    }

    /// I10: when all faults are healed everybody is online in one generation of all nodes, and nothing is left aside.
    pub fn demand_all_online(&mut self) {
        if !self.changing {
            return;
        }
        let configured = self.configured;
        for node in configured.iter() {
            let Some(members) = self.members_of(node) else {
                continue;
            };
            let current = members.membership.current();
            let whole = members.open == Some(current.generation)
                && current.generation.members == configured;
            let (status, aside) = (members.membership.status(), members.aside.len());
            self.checker.demand(whole, "I10", || {
                format!("{node} is {status:?} in {current:?}")
            });
            self.checker.demand(aside == 0, "I10", || {
                format!("{node} keeps {aside} PREPAREs aside")
            });
        }
    }

    /// LEASE, of every node.
    fn check_serving(&mut self) {
        let serves = |node: &NodeId| {
            let now = self.clock(*node);
            let alone = self.is_alone(*node);
            let holds = |members: &Members| {
                members.open.is_some() && !members.left && (alone || members.lease > now)
            };
            !self.is_paused(*node) && self.members_of(*node).is_some_and(holds)
        };
        let serving: Vec<NodeId> = self.configured.iter().filter(serves).collect();
        for node in serving {
            let Some(server) = self.servers.get(&node) else {
                continue;
            };
            let disk = &server.disk;
            let holds = |gid: Gid| disk.prepared.contains(&gid) || disk.finished.contains_key(&gid);
            self.checker.on_serving(node, holds);
        }
    }
}
