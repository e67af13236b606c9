//! Finishing prepared transactions of this server by order of the arbiter.

use crate::arbiter::event::{FinishOrder, LocalEvent, submit};
use crate::failpoint::{Failpoint, hit};
use crate::pg::in_flight;
use crate::pg::process::{self, Wait};
use crate::pg::records::DurableTable;
use crate::pg::shared::{self, shared};
use crate::pg::twophase::{self, Finished};
use protocol::Gid;
use std::cell::Cell;
use std::time::Duration;

/// How often a transaction that another process holds at this moment is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);

thread_local! {
    /// The transaction that this process is finishing.
    static IN_HAND: Cell<Option<Gid>> = const { Cell::new(None) };
}

/// Carries out orders until none is left.
pub fn finish_all(records: &DurableTable) {
    while let Some(order) = FinishOrder::take() {
        IN_HAND.set(Some(order.gid));
        finish(&order, records);
        IN_HAND.set(None);
        FinishOrder::put_down();
    }
}

/// The process ends: what it was finishing is another's to finish.
pub fn leave() {
    if let Some(gid) = IN_HAND.take() {
        FinishOrder::put_down();
        submit(&LocalEvent::FinishLost { gid });
    }
}

fn finish(order: &FinishOrder, records: &DurableTable) {
    let name = order.gid.text(shared().cluster_tag());
    let commit = shared::is_commit(order.decision);
    hit(Failpoint::FinishBeforeRecord);
    let record = order
        .record
        .as_ref()
        .and_then(|(tuple, body)| Some((*tuple, body.as_slice().try_into().ok()?)));
    // Taken by the first attempt: it stays written even if that one fails.
    let mut unwritten = record;
    loop {
        let write_record = || {
            if let Some(record) = unwritten.take() {
                // Rides on the flush of the finish (architecture.md, "Exactly once").
                records.write(&mut [record]);
            }
            hit(Failpoint::FinishAfterRecord);
        };
        match twophase::finish_after(&name, commit, write_record) {
            Finished::Done | Finished::Unknown => break,
            Finished::Busy | Finished::Failed => {
                process::wait_latch(BUSY_PAUSE, Wait::Work);
                process::exit_if_terminated();
            }
        }
    }
    in_flight::leave(order.gid);
    hit(Failpoint::FinishAfterFinish);
    submit(&LocalEvent::Finished { gid: order.gid });
    hit(Failpoint::FinishAfterTelling);
}

/// Body of the background worker `multimaster finisher`.
pub fn main() {
    process::attach_signals();
    process::stay_local();
    if !shared().finisher.claim() {
        return;
    }
    process::at_exit(|| {
        leave();
        shared().finisher.release();
    });
    process::connect_to_cluster();
    process::tag_as_applied();
    let records = process::in_transaction(|| DurableTable::open(c"records", 0));
    loop {
        finish_all(&records);
        process::report_statistics();
        process::check_interrupts();
        if shared().finishes.is_empty() {
            process::wait_latch(Duration::from_secs(1), Wait::Work);
        }
    }
}
