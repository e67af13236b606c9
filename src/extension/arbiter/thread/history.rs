//! What `mtm.events` tells: who was lost, excluded or came back, why, and how long that lasted.
//!
//! Lengths are measured by the monotonic clock: a system clock that is set makes no absence longer or shorter.

use super::super::event_kind::EventKind;
use super::Arbiter;
use super::main_link::LogLevel;
use crate::arbiter::event::MemberEvent;
use crate::pg::shared::shared;
use protocol::NodeId;
use protocol::membership::{Elected, Generation, MembershipEvent};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Since when and why nodes are away. An arbiter that starts knows nothing of before.
#[derive(Default)]
pub struct History {
    /// When the link of each peer last came or went.
    links: BTreeMap<NodeId, Instant>,
    /// Why this node does without a peer, as long as it does.
    causes: BTreeMap<NodeId, String>,
    /// Since when a node is no member.
    excluded: BTreeMap<NodeId, Instant>,
    /// Since when the others wait for this node to become level.
    awaited: Option<Instant>,
}

impl History {
    /// The peer is away; the first cause counts.
    pub fn away(&mut self, peer: NodeId, cause: &str) {
        self.causes.entry(peer).or_insert_with(|| cause.to_owned());
    }

    pub fn seen(&mut self, peer: NodeId) {
        self.causes.remove(&peer);
    }

    /// How long the link had been as it was.
    fn link_changed(&mut self, peer: NodeId, up: bool, reason: &str) -> Option<Duration> {
        if up {
            self.seen(peer);
        } else {
            self.away(peer, reason);
        }
        elapsed(self.links.insert(peer, Instant::now()))
    }

    /// Why the others go on without the node.
    fn excluded(&mut self, node: NodeId) -> &str {
        self.excluded.insert(node, Instant::now());
        // Others may find it first, or alone.
        self.causes
            .get(&node)
            .map_or("another node does not see it", String::as_str)
    }

    /// How long the node was no member.
    fn admitted(&mut self, node: NodeId) -> Option<Duration> {
        elapsed(self.excluded.remove(&node))
    }
}

fn elapsed(since: Option<Instant>) -> Option<Duration> {
    since.map(|since| since.elapsed())
}

impl Arbiter {
    pub(super) fn link_changed(&mut self, peer: NodeId, up: bool, reason: &str) {
        let node = shared().node(peer);
        node.linked.store(up, Ordering::Release);
        node.last_change_us
            .store(postgres_now_us(), Ordering::Relaxed);
        let lasted = self.history.link_changed(peer, up, reason);
        let event = if up {
            EventKind::Connected
        } else {
            EventKind::Lost
        };
        self.note(peer, event, reason, lasted);
        self.refresh_status();
    }

    /// Adds a line to `mtm.events`; `lasted`: how long the state was that has ended.
    pub(super) fn note(
        &self,
        node: NodeId,
        event: EventKind,
        reason: &str,
        lasted: Option<Duration>,
    ) {
        shared().member_events.add(&MemberEvent {
            happened_at: postgres_now_us(),
            node,
            event: event.word().to_owned(),
            reason: reason.to_owned(),
            generation: shared().generation().0,
            lasted_ms: lasted.map(|lasted| lasted.as_millis() as u64),
        });
    }

    pub(super) fn report_member_event(&mut self, event: &MembershipEvent) {
        let (kind, text, lasted) = match event {
            MembershipEvent::Switched { from, to } => {
                let is_member = to.generation.members.contains(self.node);
                let is_awaited = is_member && !to.donors.contains(self.node);
                self.history.awaited = is_awaited.then(Instant::now);
                self.note_members(from, to);
                let text = format!(
                    "generation {} follows {from}, donors {}",
                    to.generation, to.donors
                );
                (EventKind::Generation, text, None)
            }
            // For the last stretch of a recovery the others wait.
            MembershipEvent::Online { generation } => (
                EventKind::Online,
                format!("in generation {generation}"),
                elapsed(self.history.awaited.take()),
            ),
            MembershipEvent::Excluded { generation } => (
                EventKind::Outside,
                format!("not a member of generation {generation}"),
                None,
            ),
            MembershipEvent::RecoveryStarted { from } => (
                EventKind::Recovers,
                format!("from node {}", from.get()),
                None,
            ),
            other => return self.main.log(LogLevel::Info, format!("{other:?}")),
        };
        self.note(self.node, kind, &text, lasted);
        self.main.log(LogLevel::Info, format!("{kind}: {text}"));
    }

    fn note_members(&mut self, from: &Generation, to: &Elected) {
        let members = to.generation.members;
        let how = if members.is_quorum_of(self.configured) {
            "a majority goes on without it"
        } else {
            "the referee lets the other node go on alone"
        };
        for lost in from.members.difference(members).iter() {
            let cause = self.history.excluded(lost);
            let reason = if lost == self.node {
                how.to_owned()
            } else {
                format!("{how}: {cause}")
            };
            self.note(lost, EventKind::Excluded, &reason, None);
        }
        for back in members.difference(from.members).iter() {
            let lasted = self.history.admitted(back);
            self.note(
                back,
                EventKind::Admitted,
                "it is level with the others",
                lasted,
            );
        }
    }
}

/// Microseconds since 2000-01-01 by the system clock; for display only.
fn postgres_now_us() -> i64 {
    const POSTGRES_EPOCH_S: u64 = 946_684_800;
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH_S))
        .unwrap_or_default();
    since.as_micros() as i64
}
