//! Membership: which nodes' votes a transaction needs, and how that changes.
//!
//! Problem: a lost node must not stop the cluster for longer than it takes to notice; and yet no two nodes may go on with different ideas of
//! who has to vote, and a node that comes back must hold everything before it votes again.
//!
//! A numbered set of members, a *generation*, is elected by a majority of the configured nodes; the vote of each of its members is needed,
//! too. Votes tell how far each voter is, and that names the *donors*, who hold everything older. The rules, the durable state and why it is
//! right are in `docs/membership.md`.
//!
//! [`Membership`] is a function like [`crate::Core`]: inputs and time in, effects out. What its shell owes it stands at the inputs and effects.
//!
//! Where to read on: `detector` and `clique` (who is there), `campaign` and `voter` (election), `switch` (what follows from it), `recovery` (whom to
//! recover from), `referee` (two nodes), `record` (what is durable), `message`.

mod campaign;
mod clique;
mod detector;
mod effect;
mod generation;
mod message;
mod record;
mod recovery;
mod referee;
mod standing;
mod switch;
mod voter;

use self::campaign::Campaign;
use self::detector::Detector;
use self::recovery::Recovery;
use self::switch::Stage;
use crate::lease::binding;
use crate::types::{GenerationNum, Gid, Millis, NodeId, NodeSet};

pub use effect::{
    Admission, MembershipEffect, MembershipEffects, MembershipEvent, MembershipInput, Status,
};
pub use generation::{Elected, Generation};
pub use message::{MembershipMessage, Presence};
pub use record::{MEMBERSHIP_RECORD_BYTES, MembershipRecord};
pub use referee::{Referee, RefereeAnswer, RefereeRequest};
pub use standing::{Phase, Standing};

/// What the membership is told once, at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MembershipConfig {
    pub node: NodeId,
    pub configured: NodeSet,
    /// How long a candidate waits per place in the order of nodes; more than a round trip and a flush.
    pub campaign_step_ms: Millis,
    /// How long an unanswered request waits before it is sent again.
    pub resend_ms: Millis,
    /// How long a campaign lasts at most.
    pub campaign_ms: Millis,
    /// How long promises of this node's earlier life may still run after its start: the longest that can be set.
    pub promise_ms_max: Millis,
    /// Whether a third voter can let one of two configured nodes go on alone; the same on both.
    pub referee: bool,
    /// The node that this one is a copy of. Until it has been online, the copy can be completed by that node only: nobody else's WAL tells what it holds.
    pub copied_from: Option<NodeId>,
    /// Chance in the choice among equally good donors. Nodes with the same one choose independently of each other, too; 0 is as good as any.
    pub donor_seed: u64,
    /// A rule broken on purpose, to prove that a checker finds it. `None` outside the checkers' own tests.
    pub fault: Option<MembershipFault>,
}

impl MembershipConfig {
    /// Intervals that suit a local network.
    pub const fn new(node: NodeId, configured: NodeSet) -> Self {
        Self {
            node,
            configured,
            campaign_step_ms: 50,
            resend_ms: 50,
            campaign_ms: 500,
            promise_ms_max: 1_000,
            referee: false,
            copied_from: None,
            donor_seed: 0,
            fault: None,
        }
    }

    /// How many nodes of the set go before this one.
    fn rank(&self, among: NodeSet) -> u64 {
        among.iter().take_while(|node| *node < self.node).count() as u64
    }

    fn breaks(&self, fault: MembershipFault) -> bool {
        self.fault == Some(fault)
    }
}

/// Rules whose absence a checker must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MembershipFault {
    /// A member that is no donor takes itself for one.
    EverybodyDonor,
    /// A node that has voted for a higher generation comes online in a lower one.
    VoteForgotten,
    /// A candidate counts a majority and not also every member.
    MajorityOnly,
    /// A voter does not wait for the end of its promises.
    PromiseIgnored,
    /// The referee grants any higher number, whoever has gone on alone before.
    AnyGrant,
}

/// The membership of one node: inputs in, effects out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Membership {
    config: MembershipConfig,
    record: MembershipRecord,
    detector: Detector,
    stage: Stage,
    campaign: Campaign,
    recovery: Recovery,
    /// Nodes to which no promise is running, as of the last tick, and none can have been made since.
    unbound: NodeSet,
    /// When promises of an earlier life are over.
    bound_before: Millis,
    withheld: NodeSet,
    leaving: bool,
    /// What was last said to be worth a heartbeat.
    shown: Presence,
}

impl Membership {
    /// Starts with the durable record, or without one in a new cluster. All links are down.
    pub fn new(
        config: MembershipConfig,
        record: Option<MembershipRecord>,
        now: Millis,
        out: &mut MembershipEffects,
    ) -> Self {
        assert!(
            config.configured.contains(config.node),
            "a node runs in its own cluster only"
        );
        let first = record.is_none();
        let record = record.unwrap_or(MembershipRecord::first(config.configured));
        let mut membership = Self {
            config,
            record,
            detector: Detector::new(config.node, config.configured),
            stage: Stage::Closing,
            campaign: Campaign::default(),
            recovery: Recovery::default(),
            unbound: NodeSet::EMPTY,
            // Also without a record: an earlier life may have promised before it wrote one.
            bound_before: now + binding(config.promise_ms_max),
            withheld: NodeSet::EMPTY,
            leaving: false,
            shown: Presence::default(),
        };
        if first {
            membership.persist(out);
        }
        membership.start_stage(out);
        membership.settle(now, out);
        membership
    }

    /// Takes in one input; what has to be done about it is appended to `out`.
    pub fn handle(&mut self, now: Millis, input: MembershipInput, out: &mut MembershipEffects) {
        match input {
            MembershipInput::LinkUp { peer } if self.is_peer(peer) => self.detector.link_up(peer),
            MembershipInput::LinkDown { peer } if self.is_peer(peer) => {
                self.detector.link_down(peer);
            }
            MembershipInput::Stuck { peer, stuck } if self.is_peer(peer) => {
                self.detector.stuck(peer, stuck);
            }
            MembershipInput::Presence { from, presence } if self.is_peer(from) => {
                self.on_presence(from, presence, out);
            }
            MembershipInput::Message { from, msg } if self.is_peer(from) => {
                self.on_message(now, from, msg, out);
            }
            MembershipInput::LinkUp { peer: from }
            | MembershipInput::LinkDown { peer: from }
            | MembershipInput::Stuck { peer: from, .. }
            | MembershipInput::Presence { from, .. }
            | MembershipInput::Message { from, .. } => {
                let reason = "it is not configured";
                out.event(MembershipEvent::Rejected { from, reason });
            }
            MembershipInput::Closed { num } => self.on_closed(num, out),
            MembershipInput::Drained { num } => self.on_drained(num, out),
            MembershipInput::MarkerWritten { num } => self.on_marker_written(num, out),
            MembershipInput::MarkerReached { from, num } => self.on_marker_reached(from, num, out),
            MembershipInput::Level { from, level } => self.recovery.set_level(from, level),
            MembershipInput::RecoveryLost { from } => self.recovery.lost(from),
            MembershipInput::Referee(answer) => self.on_referee(now, answer, out),
            MembershipInput::Leave => self.leaving = true,
            MembershipInput::Tick { unbound } => {
                self.unbound = unbound.intersection(self.withheld);
            }
        }
        self.settle(now, out);
    }

    /// What the next heartbeat says.
    pub fn presence(&self) -> Presence {
        Presence {
            current: self.record.current,
            online_in: self.record.online_in,
            sees: self.detector.sees(),
            willing: self.is_willing(),
            leaving: self.leaving,
        }
    }

    /// The latest generation this node knows.
    pub const fn current(&self) -> Elected {
        self.record.current
    }

    /// The durable state as it was last given out.
    pub const fn record(&self) -> &MembershipRecord {
        &self.record
    }

    /// Whether transactions are prepared here. Serving also needs a lease.
    pub fn is_online(&self) -> bool {
        self.stage == Stage::Online && !self.leaving
    }

    pub fn status(&self) -> Status {
        let members = self.record.current.generation.members;
        match self.stage {
            Stage::Online if members.is_subset(self.detector.clique()) => Status::Online,
            Stage::Online => Status::Isolated,
            Stage::Closing | Stage::Draining | Stage::Marking { .. } => Status::Switching,
            Stage::Recovering => Status::Recovery,
            Stage::Outside if self.recovery.source().is_some() => Status::Catchup,
            Stage::Outside => Status::Disabled,
        }
    }

    /// The largest set of nodes that all see each other.
    pub const fn clique(&self) -> NodeSet {
        self.detector.clique()
    }

    /// From whom this node recovers.
    pub fn donor(&self) -> Option<NodeId> {
        self.recovery.source()
    }

    /// What to do with a PREPARE of another node that is not prepared here and has no outcome on record. Before [`MembershipEffect::Open`] is
    /// carried out nothing is applied, refused or skipped: until then these answers mean to hold.
    pub fn admit(&self, gid: Gid) -> Admission {
        self.standing().admit(self.config.node, gid)
    }

    /// Whether the mark of a peer's stream may pass a marker or fence of this number.
    pub fn may_pass(&self, num: GenerationNum) -> bool {
        self.standing().may_pass(num)
    }

    /// Drops what decides nothing: the pace of campaigns. See [`crate::Core::reduce`].
    pub fn reduce(&mut self) {
        self.campaign.reduce();
        self.shown = Presence::default();
    }

    fn is_peer(&self, peer: NodeId) -> bool {
        peer != self.config.node && self.config.configured.contains(peer)
    }

    fn persist(&self, out: &mut MembershipEffects) {
        out.push(MembershipEffect::Persist(self.record));
    }

    fn on_presence(&mut self, from: NodeId, presence: Presence, out: &mut MembershipEffects) {
        self.detector.heard(from, presence);
        if presence.current.generation.num < self.record.num() {
            out.send(from, MembershipMessage::Elected(self.record.current));
        } else {
            self.consider(from, presence.current, out);
        }
    }

    fn on_message(
        &mut self,
        now: Millis,
        from: NodeId,
        msg: MembershipMessage,
        out: &mut MembershipEffects,
    ) {
        match msg {
            MembershipMessage::RequestVote {
                generation,
                current,
            } => {
                self.consider(from, current, out);
                self.on_request(now, from, generation, out);
            }
            MembershipMessage::Granted {
                generation,
                online_in,
            } => self.on_granted(from, generation, online_in, out),
            MembershipMessage::Denied {
                num,
                last_vote,
                current,
            } => {
                self.consider(from, current, out);
                self.on_denied(now, num, last_vote, out);
            }
            MembershipMessage::Elected(elected) => self.consider(from, elected, out),
        }
    }

    /// Lets everything follow from what is known now.
    fn settle(&mut self, now: Millis, out: &mut MembershipEffects) {
        self.choose_source(out);
        self.campaign(now, out);
        self.withhold(out);
        let presence = self.presence();
        if presence != self.shown {
            self.shown = presence;
            out.push(MembershipEffect::Beat);
        }
    }

    /// Nodes that this node would drop, or has voted to drop: they must not count on it.
    fn withhold(&mut self, out: &mut MembershipEffects) {
        let MembershipConfig {
            node, configured, ..
        } = self.config;
        let members = self.record.current.generation.members;
        let promised = members
            .intersection(self.record.last_vote.members)
            .intersection(self.detector.clique())
            .with(node);
        let from = configured.difference(promised);
        if self.withheld != from {
            // Who may be promised now, or might until now, is bound until a tick says otherwise.
            self.unbound = self.unbound.intersection(self.withheld).intersection(from);
            self.withheld = from;
            out.push(MembershipEffect::Withhold { from });
        }
    }

    /// Whether no promise of this node to any node outside of these is running.
    fn is_unbound_but_to(&self, now: Millis, members: NodeSet) -> bool {
        if self.config.breaks(MembershipFault::PromiseIgnored) {
            return true;
        }
        let dropped = self
            .config
            .configured
            .difference(members)
            .without(self.config.node)
            .difference(self.detector.leaving());
        dropped.is_empty() || (now >= self.bound_before && dropped.is_subset(self.unbound))
    }
}
