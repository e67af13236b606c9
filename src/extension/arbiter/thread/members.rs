//! The membership: feeds it with what happens, and carries out what it wants done.
//!
//! What it says of this node rides on heartbeats. See `docs/membership.md`.

use super::super::event::LocalEvent;
use super::super::event_kind::EventKind;
use super::super::referee;
use super::super::user_votes::{UserTally, generation_over};
use super::extras::{self, Extra};
use super::links::LEAVING_PAUSE;
use super::main_link::{LogLevel, ToMain};
use super::{Arbiter, lease};
use crate::pg::barrier;
use crate::pg::shared::{NodeStatus, shared};
use protocol::membership::{
    Generation, Membership, MembershipConfig, MembershipEffect, MembershipEffects, MembershipInput,
    MembershipRecord, Phase, Presence, Status,
};
use protocol::{GenerationNum, Message, Millis, NodeId, NodeSet};
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};

/// The membership with what it waits for.
pub struct Members {
    node: NodeId,
    /// It has been asked to note that this node needs a copy.
    copy_asked: bool,
    membership: Membership,
    effects: MembershipEffects,
    /// Effects behind a record that is not durable yet.
    held: VecDeque<MembershipEffect>,
    /// The record that is being written.
    persisting: Option<MembershipRecord>,
    /// The last record that is known to be durable.
    durable: MembershipRecord,
    /// The generation for which the barrier is closed.
    closing: Option<Generation>,
    /// The generation for which older transactions have to end, and whether the main thread has been asked.
    draining: Option<GenerationNum>,
    asked: bool,
    /// The generation in which this node may prepare.
    opened: Option<GenerationNum>,
    /// Recovery has given up, until this process is started anew: with the server, or by `mtm.rejoin`.
    failed: bool,
}

impl Members {
    /// Starts with the durable record.
    pub fn new(
        node: NodeId,
        configured: NodeSet,
        referee: bool,
        record: Option<MembershipRecord>,
        copied_from: Option<NodeId>,
        now: Millis,
    ) -> Members {
        let mut effects = MembershipEffects::new();
        let config = MembershipConfig {
            promise_ms_max: lease::LASTS_MS_MAX,
            referee,
            copied_from,
            // The keys of a new hasher come from the system's randomness.
            donor_seed: RandomState::new().build_hasher().finish(),
            ..MembershipConfig::new(node, configured)
        };
        let membership = Membership::new(config, record, now, &mut effects);
        let held = effects.drain().collect();
        Members {
            node,
            copy_asked: false,
            membership,
            effects,
            held,
            persisting: None,
            durable: record.unwrap_or(MembershipRecord::first(configured)),
            closing: None,
            draining: None,
            asked: false,
            opened: None,
            failed: false,
        }
    }

    /// What the membership says in heartbeats. Others choose a donor and elect by it, so it claims nothing that a crash of this node could take back.
    pub fn presence(&self) -> Presence {
        let latest = self.membership.presence();
        Presence {
            current: self.durable.current,
            online_in: self.durable.online_in,
            willing: latest.willing && self.persisting.is_none() && !self.needs_copy(),
            ..latest
        }
    }

    /// What heartbeats carry about nodes that cannot recover any more.
    pub fn needs_copy_extra(&self) -> Option<Extra> {
        let others = shared().needs_copy().without(self.node);
        (!others.is_empty())
            .then(|| extras::put(extras::NEEDS_COPY, &others.bits()))
            .flatten()
    }

    /// What heartbeats carry about a recovery.
    pub fn lag_extra(&self) -> Option<Extra> {
        shared().recovery_order()?;
        extras::put(extras::LAG, &shared().recovery_progress.left())
    }

    /// Whether this node cannot recover any more.
    fn needs_copy(&self) -> bool {
        !self.is_open() && shared().needs_copy().contains(self.node)
    }

    /// Members of the current generation.
    pub fn current(&self) -> NodeSet {
        self.membership.current().generation.members
    }

    /// Whether everything that makes this node a working one in its current generation has been carried out.
    fn is_open(&self) -> bool {
        self.opened == Some(self.membership.current().generation.num)
    }

    /// What users read, as far as the membership knows. `complete` says whether changes flow between all members.
    pub fn status(&self, before: NodeStatus, complete: bool) -> NodeStatus {
        if self.failed {
            return NodeStatus::Failed;
        }
        if self.needs_copy() {
            return NodeStatus::NeedsCopy;
        }
        match self.membership.status() {
            Status::Online | Status::Isolated if !self.is_open() => match before {
                NodeStatus::Starting => before,
                _ => NodeStatus::Switching,
            },
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
        self.hold_members(effects.drain());
        self.members.effects = effects;
        self.carry_out_members();
    }

    /// Takes up the membership after a start of this process. An earlier life may have ordered a recovery, and have been told how far it is.
    pub(super) fn start_members(&mut self) {
        recover_from(None);
        let first = std::mem::take(&mut self.members.held);
        self.hold_members(first.into_iter());
        self.carry_out_members();
    }

    /// Queues effects. What may be promised does not wait for a record: the next tick tells which promises are over, and counts none that is given later.
    fn hold_members(&mut self, effects: impl Iterator<Item = MembershipEffect>) {
        for effect in effects {
            match effect {
                MembershipEffect::Withhold { from } => self.withhold(from),
                effect => self.members.held.push_back(effect),
            }
        }
    }

    /// Carries out effects up to the next record.
    pub(super) fn carry_out_members(&mut self) {
        while self.members.persisting.is_none()
            && let Some(effect) = self.members.held.pop_front()
        {
            self.carry_out_member(effect);
        }
        self.show_standing();
    }

    /// Tells those who apply where this node stands; nothing of it before it is durable and carried out.
    fn show_standing(&mut self) {
        let mut standing = self.members.membership.standing();
        if self.members.persisting.is_some() {
            let shown = shared().standing.get();
            standing.online_in = shown.online_in;
            standing.recovered_to = shown.recovered_to;
        }
        if standing.phase == Phase::Online && !self.members.is_open() {
            standing.phase = Phase::Waiting;
        }
        shared().standing.set(&standing);
    }

    fn carry_out_member(&mut self, effect: MembershipEffect) {
        match effect {
            MembershipEffect::Persist(record) => {
                self.members.persisting = Some(record);
                self.main.send(ToMain::WriteMembership(record.to_bytes()));
            }
            MembershipEffect::Send { to, msg } => self.send(to, &Message::Membership(msg)),
            // Carried out when it was queued.
            MembershipEffect::Withhold { .. } => {}
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
                // Who is not to come online by itself does not go on alone either.
                // Nor one that is stuck, while the other one is there to ask.
                let stuck = self.stuck.is_own() && !self.linked.is_empty();
                let stays_out = stuck || self.members.failed || self.members.needs_copy();
                if !stays_out && !self.referee.differs() {
                    referee::leave(request);
                    shared().arbiter.wake();
                    shared().referee.wake();
                }
            }
            MembershipEffect::Recover { from } => {
                let gives_up = self.members.failed || self.members.needs_copy();
                recover_from(Some(from).filter(|_| !gives_up));
            }
            MembershipEffect::StopRecovery => recover_from(None),
            MembershipEffect::Beat => {
                self.publish();
                self.beat_all();
            }
            MembershipEffect::Event(event) => self.report_member_event(&event),
        }
    }

    /// Promises nothing to these nodes from now on.
    fn withhold(&mut self, from: NodeSet) {
        self.leases
            .withhold_from_all_but(self.configured.difference(from));
        self.publish();
    }

    pub(super) fn beat_all(&self) {
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
        // Nodes that have switched need not vote on what is older.
        for gid in self.user_votes.lose_older(generation.num) {
            self.answer_user(gid, UserTally::Refused(generation_over()));
        }
        self.input(protocol::Input::Generation { generation });
        self.member_input(MembershipInput::Closed {
            num: generation.num,
        });
    }

    fn open(&mut self, generation: Generation) {
        self.members.opened = Some(generation.num);
        let returned = self.members.durable.recovered_to == generation.num;
        shared().service.begin(returned);
        // Nobody can go on without the only member.
        let alone = generation.members == NodeSet::default().with(self.node);
        self.leases.set_alone(alone);
        shared().set_generation(generation.num, generation.members);
        barrier::admit_own(generation.num);
        // It is closed still if an earlier life of this process died before it was empty.
        barrier::open();
        self.show_standing();
        self.input(protocol::Input::Generation { generation });
        self.input(protocol::Input::Online);
        self.main.send(ToMain::ForgetRecovered);
        self.refresh_status();
    }

    /// What the heartbeat of a peer says about members.
    pub(super) fn hear_members(&mut self, from: NodeId, heartbeat: &wire::frame::Heartbeat) {
        if let Some(bits) = extras::get(heartbeat, extras::NEEDS_COPY) {
            self.hear_of_copies(from, NodeSet::from_bits(bits));
        }
        let node = shared().node(from);
        node.set_recovery_lag(extras::get(heartbeat, extras::LAG));
        if let Some(presence) = heartbeat.presence() {
            if presence.leaving {
                self.leases.released_by(from);
                self.history.away(from, "it said good-bye");
            }
            self.member_input(MembershipInput::Presence { from, presence });
        }
    }

    /// A member says which nodes it no longer keeps WAL for.
    fn hear_of_copies(&mut self, from: NodeId, needing: NodeSet) {
        let known = shared().needs_copy().contains(self.node) || self.members.copy_asked;
        if known || self.members.is_open() || !needing.contains(self.node) {
            return;
        }
        self.members.copy_asked = true;
        let reason = format!(
            "node {} no longer keeps the WAL that this node has missed",
            from.get()
        );
        self.note(self.node, EventKind::NeedsCopy, &reason, None);
        self.main.log(
            LogLevel::Warning,
            format!("this node needs a new copy: {reason}"),
        );
        let node = self.node;
        self.main.send(ToMain::NeedCopy { node, reason });
    }

    /// What is committed elsewhere cannot be applied here. Nobody is to wait for this node; it says good-bye, as a server does that stops.
    pub(super) fn on_recovery_failed(&mut self, reason: &str) {
        if self.members.failed || self.members.is_open() {
            return;
        }
        self.members.failed = true;
        self.note(self.node, EventKind::Failed, reason, None);
        recover_from(None);
        self.member_input(MembershipInput::Leave);
        self.refresh_status();
        self.publish();
        self.beat_all();
    }

    /// It is durable that this node needs a copy.
    pub(super) fn on_copy_needed(&mut self) {
        self.members.copy_asked = false;
        recover_from(None);
        self.refresh_status();
        self.publish();
    }

    /// What the main thread has made durable.
    pub(super) fn on_member_record(&mut self) {
        if let Some(record) = self.members.persisting.take() {
            self.members.durable = record;
            self.publish();
        }
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

    /// What the recovery says.
    pub(super) fn on_recovery(&mut self, event: &LocalEvent) {
        let input = match *event {
            LocalEvent::MarkerReached { from, num } => MembershipInput::MarkerReached { from, num },
            LocalEvent::RecoveryLevel { from, level } => MembershipInput::Level { from, level },
            LocalEvent::RecoveryLost { from } => MembershipInput::RecoveryLost { from },
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
        let unbound = self.leases.unbound(self.configured);
        self.member_input(MembershipInput::Tick { unbound });
    }

    /// This server ends: stop serving, then say so.
    pub(super) async fn say_goodbye(&mut self) {
        shared().set_status(NodeStatus::Starting);
        self.leases.end();
        self.member_input(MembershipInput::Leave);
        self.publish();
        self.beat_all();
        tokio::time::sleep(LEAVING_PAUSE).await;
    }
}

fn recover_from(node: Option<NodeId>) {
    shared().order_recovery(node);
    shared().recovery.wake();
    shared().arbiter.wake();
}
