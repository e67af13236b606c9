//! Horizons: telling another node up to which number it has finished this node's commits (see `causal`).

use crate::core::Core;
use crate::effect::Effects;
use crate::message::Message;
use crate::site::Asked;
use crate::types::{Csn, Decision, NodeId};

impl Core {
    pub(crate) fn on_horizon_message(&mut self, from: NodeId, msg: &Message, out: &mut Effects) {
        match msg {
            Message::AskHorizon => {
                self.site.ask_horizon(from);
            }
            Message::Horizon { csn } => {
                self.site.causal.horizon(from, *csn, out);
                if self
                    .site
                    .epoch_of(from)
                    .is_some_and(|epoch| csn.epoch() >= epoch)
                {
                    self.site.horizon_missing.remove(from);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn answer_horizons(&mut self, out: &mut Effects) {
        for (asker, asked) in self.site.horizon_askers.clone() {
            let horizon = self.horizon_of(asker);
            let Some(csn) = horizon.filter(|csn| *csn >= asked.wanted) else {
                continue;
            };
            if asked.again > csn {
                let wanted = asked.again;
                self.site
                    .horizon_askers
                    .insert(asker, Asked { wanted, ..asked });
            } else {
                self.site.horizon_askers.remove(&asker);
            }
            if asker == self.site.node() {
                self.site.causal.horizon(asker, csn, out);
            } else {
                out.send(asker, Message::Horizon { csn });
            }
        }
    }

    /// Up to which of this node's numbers the asker has finished every commit; `None` while some commit of an earlier epoch may be
    /// unfinished there.
    ///
    /// Also while some transaction is undecided of which the asker is no member: it is not told the number, and would take it for one that is still to come. Who asks when it has come online
    /// in a generation hears of all of them: what can commit without it is prepared everywhere before a donor writes its marker.
    fn horizon_of(&self, asker: NodeId) -> Option<Csn> {
        let mut horizon = self.site.last_csn();
        for txn in self.txns.values() {
            let concerns = |node| txn.gid().members.contains(node);
            if txn.record.decision.is_none() && concerns(self.site.node()) && !concerns(asker) {
                return None;
            }
            let open = if asker == self.site.node() {
                !txn.is_done()
            } else {
                txn.announced.unacked.contains(asker)
            };
            match (txn.record.decision, txn.announced.csn) {
                (None, _) if txn.recovered && txn.own.is_some() => return None,
                // Rule D2: numbered, and announced only when it is durable.
                (None, Some(csn)) => horizon = horizon.min(csn.previous()),
                (Some(Decision::Commit), Some(_)) if open && txn.recovered => return None,
                (Some(Decision::Commit), Some(csn)) if open => {
                    horizon = horizon.min(csn.previous())
                }
                _ => {}
            }
        }
        Some(horizon)
    }
}
