//! Campaigns: when this node wants another generation, and how it is elected.
//!
//! A generation is elected by the votes of a majority of the configured nodes *and* of each of its members. The majority makes sure that of two
//! elections the later one hears of the earlier; the members' votes, that none of them is dragged along.
//!
//! Donors are the members whose `online_in` is the greatest among all votes. If a voter that is no member has a greater one, the election
//! fails: something may have committed that no member holds.

use std::collections::BTreeMap;

use super::effect::{MembershipEffects, MembershipEvent};
use super::generation::{Elected, Generation};
use super::message::MembershipMessage;
use super::referee::RefereeAnswer;
use super::switch::Stage;
use super::{Membership, MembershipFault};
use crate::types::{GenerationNum, Millis, NodeId, NodeSet};

/// What a node knows about its own campaigns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Campaign {
    /// When to start, as long as there is a reason.
    at: Option<Millis>,
    pub running: Option<Running>,
    /// The highest number heard of.
    heard: GenerationNum,
    /// The highest number of which the referee has said that it is not for this node.
    refused: GenerationNum,
    attempts: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Running {
    pub generation: Generation,
    votes: BTreeMap<NodeId, GenerationNum>,
    /// By the referee.
    pub granted: bool,
    resend_at: Millis,
    until: Millis,
}

impl Campaign {
    /// See [`Membership::reduce`].
    pub const fn reduce(&mut self) {
        self.attempts = 0;
    }

    /// The number is of no use when the referee has granted it, or a higher one, to somebody else.
    pub fn granted_elsewhere(&mut self, answer: RefereeAnswer) {
        if !answer.granted {
            self.refused = self.refused.max(answer.latest);
            self.heard = self.heard.max(answer.latest);
        }
    }

    pub fn stop(&mut self) {
        self.at = None;
        self.running = None;
        self.attempts = 0;
    }
}

/// The referee may be far away: a campaign that needs it lasts so many times longer.
const REFEREE_PATIENCE: u64 = 10;

/// Beyond this many attempts the pause between them no longer grows.
const PAUSE_STEPS_MAX: u64 = 8;

impl Membership {
    /// Starts, repeats or ends a campaign.
    pub(super) fn campaign(&mut self, now: Millis, out: &mut MembershipEffects) {
        let Some(members) = self.wanted() else {
            self.campaign.at = None;
            self.lose(out);
            return;
        };
        let running = self.campaign.running.as_ref();
        if running.is_some_and(|running| running.generation.members != members) {
            self.lose(out);
        }
        if let Some(running) = &self.campaign.running {
            if now >= running.until {
                self.lose(out);
                self.pause(now);
            } else if now >= running.resend_at {
                self.request(now, out);
            }
            return;
        }
        let step = self.config.campaign_step_ms;
        let turn = now + step * self.config.rank(self.detector.clique());
        let at = *self.campaign.at.get_or_insert(turn);
        // Also waits for the end of this node's own promises.
        if now >= at && self.is_unbound_but_to(now, members) {
            self.start(now, members, out);
        }
    }

    /// The members this node would like to have, if it has a reason to campaign.
    fn wanted(&self) -> Option<NodeSet> {
        let clique = self.detector.clique();
        let current = self.record.current.generation;
        if self.leaving || !clique.contains(self.config.node) {
            return None;
        }
        let proposal = current
            .members
            .intersection(clique)
            .union(self.willing().intersection(clique));
        let drops = !current.members.is_subset(clique);
        // A vote that came to nothing keeps promises back for ever.
        let astray = self.record.last_vote.num > current.num;
        let reason = match self.stage {
            Stage::Online | Stage::Draining | Stage::Marking { .. } => drops || astray,
            Stage::Recovering => drops && self.recovery.source().is_none(),
            Stage::Outside => self.is_willing(),
            Stage::Closing => false,
        };
        let possible = self.config.is_electable(proposal)
            && proposal.contains(self.config.node)
            && (self.may_hold_all() || !self.config.needs_referee(proposal));
        (reason && possible).then_some(proposal)
    }

    /// Nodes that ask to be made members.
    pub(super) fn willing(&self) -> NodeSet {
        let peers = self.detector.present();
        let mut willing: NodeSet = peers
            .filter(|(_, presence)| presence.willing)
            .map(|(peer, _)| peer)
            .collect();
        if self.is_willing() {
            willing.insert(self.config.node);
        }
        willing
    }

    fn start(&mut self, now: Millis, members: NodeSet, out: &mut MembershipEffects) {
        let last = self.record.last_vote;
        let again = last.members == members
            && last.num > self.record.num()
            && last.num > self.campaign.refused;
        let num = if again {
            last.num
        } else {
            GenerationNum(last.num.max(self.campaign.heard).0.saturating_add(1))
        };
        let generation = Generation { num, members };
        let lasts = if self.config.needs_referee(members) {
            self.config.campaign_ms * REFEREE_PATIENCE
        } else {
            self.config.campaign_ms
        };
        self.record.last_vote = generation;
        self.persist(out);
        self.leave_unless_online();
        out.event(MembershipEvent::CampaignStarted { generation });
        self.campaign.at = None;
        self.campaign.attempts += 1;
        self.campaign.running = Some(Running {
            generation,
            votes: BTreeMap::new(),
            granted: false,
            resend_at: now,
            until: now + lasts,
        });
        self.request(now, out);
        self.on_granted(self.config.node, generation, self.record.online_in, out);
    }

    /// Asks those of the clique that have not answered.
    fn request(&mut self, now: Millis, out: &mut MembershipEffects) {
        let clique = self.detector.clique().without(self.config.node);
        let Some(running) = &mut self.campaign.running else {
            return;
        };
        running.resend_at = now + self.config.resend_ms;
        if self.config.needs_referee(running.generation.members) {
            let running = running.clone();
            return self.ask_referee(&running, out);
        }
        let generation = running.generation;
        let current = self.record.current;
        let voted: NodeSet = running.votes.keys().copied().collect();
        for peer in clique.difference(voted).iter() {
            let msg = MembershipMessage::RequestVote {
                generation,
                current,
            };
            out.send(peer, msg);
        }
    }

    pub(super) fn on_granted(
        &mut self,
        from: NodeId,
        generation: Generation,
        online_in: GenerationNum,
        out: &mut MembershipEffects,
    ) {
        let Some(running) = &mut self.campaign.running else {
            return;
        };
        if running.generation != generation {
            return;
        }
        running.votes.insert(from, online_in);
        self.conclude(out);
    }

    /// Ends the campaign when every vote that it needs is there.
    pub(super) fn conclude(&mut self, out: &mut MembershipEffects) {
        let config = self.config;
        let Some(running) = &self.campaign.running else {
            return;
        };
        let generation = running.generation;
        let voted: NodeSet = running.votes.keys().copied().collect();
        let majority_only = config.breaks(MembershipFault::MajorityOnly);
        let all = generation.members.is_subset(voted) || majority_only;
        let enough = if config.needs_referee(generation.members) {
            running.granted
        } else {
            voted.is_quorum_of(config.configured)
        };
        if !all || !enough {
            return;
        }
        match donors(&running.votes, generation.members) {
            Some(donors) => self.win(Elected { generation, donors }, out),
            None => self.lose(out),
        }
    }

    fn win(&mut self, elected: Elected, out: &mut MembershipEffects) {
        self.switch(elected, out);
        for peer in self.detector.linked().iter() {
            out.send(peer, MembershipMessage::Elected(elected));
        }
    }

    /// The number is taken. Tries again with a higher one, after a while.
    pub(super) fn on_denied(
        &mut self,
        now: Millis,
        num: GenerationNum,
        last_vote: GenerationNum,
        out: &mut MembershipEffects,
    ) {
        self.campaign.heard = self.campaign.heard.max(last_vote);
        let running = self.campaign.running.as_ref();
        if running.is_some_and(|running| running.generation.num == num) {
            self.lose(out);
            self.pause(now);
        }
    }

    pub(super) fn lose(&mut self, out: &mut MembershipEffects) {
        if let Some(Running { generation, .. }) = self.campaign.running.take() {
            out.event(MembershipEvent::CampaignLost { generation });
        }
    }

    /// The pause grows with the node's place and its attempts, so that somebody is eventually alone.
    pub(super) fn pause(&mut self, now: Millis) {
        let place = self.config.rank(self.config.configured) + 1;
        let steps = place * self.campaign.attempts.min(PAUSE_STEPS_MAX);
        self.campaign.at = Some(now + steps * self.config.campaign_step_ms);
    }
}

/// The members that hold everything older, if it is certain that some do.
fn donors(votes: &BTreeMap<NodeId, GenerationNum>, members: NodeSet) -> Option<NodeSet> {
    let latest = votes.values().max()?;
    let donors: NodeSet = votes
        .iter()
        .filter(|(node, online_in)| *online_in == latest && members.contains(**node))
        .map(|(node, _)| *node)
        .collect();
    (!donors.is_empty()).then_some(donors)
}
