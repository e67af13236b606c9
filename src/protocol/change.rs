//! What a change of members means for transactions in flight. Who is a member is decided in `membership`.
//!
//! - Votes that are still missing do not come: members that have switched apply nothing older. The coordinator resolves at once.
//! - Transactions of a coordinator outside of it are resolved by those that are left.
//! - Numbers of a coordinator outside of it are replaced by this node's (see `causal`).
//! - A node that was not a member has recovered commits without their numbers. Once it is online it asks everybody for their horizons, which
//!   cover them: what it is still missing then, it knows as prepared, and the announcing node waits for it.

use crate::core::Core;
use crate::effect::Effects;
use crate::membership::Generation;
use crate::message::Message;
use crate::site::Turn;
use crate::types::Millis;

impl Core {
    pub(crate) fn on_generation(&mut self, now: Millis, generation: Generation, out: &mut Effects) {
        self.site.config.generation = generation.num;
        self.site.config.members = generation.members;
        let mut turn = Turn {
            site: &mut self.site,
            now,
            out,
        };
        for txn in self.txns.values_mut() {
            txn.conclude(&mut turn);
            txn.resolve_if_over(&mut turn);
            txn.resolve_orphan(&mut turn);
            txn.adopt(&mut turn);
            txn.report_peers(&mut turn);
        }
        self.forget_all(out);
    }

    pub(crate) fn on_online(&mut self, out: &mut Effects) {
        let peers = self.site.config.peers();
        self.site.horizon_missing = peers;
        for peer in peers.intersection(self.site.links).iter() {
            out.send(peer, Message::AskHorizon);
        }
    }
}
