//! The membership: feeds it with what happens, and carries out what it wants done.
//!
//! What it says of this node rides on heartbeats. See `docs/membership.md`.

use super::super::event::LocalEvent;
use super::super::referee;
use super::links::LEAVING_PAUSE;
use super::main_link::{LogLevel, ToMain};
use super::{Arbiter, lease};
use crate::pg::barrier;
use crate::pg::shared::{NodeStatus, shared};
use protocol::membership::{
    Generation, Membership, MembershipConfig, MembershipEffect, MembershipEffects, MembershipEvent,
    MembershipInput, MembershipRecord, Phase, Presence, Status,
};
use protocol::{GenerationNum, Message, Millis, NodeId, NodeSet};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// Tag of a heartbeat's extra: the sender's `Presence`.
const PRESENCE_TAG: u16 = 4;

/// The membership with what it waits for.
pub struct Members {
    membership: Membership,
    effects: MembershipEffects,
    /// Effects behind a record that is not durable yet.
    held: VecDeque<MembershipEffect>,
    persisting: bool,
    /// The generation for which the barrier is closed.
    closing: Option<Generation>,
    /// The generation for which older transactions have to end, and whether the main thread has been asked.
    draining: Option<GenerationNum>,
    asked: bool,
    /// The generation in which this node may prepare.
    opened: Option<GenerationNum>,
}

impl Members {
    /// Starts with the durable record.
    pub fn new(
        node: NodeId,
        configured: NodeSet,
        referee: bool,
        record: Option<MembershipRecord>,
        now: Millis,
    ) -> Members {
        let mut effects = MembershipEffects::new();
        let config = MembershipConfig {
            promise_ms_max: lease::LASTS_MS_MAX,
            referee,
            ..MembershipConfig::new(node, configured)
        };
        let membership = Membership::new(config, record, now, &mut effects);
        let held = effects.drain().collect();
        Members {
            membership,
            effects,
            held,
            persisting: false,
            closing: None,
            draining: None,
            asked: false,
            opened: None,
        }
    }

    /// What heartbeats carry.
    pub fn extra(&self) -> Option<(u16, Vec<u8>)> {
        let presence = self.membership.presence();
        let bytes = bincode::serde::encode_to_vec(presence, bincode::config::standard()).ok()?;
        Some((PRESENCE_TAG, bytes))
    }

    /// Members of the current generation.
    pub fn current(&self) -> NodeSet {
        self.membership.current().generation.members
    }

    /// What users read, as far as the membership knows. `complete` says whether changes flow between all members.
    pub fn status(&self, before: NodeStatus, complete: bool) -> NodeStatus {
        match self.membership.status() {
            Status::Online if complete => NodeStatus::Online,
            Status::Online | Status::Isolated if before == NodeStatus::Starting => before,
            Status::Online | Status::Isolated => NodeStatus::Degraded,
            Status::Switching => NodeStatus::Switching,
            Status::Recovery => NodeStatus::Recovery,
            Status::Catchup => NodeStatus::Catchup,
            Status::Disabled => NodeStatus::Minority,
        }
    }
}

impl Arbiter {
    /// Tells the membership something.
    pub(super) fn member_input(&mut self, input: MembershipInput) {
        let now = self.now();
        let mut effects = std::mem::take(&mut self.members.effects);
        self.members.membership.handle(now, input, &mut effects);
        self.members.held.extend(effects.drain());
        self.members.effects = effects;
        self.carry_out_members();
    }

    /// Carries out effects up to the next record.
    pub(super) fn carry_out_members(&mut self) {
        while !self.members.persisting
            && let Some(effect) = self.members.held.pop_front()
        {
            self.carry_out_member(effect);
        }
        self.show_standing();
    }

    /// Tells those who apply where this node stands; nothing of it before it is durable and carried out.
    fn show_standing(&mut self) {
        let mut standing = self.members.membership.standing();
        if self.members.persisting {
            let shown = shared().standing.get();
            standing.online_in = shown.online_in;
            standing.recovered_to = shown.recovered_to;
        }
        if standing.phase == Phase::Online && self.members.opened != Some(standing.current.num) {
            standing.phase = Phase::Waiting;
        }
        shared().standing.set(&standing);
    }

    fn carry_out_member(&mut self, effect: MembershipEffect) {
        match effect {
            MembershipEffect::Persist(record) => {
                self.members.persisting = true;
                self.main.send(ToMain::WriteMembership(record.to_bytes()));
            }
            MembershipEffect::Send { to, msg } => self.send(to, &Message::Membership(msg)),
            MembershipEffect::Withhold { from } => {
                let members = self.configured.difference(from);
                self.leases.withhold_from_all_but(members);
                self.publish();
            }
            MembershipEffect::Close { generation } => self.close(generation),
            MembershipEffect::Drain { num } => {
                self.members.draining = Some(num);
                self.members.asked = false;
            }
            MembershipEffect::WriteMarker { elected } => {
                self.main.send(ToMain::WriteMarker(elected.generation.num));
            }
            MembershipEffect::Open { generation } => self.open(generation),
            MembershipEffect::AskReferee(request) => {
                referee::leave(request);
                shared().arbiter.wake();
                shared().referee.wake();
            }
            MembershipEffect::Recover { from } => recover_from(Some(from)),
            MembershipEffect::StopRecovery => recover_from(None),
            MembershipEffect::Beat => {
                self.publish();
                self.beat_all();
            }
            MembershipEffect::Event(event) => self.report_member_event(&event),
        }
    }

    fn beat_all(&self) {
        for peer in self.configured.without(self.node).iter() {
            self.mesh.beat(peer);
        }
    }

    /// Nobody prepares under an older generation from now on.
    fn close(&mut self, generation: Generation) {
        self.leases.set_alone(false);
        barrier::close();
        self.members.closing = Some(generation);
        self.members.opened = None;
        self.members.draining = None;
        self.refresh_status();
        self.look_at_barrier();
    }

    /// Whether the last process has left its PREPARE.
    pub(super) fn look_at_barrier(&mut self) {
        let Some(generation) = self.members.closing.filter(|_| barrier::is_empty()) else {
            return;
        };
        self.members.closing = None;
        shared().set_generation(generation.num, generation.members);
        // Whoever comes now sees that its generation is over.
        barrier::open();
        self.input(protocol::Input::Generation { generation });
        self.member_input(MembershipInput::Closed {
            num: generation.num,
        });
    }

    fn open(&mut self, generation: Generation) {
        self.members.opened = Some(generation.num);
        // Nobody can go on without the only member.
        let alone = generation.members == NodeSet::default().with(self.node);
        self.leases.set_alone(alone);
        shared().set_generation(generation.num, generation.members);
        self.show_standing();
        self.input(protocol::Input::Generation { generation });
        self.input(protocol::Input::Online);
        self.main.send(ToMain::ForgetRecovered);
        self.refresh_status();
    }

    /// What the heartbeat of a peer says about members.
    pub(super) fn hear_members(&mut self, from: NodeId, heartbeat: &wire::frame::Heartbeat) {
        if let Some(presence) = decoded::<Presence>(heartbeat, PRESENCE_TAG) {
            if presence.leaving {
                self.leases.released_by(from);
            }
            self.member_input(MembershipInput::Presence { from, presence });
        }
    }

    /// What the main thread has made durable.
    pub(super) fn on_member_record(&mut self) {
        self.members.persisting = false;
        self.carry_out_members();
    }

    /// The main thread has written the marker.
    pub(super) fn on_marker_written(&mut self, num: GenerationNum) {
        self.member_input(MembershipInput::MarkerWritten { num });
    }

    /// The main thread has looked for transactions of older generations.
    pub(super) fn on_drained(&mut self, num: GenerationNum, drained: bool) {
        self.members.asked = false;
        if drained && self.members.draining == Some(num) {
            self.members.draining = None;
            self.member_input(MembershipInput::Drained { num });
        }
    }

    /// What the recovery or the referee says.
    pub(super) fn on_recovery(&mut self, event: &LocalEvent) {
        let input = match *event {
            LocalEvent::MarkerReached { from, num } => MembershipInput::MarkerReached { from, num },
            LocalEvent::RecoveryLevel { from, level } => MembershipInput::Level { from, level },
            LocalEvent::RecoveryLost { from } => MembershipInput::RecoveryLost { from },
            LocalEvent::Refereed { answer } => MembershipInput::Referee(answer),
            _ => return,
        };
        self.member_input(input);
    }

    /// Timers of the membership.
    pub(super) fn tick_members(&mut self) {
        if let Some(num) = self.members.draining.filter(|_| !self.members.asked) {
            self.members.asked = true;
            self.main.send(ToMain::LookForOlder(num));
        }
        self.look_at_barrier();
        let unbound = self.leases.unbound(&self.mesh, self.configured);
        self.member_input(MembershipInput::Tick { unbound });
    }

    /// This server ends: stop serving, then say so.
    pub(super) async fn say_goodbye(&mut self) {
        shared().set_status(NodeStatus::Starting);
        shared().lease_until_ms.store(0, Ordering::Release);
        self.member_input(MembershipInput::Leave);
        self.publish();
        self.beat_all();
        tokio::time::sleep(LEAVING_PAUSE).await;
    }

    fn report_member_event(&self, event: &MembershipEvent) {
        let (node, kind, text) = match event {
            MembershipEvent::Switched { from, to } => {
                for lost in from.members.difference(to.generation.members).iter() {
                    let reason = if to.generation.members.is_quorum_of(self.configured) {
                        "a majority goes on without it"
                    } else {
                        "the referee lets the other node go on alone"
                    };
                    self.note(lost, "excluded", reason, 0);
                }
                for back in to.generation.members.difference(from.members).iter() {
                    self.note(back, "admitted", "it is level with the others", 0);
                }
                let text = format!(
                    "generation {} follows {from}, donors {}",
                    to.generation, to.donors
                );
                (self.node, "generation", text)
            }
            MembershipEvent::Online { generation } => {
                (self.node, "online", format!("in generation {generation}"))
            }
            MembershipEvent::Excluded { generation } => (
                self.node,
                "outside",
                format!("not a member of generation {generation}"),
            ),
            MembershipEvent::RecoveryStarted { from } => {
                (self.node, "recovers", format!("from node {}", from.get()))
            }
            other => return self.main.log(LogLevel::Info, format!("{other:?}")),
        };
        self.note(node, kind, &text, 0);
        self.main.log(LogLevel::Info, format!("{kind}: {text}"));
    }
}

fn recover_from(node: Option<NodeId>) {
    let number = node.map_or(0, |node| u32::from(node.get()));
    shared().recover_from.store(number, Ordering::Release);
    shared().recovery.wake();
    shared().arbiter.wake();
}

fn decoded<T: serde::de::DeserializeOwned>(
    heartbeat: &wire::frame::Heartbeat,
    tag: u16,
) -> Option<T> {
    let bytes = lease::extra_of(heartbeat, tag)?;
    let (value, _) = bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
    Some(value)
}
