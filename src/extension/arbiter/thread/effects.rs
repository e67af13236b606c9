//! Carries out what the core wants done, in order and nothing before what it waits for is durable.

use super::super::durable::RECORDS_MAX;
use super::super::event::FinishOrder;
use super::super::trace;
use super::super::user_votes::UserTally;
use super::Arbiter;
use super::main_link::{LogLevel, ToMain};
use crate::failpoint::{Failpoint, hit_in_thread};
use crate::pg::records::Body;
use crate::pg::shared::{self, outcome, shared};
use protocol::{Decision, Effect, Event, Gid, NodeId, Outcome, Source};
use std::sync::atomic::Ordering;

impl Arbiter {
    /// Carries out effects; what belongs to a transaction whose record is being written waits for it.
    pub(super) fn carry_out(&mut self, effects: impl Iterator<Item = Effect>) {
        let mut effects = effects.peekable();
        let mut pending_record: Option<(Gid, u32, Body)> = None;
        while let Some(effect) = effects.next() {
            if let Some(gid) = gid_of(&effect)
                && self.order.holds(gid)
            {
                self.order.hold(gid, effect);
                continue;
            }
            self.trace(|| trace::effect(&effect));
            match effect {
                Effect::Persist { gid, record } => match self.tuples.of(gid) {
                    Some(tuple) => self.order.persist(gid, tuple, record.to_bytes()),
                    None => self.out_of_records(gid),
                },
                Effect::Write { gid, record } => match self.tuples.of(gid) {
                    // What follows carries the record, so that the process that finishes writes it first.
                    Some(tuple) if effects.peek().is_some_and(|next| takes_record(next, gid)) => {
                        pending_record = Some((gid, tuple, record.to_bytes()));
                    }
                    // The backend that hears of an abort rolls back at once, and its flush takes the record along.
                    Some(tuple) if matches!(effects.peek(), Some(Effect::Reply { gid: next, .. }) if *next == gid) =>
                    {
                        self.order.write_before(gid, tuple, record.to_bytes());
                    }
                    Some(tuple) => self.order.write(tuple, record.to_bytes()),
                    None => self.out_of_records(gid),
                },
                Effect::Finish { gid, decision } => {
                    let record = pending_record.take().filter(|(owner, ..)| *owner == gid);
                    self.finish(
                        gid,
                        decision,
                        record.map(|(_, tuple, body)| (tuple, body.to_vec())),
                    );
                }
                Effect::Reply { gid, outcome } => {
                    let record = pending_record.take().filter(|(owner, ..)| *owner == gid);
                    self.reply(gid, outcome, record.map(|(_, tuple, body)| (tuple, body)));
                }
                other => self.carry_out_simple(other),
            }
        }
    }

    fn carry_out_simple(&mut self, effect: Effect) {
        match effect {
            Effect::Send { to, msg } if to == self.node => self.to_self.push_back(msg),
            Effect::Send { to, msg } => {
                self.note_proposal(&msg);
                self.send(to, &msg);
            }
            Effect::Free { gid } => {
                if let Some(tuple) = self.tuples.taken_by(gid) {
                    self.order.clear(gid, tuple);
                }
            }
            Effect::PeersFinished { gid } => {
                if let Some(waiting) = self.waiting.remove(&gid) {
                    let slot = &shared::backends()[waiting.backend as usize];
                    slot.tell_peers_finished(gid.xid);
                    shared::wake_proc(waiting.backend as usize);
                }
            }
            Effect::LookUp { gid } => self.main.send(ToMain::LookUp(gid)),
            Effect::Visible { node, csn } => shared().raise_visible(node, csn),
            Effect::Settled { node, csn } => self.settled(node, csn),
            Effect::Event(event) => self.report(&event),
            Effect::Persist { .. }
            | Effect::Write { .. }
            | Effect::Finish { .. }
            | Effect::Reply { .. } => {
                unreachable!("carried out by carry_out")
            }
        }
    }

    /// Every tuple is taken by a transaction that some node has not finished: stop rather than break the order of records.
    fn out_of_records(&self, gid: Gid) {
        self.main.log(
            LogLevel::Warning,
            format!("no durable record is free for transaction {gid:?}"),
        );
        panic!("all {} durable records are in use", RECORDS_MAX);
    }

    fn finish(&mut self, gid: Gid, decision: Decision, record: Option<(u32, Vec<u8>)>) {
        let order = FinishOrder {
            gid,
            decision,
            record,
        };
        hit_in_thread(Failpoint::BeforeFinishOrder);
        self.finishing.give(order);
        hit_in_thread(Failpoint::AfterFinishOrder);
    }

    /// Tells the backend; it writes the `record` (tuple and bytes) before it commits. One that has gone has left a word, and the core will have another
    /// process write the record and finish.
    fn reply(&mut self, gid: Gid, result: Outcome, record: Option<(u32, Body)>) {
        let Some(waiting) = self.waiting.get(&gid).copied() else {
            return;
        };
        let slot = &shared::backends()[waiting.backend as usize];
        if slot.gid.get() != Some(gid) {
            self.waiting.remove(&gid);
            return;
        }
        slot.record
            .set(record.map(|(tuple, body)| (self.places.of(tuple), body)));
        let code = match result {
            Outcome::Commit { .. } => {
                self.note_commit(gid);
                if !waiting.wait_peers {
                    self.waiting.remove(&gid);
                }
                outcome::COMMIT
            }
            Outcome::Abort(refusal) => {
                self.refusals.count(&refusal);
                slot.refusal.set(&refusal);
                self.waiting.remove(&gid);
                outcome::ABORT
            }
            Outcome::Unknown => outcome::UNKNOWN,
        };
        hit_in_thread(Failpoint::BeforeReply);
        slot.tell_outcome(gid.xid, code);
        shared::wake_proc(waiting.backend as usize);
        hit_in_thread(Failpoint::AfterReply);
    }

    /// The votes on a user's PREPARE TRANSACTION are in.
    pub(super) fn answer_user(&mut self, gid: Gid, tally: UserTally) {
        let result = match tally {
            UserTally::Pending => return,
            UserTally::Prepared => Outcome::Commit {
                csn: protocol::Csn::ZERO,
            },
            UserTally::Refused(refusal) => Outcome::Abort(refusal),
        };
        self.reply(gid, result, None);
        self.waiting.remove(&gid);
    }

    fn report(&self, event: &Event) {
        match event {
            // Every transaction has one, and conflicts are ordinary: not for the log.
            Event::Decided {
                source:
                    Source::Central | Source::Fast | Source::Told | Source::VotedNo | Source::Refused,
                ..
            } => {}
            event => self.main.log(LogLevel::Info, format!("{event:?}")),
        }
    }

    fn settled(&self, node: NodeId, csn: protocol::Csn) {
        shared().node(node).settled.store(csn.0, Ordering::Release);
        for slot in shared::workers() {
            if slot.waits_for_order.load(Ordering::Acquire) {
                slot.process.wake();
            }
        }
    }
}

/// Whether the effect goes to a process that commits the transaction, or rolls it back by order, and writes the record first.
fn takes_record(effect: &Effect, gid: Gid) -> bool {
    match effect {
        Effect::Finish { gid: next, .. } => *next == gid,
        Effect::Reply {
            gid: next,
            outcome: Outcome::Commit { .. },
        } => *next == gid,
        _ => false,
    }
}

/// The transaction an effect is ordered by.
fn gid_of(effect: &Effect) -> Option<Gid> {
    match effect {
        Effect::Send { msg, .. } => msg.gid(),
        Effect::Persist { gid, .. }
        | Effect::Write { gid, .. }
        | Effect::Free { gid }
        | Effect::Finish { gid, .. }
        | Effect::Reply { gid, .. }
        | Effect::PeersFinished { gid }
        | Effect::LookUp { gid } => Some(*gid),
        Effect::Visible { .. } | Effect::Settled { .. } | Effect::Event(_) => None,
    }
}
