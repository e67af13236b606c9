//! What the shell around a core does: inputs of all kinds, sessions, finishes. Streams and applies are in `apply`.

use protocol::membership::MembershipInput;
use protocol::{Decision, Fault, Gid, Input, NodeId, Outcome, Vote};

use crate::event::{ApplyStep, Event, SessionStep};
use crate::server::{Session, StreamItem};
use crate::world::{Plan, TICK_MS, World};

impl World {
    pub fn happen(&mut self, event: Event) {
        if let Some(until) = self.postponed(&event) {
            return self.agenda.plan(until, event);
        }
        match event {
            Event::Strike(hazard) => self.strike(hazard),
            Event::Silence { from, to } => self.on_silence(from, to),
            Event::Audible { from, to } => self.unmute(from, to),
            Event::Deliver {
                link,
                from,
                to,
                msg,
            } => self.deliver(link, from, to, msg),
            Event::Client { node } => self.begin(node),
            Event::Crash { node } => self.crash(node),
            Event::Restart { node } => self.restart(node),
            Event::DiskLost { node } => self.lose_disk(node),
            Event::Clone { node, step } => self.clone_step(node, step),
            Event::OldDisk { node } => self.start_old_disk(node),
            Event::OldDiskEnds { node } => self.old_disk_ends(node),
            Event::ArbiterEnds { node } => self.end_arbiter(node),
            Event::ArbiterStarts { node, life } if self.life(node) == life => {
                self.start_arbiter(node);
            }
            Event::ArbiterStarts { .. } => {}
            Event::Cut { a, b, stream_only } => self.cut(a, b, stream_only),
            Event::Connect { a, b } => self.connect(a, b),
            Event::ConnectStream { origin, to } => self.connect_stream(origin, to),
            Event::Stream {
                connection,
                origin,
                to,
                lsn,
                deps,
            } => {
                self.on_stream(connection, origin, to, lsn, deps);
            }
            Event::Heartbeat {
                link,
                from,
                to,
                beat,
            } => self.on_heartbeat(link, from, to, &beat),
            Event::AskReferee {
                node,
                life,
                request,
            } => self.on_asked(node, life, request),
            Event::LoseReferee { nodes } => self.lose_referee(nodes),
            Event::FindReferee { nodes } => self.find_referee(nodes),
            Event::Members { node, life, .. }
            | Event::MembersStored { node, life }
            | Event::WriteMarker { node, life, .. }
            | Event::Beat { node, life }
            | Event::Recover { node, life, .. }
            | Event::Loop { node, life, .. }
            | Event::Prepared { node, life, .. }
            | Event::Tick { node, life }
            | Event::Flushed { node, life, .. }
            | Event::Session { node, life, .. }
            | Event::Finish { node, life, .. }
            | Event::LookUp { node, life, .. }
            | Event::Apply { node, life, .. }
            | Event::StoreMarks { node, life }
            | Event::MarkStored { node, life, .. }
            | Event::Judge { node, life, .. }
            | Event::LinkDown { node, life, .. } => {
                if self.is_alive(node, life, &event) {
                    self.happen_on(node, event);
                }
            }
        }
    }

    fn happen_on(&mut self, node: NodeId, event: Event) {
        let life = self.life(node);
        match event {
            Event::Loop { msg, .. } => self.input(node, Input::Message { from: node, msg }),
            Event::Prepared { gid, lsn, .. } => self.tell_vote(node, gid, lsn, Vote::Yes),
            Event::LinkDown { peer, .. } => self.lose_link(node, peer),
            Event::Tick { .. } => {
                self.input(node, Input::Tick);
                self.tick_members(node);
                self.agenda
                    .plan(self.now + TICK_MS, Event::Tick { node, life });
            }
            Event::Flushed { upto, .. } => {
                if let Some((server, checker)) = self.disk(node) {
                    server.flush(upto, checker);
                }
                self.open_gates(node, upto);
            }
            Event::Members { input, .. } => self.members(node, input),
            Event::Judge { peer, .. } => {
                let stuck = self.is_stalled(peer);
                self.members(node, MembershipInput::Stuck { peer, stuck });
            }
            Event::MembersStored { .. } => self.members_stored(node),
            Event::WriteMarker { num, .. } => self.write_marker(node, num),
            Event::Beat { .. } => self.beat(node, true),
            Event::Recover { from, number, .. } => self.recover_step(node, from, number),
            Event::Session { gid, step, .. } => self.on_session(node, gid, step),
            Event::Finish { gid, decision, .. } => {
                if let Some(memory) = self.memory_mut(node) {
                    memory.orders -= 1;
                }
                self.finish(node, gid, decision);
            }
            Event::LookUp { gid, .. } => self.look_up(node, gid),
            Event::Apply {
                gid,
                step: ApplyStep::Start,
                ..
            } => self.start_apply(node, gid),
            Event::Apply {
                gid,
                step: ApplyStep::Prepare,
                ..
            } => self.end_apply(node, gid),
            Event::StoreMarks { .. } => self.store_marks(node),
            Event::MarkStored {
                origin, lsn, upto, ..
            } => {
                if let Some((server, checker)) = self.disk(node) {
                    server.flush(upto, checker);
                }
                self.input(node, Input::MarkPassed { origin, lsn });
            }
            _ => {}
        }
    }

    /// A client begins a transaction that writes one row, unless another one holds it.
    fn begin(&mut self, node: NodeId) {
        let key = self.rng.between(1, self.climate.keys) as u32;
        let life = self.life(node);
        self.xids += 1;
        let started_at = (self.now * 1_000 + self.xids) as i64;
        let Some(generation) = self.open_generation(node) else {
            return;
        };
        let gid = Gid {
            coordinator: node,
            xid: self.xids,
            generation: generation.num,
            members: generation.members,
            started_at,
        };
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        if memory.locks.contains_key(&key) {
            return;
        }
        memory.locks.insert(key, gid);
        memory.sessions.insert(gid, Session::Running);
        self.plans.insert(gid, Plan { key });
        self.later(
            1,
            10,
            Event::Session {
                node,
                life,
                gid,
                step: SessionStep::Prepare,
            },
        );
    }

    fn on_session(&mut self, node: NodeId, gid: Gid, step: SessionStep) {
        let state = self
            .memory(node)
            .and_then(|memory| memory.sessions.get(&gid).copied());
        match (step, state) {
            (SessionStep::Prepare, Some(Session::Running)) => self.prepare_own(node, gid),
            (SessionStep::Announce, Some(Session::Waiting)) => {
                self.input(
                    node,
                    Input::Committing {
                        gid,
                        wait_peers: true,
                        // Both ways of deciding, side by side.
                        fast: self.decides_fast(gid),
                    },
                );
            }
            (SessionStep::Interrupt, Some(Session::Waiting)) => {
                self.input(node, Input::Interrupted { gid })
            }
            (SessionStep::Vanish, Some(Session::Waiting | Session::Finishing(_))) => {
                if let Some(memory) = self.memory_mut(node) {
                    memory.sessions.remove(&gid);
                    memory.handed.remove(&gid);
                }
                self.input(node, Input::Abandoned { gid });
            }
            (SessionStep::Finish, Some(Session::Finishing(decision))) => {
                if let Some((server, _)) = self.disk(node) {
                    server.write_handed(gid);
                }
                self.finish(node, gid, decision);
                self.answer(gid, decision);
            }
            _ => {}
        }
    }

    /// Every second transaction; with a fault in the precommits none, since those are what has to be seen then.
    fn decides_fast(&self, gid: Gid) -> bool {
        self.fault != Some(Fault::UndurableAccept) && gid.xid.is_multiple_of(2)
    }

    fn prepare_own(&mut self, node: NodeId, gid: Gid) {
        let life = self.life(node);
        if !self.may_prepare(node, gid) {
            return self.drop_session(node, gid);
        }
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let Some(memory) = &mut server.memory else {
            return;
        };
        memory.sessions.insert(gid, Session::Waiting);
        server.flush_all(checker);
        let committed = server
            .disk
            .finished
            .iter()
            .filter(|(_, decision)| **decision == Decision::Commit);
        let seen = committed.map(|(gid, _)| *gid).collect();
        server.disk.prepared.insert(gid);
        server.disk.log(StreamItem::Prepare(gid));
        checker.on_prepared(node, gid, Some(seen));
        self.pump_all(node);
        self.disturb(node, gid);
        self.later(
            0,
            15,
            Event::Session {
                node,
                life,
                gid,
                step: SessionStep::Announce,
            },
        );
    }

    pub fn on_reply(&mut self, node: NodeId, gid: Gid, outcome: Outcome) {
        let life = self.life(node);
        let Some(memory) = self.memory_mut(node) else {
            return;
        };
        if !memory.sessions.contains_key(&gid) {
            return;
        }
        let decision = match outcome {
            Outcome::Unknown => {
                memory.sessions.remove(&gid);
                return self.checker.on_told(gid, None);
            }
            Outcome::Commit { .. } => Decision::Commit,
            Outcome::Abort(_) => Decision::Abort,
        };
        memory.sessions.insert(gid, Session::Finishing(decision));
        if decision == Decision::Commit && !self.decides_fast(gid) {
            // A majority of precommits decides, whatever becomes of the backend.
            self.demand_commits_survive(&[gid]);
        }
        self.later(
            1,
            10,
            Event::Session {
                node,
                life,
                gid,
                step: SessionStep::Finish,
            },
        );
    }

    /// The session has finished its transaction, durably, and answers its client.
    fn answer(&mut self, gid: Gid, decision: Decision) {
        self.checker.on_told(gid, Some(decision));
        if decision == Decision::Commit {
            self.demand_commits_survive(&[gid]);
        }
    }

    /// COMMIT or ROLLBACK PREPARED, by whoever was told to.
    fn finish(&mut self, node: NodeId, gid: Gid, decision: Decision) {
        let key = self.plans.get(&gid).map(|plan| plan.key);
        let Some((server, checker)) = self.disk(node) else {
            return;
        };
        let Some(memory) = &mut server.memory else {
            return;
        };
        memory.sessions.remove(&gid);
        memory.handed.remove(&gid);
        if server.disk.prepared.remove(&gid) {
            if memory.locks.get(&key.unwrap_or(0)) == Some(&gid) {
                memory.locks.remove(&key.unwrap_or(0));
            }
            server.flush_all(checker);
            let before = server.disk.finished.insert(gid, decision);
            checker.demand(before.is_none_or(|before| before == decision), "I6", || {
                format!("{gid} changes at {node}")
            });
            checker.on_finished(node, gid, decision);
            if gid.coordinator == node || server.disk.members.is_some() {
                server.disk.log(StreamItem::Outcome(gid, decision));
                self.pump_all(node);
            }
            if decision == Decision::Commit {
                let key = key.unwrap_or(0);
                self.checker.on_row_committed(node, key, gid);
            }
        } else {
            let finished = server.disk.finished.contains_key(&gid);
            checker.demand(finished, "I8", || {
                format!("{gid} is finished at {node}, where it never was prepared")
            });
        }
        self.input(node, Input::Finished { gid });
    }

    fn look_up(&mut self, node: NodeId, gid: Gid) {
        let Some(server) = self.servers.get(&node) else {
            return;
        };
        let running = server
            .memory
            .as_ref()
            .is_some_and(|memory| memory.sessions.contains_key(&gid));
        let outcome = match server.disk.finished.get(&gid) {
            Some(decision) => Some(*decision),
            None if running || server.disk.prepared.contains(&gid) => None,
            None => Some(Decision::Abort),
        };
        self.input(node, Input::CoordinatorOutcome { gid, outcome });
    }
}
