//! What all tasks of a mesh share.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::{MAX_NODES, NodeId, NodeSet};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use wire::frame::Heartbeat;
use wire::handshake::Identity;

use crate::config::Timing;
use crate::event::{MeetError, MeshEvent};
use crate::outbox::Outbox;

/// Most events that wait for the caller. Links stop reading while it is full.
pub(crate) const EVENTS_MAX: usize = 256;
/// Refusals are dropped when less than this is free: strangers must not fill the queue of the peers.
const EVENTS_RESERVED: usize = EVENTS_MAX / 2;
/// Most refusals reported per second.
const REFUSALS_PER_SECOND: u32 = 20;
/// No end to the time this node may speak.
const FOREVER_MS: u64 = u64::MAX;

pub(crate) struct Shared {
    pub identity: Identity,
    pub peers: NodeSet,
    pub connect_timeout: Duration,
    pub timing: watch::Sender<Timing>,
    pub events: mpsc::Sender<MeshEvent>,
    clock_ms: fn() -> u64,
    outboxes: [Outbox; MAX_NODES as usize],
    started: Instant,
    speak_until_ms: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    heartbeat: Heartbeat,
    connected: NodeSet,
    /// Epoch of each connected peer.
    epochs: [u32; MAX_NODES as usize],
    refusals: RefusalMeter,
}

impl Shared {
    pub(crate) fn new(
        identity: Identity,
        peers: NodeSet,
        connect_timeout: Duration,
        timing: Timing,
        events: mpsc::Sender<MeshEvent>,
        clock_ms: fn() -> u64,
    ) -> Self {
        Self {
            identity,
            peers,
            connect_timeout,
            timing: watch::Sender::new(timing),
            events,
            clock_ms,
            outboxes: Default::default(),
            started: Instant::now(),
            speak_until_ms: AtomicU64::new(FOREVER_MS),
            state: Mutex::default(),
        }
    }

    pub(crate) const fn outbox(&self, peer: NodeId) -> &Outbox {
        &self.outboxes[peer.index()]
    }

    /// Milliseconds since the mesh started.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The point in time `ms` after the start.
    pub(crate) fn instant(&self, ms: u64) -> Instant {
        self.started + Duration::from_millis(ms)
    }

    /// Whether this node may still claim to be alive.
    pub(crate) fn may_speak(&self) -> bool {
        let until = self.speak_until_ms.load(Ordering::Relaxed);
        until == FOREVER_MS || self.now_ms() < until
    }

    pub(crate) fn speak_for(&self, time: Option<Duration>) {
        let until = time.map_or(FOREVER_MS, |time| {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            self.now_ms().saturating_add(ms)
        });
        let was_silent = !self.may_speak();
        self.speak_until_ms.store(until, Ordering::Relaxed);
        if was_silent {
            self.peers.iter().for_each(|peer| self.outbox(peer).wake());
        }
    }

    pub(crate) fn set_heartbeat(&self, heartbeat: Heartbeat) {
        self.state().heartbeat = heartbeat;
    }

    /// The heartbeat to send now.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let state = self.state();
        Heartbeat {
            sent_ms: (self.clock_ms)(),
            epoch: self.identity.epoch,
            connected: state.connected.with(self.identity.node),
            ..state.heartbeat.clone()
        }
    }

    pub(crate) fn connected(&self) -> NodeSet {
        self.state().connected
    }

    /// The epoch of the peer's link, if one stands.
    pub(crate) fn connected_epoch(&self, peer: NodeId) -> Option<u32> {
        let state = self.state();
        state
            .connected
            .contains(peer)
            .then(|| state.epochs[peer.index()])
    }

    pub(crate) fn link_stands(&self, peer: NodeId, epoch: u32) {
        let mut state = self.state();
        state.connected.insert(peer);
        state.epochs[peer.index()] = epoch;
        drop(state);
        self.outbox(peer).open();
    }

    pub(crate) fn link_ended(&self, peer: NodeId) {
        self.state().connected.remove(peer);
        self.outbox(peer).close();
    }

    /// Reports a connection that did not become a link, or counts it if there were too many.
    pub(crate) fn report_refusal(
        &self,
        peer: Option<NodeId>,
        addr: Option<SocketAddr>,
        reason: MeetError,
    ) {
        let second = self.now_ms() / 1000;
        let mut state = self.state();
        let room = self.events.capacity() > EVENTS_RESERVED;
        let Some(unreported) = state.refusals.count(second, room) else {
            return;
        };
        drop(state);
        // Full or closed after all: then nobody wants to hear of strangers.
        let _ = self.events.try_send(MeshEvent::Refused {
            peer,
            addr,
            reason,
            unreported,
        });
    }

    /// Every change under the lock is a single assignment, so a panic leaves nothing half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Limits how often refusals are reported.
#[derive(Default)]
struct RefusalMeter {
    second: u64,
    reported: u32,
    unreported: u64,
}

impl RefusalMeter {
    /// Counts a refusal; if it may be reported, says how many were not since the last report.
    fn count(&mut self, second: u64, room: bool) -> Option<u64> {
        if second != self.second {
            self.second = second;
            self.reported = 0;
        }
        if !room || self.reported == REFUSALS_PER_SECOND {
            self.unreported += 1;
            return None;
        }
        self.reported += 1;
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_reported_so_often_and_counted_beyond() {
        let mut meter = RefusalMeter::default();
        for _ in 0..REFUSALS_PER_SECOND {
            assert_eq!(meter.count(7, true), Some(0));
        }
        assert_eq!(meter.count(7, true), None);
        assert_eq!(meter.count(8, false), None);
        assert_eq!(meter.count(8, true), Some(2));
    }
}
