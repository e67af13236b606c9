//! What a node's start makes of the transactions it finds.
//!
//! - Own and prepared: nobody may abort it alone any more, so it is resolved.
//! - Own, not prepared, with a record: the own log knows how it ended, but some member may not have finished.
//! - Foreign and prepared: voted yes; the coordinator is asked, or the resolver after a while.
//! - With a decision: finished if it is not yet, and announced again if its number was this node's own. Numbers of earlier epochs
//!   are not used again: the commit gets a new one.

use crate::config::Recovered;
use crate::coordinator::Backend;
use crate::effect::Source;
use crate::site::Turn;
use crate::txn::{Local, Txn};
use crate::types::Csn;

/// Takes up a transaction where this node's restart left it.
pub(crate) fn recover(turn: &mut Turn, found: &Recovered) -> Txn {
    let own = found.gid.coordinator == turn.site.node();
    let mut txn = if own {
        Txn::new_own(found.gid, turn.now, Backend::Gone)
    } else {
        Txn::new(found.gid, turn.now)
    };
    txn.recovered = true;
    if let Some(record) = found.record {
        txn.record = record;
        txn.recorded = true;
    }
    let decision = txn.record.decision.take();
    txn.local = if found.prepared {
        Local::Prepared
    } else {
        Local::Finished
    };
    match decision {
        Some(decision) => {
            let number = Some(txn.record.csn).filter(|csn| *csn > Csn::ZERO);
            txn.decide(turn, decision, Source::Log, number);
        }
        None if found.prepared => {
            txn.record.voted_yes = true;
            if own {
                txn.resolve(turn);
            } else {
                txn.watch_coordinator(turn);
            }
        }
        None if own => {
            txn.local = Local::Prepared;
            txn.look_up(turn);
        }
        None => {
            // A promise without a vote; or a vote whose transaction is gone, of which the finish will complain.
            txn.local = if txn.record.voted_yes {
                Local::Prepared
            } else {
                Local::Absent
            };
            txn.watch_coordinator(turn);
        }
    }
    txn
}
