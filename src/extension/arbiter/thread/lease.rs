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
/// A promise lasts a quarter of the silence after which a node counts as dead: whoever dies under load is missed for no longer.
const LASTS_OF_SILENCE: u64 = 4;
/// It lasts at least so many heartbeats, or it would end between two of them.
const LASTS_HALF_HEARTBEATS: u64 = 5;
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
        let until = self.began_ms.saturating_add(self.leases.until());
        shared().lease_until_ms.fetch_max(until, Ordering::AcqRel);
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

    /// What heartbeats carry.
    pub fn extra(&self) -> Option<(u16, Vec<u8>)> {
        let grants: Vec<Grant> = self.leases.grants().collect();
        let bytes = bincode::serde::encode_to_vec(&grants, bincode::config::standard()).ok()?;
        Some((GRANTS_TAG, bytes))
    }
}

fn duration(times: HeartbeatTimes) -> Millis {
    (times.recv_ms / LASTS_OF_SILENCE).max(times.send_ms * LASTS_HALF_HEARTBEATS / 2)
}

fn grants_of(heartbeat: &Heartbeat) -> Vec<Grant> {
    heartbeat
        .extras
        .iter()
        .find(|(tag, _)| *tag == GRANTS_TAG)
        .and_then(|(_, bytes)| {
            bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()
        })
        .map_or_else(Vec::new, |(grants, _)| grants)
}
