//! Recovery from a donor: its WAL, transaction by transaction, until its marker.

use protocol::membership::MembershipInput;
use protocol::{Decision, Gid, NodeId};

use crate::event::Event;
use crate::server::{Session, StreamItem};
use crate::world::World;

/// Items behind the donor at which a node takes itself for level.
const LEVEL_ITEMS: usize = 20;

impl World {
    pub fn recover(&mut self, node: NodeId, from: NodeId) {
        let life = self.life(node);
        let mark = self
            .servers
            .get(&node)
            .and_then(|server| server.disk.marks.get(&from))
            .copied()
            .unwrap_or_default();
        let Some(members) = self.members_mut(node) else {
            return;
        };
        members.cursor = Some((from, mark.0 as usize));
        members.recoveries += 1;
        let number = members.recoveries;
        let event = Event::Recover {
            node,
            life,
            from,
            number,
        };
        self.later(5, 50, event);
    }

    /// Applies the donor's next commit, if nothing stands against it.
    pub fn recover_step(&mut self, node: NodeId, from: NodeId, number: u64) {
        let life = self.life(node);
        let cursor = self
            .members_of(node)
            .filter(|members| members.recoveries == number)
            .and_then(|members| members.cursor);
        let Some((_, at)) = cursor.filter(|(donor, _)| *donor == from) else {
            return;
        };
        let event = Event::Recover {
            node,
            life,
            from,
            number,
        };
        let linked = self
            .streams
            .get(&(from, node))
            .is_some_and(|stream| stream.up && !self.is_paused(from));
        let Some(donor) = self.servers.get(&from).filter(|_| linked) else {
            return self.later(5, 20, event);
        };
        let shown = donor.disk.shown();
        let (length, item) = (shown.len(), shown.get(at).copied());
        let in_doubt = self
            .servers
            .get(&node)
            .is_some_and(|server| !server.disk.prepared.is_empty());
        let Some(item) = item.filter(|_| !in_doubt) else {
            self.tell_level(node, from, length - at);
            return self.later(2, 10, event);
        };
        if let StreamItem::Outcome(gid, Decision::Commit) = item
            && self.is_missing(node, gid)
            && self.is_decodable(from, node, gid)
        {
            if !self.apply_recovered(node, gid) {
                return self.later(2, 10, event);
            }
            self.later(1, 2, event);
        } else {
            self.agenda.plan(self.now, event);
        }
        if let Some(members) = self.members_mut(node) {
            members.cursor = Some((from, at + 1));
        }
        self.tell_level(node, from, length - at - 1);
        if let StreamItem::Marker(num) = item {
            if let Some((server, checker)) = self.disk(node) {
                server.flush_all(checker);
            }
            self.members(node, MembershipInput::MarkerReached { from, num });
        }
    }

    fn tell_level(&mut self, node: NodeId, from: NodeId, behind: usize) {
        let level = behind <= LEVEL_ITEMS;
        self.members(node, MembershipInput::Level { from, level });
    }

    fn is_missing(&self, node: NodeId, gid: Gid) -> bool {
        let Some(server) = self.servers.get(&node) else {
            return false;
        };
        let online_in = server.disk.members.map(|record| record.online_in);
        gid.coordinator != node
            && !server.disk.finished.contains_key(&gid)
            && online_in.is_some_and(|online_in| gid.generation > online_in)
    }

    /// Applies and commits in one step; says whether it could.
    fn apply_recovered(&mut self, node: NodeId, gid: Gid) -> bool {
        let key = self.plans.get(&gid).map_or(0, |plan| plan.key);
        let lazy = self.hazards.lazy_recovery;
        let Some((server, checker)) = self.disk(node) else {
            return false;
        };
        let Some(memory) = &mut server.memory else {
            return false;
        };
        if let Some(holder) = memory.locks.get(&key).copied() {
            // A session that still runs gives way.
            if memory.sessions.get(&holder) == Some(&Session::Running) {
                memory.sessions.remove(&holder);
                memory.locks.remove(&key);
            }
            return false;
        }
        checker.on_apply_start(node, gid, &server.disk.finished);
        if let Some(members) = &mut memory.members
            && members.fenced < gid.generation
        {
            members.fenced = gid.generation;
            server.flush_all(checker);
            server.disk.log(StreamItem::Fence(gid.generation));
        }
        server.write_recovered(gid, key);
        if !lazy {
            server.flush_all(checker);
        }
        self.recovered += 1;
        self.pump_all(node);
        true
    }
}
