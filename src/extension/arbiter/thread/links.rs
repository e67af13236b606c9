//! Links to the other nodes: what comes over them, which of them work, and what this node makes of that.

use super::super::LOOK_AROUND;
use super::super::event_kind::EventKind;
use super::super::net_config::NetSettings;
use super::super::user_votes::UserTally;
use super::extras;
use super::main_link::{HeartbeatTimes, LogLevel};
use super::{Arbiter, lease};
use crate::failpoint::{self, hit_in_thread};
use crate::pg::shared::shared;
use mesh::MeshEvent;
use protocol::membership::MembershipInput;
use protocol::{Decision, Input, Lsn, Message, NodeId, NodeSet, Refusal};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use wire::frame::Heartbeat;

/// Time for a good-bye to leave before the connections are closed.
pub(super) const LEAVING_PAUSE: Duration = Duration::from_millis(60);

/// A main thread that has missed so many of its looks around hangs, however little silence the settings allow between nodes.
const LOOKS_MISSED: u32 = 5;

/// Up to where the sender holds a node's stream.
pub(super) fn mark_of(heartbeat: &Heartbeat, of: NodeId) -> Option<Lsn> {
    let found = heartbeat.received.iter().find(|(node, _)| *node == of)?;
    Some(found.1)
}

fn view_of(heartbeat: &Heartbeat) -> NodeSet {
    NodeSet::from_bits(extras::get(heartbeat, extras::RECEIVING).unwrap_or_default())
}

/// Whether the peer has started more often before, or a copy has taken its place: what answers now does not know what its node has promised since.
pub(super) fn is_older(peer: NodeId, epoch: u32) -> bool {
    epoch < shared().node(peer).newest_epoch.load(Ordering::Acquire)
}

impl Arbiter {
    pub(super) fn on_mesh(&mut self, event: MeshEvent) {
        let Some(event) = self.hear_newcomer(event) else {
            return;
        };
        match event {
            MeshEvent::Up { peer, epoch, .. } if is_older(peer, epoch) => {
                self.tell_old_copy(peer);
            }
            MeshEvent::Up { peer, epoch, .. } => self.meet(peer, epoch),
            // Of a link that does not count.
            MeshEvent::Down { peer, .. } if !self.linked.contains(peer) => {
                self.newcomers.remove(&peer);
            }
            MeshEvent::Messages { from, .. } | MeshEvent::Heartbeat { from, .. }
                if !self.linked.contains(from) => {}
            MeshEvent::Down { peer, reason } => self.lose(peer, &reason.to_string()),
            MeshEvent::Messages { from, batch } => self.on_messages(from, batch),
            MeshEvent::Heartbeat { from, heartbeat } => self.on_heartbeat(from, &heartbeat),
            MeshEvent::Refused {
                peer: Some(peer),
                reason,
                ..
            } => {
                self.main.log(
                    LogLevel::Info,
                    format!("arbiter cannot connect to node {}: {reason}", peer.get()),
                );
            }
            MeshEvent::Refused {
                addr,
                reason,
                unreported,
                ..
            } => {
                let who =
                    addr.map_or_else(|| "an unknown address".to_owned(), |addr| addr.to_string());
                let text = format!(
                    "arbiter refused a connection from {who}: {reason} ({unreported} more not reported)"
                );
                self.main.log(LogLevel::Warning, text);
            }
        }
    }

    /// The link counts from now on.
    pub(super) fn count_link(&mut self, peer: NodeId, epoch: u32) {
        // Not before: an old copy can have started more often than its node.
        let newest = &shared().node(peer).newest_epoch;
        newest.fetch_max(epoch, Ordering::AcqRel);
        self.linked.insert(peer);
        self.link_changed(peer, true, "its arbiter answers");
        self.main.log(
            LogLevel::Info,
            format!("arbiter connected to node {}", peer.get()),
        );
        self.input(Input::LinkUp { peer, epoch });
        self.member_input(MembershipInput::LinkUp { peer });
    }

    pub(super) fn on_messages(&mut self, from: NodeId, batch: Vec<Message>) {
        for msg in batch {
            if let Message::Membership(msg) = msg {
                self.member_input(MembershipInput::Message { from, msg });
                continue;
            }
            self.trace_message(&msg, "from", from);
            self.note_delay(from, &msg);
            self.stop_hopeless_apply(&msg);
            match self.user_votes.count(from, &msg) {
                Some((gid, tally)) => self.answer_user(gid, tally),
                None => self.on_protocol_message(from, msg),
            }
        }
    }

    pub(super) fn on_heartbeat(&mut self, from: NodeId, heartbeat: &Heartbeat) {
        let node = shared().node(from);
        node.heartbeats.fetch_add(1, Ordering::Relaxed);
        node.flushed.store(heartbeat.flushed.0, Ordering::Relaxed);
        let held = mark_of(heartbeat, self.node).unwrap_or_default();
        node.held.fetch_max(held.0, Ordering::AcqRel);
        node.connectivity
            .store(u32::from(heartbeat.connected.bits()), Ordering::Relaxed);
        self.peer_views.insert(from, view_of(heartbeat));
        self.compare_times(from, heartbeat);
        self.leases.on_heartbeat(from, heartbeat);
        self.hear_stuck(from, heartbeat);
        self.hear_referee(heartbeat);
        self.hear_members(from, heartbeat);
        self.refresh_status();
        self.leases.answer(from, &self.mesh);
    }

    /// The peer cannot be heard any more, or must not be.
    fn lose(&mut self, peer: NodeId, reason: &str) {
        self.linked.remove(peer);
        shared().node(peer).losses.fetch_add(1, Ordering::AcqRel);
        self.peer_views.remove(&peer);
        self.stuck.lost(peer);
        self.link_changed(peer, false, reason);
        self.main.log(
            LogLevel::Warning,
            format!("arbiter lost node {}: {reason}", peer.get()),
        );
        for gid in self.user_votes.lose(peer) {
            self.answer_user(gid, UserTally::Refused(unreachable_peer(peer)));
        }
        self.input(Input::LinkDown { peer });
        self.member_input(MembershipInput::LinkDown { peer });
    }

    /// An old copy of a node has no say: nothing it says is heard, and it is promised nothing (membership.md, "A node is its memory").
    pub(super) fn tell_old_copy(&self, peer: NodeId) {
        let text = "it is an old copy of its node, and is not listened to";
        self.note(peer, EventKind::OldCopy, text, None);
        self.main
            .log(LogLevel::Warning, format!("node {}: {text}", peer.get()));
    }

    fn on_protocol_message(&mut self, from: NodeId, msg: Message) {
        let unannounced = match &msg {
            Message::Vote { gid, .. } => {
                gid.coordinator == self.node
                    && self.core.promised(*gid).is_none()
                    && self.core.decision(*gid).is_none()
            }
            _ => false,
        };
        let now = if unannounced {
            self.early_votes.keep(from, msg, Instant::now())
        } else {
            Some(msg)
        };
        if let Some(msg) = now {
            self.input(Input::Message { from, msg });
        }
    }

    /// Times that differ between nodes make one exclude the other earlier than it expects.
    fn compare_times(&mut self, from: NodeId, heartbeat: &Heartbeat) {
        let theirs = lease::times_of(heartbeat);
        if theirs.is_some() && self.peer_times.insert(from, theirs) != Some(theirs) {
            self.tell_unequal(from, theirs);
        }
    }

    /// Says so if a peer's heartbeat times are not those of this node.
    pub(super) fn tell_unequal(&self, from: NodeId, theirs: Option<HeartbeatTimes>) {
        let ours = self.leases.times();
        if let Some(theirs) = theirs.filter(|theirs| *theirs != ours) {
            let text = format!(
                "node {} has heartbeat_send_timeout {} ms, heartbeat_recv_timeout {} ms and slow_node_timeout {} ms, this node {} ms, {} ms and {} ms",
                from.get(),
                theirs.send_ms,
                theirs.recv_ms,
                theirs.slow_ms,
                ours.send_ms,
                ours.recv_ms,
                ours.slow_ms
            );
            self.note(from, EventKind::UnequalSettings, &text, None);
            self.main.log(LogLevel::Warning, text);
        }
    }

    /// A transaction that is already aborted elsewhere need not be applied to its end.
    fn stop_hopeless_apply(&self, msg: &Message) {
        if let Message::Decided {
            gid,
            decision: Decision::Abort,
            ..
        } = msg
        {
            crate::conflict::cancel_apply(*gid);
        }
    }

    /// The nodes whose arbiter we talk to and whose stream we receive.
    fn view(&self) -> NodeSet {
        self.linked
            .iter()
            .filter(|peer| shared().node(*peer).receiving.load(Ordering::Acquire))
            .chain(std::iter::once(self.node))
            .collect()
    }

    /// Online while changes flow between all members, in both directions.
    pub(super) fn refresh_status(&mut self) {
        let view = self.view();
        self.publish_view(view);
        let complete = self.members.current().iter().all(|peer| {
            peer == self.node
                || (view.contains(peer)
                    && self
                        .peer_views
                        .get(&peer)
                        .is_some_and(|theirs| theirs.contains(self.node)))
        });
        let status = self.members.status(shared().status(), complete);
        if status != shared().status() {
            self.main.log(
                LogLevel::Info,
                format!("this node is now {}", status.name()),
            );
            shared().set_status(status);
        }
    }

    /// Puts what has changed into the next heartbeats.
    pub(super) fn publish(&self) {
        self.publish_view(self.view());
    }

    pub(super) fn send(&self, to: NodeId, msg: &Message) {
        self.trace_message(msg, "to", to);
        let (before, after) = failpoint::around(msg);
        hit_in_thread(before);
        if let Err(error) = self.mesh.send(to, msg) {
            self.main.log(
                LogLevel::Warning,
                format!("a message to node {} was not sent: {error}", to.get()),
            );
        }
        failpoint::hit_after_sending(after);
    }

    /// The settings were read again. What cannot work is not taken, as a whole: promises and silence follow the same times as heartbeats.
    pub(super) fn reconfigure(&mut self, settings: &NetSettings) {
        let times = settings.times();
        if let Err(error) = self.mesh.reconfigure(times.send_ms, times.recv_ms) {
            let text = format!("the heartbeat settings were not taken: {error}");
            self.note(self.node, EventKind::SettingsRefused, &text, None);
            return self.main.log(LogLevel::Warning, text);
        }
        self.stuck.set_timeout(times.slow_ms);
        self.silence = silence(times);
        self.leases.reconfigure(times);
        self.publish();
        for (peer, theirs) in self.peer_times.clone() {
            self.tell_unequal(peer, theirs);
        }
    }

    /// Tells the peers whose streams we receive.
    fn publish_view(&self, view: NodeSet) {
        let mut heartbeat = Heartbeat {
            generation: shared().generation(),
            online_generation: shared().online_in(),
            flushed: Lsn(shared().node(self.node).flushed.load(Ordering::Relaxed)),
            received: self
                .configured
                .iter()
                .filter(|peer| *peer != self.node)
                .map(|peer| {
                    (
                        peer,
                        protocol::Lsn(shared().node(peer).mark.load(Ordering::Relaxed)),
                    )
                })
                .collect(),
            extras: extras::put(extras::RECEIVING, &view.bits())
                .into_iter()
                .chain(self.leases.extras())
                .chain(self.members.needs_copy_extra())
                .chain(self.members.lag_extra())
                .chain(self.stuck.extra())
                .chain(self.referee.extra())
                .collect(),
            ..Heartbeat::default()
        };
        let said = heartbeat
            .set_presence(&self.members.presence())
            .and_then(|()| self.mesh.heartbeat_info(heartbeat));
        if let Err(error) = said {
            self.main.log(
                LogLevel::Warning,
                format!("the heartbeat was not changed: {error}"),
            );
        }
    }
}

/// How long this node goes on speaking without a sign of life of its main thread.
pub(super) fn silence(times: HeartbeatTimes) -> Duration {
    Duration::from_millis(times.recv_ms).max(LOOK_AROUND * LOOKS_MISSED)
}

fn unreachable_peer(peer: NodeId) -> Refusal {
    Refusal::retry(
        format!(
            "node {} was lost while the transaction was being prepared",
            peer.get()
        ),
        "",
    )
}
