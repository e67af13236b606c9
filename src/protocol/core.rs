//! The core: dispatch of inputs to transactions, and what concerns more than one of them.

use std::collections::BTreeMap;

use crate::config::{Config, Fault, Recovered};
use crate::coordinator::Backend;
use crate::effect::{Effect, Effects, Event, Input};
use crate::message::Message;
use crate::outcome::reply;
use crate::recovery::recover;
use crate::site::{Site, Turn};
use crate::txn::Txn;
use crate::types::{Ballot, Csn, Decision, Gid, Lsn, Millis, NodeId, NodeSet, Verdict, Vote};
use crate::view::{Counters, TransactionView};

/// The commit protocol of one node: inputs in, effects out. See the crate's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Core {
    pub(crate) site: Site,
    pub(crate) txns: BTreeMap<Gid, Txn>,
}

impl Core {
    /// Starts with what the server found: its durable records and its prepared transactions. All links are down.
    pub fn new(config: Config, recovered: Vec<Recovered>, now: Millis, out: &mut Effects) -> Self {
        assert!(
            config.configured.contains(config.node),
            "a node runs in its own cluster only"
        );
        assert!(
            config.members.is_subset(config.configured),
            "members are configured"
        );
        assert!(config.epoch >= 1, "epochs start at 1");
        let mut core = Self {
            site: Site::new(config),
            txns: BTreeMap::new(),
        };
        let mut turn = Turn {
            site: &mut core.site,
            now,
            out,
        };
        let (node, start) = (turn.site.node(), turn.site.last_csn());
        turn.raise_visible(node, start);
        for found in recovered {
            let txn = recover(&mut turn, &found);
            core.txns.insert(found.gid, txn);
        }
        core.forget_all(out);
        core.answer_horizons(out);
        core
    }

    /// Takes in one input; what has to be done about it is appended to `out`.
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Effects) {
        match input {
            Input::Message { from, msg } => self.on_message(now, from, msg, out),
            Input::LinkUp { peer, epoch } => self.on_link_up(now, peer, epoch, out),
            Input::LinkDown { peer } => self.on_link_down(now, peer, out),
            Input::Committing {
                gid,
                wait_peers,
                fast,
            } => {
                let known = self.txns.contains_key(&gid);
                self.own(gid, now);
                if let Some(decision) = self.site.forgotten.get(gid) {
                    // The backend was slow to announce what was resolved after a restart.
                    out.push(reply(gid, decision, Csn::ZERO, None));
                    out.push(Effect::PeersFinished { gid });
                }
                self.entry(gid, now, out, |txn, turn| {
                    if !known && turn.site.may_have_ended_before(gid) {
                        txn.look_up(turn);
                    }
                    txn.on_committing(turn, wait_peers, fast)
                });
            }
            Input::Voted {
                gid,
                vote,
                prepare_lsn,
            } => {
                self.on_voted(now, gid, vote, prepare_lsn, out);
            }
            Input::StreamOutcome { gid, decision } => {
                self.entry(gid, now, out, |txn, turn| {
                    txn.on_stream_outcome(turn, decision)
                });
            }
            Input::PrepareBefore { gid, lsn } => {
                self.entry(gid, now, out, |txn, _| txn.on_prepare_before(lsn));
            }
            Input::Finished { gid } => self.entry(gid, now, out, Txn::on_finished_here),
            Input::Interrupted { gid } => self.entry(gid, now, out, Txn::on_interrupted),
            Input::Abandoned { gid } => {
                let known = self.txns.contains_key(&gid);
                self.own(gid, now);
                self.entry(gid, now, out, |txn, turn| {
                    if !known {
                        txn.look_up(turn);
                    }
                    txn.on_abandoned(turn);
                });
            }
            Input::CoordinatorOutcome { gid, outcome } => {
                self.entry(gid, now, out, |txn, turn| txn.on_log(turn, outcome));
            }
            Input::Generation { generation } => self.on_generation(now, generation, out),
            Input::Online => self.on_online(out),
            Input::MarkPassed { origin, lsn } => self.on_mark_passed(origin, lsn, out),
            Input::Tick => self.on_tick(now, out),
        }
        self.answer_horizons(out);
    }

    /// Transactions that this node still has to do with.
    pub fn transactions(&self, now: Millis) -> impl Iterator<Item = TransactionView> + '_ {
        self.txns
            .values()
            .map(move |txn| TransactionView::of(txn, &self.site, now))
    }

    /// Ended transactions of other nodes that this node has known for so long without a place in the stream: their PREPARE was answered in an
    /// earlier life of this node, or is never sent. Without [`Input::PrepareBefore`] they could never be forgotten.
    pub fn unplaced(&self, now: Millis, longer_than: Millis) -> impl Iterator<Item = Gid> + '_ {
        let is_unplaced = move |txn: &&Txn| {
            txn.own.is_none()
                && txn.is_done()
                && txn.record.prepare_lsn == Lsn::ZERO
                && now.saturating_sub(txn.since) > longer_than
        };
        self.txns.values().filter(is_unplaced).map(Txn::gid)
    }

    pub const fn counters(&self) -> &Counters {
        &self.site.counters
    }

    /// Drops what decides nothing: statistics, the pace of attempts, the causal order, who has finished and thus forgetting. A model
    /// checker would otherwise take states for different that behave alike. No node that runs does this.
    pub fn reduce(&mut self) {
        self.site.reduce();
        for txn in self.txns.values_mut() {
            txn.reduce(&self.site.config);
        }
    }

    /// How the transaction ended, as long as this node remembers.
    pub fn decision(&self, gid: Gid) -> Option<Decision> {
        match self.txns.get(&gid) {
            Some(txn) if txn.refusing => None,
            Some(txn) => txn.record.decision,
            None => self.site.forgotten.get(gid),
        }
    }

    /// The highest ballot that the transaction was promised here.
    pub fn promised(&self, gid: Gid) -> Option<Ballot> {
        self.txns.get(&gid).map(|txn| txn.record.promised)
    }

    /// Up to which number every commit announced by `node` is finished here.
    pub fn settled(&self, node: NodeId) -> Csn {
        self.site.causal.settled(node)
    }

    /// Makes sure that a transaction of this node is known, unless it has ended everywhere.
    fn own(&mut self, gid: Gid, now: Millis) {
        let node = self.site.node();
        assert!(
            gid.coordinator == node,
            "a backend commits transactions of its own node"
        );
        if self.site.forgotten.get(gid).is_none() {
            self.txns
                .entry(gid)
                .or_insert_with(|| Txn::new_own(gid, now, Backend::Unknown));
        }
    }

    /// Lets a known transaction act, and forgets it if that was its last act.
    pub(crate) fn entry(
        &mut self,
        gid: Gid,
        now: Millis,
        out: &mut Effects,
        act: impl FnOnce(&mut Txn, &mut Turn),
    ) {
        if let Some(txn) = self.txns.get_mut(&gid) {
            act(
                txn,
                &mut Turn {
                    site: &mut self.site,
                    now,
                    out,
                },
            );
            self.forget(gid, out);
        }
    }

    /// Drops the transaction if nobody can ask for it any more.
    fn forget(&mut self, gid: Gid, out: &mut Effects) {
        let Some(txn) = self.txns.get(&gid) else {
            return;
        };
        if !txn.is_forgettable(&self.site) {
            return;
        }
        let decision = txn.record.decision;
        let own = txn.own.is_some();
        if txn.recorded {
            out.push(Effect::Free { gid });
        }
        if own {
            for peer in self.site.config.peers().iter() {
                out.send(peer, Message::Forget { gid });
            }
        }
        if let Some(decision) = decision {
            self.site.forgotten.insert(gid, decision);
        }
        self.txns.remove(&gid);
    }

    pub(crate) fn forget_all(&mut self, out: &mut Effects) {
        let gids: Vec<Gid> = self
            .txns
            .values()
            .filter(|txn| txn.is_forgettable(&self.site))
            .map(Txn::gid)
            .collect();
        for gid in gids {
            self.forget(gid, out);
        }
    }

    fn on_voted(&mut self, now: Millis, gid: Gid, vote: Vote, lsn: Lsn, out: &mut Effects) {
        let node = self.site.node();
        assert!(
            gid.coordinator != node,
            "no node applies its own transaction"
        );
        if !gid.members.contains(node) {
            // A no would be taken for a decision, and it is none.
            let reason = "a PREPARE without a vote of this node was not skipped";
            return out.event(Event::Rejected { from: node, reason });
        }
        if !self.txns.contains_key(&gid) {
            if self.site.mark_covers(gid.coordinator, lsn) {
                let reason = "a PREPARE below the stored mark was not skipped";
                return out.event(Event::Rejected { from: node, reason });
            }
            let mut txn = Txn::new(gid, now);
            txn.votes = self.site.early_votes.take(gid);
            self.txns.insert(gid, txn);
        }
        self.entry(gid, now, out, |txn, turn| txn.on_voted(turn, vote, lsn));
    }

    fn on_mark_passed(&mut self, origin: NodeId, lsn: Lsn, out: &mut Effects) {
        self.site.raise_mark(origin, lsn);
        self.forget_all(out);
    }

    fn on_tick(&mut self, now: Millis, out: &mut Effects) {
        let mut turn = Turn {
            site: &mut self.site,
            now,
            out,
        };
        for txn in self.txns.values_mut() {
            txn.on_tick(&mut turn);
        }
        let before = now.saturating_sub(turn.site.config.resend_after_ms);
        turn.site.early_votes.drop_older(before);
        let silent = turn.site.horizon_missing.intersection(turn.site.links);
        if !silent.is_empty() && now >= turn.site.horizon_ask_at {
            turn.site.horizon_ask_at = turn.resend_at();
            for peer in silent.iter() {
                turn.out.send(peer, Message::AskHorizon);
            }
        }
        self.forget_all(out);
    }

    fn on_link_up(&mut self, now: Millis, peer: NodeId, epoch: u32, out: &mut Effects) {
        if !self
            .site
            .config
            .configured
            .without(self.site.node())
            .contains(peer)
        {
            return out.event(Event::Rejected {
                from: peer,
                reason: "it is not configured",
            });
        }
        if self.site.links.contains(peer) {
            self.on_link_down(now, peer, out);
        }
        self.site.links.insert(peer);
        self.site.set_epoch(peer, epoch);
        // Also of an epoch whose horizon is known: a later question may have been lost with the last link, and what came then answered an earlier one.
        self.site.horizon_missing.insert(peer);
        out.send(peer, Message::AskHorizon);
        let mut turn = Turn {
            site: &mut self.site,
            now,
            out,
        };
        let mut in_order: Vec<&mut Txn> = self.txns.values_mut().collect();
        in_order.sort_by_key(|txn| txn.announced.csn);
        for txn in in_order {
            if txn.gid().coordinator == peer && turn.site.config.members.contains(peer) {
                txn.trust_coordinator();
            }
            txn.resend(&mut turn, NodeSet::EMPTY.with(peer));
        }
    }

    fn on_link_down(&mut self, now: Millis, peer: NodeId, out: &mut Effects) {
        self.site.links.remove(peer);
        self.site.horizon_askers.remove(&peer);
        let mut turn = Turn {
            site: &mut self.site,
            now,
            out,
        };
        for txn in self.txns.values_mut() {
            txn.watch_coordinator(&mut turn);
            txn.resolve_if_cut_off(&mut turn);
            txn.choose(&mut turn, false);
        }
    }

    fn on_message(&mut self, now: Millis, from: NodeId, msg: Message, out: &mut Effects) {
        if let Err(reason) = self.check(from, &msg) {
            return out.event(Event::Rejected { from, reason });
        }
        match msg.gid() {
            None => self.on_horizon_message(from, &msg, out),
            Some(gid) if gid.generation <= self.site.config.copied_in => {
                self.on_older_than_copy(now, from, gid, &msg, out);
            }
            Some(gid) if self.txns.contains_key(&gid) => {
                self.entry(gid, now, out, |txn, turn| txn.on_message(turn, from, msg));
            }
            Some(gid) => match self.site.forgotten.get(gid) {
                Some(decision) => self.on_forgotten(now, from, &msg, decision, out),
                None => self.on_unknown(now, from, gid, msg, out),
            },
        }
    }

    /// Refuses what no correct node sends.
    fn check(&self, from: NodeId, msg: &Message) -> Result<(), &'static str> {
        let config = &self.site.config;
        if !config.configured.contains(from) {
            return Err("it is not configured");
        }
        match msg {
            Message::Status { .. } | Message::Propose { .. } if from == config.node => {
                Err("a node does not ask itself")
            }
            Message::Vote { gid, vote } if gid.coordinator != config.node => {
                let to_all = config.votes_to_all && *vote == Vote::Yes;
                if to_all && gid.members.contains(config.node) && gid.participants().contains(from)
                {
                    Ok(())
                } else {
                    Err("its vote is for another node")
                }
            }
            Message::Vote { gid, .. } if !gid.participants().contains(from) => {
                Err("it has no vote")
            }
            Message::Status { ballot, .. } | Message::Propose { ballot, .. }
                if ballot.node == Some(from) =>
            {
                if *ballot > Ballot::COORDINATOR {
                    Ok(())
                } else {
                    Err("its ballot is too low")
                }
            }
            Message::Propose {
                gid,
                ballot: Ballot::COORDINATOR,
                verdict: Verdict::Precommit,
            } if gid.coordinator == from => Ok(()),
            Message::Status { .. } | Message::Propose { .. }
                if !config.breaks(Fault::SharedBallots) =>
            {
                Err("its ballot belongs to another node")
            }
            _ => Ok(()),
        }
    }
}

impl Txn {
    pub(crate) fn on_message(&mut self, turn: &mut Turn, from: NodeId, msg: Message) {
        match msg {
            Message::Vote { vote, .. } if self.own.is_some() => self.on_vote(turn, from, vote),
            Message::Vote { .. } => self.on_fellow_vote(turn, from),
            Message::Propose {
                ballot, verdict, ..
            } => self.on_propose(turn, from, ballot, verdict),
            Message::Accepted { ballot, .. } => self.on_accepted(turn, from, ballot),
            Message::Refused { promised, .. } => self.on_refused(turn, promised),
            Message::Status { ballot, .. } => self.on_status(turn, from, ballot),
            Message::Promised {
                ballot,
                accepted,
                voted_yes,
                ..
            } => {
                self.on_promised(turn, from, ballot, accepted, voted_yes);
            }
            Message::Decided { decision, csn, .. } => self.on_decided(turn, from, decision, csn),
            Message::Finished { decision, csn, .. } => {
                self.on_peer_finished(turn, from, decision, csn)
            }
            Message::Forget { .. } => self.on_forget(turn, from),
            Message::Query { .. } => self.tell(turn, from),
            Message::AskHorizon | Message::Horizon { .. } | Message::Membership(_) => {}
        }
    }

    fn on_tick(&mut self, turn: &mut Turn) {
        self.give_up(turn);
        if self.resolution.at.is_some_and(|at| turn.now >= at) && !self.is_unsure() {
            self.resolve(turn);
        }
        if turn.now >= self.resend_at {
            self.resend_at = turn.resend_at();
            self.choose(turn, true);
            let links = turn.site.links;
            self.resend(turn, links);
        }
    }

    /// Repeats to these nodes whatever they have not answered.
    fn resend(&mut self, turn: &mut Turn, to: NodeSet) {
        if self.is_undecided() {
            self.resend_vote(turn, to);
            self.resend_proposal(turn, to);
            self.resend_resolver(turn, to);
        } else {
            self.resend_outcome(turn, to);
        }
    }
}
