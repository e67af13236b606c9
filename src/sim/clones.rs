//! Disks that are lost for good, copies of other nodes in their place, and old disks that are started once more.
//!
//! What `mtm clone` does, step by step, while the storm goes on: it looks whether every other node is a member and nobody hears the lost one; has the slot made on each of them,
//! which waits for all that is prepared there; copies a donor's disk up to a place E in its WAL; looks a second time; and makes that the disk of the lost node, with a record of
//! membership that was online in nothing, a mark of the donor at E, and numbers above all that the lost node has used. What it finds in the way sends it back to the beginning.
//!
//! An old disk of the node is what was lost. It is started in the copy's place, or before the copy is ready, and stopped again. The rules are in `docs/membership.md`,
//! *A copy of a node*; each can be broken.

use std::collections::{BTreeMap, BTreeSet};

use protocol::membership::MembershipRecord;
use protocol::{Config, GenerationNum, Gid, Lsn, Millis, NodeId};

use crate::event::Event;
use crate::members_checker::Rows;
use crate::rng::Rng;
use crate::server::{Copied, Disk, StreamItem};
use crate::world::{World, pair};

/// Disks lost in a storm, at most.
const LOSSES: u64 = 2;
/// Times that an old disk is started after each loss, at most.
const RETURNS: u64 = 3;
/// From one look of whoever makes the copy to the next.
const LOOK_MS: Millis = 40;
/// How long a copy takes at most, from the slots to the end.
const COPY_MS: u64 = 400;
/// How long an old disk runs.
const OLD_MS: u64 = 700;
/// By so much the numbers of a copy are above those of its node.
const LIVES: u32 = 1_000;

/// A rule of copies broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneFault {
    /// The slot on the donor is made when the copy is there.
    SlotAfterCopy,
    /// The slot does not wait for what is prepared.
    SlotAtOnce,
    /// The copy answers about transactions of which the lost node may have said something.
    AnswersForLost,
    /// Old disks are listened to.
    OldIsHeard,
    /// The copy takes the donor's record of membership for its own.
    DonorsRecord,
    /// The copy recovers from any node, not only from its donor.
    AnyDonor,
    /// Nobody looks whether all other nodes are members, and have ended what is older.
    AnyTime,
    /// The marks of a copy move on before it has been online.
    MarksMove,
    /// What the donor held prepared stays prepared in the copy.
    KeepsPrepared,
}

/// One step of making a copy.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) enum CloneStep {
    Look,
    /// Are the slots made?
    Slots,
    Copy,
    /// The slot is made behind the copy: a broken rule.
    Late,
}

/// A disk that is not in its server.
#[derive(Debug)]
struct Stored {
    disk: Disk,
    rows: Rows,
}

/// A copy that is being made.
#[derive(Debug)]
struct Making {
    donor: NodeId,
    /// How long each node's WAL was when its slot was asked for, and what was prepared there.
    asked: BTreeMap<NodeId, (usize, BTreeSet<Gid>)>,
    /// Where the slots begin.
    begins: BTreeMap<NodeId, Lsn>,
}

/// All of one simulation.
#[derive(Debug, Default)]
pub(crate) struct Clones {
    rng: Option<Rng>,
    pub fault: Option<CloneFault>,
    /// Nodes without a disk.
    lost: BTreeSet<NodeId>,
    making: BTreeMap<NodeId, Making>,
    old: BTreeMap<NodeId, Stored>,
    /// Copies that are not in their servers, because an old disk is.
    aside: BTreeMap<NodeId, Stored>,
    /// Nodes whose old disk runs.
    returned: BTreeSet<NodeId>,
    /// The least life of each node that is listened to.
    least: BTreeMap<NodeId, u32>,
    /// Where the WAL of a donor (first) begins that a copy (second) can decode.
    decodable: BTreeMap<(NodeId, NodeId), usize>,
    pub made: u64,
    pub returns: u64,
}

impl Clones {
    fn breaks(&self, fault: CloneFault) -> bool {
        self.fault == Some(fault)
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        self.rng.as_mut().map_or(low, |rng| rng.between(low, high))
    }

    pub const fn are_planned(&self) -> bool {
        self.rng.is_some()
    }

    /// Whether the node has no disk, or one that is not that of its last life.
    pub fn is_silent(&self, node: NodeId) -> bool {
        self.lost.contains(&node) || self.returned.contains(&node)
    }
}

impl World {
    /// Draws from a source of its own: the storm without lost disks stays what it was.
    pub fn plan_clones(&mut self, seed: u64, storm_ms: Millis, fault: Option<CloneFault>) {
        let mut rng = Rng::new(seed ^ 0xC107_E500_0D15_C5AA);
        for _ in 0..rng.between(1, LOSSES) {
            let at = self.now + rng.between(200, storm_ms);
            let place = rng.between(0, self.configured.len() as u64 - 1) as usize;
            if let Some(node) = self.configured.iter().nth(place) {
                self.agenda.plan(at, Event::DiskLost { node });
            }
        }
        self.clones.rng = Some(rng);
        self.clones.fault = fault;
    }

    /// Whether the node can be started.
    pub fn has_disk(&self, node: NodeId) -> bool {
        !self.clones.lost.contains(&node) || self.clones.returned.contains(&node)
    }

    /// Whether the others make a link or a stream with what runs as this node.
    pub fn is_listened_to(&self, node: NodeId) -> bool {
        let least = self.clones.least.get(&node).copied().unwrap_or_default();
        self.clones.breaks(CloneFault::OldIsHeard) || self.life(node) >= least
    }

    /// An old disk finds that the others' slots stand beyond its marks, and they that it lacks what they have had of it.
    pub fn reads_streams(&self, node: NodeId) -> bool {
        !self.clones.returned.contains(&node)
    }

    pub fn copied(&self, node: NodeId) -> Option<Copied> {
        self.servers.get(&node)?.disk.copied
    }

    /// What the core of a copy is told.
    pub fn config_of_copy(&self, node: NodeId, config: Config) -> Config {
        let speaks = self.clones.breaks(CloneFault::AnswersForLost);
        let copied_in = self.copied(node).filter(|_| !speaks);
        Config {
            copied_in: copied_in.map_or(config.copied_in, |copied| copied.generation),
            ..config
        }
    }

    /// From whom alone the node may recover until it has been online.
    pub fn completed_by(&self, node: NodeId) -> Option<NodeId> {
        let any = self.clones.breaks(CloneFault::AnyDonor);
        Some(self.copied(node).filter(|_| !any)?.from)
    }

    /// Whether what the node says of this transaction is what its name has always said.
    pub fn speaks_of(&self, node: NodeId, gid: Gid) -> bool {
        let of_before = |copied: Copied| gid.generation <= copied.generation;
        !self.clones.is_silent(node) && !self.copied(node).is_some_and(of_before)
    }

    /// A disk goes, unless another one is missing already, with which the cluster would wait for one to come back, or it is all that is left of what was committed alone.
    pub fn lose_disk(&mut self, node: NodeId) {
        let incomplete = |other: &NodeId| {
            let record = self.servers.get(other).and_then(|it| it.disk.members);
            self.clones.is_silent(*other)
                || record.is_some_and(|record| record.online_in == GenerationNum(0))
        };
        let missing = self.configured.iter().any(|other| incomplete(&other));
        if missing || !self.can_do_without(node) {
            return;
        }
        self.crash(node);
        let old = self.take_out(node);
        self.clones.old.insert(node, old);
        self.clones.lost.insert(node);
        let step = CloneStep::Look;
        self.agenda
            .plan(self.now + LOOK_MS, Event::Clone { node, step });
    }

    /// Takes the disk out of a server that is down.
    fn take_out(&mut self, node: NodeId) -> Stored {
        let rows = self.checker.take_rows(node);
        let server = self.servers.get_mut(&node);
        let disk = server.map(|server| std::mem::take(&mut server.disk));
        Stored {
            disk: disk.unwrap_or_default(),
            rows,
        }
    }

    fn put_in(&mut self, node: NodeId, stored: Stored) {
        let Stored { disk, rows } = stored;
        self.checker
            .on_other_disk(node, disk.members, &disk.finished, rows);
        if let Some(server) = self.servers.get_mut(&node) {
            server.disk = disk;
        }
    }

    pub fn clone_step(&mut self, node: NodeId, step: CloneStep) {
        match step {
            CloneStep::Look => self.look_at_others(node),
            CloneStep::Slots => self.await_slots(node),
            CloneStep::Copy => self.copy_donor(node),
            CloneStep::Late => self.make_late_slot(node),
        }
    }

    fn again(&mut self, node: NodeId, pause: Millis, step: CloneStep) {
        self.agenda
            .plan(self.now + pause, Event::Clone { node, step });
    }

    fn look_at_others(&mut self, node: NodeId) {
        self.clones.making.remove(&node);
        let others = self.configured.without(node);
        let place = self.clones.between(0, others.len() as u64 - 1) as usize;
        let donor = others.iter().nth(place);
        let Some(donor) = donor.filter(|donor| self.position(node, *donor).is_some()) else {
            return self.again(node, LOOK_MS, CloneStep::Look);
        };
        self.number_copy(node);
        let asked = others.iter().filter_map(|other| {
            let disk = &self.servers.get(&other)?.disk;
            Some((other, (disk.flushed, disk.prepared.clone())))
        });
        let making = Making {
            donor,
            asked: asked.collect(),
            begins: BTreeMap::new(),
        };
        self.clones.making.insert(node, making);
        self.again(node, 1, CloneStep::Slots);
    }

    /// From now on an older life is not listened to. Old disks may be started from here on.
    fn number_copy(&mut self, node: NodeId) {
        let old = self.clones.old.get(&node).map_or(0, |old| old.disk.epoch);
        let before = self.clones.least.get(&node).copied().unwrap_or(0);
        self.clones.least.insert(node, old.max(before) + LIVES);
        for _ in 0..self.clones.between(0, RETURNS) {
            let at = self.now + self.clones.between(1, 3 * OLD_MS);
            self.agenda.plan(at, Event::OldDisk { node });
        }
    }

    /// The membership record of the donor, if every other node says that the lost one can be replaced.
    fn position(&self, lost: NodeId, donor: NodeId) -> Option<MembershipRecord> {
        let record = self.servers.get(&donor)?.disk.members;
        self.memory(donor)?;
        if self.clones.breaks(CloneFault::AnyTime) {
            return record;
        }
        let others = self.configured.without(lost);
        let agrees = |node: NodeId| {
            let (disk, members) = (&self.servers.get(&node)?.disk, self.members_of(node)?);
            let found = disk.members?;
            let num = record?.num();
            let linked = self.links.get(&pair(node, lost)).is_some_and(|it| it.up);
            let member = found.current.generation.members == others;
            let voted = found.last_vote.num == num && found.num() == num;
            let online = members.open.is_some_and(|open| open.num == num) && !members.left;
            let older = disk.prepared.iter().any(|gid| gid.generation < num);
            (member && voted && online && found.online_in == num && !older && !linked).then_some(())
        };
        let all = others.iter().all(|node| agrees(node).is_some());
        record.filter(|_| all)
    }

    fn await_slots(&mut self, node: NodeId) {
        let at_once = self.clones.breaks(CloneFault::SlotAtOnce);
        let Some(making) = self.clones.making.get(&node) else {
            return;
        };
        if !making
            .asked
            .keys()
            .all(|other| self.memory(*other).is_some())
        {
            return self.again(node, LOOK_MS, CloneStep::Look);
        }
        let ready = |(other, (_, prepared)): (&NodeId, &(usize, BTreeSet<Gid>))| {
            let disk = &self.servers.get(other)?.disk;
            (at_once || disk.prepared.is_disjoint(prepared))
                .then_some((*other, Lsn(disk.flushed as u64)))
        };
        let begins: Option<BTreeMap<NodeId, Lsn>> = making.asked.iter().map(ready).collect();
        let Some(begins) = begins else {
            return self.again(node, 1, CloneStep::Slots);
        };
        if let Some(making) = self.clones.making.get_mut(&node) {
            making.begins = begins;
        }
        let takes = self.clones.between(1, COPY_MS);
        self.again(node, takes, CloneStep::Copy);
    }

    fn copy_donor(&mut self, node: NodeId) {
        let Some(making) = self.clones.making.remove(&node) else {
            return;
        };
        let Some(record) = self.position(node, making.donor) else {
            return self.again(node, LOOK_MS, CloneStep::Look);
        };
        if self.clones.returned.contains(&node) {
            self.old_disk_ends(node);
        }
        let stored = self.copy_of(node, &making, record);
        let start = making.asked.get(&making.donor).map_or(0, |asked| asked.0);
        self.clones.decodable.insert((making.donor, node), start);
        self.clones.lost.remove(&node);
        self.put_in(node, stored);
        self.clones.made += 1;
        let late = self.clones.breaks(CloneFault::SlotAfterCopy);
        let pause = self.clones.between(1, 200);
        if late {
            return self.again(node, pause, CloneStep::Late);
        }
        self.agenda.plan(self.now + pause, Event::Restart { node });
    }

    /// The donor's disk at this moment, made that of the node.
    fn copy_of(&mut self, node: NodeId, making: &Making, record: MembershipRecord) -> Stored {
        let donor = making.donor;
        let epoch = self.clones.least.get(&node).copied().unwrap_or_default();
        let length = self.longest_wal(node);
        if let Some((server, checker)) = self.disk(donor) {
            server.flush_all(checker);
        }
        let rows = self.checker.rows_of(donor);
        let disk = self.servers.get(&donor).map(|server| server.disk.clone());
        let disk = disk.unwrap_or_default();
        let mut marks = making.begins.clone();
        marks.insert(donor, Lsn(disk.flushed as u64));
        let keeps = self.clones.breaks(CloneFault::KeepsPrepared);
        let members = if self.clones.breaks(CloneFault::DonorsRecord) {
            record
        } else {
            MembershipRecord {
                online_in: GenerationNum(0),
                recovered_to: GenerationNum(0),
                ..record
            }
        };
        let copied = Copied {
            from: donor,
            generation: record.num(),
            marks_move: self.clones.breaks(CloneFault::MarksMove),
        };
        Stored {
            disk: Disk {
                epoch,
                prepared: disk.prepared.into_iter().filter(|_| keeps).collect(),
                finished: disk.finished,
                marks,
                members: Some(members),
                stream: vec![StreamItem::Gap; length],
                flushed: length,
                copied: Some(copied),
                ..Disk::default()
            },
            rows,
        }
    }

    /// Beyond all that anybody has seen of the node's WAL.
    fn longest_wal(&self, node: NodeId) -> usize {
        let stored = [self.clones.old.get(&node), self.clones.aside.get(&node)];
        let stored = stored.into_iter().flatten().map(|it| it.disk.stream.len());
        let seen = self.configured.iter().map(|peer| {
            let received = self.memory(peer).and_then(|it| it.received.get(&node));
            received.map_or(0, |lsn| lsn.0 as usize)
        });
        stored.chain(seen).max().unwrap_or(0) + 1
    }

    fn make_late_slot(&mut self, node: NodeId) {
        let from = self.copied(node).map(|copied| copied.from);
        let end = from.and_then(|from| Some(self.servers.get(&from)?.disk.flushed));
        if let (Some(from), Some(end)) = (from, end)
            && let Some(server) = self.servers.get_mut(&node)
        {
            server.disk.marks.insert(from, Lsn(end as u64));
            self.clones.decodable.insert((from, node), end);
        }
        self.agenda.plan(self.now, Event::Restart { node });
    }

    /// Whether the slot can show a transaction that ends in the donor's WAL: it was begun behind the place where the slot was asked for.
    pub fn is_decodable(&self, donor: NodeId, node: NodeId, gid: Gid) -> bool {
        let start = self.clones.decodable.get(&(donor, node)).copied();
        let Some(start) = start.filter(|start| *start > 0) else {
            return true;
        };
        let Some(server) = self.servers.get(&donor) else {
            return true;
        };
        let before = server.disk.stream.iter().take(start);
        let mut before =
            before.filter(|item| matches!(item, StreamItem::Prepare(other) if *other == gid));
        before.next().is_none()
    }

    /// Somebody starts the node's old directory: instead of the copy, or before there is one.
    pub fn start_old_disk(&mut self, node: NodeId) {
        let least = self.clones.least.get(&node).copied().unwrap_or_default();
        // What was lost after the last copy had been numbered is the node itself.
        let is_old = |old: &Stored| old.disk.epoch < least.saturating_sub(LIVES / 2);
        if self.clones.returned.contains(&node) || !self.clones.old.get(&node).is_some_and(is_old) {
            return;
        }
        let Some(old) = self.clones.old.remove(&node) else {
            return;
        };
        if !self.clones.lost.contains(&node) {
            self.crash(node);
            let copy = self.take_out(node);
            self.clones.aside.insert(node, copy);
        }
        self.clones.returned.insert(node);
        self.clones.returns += 1;
        self.put_in(node, old);
        self.restart(node);
        let at = self.now + self.clones.between(1, OLD_MS);
        self.agenda.plan(at, Event::OldDiskEnds { node });
    }

    pub fn old_disk_ends(&mut self, node: NodeId) {
        if !self.clones.returned.contains(&node) {
            return;
        }
        self.crash(node);
        self.clones.returned.remove(&node);
        let old = self.take_out(node);
        self.clones.old.insert(node, old);
        if let Some(copy) = self.clones.aside.remove(&node) {
            self.put_in(node, copy);
            self.restart(node);
        }
    }
}
