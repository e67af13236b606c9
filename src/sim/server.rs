//! One simulated server: its disk, its WAL, and what a crash takes away.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::arbiter::Told;
use crate::checker::Checker;
use crate::members::Members;
use protocol::membership::MembershipRecord;
use protocol::{
    Config, Core, Csn, Decision, Effect, Effects, GenerationNum, Gid, Lsn, Millis, NodeId, Record,
    Recovered,
};

/// What a node's stream carries, in WAL order; its place, counted from one, is its LSN.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StreamItem {
    Prepare(Gid),
    Outcome(Gid, Decision),
    /// What is older than this generation lies before it.
    Marker(GenerationNum),
    /// A recovering node: transactions of generations up to this one may follow.
    Fence(GenerationNum),
    /// Nothing: the WAL of a copy begins behind that of the node that it replaces.
    Gap,
}

/// Written to WAL, in order. Reaches the disk at the next flush, or not at all.
#[derive(Clone, Debug)]
enum WalItem {
    Record(Record),
    Free(Gid),
    Mark(NodeId, Lsn),
    /// A transaction that came through a donor, committed without waiting for the disk; this node's WAL ends there.
    Recovered {
        gid: Gid,
        key: u32,
        end: usize,
    },
}

/// Where a disk comes from that is a copy of another node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copied {
    pub from: NodeId,
    /// The generation in which it was made.
    pub generation: GenerationNum,
    /// A broken rule: marks move on before the copy has been online.
    pub marks_move: bool,
}

/// What survives a crash.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    pub epoch: u32,
    pub records: BTreeMap<Gid, Record>,
    pub prepared: BTreeSet<Gid>,
    pub finished: BTreeMap<Gid, Decision>,
    pub marks: BTreeMap<NodeId, Lsn>,
    pub members: Option<MembershipRecord>,
    /// This node's WAL. The ordinary stream shows what is its own; without membership nothing else is in it.
    pub stream: Vec<StreamItem>,
    /// How much of it is flushed, and thus shown to others.
    pub flushed: usize,
    pub copied: Option<Copied>,
}

impl Disk {
    /// Puts something into WAL that is flushed at once, like all before it.
    pub fn log(&mut self, item: StreamItem) {
        self.stream.push(item);
        self.flushed = self.stream.len();
    }

    /// What others can read.
    pub fn shown(&self) -> &[StreamItem] {
        &self.stream[..self.flushed]
    }
}

/// A client's transaction on its own node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Session {
    Running,
    /// Prepared; waits for the outcome.
    Waiting,
    /// Has its outcome and is about to finish.
    Finishing(Decision),
}

/// Effects that wait until an earlier record of the same transaction is durable.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    pub upto: u64,
    pub queue: VecDeque<Effect>,
}

/// What a crash takes away.
#[derive(Debug)]
pub(crate) struct Memory {
    pub core: Core,
    pub gates: BTreeMap<Gid, Gate>,
    pub sessions: BTreeMap<Gid, Session>,
    /// Records of commits that the session has been told of and writes itself.
    pub handed: BTreeMap<Gid, Record>,
    pub visible: BTreeMap<NodeId, Csn>,
    /// Foreign transactions being applied, or waiting to be.
    pub applying: BTreeMap<Gid, Applying>,
    /// Who holds each key: running, being applied or prepared.
    pub locks: BTreeMap<u32, Gid>,
    /// Up to where each origin's stream has been received, and which PREPAREs in it have been dealt with.
    pub received: BTreeMap<NodeId, Lsn>,
    pub dealt: BTreeSet<(NodeId, Lsn)>,
    /// Orders to finish that a process has not carried out yet.
    pub orders: usize,
    /// While there is no arbiter: what its next life will hear.
    pub unheard: Option<VecDeque<Told>>,
    /// What it is about to hear.
    pub told: VecDeque<Told>,
    /// The epoch in which the server was started; later ones are those of its arbiter.
    pub born: u32,
    /// Membership and what belongs to it; none when all nodes are members for ever.
    pub members: Option<Members>,
}

#[derive(Clone, Debug)]
pub(crate) struct Applying {
    pub lsn: Lsn,
    pub deps: Vec<(NodeId, Csn)>,
    pub holds_lock: bool,
}

#[derive(Debug)]
pub(crate) struct Server {
    pub node: NodeId,
    pub disk: Disk,
    wal: VecDeque<WalItem>,
    wal_written: u64,
    /// `None` while it is down.
    pub memory: Option<Memory>,
}

impl Server {
    pub fn new(node: NodeId) -> Self {
        Self {
            node,
            disk: Disk::default(),
            wal: VecDeque::new(),
            wal_written: 0,
            memory: None,
        }
    }

    /// Starts the server with what is on its disk.
    pub fn start(
        &mut self,
        config: Config,
        locks: BTreeMap<u32, Gid>,
        now: Millis,
        out: &mut Effects,
    ) {
        self.memory = Some(Memory {
            core: Core::new(config, self.recovered(), now, out),
            gates: BTreeMap::new(),
            sessions: BTreeMap::new(),
            handed: BTreeMap::new(),
            visible: BTreeMap::new(),
            applying: BTreeMap::new(),
            locks,
            received: BTreeMap::new(),
            dealt: BTreeSet::new(),
            orders: 0,
            unheard: None,
            told: VecDeque::new(),
            born: self.disk.epoch,
            members: None,
        });
    }

    /// Starts another core beside what goes on.
    pub fn restart_core(&mut self, config: Config, now: Millis, out: &mut Effects) {
        let recovered = self.recovered();
        if let Some(memory) = &mut self.memory {
            memory.core = Core::new(config, recovered, now, out);
            memory.told = memory.unheard.take().unwrap_or_default();
        }
    }

    /// What a core finds when it starts.
    fn recovered(&self) -> Vec<Recovered> {
        let gids: BTreeSet<Gid> = self
            .disk
            .records
            .keys()
            .chain(&self.disk.prepared)
            .copied()
            .collect();
        gids.into_iter()
            .map(|gid| Recovered {
                gid,
                record: self.disk.records.get(&gid).copied(),
                prepared: self.disk.prepared.contains(&gid),
            })
            .collect()
    }

    /// Loses memory, and WAL behind the first `kept` unflushed items.
    pub fn crash(&mut self, kept: usize, checker: &mut Checker) {
        let kept = kept.min(self.wal.len());
        self.sync(kept, checker);
        for lost in self.wal.drain(..) {
            if let WalItem::Recovered { gid, .. } = lost {
                self.disk.finished.remove(&gid);
            }
        }
        self.disk.stream.truncate(self.disk.flushed);
        self.memory = None;
    }

    pub fn unflushed(&self) -> usize {
        self.wal.len()
    }

    /// A session that waits for its outcome writes the record of its commit itself, with its finish; false when there is none.
    pub fn hand_over(&mut self, gid: Gid, record: Record) -> bool {
        let Some(memory) = &mut self.memory else {
            return false;
        };
        let waits = memory.sessions.get(&gid) == Some(&Session::Waiting);
        let taken = waits && record.decision == Some(Decision::Commit);
        if taken {
            memory.handed.insert(gid, record);
        }
        taken
    }

    /// The session is about to finish: what it was handed precedes that in WAL.
    pub fn write_handed(&mut self, gid: Gid) {
        let memory = self.memory.as_mut();
        if let Some(record) = memory.and_then(|memory| memory.handed.remove(&gid)) {
            self.write_record(record);
        }
    }

    pub fn write_record(&mut self, record: Record) -> u64 {
        self.write(WalItem::Record(record))
    }

    pub fn write_free(&mut self, gid: Gid) -> u64 {
        self.write(WalItem::Free(gid))
    }

    pub fn write_mark(&mut self, origin: NodeId, lsn: Lsn) -> u64 {
        self.write(WalItem::Mark(origin, lsn))
    }

    /// Commits a transaction that came through a donor; visible at once, durable with the next flush.
    pub fn write_recovered(&mut self, gid: Gid, key: u32) {
        self.disk.finished.insert(gid, Decision::Commit);
        let commit = StreamItem::Outcome(gid, Decision::Commit);
        self.disk.stream.push(commit);
        let end = self.disk.stream.len();
        self.write(WalItem::Recovered { gid, key, end });
    }

    fn write(&mut self, item: WalItem) -> u64 {
        self.wal.push_back(item);
        self.wal_written += 1;
        self.wal_written
    }

    /// The record as the next start would find it if all of WAL got to the disk.
    pub fn written_record(&self, gid: Gid) -> Option<Record> {
        let last = self.wal.iter().rev().find_map(|item| match item {
            WalItem::Record(record) if record.gid == gid => Some(Some(*record)),
            WalItem::Free(freed) if *freed == gid => Some(None),
            _ => None,
        });
        last.unwrap_or_else(|| self.disk.records.get(&gid).copied())
    }

    /// Brings WAL up to this item to the disk.
    pub fn flush(&mut self, upto: u64, checker: &mut Checker) {
        let unflushed_from = self.wal_written - self.wal.len() as u64;
        self.sync(upto.saturating_sub(unflushed_from) as usize, checker);
    }

    /// Brings all of WAL to the disk, as PREPARE and COMMIT PREPARED do.
    pub fn flush_all(&mut self, checker: &mut Checker) {
        self.sync(self.wal.len(), checker);
    }

    fn sync(&mut self, items: usize, checker: &mut Checker) {
        for item in self.wal.drain(..items) {
            match item {
                WalItem::Record(record) => {
                    self.disk.records.insert(record.gid, record);
                    checker.on_durable(self.node, record);
                }
                WalItem::Free(gid) => {
                    self.disk.records.remove(&gid);
                    checker.on_freed(self.node, gid);
                }
                WalItem::Mark(origin, lsn) => {
                    self.disk.marks.insert(origin, lsn);
                }
                WalItem::Recovered { gid, key, end } => {
                    self.disk.flushed = end;
                    checker.on_finished(self.node, gid, Decision::Commit);
                    checker.on_row_committed(self.node, key, gid);
                }
            }
        }
    }

    /// The largest LSN of the origin's stream up to which nothing has to be sent again.
    pub fn mark(&self, origin: NodeId, stream: &[StreamItem]) -> Lsn {
        let stored = self.disk.marks.get(&origin).copied().unwrap_or_default();
        let Some(memory) = &self.memory else {
            return stored;
        };
        // Of the section in which a copy was made it does not hold all, whatever the ordinary stream shows.
        let incomplete = self.disk.copied.is_some_and(|copied| !copied.marks_move)
            && self
                .disk
                .members
                .is_some_and(|record| record.online_in == GenerationNum(0));
        if incomplete {
            return stored;
        }
        let received = memory.received.get(&origin).copied().unwrap_or_default();
        let mut mark = stored;
        // An old disk of the origin may be in its place.
        while mark < received
            && let Some(item) = stream.get(mark.0 as usize)
            && self.is_safe(origin, Lsn(mark.0 + 1), *item, memory)
        {
            mark = Lsn(mark.0 + 1);
        }
        mark
    }

    /// A PREPARE is safe when it is prepared here, finished here, or refused. Outcomes need no rule: their PREPARE goes before them,
    /// and what is prepared here will be finished by the core.
    fn is_safe(&self, origin: NodeId, lsn: Lsn, item: StreamItem, memory: &Memory) -> bool {
        let gid = match item {
            StreamItem::Prepare(gid) if gid.coordinator == origin => gid,
            StreamItem::Marker(num) | StreamItem::Fence(num) => {
                return self
                    .disk
                    .members
                    .is_none_or(|record| num <= record.online_in);
            }
            _ => return true,
        };
        if self.disk.members.is_some_and(|record| {
            let over = gid.generation < record.online_in;
            gid.generation < record.recovered_to || (over && !gid.members.contains(self.node))
        }) {
            return true;
        }
        let kept = self.disk.prepared.contains(&gid) || self.disk.finished.contains_key(&gid);
        let refused = self
            .written_record(gid)
            .is_some_and(|record| record.decision == Some(Decision::Abort));
        memory.dealt.contains(&(origin, lsn)) && (kept || refused)
    }
}
