//! Users' own prepared transactions across generations, in a small world of their own: nodes 1 and 2 work all the time, node 3 is left out, recovers from
//! one of them and comes back, and its receivers start again at any time.
//!
//! A user's PREPARE TRANSACTION has no generation in its name, and its finish travels apart from it, in the stream of whichever node the user was on. What
//! is checked: nothing that has ended on node 3 is prepared there again, and in the end it holds what the others hold. The rules are in
//! `docs/membership.md`, *Users' prepared transactions*; each can be broken.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::membership::{Admission, Generation, Phase, Standing};
use protocol::{GenerationNum, Gid, NodeId, NodeSet};

use crate::rng::Rng;

/// Steps of one run, before everything is brought to an end.
const STEPS: u64 = 160;
/// Enough for node 3 to read everything, recover and come back.
const CALM_ROUNDS: usize = 400;

/// A rule broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsersFault {
    /// A receiver that starts takes its peer's WAL for one of the generation in which this node was online last.
    GenerationOfOnline,
    /// A finish does not wait for the streams that may bring its PREPARE again, and stores the mark of the one that brought it.
    OneMark,
    /// A finish that comes while this node is not online is carried out, or passed over, at once.
    FinishAtOnce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Marker(u32),
    /// `own` are those that the ordinary stream shows.
    Prepare {
        name: u32,
        own: bool,
    },
    Finish {
        name: u32,
        own: bool,
    },
}

/// A working node: its WAL, and finishes of the other one that it has not carried out yet.
#[derive(Default)]
struct Peer {
    wal: Vec<Item>,
    late: VecDeque<u32>,
}

/// What node 3 keeps about one stream.
#[derive(Clone, Default)]
struct Stream {
    read: usize,
    generation: u32,
    /// What was stored: the place, and the generation that the WAL is in there.
    mark: (usize, u32),
    /// The mark stays before the first of these in whose generation this node is not online.
    fences: VecDeque<(usize, u32)>,
    /// Finishes that wait, with their places. The mark stays before them.
    aside: VecDeque<(usize, u32)>,
    /// Where the WAL ended when this was begun: before that it may bring again what is here.
    again: usize,
}

struct Small {
    rng: Rng,
    fault: Option<UsersFault>,
    names: u32,
    generation: u32,
    /// Node 3 is a member.
    member: bool,
    /// Prepared everywhere but perhaps on node 3, whose vote is awaited.
    awaited: BTreeSet<u32>,
    prepared: BTreeSet<u32>,
    peers: [Peer; 2],
    streams: [Stream; 2],
    standing: Standing,
    here: BTreeSet<u32>,
    ended: BTreeSet<u32>,
    /// `mtm.recovered`.
    known: BTreeSet<u32>,
    recovery: Option<(usize, usize, u32)>,
    violation: Option<String>,
    log: Option<Vec<String>>,
}

/// Runs one seed; the error says what broke.
pub fn run_users_seed(seed: u64, fault: Option<UsersFault>) -> Result<(), String> {
    Small::new(seed, fault).run(seed)
}

/// Runs one seed and returns what happened on node 3 and in the WAL of the others, one a line, with the result.
pub fn trace_users_seed(seed: u64) -> (Vec<String>, Result<(), String>) {
    let mut small = Small::new(seed, None);
    small.log = Some(Vec::new());
    let result = small.run(seed);
    (small.log.unwrap_or_default(), result)
}

impl Small {
    fn new(seed: u64, fault: Option<UsersFault>) -> Self {
        let stream = Stream {
            generation: 1,
            mark: (0, 1),
            ..Stream::default()
        };
        let mut small = Self {
            rng: Rng::new(seed),
            fault,
            names: 0,
            generation: 1,
            member: true,
            awaited: BTreeSet::new(),
            prepared: BTreeSet::new(),
            peers: [Peer::default(), Peer::default()],
            streams: [stream.clone(), stream],
            standing: Standing::default(),
            here: BTreeSet::new(),
            ended: BTreeSet::new(),
            known: BTreeSet::new(),
            recovery: None,
            violation: None,
            log: None,
        };
        small.stand(Phase::Online);
        small.standing.online_in = GenerationNum(1);
        small
    }

    fn run(&mut self, seed: u64) -> Result<(), String> {
        for _ in 0..STEPS {
            self.step();
        }
        self.note(|| "calm".to_owned());
        self.calm();
        self.violation
            .as_ref()
            .map_or(Ok(()), |broken| Err(format!("seed {seed}: {broken}")))
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(line());
        }
    }

    fn stand(&mut self, phase: Phase) {
        self.standing.phase = phase;
        self.standing.current = Generation {
            num: GenerationNum(self.generation),
            members: NodeSet::from_bits(if self.member { 0b111 } else { 0b11 }),
        };
    }

    fn is_online(&self) -> bool {
        self.standing.phase == Phase::Online
    }

    fn step(&mut self) {
        let which = self.rng.between(0, 1) as usize;
        match self.rng.between(0, 99) {
            0..=11 => self.prepare(which),
            12..=23 => self.finish(which),
            24..=33 => self.catch_up(which),
            34..=69 => self.read(which),
            70..=74 => self.store(which),
            75..=79 => self.restart(),
            80..=82 if self.is_online() => self.change(false),
            83..=97 if !self.is_online() => self.recover(which),
            98..=99 if !self.member => self.change(true),
            _ => {}
        }
    }

    /// A user prepares on a working node; the other one follows at once.
    fn prepare(&mut self, on: usize) {
        self.names += 1;
        let name = self.names;
        self.note(|| format!("node {}: PREPARE {name}", on + 1));
        for (place, peer) in self.peers.iter_mut().enumerate() {
            let own = place == on;
            peer.wal.push(Item::Prepare { name, own });
        }
        self.prepared.insert(name);
        if self.member {
            self.awaited.insert(name);
        }
    }

    /// The user ends one that was answered, on either node.
    fn finish(&mut self, on: usize) {
        let mut answered = self.prepared.difference(&self.awaited);
        let count = self.prepared.len() - self.awaited.len();
        if count > 0 {
            let place = self.rng.between(0, count as u64 - 1) as usize;
            if let Some(name) = answered.nth(place).copied() {
                self.end(on, name);
            }
        }
    }

    fn end(&mut self, on: usize, name: u32) {
        self.note(|| format!("node {}: finish of {name}", on + 1));
        self.prepared.remove(&name);
        self.peers[on].wal.push(Item::Finish { name, own: true });
        self.peers[1 - on].late.push_back(name);
    }

    /// The other node's finish is carried out.
    fn catch_up(&mut self, on: usize) {
        let peer = &mut self.peers[on];
        if let Some(name) = peer.late.pop_front() {
            peer.wal.push(Item::Finish { name, own: false });
        }
    }

    /// Another generation, with node 3 or without it. What still awaits its vote is rolled back.
    fn change(&mut self, member: bool) {
        for name in std::mem::take(&mut self.awaited) {
            let on = self.rng.between(0, 1) as usize;
            self.end(on, name);
        }
        self.generation += 1;
        self.member = member;
        let num = self.generation;
        self.note(|| format!("generation {num}, node 3 a member: {member}"));
        for peer in &mut self.peers {
            peer.wal.push(Item::Marker(self.generation));
        }
        self.stand(if member {
            Phase::Recovering
        } else {
            Phase::Outside
        });
    }

    /// Node 3 reads the next item of an ordinary stream.
    fn read(&mut self, from: usize) {
        let at = self.streams[from].read;
        let Some(item) = self.peers[from].wal.get(at).copied() else {
            return;
        };
        let generation = self.streams[from].generation;
        match item {
            Item::Marker(num) => {
                let stream = &mut self.streams[from];
                stream.generation = stream.generation.max(num);
                stream.fences.push_back((at, num));
            }
            Item::Prepare { name, own: true } => {
                let Some(answer) = self.admit(from, generation) else {
                    return;
                };
                let here = self.here.contains(&name);
                if answer == Admission::Apply && !here {
                    self.prepare_here(name);
                }
                if here || answer == Admission::Apply {
                    self.awaited.remove(&name);
                }
                if answer == Admission::SetAside {
                    self.streams[from].fences.push_back((at, generation));
                }
            }
            Item::Finish { name, own: true } => self.finish_from(from, generation, name),
            Item::Prepare { .. } | Item::Finish { .. } => {}
        }
        self.streams[from].read = at + 1;
        self.note(|| {
            format!(
                "node 3 reads {at} of {}: {item:?} of {generation}",
                from + 1
            )
        });
        self.look_again();
    }

    /// What the standing says; none when the stream is held.
    fn admit(&self, from: usize, generation: u32) -> Option<Admission> {
        let three = NodeId::new(3)?;
        let gid = Gid {
            coordinator: NodeId::new(from as u8 + 1)?,
            xid: 1,
            generation: GenerationNum(generation),
            members: NodeSet::from_bits(0b111),
            started_at: 0,
        };
        let answer = self.standing.admit(three, gid);
        (answer != Admission::Hold).then_some(answer)
    }

    fn prepare_here(&mut self, name: u32) {
        if self.ended.contains(&name) {
            self.violation
                .get_or_insert(format!("{name} is prepared again after it has ended"));
        }
        self.note(|| format!("node 3 prepares {name}"));
        self.here.insert(name);
    }

    fn finish_from(&mut self, from: usize, generation: u32, name: u32) {
        let early = GenerationNum(generation) > self.standing.online_in;
        let may_come_again = self.streams.iter().any(|stream| stream.read < stream.again);
        let waits = early && self.fault != Some(UsersFault::FinishAtOnce)
            || may_come_again && self.fault != Some(UsersFault::OneMark);
        if waits {
            let at = self.streams[from].read;
            self.streams[from].aside.push_back((at, name));
        } else {
            self.finish_here(from, name);
        }
    }

    /// Finishes that were set aside, when nothing stands against them any more.
    fn look_again(&mut self) {
        let known = self
            .streams
            .iter()
            .all(|stream| stream.read >= stream.again);
        if !self.is_online() || !known && self.fault != Some(UsersFault::OneMark) {
            return;
        }
        for from in 0..self.streams.len() {
            for (_, name) in std::mem::take(&mut self.streams[from].aside) {
                self.finish_here(from, name);
            }
        }
    }

    fn finish_here(&mut self, from: usize, name: u32) {
        for stream in 0..self.streams.len() {
            if self.fault != Some(UsersFault::OneMark) || from == stream {
                self.store(stream);
            }
        }
        if self.here.remove(&name) {
            self.note(|| format!("node 3 ends {name}"));
            self.ended.insert(name);
        }
    }

    fn store(&mut self, which: usize) {
        let stream = &mut self.streams[which];
        let online_in = self.standing.online_in.0;
        while stream
            .fences
            .front()
            .is_some_and(|(_, num)| *num <= online_in)
        {
            stream.fences.pop_front();
        }
        let fence = stream.fences.front().map_or(stream.read, |(at, _)| *at);
        let upto = stream.aside.front().map_or(fence, |(at, _)| fence.min(*at));
        if upto > stream.mark.0 {
            let before = self.peers[which].wal[..upto].iter();
            let generation = before.filter_map(|item| match item {
                Item::Marker(num) => Some(*num),
                _ => None,
            });
            stream.mark = (upto, generation.max().unwrap_or(1));
        }
    }

    /// Receivers and recovery begin again from what is stored.
    fn restart(&mut self) {
        self.note(|| "node 3 starts its receivers again".to_owned());
        let online_in = self.standing.online_in.0;
        for (stream, peer) in self.streams.iter_mut().zip(&self.peers) {
            let (read, generation) = stream.mark;
            let generation = match self.fault {
                Some(UsersFault::GenerationOfOnline) => online_in,
                _ => generation,
            };
            *stream = Stream {
                read,
                generation,
                mark: stream.mark,
                again: peer.wal.len(),
                ..Stream::default()
            };
        }
        self.recovery = None;
    }

    /// The next item of the donor's WAL, of whatever origin.
    fn recover(&mut self, donor: usize) {
        let (from, at, generation) =
            *self
                .recovery
                .get_or_insert((donor, self.streams[donor].mark.0, 0));
        let Some(item) = self.peers[from].wal.get(at).copied() else {
            return;
        };
        let missing = generation > self.standing.online_in.0;
        let mut now = generation;
        match item {
            Item::Marker(num) => now = now.max(num),
            Item::Prepare { name, .. } if missing => {
                if !self.known.contains(&name) && !self.here.contains(&name) {
                    self.prepare_here(name);
                }
            }
            Item::Finish { name, .. } => {
                if missing {
                    self.known.insert(name);
                }
                if self.here.remove(&name) {
                    self.ended.insert(name);
                }
            }
            Item::Prepare { .. } => {}
        }
        self.note(|| {
            format!(
                "node 3 recovers {at} of {}: {item:?} of {generation}",
                from + 1
            )
        });
        self.recovery = Some((from, at + 1, now));
        if self.member && item == Item::Marker(self.generation) {
            self.come_online();
        }
    }

    fn come_online(&mut self) {
        self.note(|| "node 3 comes online".to_owned());
        self.standing.online_in = GenerationNum(self.generation);
        self.standing.recovered_to = GenerationNum(self.generation);
        self.stand(Phase::Online);
        self.recovery = None;
        self.known.clear();
        self.look_again();
    }

    /// Everybody comes to the end of everything.
    fn calm(&mut self) {
        if !self.member {
            self.change(true);
        }
        for _ in 0..CALM_ROUNDS {
            for which in 0..self.peers.len() {
                self.catch_up(which);
                if !self.is_online() {
                    self.recover(which);
                }
                self.read(which);
            }
        }
        let open: BTreeMap<&str, Vec<u32>> = [
            (
                "missing",
                self.prepared.difference(&self.here).copied().collect(),
            ),
            (
                "left over",
                self.here.difference(&self.prepared).copied().collect(),
            ),
            ("still awaited", self.awaited.iter().copied().collect()),
        ]
        .into_iter()
        .filter(|(_, names): &(_, Vec<u32>)| !names.is_empty())
        .collect();
        if !self.is_online() || !open.is_empty() {
            self.violation.get_or_insert(format!("in the end {open:?}"));
        }
    }
}
