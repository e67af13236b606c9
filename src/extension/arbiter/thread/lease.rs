//! The lease of this node: promises in heartbeats, and the moment until which backends may serve reads.

use super::extras::{self, Extra};
use super::main_link::HeartbeatTimes;
use crate::pg::clock;
use crate::pg::shared::shared;
use mesh::MeshHandle;
use protocol::{Grant, Leases, Millis, NodeId, NodeSet};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use wire::frame::Heartbeat;

/// A promise lasts a quarter of the silence after which a node counts as dead: whoever dies under load is missed for no longer.
const LASTS_OF_SILENCE: u64 = 4;
/// It lasts at least so many heartbeats, or it would end between two of them.
const LASTS_HALF_HEARTBEATS: u64 = 5;
/// The longest promise, milliseconds: after a start, a node takes all of its earlier life for running that long.
pub const LASTS_MS_MAX: Millis = 2_000;
/// Heartbeats are sent at least this often, milliseconds, whatever the setting says: the longest promise would end between two of them otherwise.
pub const SEND_MS_MAX: u64 = LASTS_MS_MAX * 2 / LASTS_HALF_HEARTBEATS;
/// Parts of the time between heartbeats within which a node is answered once only.
const ANSWERS_PER_HEARTBEAT: u64 = 4;

/// Promises given and taken; time is that of `clock::monotonic_ms`, with which heartbeats are stamped.
pub struct LeaseKeeper {
    leases: Leases,
    times: HeartbeatTimes,
    answered: BTreeMap<NodeId, Millis>,
    /// This node has said good-bye, which released its peers from their promises.
    ended: bool,
}

impl LeaseKeeper {
    pub fn new(
        node: NodeId,
        epoch: u32,
        configured: NodeSet,
        times: HeartbeatTimes,
    ) -> LeaseKeeper {
        LeaseKeeper {
            leases: Leases::new(node, epoch, configured, duration(times)),
            times,
            answered: BTreeMap::new(),
            ended: false,
        }
    }

    /// Whether this node serves without anybody's promise, or needs them from now on.
    pub fn set_alone(&mut self, alone: bool) {
        match (self.ended, alone) {
            (true, _) => shared().lease_until_ms.store(0, Ordering::Release),
            (false, true) => shared().renew_lease(Millis::MAX),
            // What lies behind it may be less than what has been shown.
            (false, false) => shared()
                .lease_until_ms
                .store(self.leases.until(), Ordering::Release),
        }
    }

    /// Backends serve nothing from now on, whatever is promised.
    pub fn end(&mut self) {
        self.ended = true;
        shared().lease_until_ms.store(0, Ordering::Release);
    }

    /// The heartbeat times have changed.
    pub fn reconfigure(&mut self, times: HeartbeatTimes) {
        self.times = times;
    }

    /// Takes in a peer's heartbeat: promises to it what it asks for, and lets backends serve as long as the promises of a majority last.
    pub fn on_heartbeat(&mut self, from: NodeId, heartbeat: &Heartbeat) {
        let now = clock::monotonic_ms();
        // Whoever asks less often has to be promised for longer.
        let theirs = times_of(heartbeat).map_or(0, |times| between_heartbeats(times.send_ms));
        let lasts = duration(self.times).max(theirs).min(LASTS_MS_MAX);
        self.leases.set_duration(lasts);
        self.leases
            .heard(from, heartbeat.epoch, heartbeat.sent_ms, now);
        self.leases.on_grants(from, &grants_of(heartbeat));
        if !self.ended {
            shared().renew_lease(self.leases.until());
        }
    }

    /// Sends the promise soon, and not only with the next regular heartbeat: the way there and back is then all that a lease loses.
    pub fn answer(&mut self, to: NodeId, mesh: &MeshHandle) {
        let now = clock::monotonic_ms();
        let pause = self.times.send_ms / ANSWERS_PER_HEARTBEAT;
        let last = self.answered.get(&to).copied();
        if last.is_none_or(|last| now >= last + pause) {
            self.answered.insert(to, now);
            mesh.beat(to);
        }
    }

    /// Only these nodes are promised anything from now on.
    pub fn withhold_from_all_but(&mut self, members: NodeSet) {
        self.leases.withhold_from_all_but(members);
    }

    /// The peer serves nothing any more.
    pub fn released_by(&mut self, peer: NodeId) {
        self.leases.released_by(peer);
    }

    /// Those of the nodes to which no promise is running.
    pub fn unbound(&self, nodes: NodeSet) -> NodeSet {
        let now = clock::monotonic_ms();
        nodes
            .iter()
            .filter(|node| self.leases.bound_until(NodeSet::EMPTY.with(*node)) <= now)
            .collect()
    }

    /// The heartbeat times that hold here.
    pub fn times(&self) -> HeartbeatTimes {
        self.times
    }

    /// What heartbeats carry.
    pub fn extras(&self) -> impl Iterator<Item = Extra> {
        let grants: Vec<Grant> = self.leases.grants().collect();
        let times = (self.times.send_ms, self.times.recv_ms, self.times.slow_ms);
        [
            extras::put(extras::GRANTS, &grants),
            extras::put(extras::TIMES, &times),
        ]
        .into_iter()
        .flatten()
    }
}

/// The heartbeat times of the sender.
pub fn times_of(heartbeat: &Heartbeat) -> Option<HeartbeatTimes> {
    let (send_ms, recv_ms, slow_ms) = extras::get(heartbeat, extras::TIMES)?;
    Some(HeartbeatTimes {
        send_ms,
        recv_ms,
        slow_ms,
    })
}

fn duration(times: HeartbeatTimes) -> Millis {
    let lasts = (times.recv_ms / LASTS_OF_SILENCE).max(between_heartbeats(times.send_ms));
    lasts.min(LASTS_MS_MAX)
}

/// How long a promise has to last at least so that it is renewed in time.
const fn between_heartbeats(send_ms: u64) -> Millis {
    send_ms * LASTS_HALF_HEARTBEATS / 2
}

fn grants_of(heartbeat: &Heartbeat) -> Vec<Grant> {
    extras::get(heartbeat, extras::GRANTS).unwrap_or_default()
}
