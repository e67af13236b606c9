//! What goes wrong: crashes, cuts, lost messages, interrupted and vanishing sessions.

use protocol::membership::MembershipInput;
use protocol::{Effects, Input, Message, Millis, NodeId};

use crate::event::{Event, SessionStep};
use crate::rng::Rng;
use crate::world::{TICK_MS, World, pair};

/// How bad the weather is in one simulation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Climate {
    pub delay_max_ms: u64,
    pub loss_permille: u64,
    pub double_permille: u64,
    pub crashes: u64,
    pub cuts: u64,
    pub interrupt_permille: u64,
    pub vanish_permille: u64,
    /// Distinct rows that clients write; the fewer, the more conflicts.
    pub keys: u64,
    pub clients: u64,
    /// An apply fails for a reason of its own.
    pub refusal_permille: u64,
}

impl Climate {
    pub fn draw(rng: &mut Rng) -> Self {
        Self {
            delay_max_ms: rng.between(1, 30),
            loss_permille: if rng.permille(500) {
                rng.between(0, 80)
            } else {
                0
            },
            double_permille: if rng.permille(500) {
                rng.between(0, 80)
            } else {
                0
            },
            crashes: rng.between(0, 6),
            cuts: rng.between(0, 8),
            interrupt_permille: rng.between(0, 150),
            vanish_permille: rng.between(0, 100),
            keys: rng.between(2, 40),
            clients: rng.between(10, 40),
            refusal_permille: rng.between(0, 60),
        }
    }

    /// After healing nothing is lost and nobody interferes.
    pub const fn calm(self) -> Self {
        Self {
            loss_permille: 0,
            double_permille: 0,
            interrupt_permille: 0,
            vanish_permille: 0,
            refusal_permille: 0,
            ..self
        }
    }
}

impl World {
    /// Plans the faults and the clients of the stormy part.
    pub fn plan_storm(&mut self, storm_ms: Millis) {
        self.plan_referee(storm_ms);
        for node in self.configured.iter() {
            self.restart(node);
            for _ in 0..self.climate.clients {
                self.later(50, storm_ms, Event::Client { node });
            }
        }
        for _ in 0..self.climate.crashes {
            let node = self.some_node();
            self.later(100, storm_ms, Event::Crash { node });
        }
        if self.rng.permille(100) {
            let at = self.now + self.rng.between(100, storm_ms);
            for node in self.configured.iter() {
                self.agenda.plan(at, Event::Crash { node });
            }
        }
        for _ in 0..self.climate.cuts {
            let (a, b) = (self.some_node(), self.some_node());
            let stream_only = self.rng.permille(300);
            if a != b {
                self.later(100, storm_ms, Event::Cut { a, b, stream_only });
            }
        }
    }

    pub fn some_node(&mut self) -> NodeId {
        let place = self.rng.between(0, self.configured.len() as u64 - 1) as usize;
        self.configured.iter().nth(place).unwrap_or(self.first())
    }

    fn first(&self) -> NodeId {
        *self.servers.keys().next().expect("a cluster has nodes")
    }

    pub fn crash(&mut self, node: NodeId) {
        if self.memory(node).is_none() {
            return;
        }
        let unflushed = self
            .servers
            .get(&node)
            .map_or(0, |server| server.unflushed()) as u64;
        let kept = self.rng.between(0, unflushed) as usize;
        if let Some((server, checker)) = self.disk(node) {
            server.crash(kept, checker);
        }
        for peer in self.configured.without(node).iter() {
            self.cut(node, peer, false);
        }
        let committed = self.checker.told_committed();
        self.demand_commits_survive(&committed);
        self.later(20, 900, Event::Restart { node });
    }

    pub fn restart(&mut self, node: NodeId) {
        if self.memory(node).is_some() || !self.has_disk(node) {
            return;
        }
        let mut out = Effects::new();
        let now = self.now;
        let epoch = self.life(node) + 1;
        let config = self.config_of_copy(node, self.config(node, epoch));
        let Some(server) = self.servers.get_mut(&node) else {
            return;
        };
        server.disk.epoch = epoch;
        let locks = server
            .disk
            .prepared
            .iter()
            .filter_map(|gid| Some((self.plans.get(gid)?.key, *gid)))
            .collect();
        let clock = self.clock(node);
        let Some(server) = self.servers.get_mut(&node) else {
            return;
        };
        server.start(config, locks, clock, &mut out);
        let marks = server.disk.marks.clone();
        self.carry_out(node, &mut out);
        self.start_members(node);
        for (origin, lsn) in marks {
            self.input(node, Input::MarkPassed { origin, lsn });
        }
        self.agenda
            .plan(now + TICK_MS, Event::Tick { node, life: epoch });
        self.later(20, 100, Event::StoreMarks { node, life: epoch });
        for peer in self.configured.without(node).iter() {
            self.later(1, 200, Event::Connect { a: node, b: peer });
            self.plan_streams(node, peer);
        }
    }

    fn plan_streams(&mut self, a: NodeId, b: NodeId) {
        self.later(1, 300, Event::ConnectStream { origin: a, to: b });
        self.later(1, 300, Event::ConnectStream { origin: b, to: a });
    }

    /// Breaks the link and both streams of a pair, or the streams alone.
    pub fn cut(&mut self, a: NodeId, b: NodeId, stream_only: bool) {
        for (origin, to) in [(a, b), (b, a)] {
            self.drop_stream(origin, to);
        }
        let outage = self.rng.between(20, 1_500);
        if !stream_only {
            self.cut_link(a, b);
            self.agenda.plan(self.now + outage, Event::Connect { a, b });
        }
        self.agenda
            .plan(self.now + outage, Event::ConnectStream { origin: a, to: b });
        self.agenda
            .plan(self.now + outage, Event::ConnectStream { origin: b, to: a });
    }

    /// Both notice it, each at its own moment.
    pub fn cut_link(&mut self, a: NodeId, b: NodeId) {
        let link = self.links.entry(pair(a, b)).or_default();
        let was_up = std::mem::take(&mut link.up);
        link.number += 1;
        for (node, peer) in [(a, b), (b, a)] {
            if was_up {
                let life = self.life(node);
                let event = Event::LinkDown { node, life, peer };
                self.later(1, 19, event);
            }
        }
    }

    fn drop_stream(&mut self, origin: NodeId, to: NodeId) {
        let stream = self.streams.entry((origin, to)).or_default();
        stream.up = false;
        stream.number += 1;
    }

    /// Breaks one stream until then.
    pub fn break_stream(&mut self, origin: NodeId, to: NodeId, until: Millis) {
        self.drop_stream(origin, to);
        self.agenda.plan(until, Event::ConnectStream { origin, to });
    }

    /// The node notices a loss, unless a new link has come first: that tells it as much.
    pub fn lose_link(&mut self, node: NodeId, peer: NodeId) {
        let current = self.links.get(&pair(node, peer));
        if current.is_some_and(|current| !current.up) {
            self.input(node, Input::LinkDown { peer });
            self.members(node, MembershipInput::LinkDown { peer });
        }
    }

    pub fn connect(&mut self, a: NodeId, b: NodeId) {
        let both_up = self.has_arbiter(a) && self.has_arbiter(b);
        let both_up = both_up && self.is_listened_to(a) && self.is_listened_to(b);
        let link = self.links.entry(pair(a, b)).or_default();
        if link.up || !both_up {
            return;
        }
        link.up = true;
        link.number += 1;
        for (node, peer) in [(a, b), (b, a)] {
            let epoch = self.life(peer);
            self.input(node, Input::LinkUp { peer, epoch });
            self.members(node, MembershipInput::LinkUp { peer });
        }
    }

    pub fn deliver(&mut self, link: u32, from: NodeId, to: NodeId, msg: Message) {
        let current = self.links.get(&pair(from, to)).copied().unwrap_or_default();
        if !current.up || current.number != link {
            return;
        }
        if let Message::Membership(msg) = msg {
            self.members(to, MembershipInput::Message { from, msg });
        } else {
            self.input(to, Input::Message { from, msg });
        }
    }

    /// Ends all faults: everybody up, everything connected.
    pub fn heal(&mut self) {
        self.climate = self.climate.calm();
        self.heal_referee();
        self.hazards.calm();
        for node in self.configured.iter() {
            self.restart(node);
            for peer in self.configured.iter().filter(|peer| *peer > node) {
                self.later(1, 300, Event::Connect { a: node, b: peer });
                self.plan_streams(node, peer);
            }
        }
    }

    /// Interrupts or kills sessions at some moments of their commit.
    pub fn disturb(&mut self, node: NodeId, gid: protocol::Gid) {
        let life = self.life(node);
        let most = self.climate.delay_max_ms * 4 + 30;
        if self.rng.permille(self.climate.interrupt_permille) {
            self.later(
                1,
                most,
                Event::Session {
                    node,
                    life,
                    gid,
                    step: SessionStep::Interrupt,
                },
            );
        }
        if self.rng.permille(self.climate.vanish_permille) {
            self.later(
                1,
                most,
                Event::Session {
                    node,
                    life,
                    gid,
                    step: SessionStep::Vanish,
                },
            );
        }
    }
}
