//! Streams and applies: how a PREPARE gets from its node to the others, and what the conflict rule does to it.

use protocol::{Csn, Decision, Gid, Input, Lsn, NodeId, Refusal, Vote};

use crate::event::{ApplyStep, Event};
use crate::server::{Applying, Session, StreamItem};
use crate::world::World;

impl World {
    pub fn connect_stream(&mut self, origin: NodeId, to: NodeId) {
        if self.memory(origin).is_none() || self.memory(to).is_none() {
            return;
        }
        if !self.reads_streams(origin) || !self.reads_streams(to) {
            return;
        }
        let confirmed = self
            .servers
            .get(&to)
            .and_then(|server| server.disk.marks.get(&origin))
            .copied()
            .unwrap_or_default();
        let stream = self.streams.entry((origin, to)).or_default();
        if stream.up {
            return;
        }
        stream.up = true;
        stream.number += 1;
        stream.sent = confirmed.0 as usize;
        stream.last_arrival = 0;
        if let Some(memory) = self.memory_mut(to) {
            memory.received.insert(origin, confirmed);
        }
        self.bound_prepares(origin, to);
        self.pump(origin, to);
    }

    /// What was found at the start may not come again.
    fn bound_prepares(&mut self, origin: NodeId, to: NodeId) {
        let lsn = self.stream_end(origin);
        let Some(disk) = self.servers.get(&to).map(|server| &server.disk) else {
            return;
        };
        let found = disk
            .records
            .keys()
            .chain(&disk.prepared)
            .filter(|gid| gid.coordinator == origin);
        let found: Vec<Gid> = found.copied().collect();
        for gid in found {
            self.input(to, Input::PrepareBefore { gid, lsn });
        }
    }

    /// The last position that an ordinary stream shows.
    fn stream_end(&self, origin: NodeId) -> Lsn {
        let shown = self.servers.get(&origin).and_then(|server| {
            let mut items = server.disk.shown().iter();
            items.rposition(|item| !is_foreign(*item, origin))
        });
        Lsn(shown.map_or(0, |place| place as u64 + 1))
    }

    pub fn pump_all(&mut self, origin: NodeId) {
        for to in self.configured.without(origin).iter() {
            self.pump(origin, to);
        }
    }

    /// Sends what the stream has not sent yet. What is visible now is what the output plugin writes down.
    fn pump(&mut self, origin: NodeId, to: NodeId) {
        let Some(memory) = self.memory(origin) else {
            return;
        };
        let deps: Vec<_> = memory
            .visible
            .iter()
            .map(|(node, csn)| (*node, *csn))
            .collect();
        let Some(log) = self.servers.get(&origin).map(|server| server.disk.shown()) else {
            return;
        };
        let written = log.len();
        let slowest = self.climate.delay_max_ms;
        loop {
            let now = self.now;
            let Some(stream) = self.streams.get_mut(&(origin, to)) else {
                return;
            };
            if !stream.up || stream.sent >= written {
                return;
            }
            stream.sent += 1;
            if log
                .get(stream.sent - 1)
                .is_some_and(|item| is_foreign(*item, origin))
            {
                continue;
            }
            let delay = self.rng.between(1, slowest);
            stream.last_arrival = stream.last_arrival.max(now + delay);
            let lsn = Lsn(stream.sent as u64);
            let event = Event::Stream {
                connection: stream.number,
                origin,
                to,
                lsn,
                deps: deps.clone(),
            };
            self.agenda.plan(stream.last_arrival, event);
        }
    }

    pub fn on_stream(
        &mut self,
        connection: u32,
        origin: NodeId,
        to: NodeId,
        lsn: Lsn,
        deps: Vec<(NodeId, Csn)>,
    ) {
        let current = self
            .streams
            .get(&(origin, to))
            .is_some_and(|stream| stream.up && stream.number == connection);
        let item = self
            .servers
            .get(&origin)
            .and_then(|server| server.disk.stream.get(lsn.0 as usize - 1))
            .copied();
        let (true, Some(item), Some(memory)) = (current, item, self.memory_mut(to)) else {
            return;
        };
        memory.received.insert(origin, lsn);
        if self
            .servers
            .get(&to)
            .is_some_and(|server| server.disk.marks.get(&origin) >= Some(&lsn))
        {
            return;
        }
        match item {
            StreamItem::Outcome(gid, decision) => {
                self.input(to, Input::StreamOutcome { gid, decision });
            }
            StreamItem::Prepare(gid) => self.on_prepare(to, gid, lsn, deps),
            StreamItem::Marker(_) | StreamItem::Fence(_) | StreamItem::Gap => {}
        }
    }

    pub fn on_prepare(&mut self, node: NodeId, gid: Gid, lsn: Lsn, deps: Vec<(NodeId, Csn)>) {
        let Some(server) = self.servers.get_mut(&node) else {
            return;
        };
        // Its record says what has become of it. Of what it has recovered a node has none.
        let decision = server
            .written_record(gid)
            .filter(|_| gid.members.contains(node))
            .and_then(|record| record.decision);
        let refused = decision == Some(Decision::Abort);
        let known = server.disk.prepared.contains(&gid) || decision == Some(Decision::Commit);
        let Some(memory) = &mut server.memory else {
            return;
        };
        if memory.applying.contains_key(&gid) {
            return;
        }
        if known {
            return self.vote(node, gid, lsn, Vote::Yes);
        }
        if refused {
            return self.vote(node, gid, lsn, Vote::No(refusal("it was refused before")));
        }
        // The mark waits for it, whatever was said of it when it came before.
        memory.dealt.remove(&(gid.coordinator, lsn));
        let applying = Applying {
            lsn,
            deps,
            holds_lock: false,
        };
        self.admit(node, gid, applying);
    }

    pub fn vote(&mut self, node: NodeId, gid: Gid, lsn: Lsn, vote: Vote) {
        if let Some(memory) = self.memory_mut(node) {
            memory.applying.remove(&gid);
            if let Some(members) = &mut memory.members {
                members.aside.remove(&gid);
            }
        }
        self.tell_vote(node, gid, lsn, vote);
    }

    /// The worker's word reaches the core; from then on the mark may pass.
    pub fn tell_vote(&mut self, node: NodeId, gid: Gid, lsn: Lsn, vote: Vote) {
        if let Some(memory) = self.memory_mut(node) {
            memory.dealt.insert((gid.coordinator, lsn));
        }
        self.input(
            node,
            Input::Voted {
                gid,
                vote,
                prepare_lsn: lsn,
            },
        );
    }

    /// Tries again the applies that waited for an earlier commit.
    pub fn start_applies(&mut self, node: NodeId) {
        let life = self.life(node);
        let Some(memory) = self.memory(node) else {
            return;
        };
        let waiting: Vec<Gid> = memory
            .applying
            .iter()
            .filter(|(_, applying)| !applying.holds_lock)
            .map(|(gid, _)| *gid)
            .collect();
        for gid in waiting {
            self.agenda.plan(
                self.now,
                Event::Apply {
                    node,
                    life,
                    gid,
                    step: ApplyStep::Start,
                },
            );
        }
    }

    /// Applies the conflict rule: who meets an older prepared or applied transaction dies, who meets a younger one waits.
    pub fn start_apply(&mut self, node: NodeId, gid: Gid) {
        let life = self.life(node);
        let Some(key) = self.plans.get(&gid).map(|plan| plan.key) else {
            return;
        };
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let Some(memory) = &mut server.memory else {
            return;
        };
        let Some(applying) = memory.applying.get(&gid) else {
            return;
        };
        let behind = applying
            .deps
            .iter()
            .filter(|(node, _)| gid.members.contains(*node))
            .any(|(node, csn)| memory.core.settled(*node) < *csn);
        if behind || applying.holds_lock {
            return;
        }
        let lsn = applying.lsn;
        let holder = memory.locks.get(&key).copied();
        let running =
            holder.is_some_and(|holder| memory.sessions.get(&holder) == Some(&Session::Running));
        match holder {
            Some(holder) if !running && holder.age() < gid.age() => {
                self.vote(
                    node,
                    gid,
                    lsn,
                    Vote::No(refusal("it meets an older transaction")),
                );
            }
            Some(_) => self.later(
                2,
                10,
                Event::Apply {
                    node,
                    life,
                    gid,
                    step: ApplyStep::Start,
                },
            ),
            None => {
                checker.on_apply_start(node, gid, &server.disk.finished);
                memory.locks.insert(key, gid);
                if let Some(applying) = memory.applying.get_mut(&gid) {
                    applying.holds_lock = true;
                }
                self.later(
                    1,
                    10,
                    Event::Apply {
                        node,
                        life,
                        gid,
                        step: ApplyStep::Prepare,
                    },
                );
            }
        }
    }

    pub fn end_apply(&mut self, node: NodeId, gid: Gid) {
        let life = self.life(node);
        let fails = self.rng.permille(self.climate.refusal_permille);
        let key = self.plans.get(&gid).map_or(0, |plan| plan.key);
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let Some(memory) = &mut server.memory else {
            return;
        };
        let Some(applying) = memory.applying.get(&gid) else {
            return;
        };
        if !memory
            .members
            .as_ref()
            .is_none_or(|members| members.applies(gid))
        {
            return self.set_aside_old(node);
        }
        let lsn = applying.lsn;
        if fails {
            memory.locks.remove(&key);
            return self.vote(node, gid, lsn, Vote::No(refusal("its apply failed")));
        }
        server.flush_all(checker);
        server.disk.prepared.insert(gid);
        if server.disk.members.is_some() {
            server.disk.log(StreamItem::Prepare(gid));
        }
        checker.on_prepared(node, gid, None);
        if let Some(memory) = &mut server.memory {
            memory.applying.remove(&gid);
        }
        // The worker's word takes a moment to reach the core; a resolver may ask in between.
        self.later(
            0,
            10,
            Event::Prepared {
                node,
                life,
                gid,
                lsn,
            },
        );
    }

    /// What was skipped, or will never be sent, has to be forgotten all the same.
    fn place_the_unplaced(&mut self, node: NodeId) {
        let Some(memory) = self.memory(node) else {
            return;
        };
        let unplaced: Vec<Gid> = memory.core.unplaced(self.clock(node), 500).collect();
        for gid in unplaced {
            let origin = gid.coordinator;
            let up = self
                .streams
                .get(&(origin, node))
                .is_some_and(|stream| stream.up);
            if up {
                let lsn = self.stream_end(origin);
                self.input(node, Input::PrepareBefore { gid, lsn });
            }
        }
    }

    pub fn store_marks(&mut self, node: NodeId) {
        let life = self.life(node);
        if self.changing {
            self.place_the_unplaced(node);
        }
        for origin in self.configured.without(node).iter() {
            let Some(stream) = self
                .servers
                .get(&origin)
                .map(|server| server.disk.stream.clone())
            else {
                continue;
            };
            let Some(server) = self.servers.get_mut(&node) else {
                continue;
            };
            let mark = server.mark(origin, &stream);
            if mark > server.disk.marks.get(&origin).copied().unwrap_or_default() {
                let upto = server.write_mark(origin, mark);
                self.later(
                    1,
                    8,
                    Event::MarkStored {
                        node,
                        life,
                        origin,
                        lsn: mark,
                        upto,
                    },
                );
            }
        }
        self.later(50, 150, Event::StoreMarks { node, life });
    }
}

/// Whether an ordinary stream leaves it out.
fn is_foreign(item: StreamItem, origin: NodeId) -> bool {
    match item {
        StreamItem::Prepare(gid) | StreamItem::Outcome(gid, _) => gid.coordinator != origin,
        StreamItem::Marker(_) | StreamItem::Fence(_) | StreamItem::Gap => false,
    }
}

pub(crate) fn refusal(reason: &str) -> Refusal {
    Refusal::retry("could not serialize access", reason)
}
