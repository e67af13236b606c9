//! The lease of this node: promises in heartbeats, and the moment until which backends may serve reads.

use super::main_link::HeartbeatTimes;
use crate::pg::clock;
use crate::pg::shared::shared;
use mesh::MeshHandle;
use protocol::{Grant, Leases, Millis, NodeId, NodeSet};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use wire::frame::Heartbeat;

/// Tag of a heartbeat's extra: the sender's promises, as `Vec<Grant>`.
const GRANTS_TAG: u16 = 2;
/// Tag of a heartbeat's extra: the sender's heartbeat times, milliseconds.
const TIMES_TAG: u16 = 3;
/// A promise lasts a quarter of the silence after which a node counts as dead: whoever dies under load is missed for no longer.
const LASTS_OF_SILENCE: u64 = 4;
/// It lasts at least so many heartbeats, or it would end between two of them.
const LASTS_HALF_HEARTBEATS: u64 = 5;
/// The longest promise, milliseconds: after a start, a node takes all of its earlier life for running that long.
pub const LASTS_MS_MAX: Millis = 2_000;
/// Parts of the time between heartbeats within which a node is answered once only.
const ANSWERS_PER_HEARTBEAT: u64 = 4;

/// Promises given and taken; time is the mesh's.
pub struct LeaseKeeper {
    leases: Leases,
    times: HeartbeatTimes,
    /// `clock::monotonic_ms` when the mesh's clock was zero, or a little before.
    began_ms: u64,
    answered: BTreeMap<NodeId, Millis>,
}

impl LeaseKeeper {
    pub fn new(
        node: NodeId,
        epoch: u32,
        configured: NodeSet,
        times: HeartbeatTimes,
        mesh: &MeshHandle,
    ) -> LeaseKeeper {
        let now = clock::monotonic_ms();
        LeaseKeeper {
            leases: Leases::new(node, epoch, configured, duration(times)),
            times,
            began_ms: now.saturating_sub(mesh.now_ms() + 1),
            answered: BTreeMap::new(),
        }
    }

    /// Whether this node serves without anybody's promise, or needs them from now on.
    pub fn set_alone(&mut self, alone: bool) {
        let until = if alone { Millis::MAX } else { self.until() };
        shared().lease_until_ms.store(until, Ordering::Release);
    }

    /// End of the lease by the promises of others, as `clock::monotonic_ms`.
    fn until(&self) -> Millis {
        self.began_ms.saturating_add(self.leases.until())
    }

    /// The heartbeat times have changed.
    pub fn reconfigure(&mut self, times: HeartbeatTimes) {
        self.times = times;
        self.leases.set_duration(duration(times));
    }

    /// Takes in a peer's heartbeat: promises to it what it asks for, and lets backends serve as long as the promises of a majority last.
    pub fn on_heartbeat(&mut self, from: NodeId, heartbeat: &Heartbeat, mesh: &MeshHandle) {
        let now = mesh.now_ms();
        self.leases
            .heard(from, heartbeat.epoch, heartbeat.sent_ms, now);
        self.leases.on_grants(from, &grants_of(heartbeat));
        shared()
            .lease_until_ms
            .fetch_max(self.until(), Ordering::AcqRel);
    }

    /// Sends the promise soon, and not only with the next regular heartbeat: the way there and back is then all that a lease loses.
    pub fn answer(&mut self, to: NodeId, mesh: &MeshHandle) {
        let now = mesh.now_ms();
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
    pub fn unbound(&self, mesh: &MeshHandle, nodes: NodeSet) -> NodeSet {
        let now = mesh.now_ms();
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
    pub fn extras(&self) -> impl Iterator<Item = (u16, Vec<u8>)> {
        let grants: Vec<Grant> = self.leases.grants().collect();
        let config = bincode::config::standard();
        let grants = bincode::serde::encode_to_vec(&grants, config);
        let times = bincode::serde::encode_to_vec((self.times.send_ms, self.times.recv_ms), config);
        let found = [(GRANTS_TAG, grants), (TIMES_TAG, times)].into_iter();
        found.filter_map(|(tag, bytes)| Some((tag, bytes.ok()?)))
    }
}

/// The heartbeat times of the sender.
pub fn times_of(heartbeat: &Heartbeat) -> Option<HeartbeatTimes> {
    let bytes = extra_of(heartbeat, TIMES_TAG)?;
    let ((send_ms, recv_ms), _) =
        bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
    Some(HeartbeatTimes { send_ms, recv_ms })
}

/// The bytes that a heartbeat carries under a tag.
pub fn extra_of(heartbeat: &Heartbeat, tag: u16) -> Option<&[u8]> {
    let mut extras = heartbeat.extras.iter();
    extras
        .find(|(found, _)| *found == tag)
        .map(|(_, bytes)| bytes.as_slice())
}

fn duration(times: HeartbeatTimes) -> Millis {
    let lasts = (times.recv_ms / LASTS_OF_SILENCE).max(times.send_ms * LASTS_HALF_HEARTBEATS / 2);
    lasts.min(LASTS_MS_MAX)
}

fn grants_of(heartbeat: &Heartbeat) -> Vec<Grant> {
    extra_of(heartbeat, GRANTS_TAG)
        .and_then(|bytes| {
            bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()
        })
        .map_or_else(Vec::new, |(grants, _)| grants)
}
