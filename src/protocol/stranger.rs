//! Messages about transactions that this node does not keep: not yet, or no longer.
//!
//! Which of the two it is follows from the rules of forgetting (see `outcome`): whoever is still in doubt proves that nobody has forgotten,
//! and a commit proves that this member had prepared it.

use crate::config::TRANSACTIONS_MAX;
use crate::coordinator::Backend;
use crate::core::Core;
use crate::effect::{Effects, Event};
use crate::message::Message;
use crate::site::Turn;
use crate::txn::Txn;
use crate::types::{Csn, Decision, Gid, Millis, NodeId, Verdict};

impl Core {
    /// About a transaction that this node has forgotten: a message was overtaken, or an aborted PREPARE came late.
    pub(crate) fn on_forgotten(
        &mut self,
        now: Millis,
        from: NodeId,
        msg: &Message,
        decision: Decision,
        out: &mut Effects,
    ) {
        let Some(gid) = msg.gid() else { return };
        match msg {
            // To all: the coordinator answers it.
            Message::Vote { .. } if gid.coordinator != self.site.node() => {}
            Message::Vote { .. }
            | Message::Query { .. }
            | Message::Status { .. }
            | Message::Propose { .. } => {
                out.send(
                    from,
                    Message::Decided {
                        gid,
                        decision,
                        csn: None,
                    },
                );
            }
            Message::Finished { .. } if gid.coordinator == self.site.node() => {
                out.send(from, Message::Forget { gid })
            }
            Message::Decided {
                decision: told,
                csn,
                ..
            } if *told == decision => {
                self.acknowledge_forgotten(now, from, gid, decision, *csn, out);
            }
            _ => {}
        }
    }

    /// About a transaction of which an earlier server of this node's name may have promised, accepted or voted something that is lost. Nobody is told
    /// anything that could count as an answer of that server; the copy holds the outcome, since it was taken when every such transaction had one or
    /// needed no vote of this node. See `docs/membership.md`, "A copy of a node".
    pub(crate) fn on_older_than_copy(
        &mut self,
        now: Millis,
        from: NodeId,
        gid: Gid,
        msg: &Message,
        out: &mut Effects,
    ) {
        match msg {
            Message::Decided { decision, csn, .. } => {
                self.acknowledge_forgotten(now, from, gid, *decision, *csn, out);
            }
            Message::Finished { .. } if gid.coordinator == self.site.node() => {
                out.send(from, Message::Forget { gid });
            }
            // It has only promised, as an acceptor without a vote, and keeps that until the coordinator says this. All that the lost node coordinated had ended when it was copied.
            Message::Query { .. }
                if gid.coordinator == self.site.node() && !gid.members.contains(from) =>
            {
                out.send(from, Message::Forget { gid });
            }
            _ => {}
        }
    }

    fn acknowledge_forgotten(
        &mut self,
        now: Millis,
        from: NodeId,
        gid: Gid,
        decision: Decision,
        csn: Option<Csn>,
        out: &mut Effects,
    ) {
        if let (Decision::Commit, Some(csn)) = (decision, csn) {
            Turn {
                site: &mut self.site,
                now,
                out,
            }
            .settle(from, csn);
        }
        out.send(from, Message::Finished { gid, decision, csn });
    }

    /// About a transaction that this node has not heard of, or has forgotten long ago.
    pub(crate) fn on_unknown(
        &mut self,
        now: Millis,
        from: NodeId,
        gid: Gid,
        msg: Message,
        out: &mut Effects,
    ) {
        let member = gid.members.contains(self.site.node());
        if gid.coordinator == self.site.node() {
            return self.on_unknown_own(now, from, gid, msg, out);
        }
        match msg {
            // It has overtaken the PREPARE, which comes another way; or is late, and dropped in a while.
            Message::Vote { .. } => self.site.early_votes.keep(gid, from, now),
            // Without a vote it has nothing to finish and nothing to acknowledge.
            Message::Decided { .. } if !member => {}
            // Every member has prepared what was committed; what is no longer prepared here is finished.
            Message::Decided {
                decision: Decision::Commit,
                csn,
                ..
            } => {
                self.acknowledge_forgotten(now, from, gid, Decision::Commit, csn, out);
            }
            Message::Propose {
                verdict: Verdict::Precommit,
                ..
            } if member => {}
            Message::Status { .. } | Message::Propose { .. } if member => {
                self.create(gid, now, out, |txn, turn| txn.bar(turn, from));
            }
            // Its PREPARE is still to come and must find a refusal, whatever happens to this node until then. Only the coordinator
            // knows that it was not forgotten instead.
            Message::Decided { .. } if member && from != gid.coordinator => {}
            Message::Decided { .. } if member => {
                self.create(gid, now, out, |txn, turn| txn.bar(turn, from));
            }
            Message::Decided { .. } | Message::Status { .. } | Message::Propose { .. } => {
                self.create(gid, now, out, |txn, turn| txn.on_message(turn, from, msg));
            }
            _ => {}
        }
    }

    /// A node speaks of this node's transaction before its backend does, or this node has restarted since. The own log is asked
    /// first; what is not kept until it answers will be said again.
    fn on_unknown_own(
        &mut self,
        now: Millis,
        from: NodeId,
        gid: Gid,
        msg: Message,
        out: &mut Effects,
    ) {
        match msg {
            Message::Accepted { .. }
            | Message::Promised { .. }
            | Message::Refused { .. }
            | Message::Forget { .. } => {}
            _ => self.create(gid, now, out, |txn, turn| {
                txn.look_up(turn);
                txn.on_message(turn, from, msg);
            }),
        }
    }

    /// Takes up a transaction on a peer's word, while there is room.
    fn create(
        &mut self,
        gid: Gid,
        now: Millis,
        out: &mut Effects,
        act: impl FnOnce(&mut Txn, &mut Turn),
    ) {
        if self.txns.len() >= TRANSACTIONS_MAX {
            return out.event(Event::TableFull {
                table: "transactions",
            });
        }
        let own = gid.coordinator == self.site.node();
        let txn = if own {
            Txn::new_own(gid, now, Backend::Unknown)
        } else {
            Txn::new(gid, now)
        };
        self.txns.insert(gid, txn);
        self.entry(gid, now, out, act);
    }
}
