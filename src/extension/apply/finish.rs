//! Finishing prepared transactions of this server by order of the arbiter.

use crate::arbiter::event::{FinishOrder, LocalEvent, submit};
use crate::pg::process::{self, Wait};
use crate::pg::records::DurableTable;
use crate::pg::shared::{self, shared};
use crate::pg::twophase::{self, Finished};
use std::cell::RefCell;
use std::time::Duration;

/// How often a transaction that another process holds at this moment is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// How long a process that ends waits for room in the queue for the order it could not carry out.
const GIVE_BACK_TRIES: u32 = 1000;

thread_local! {
    /// The order this process has taken and not carried out yet.
    static IN_HAND: RefCell<Option<FinishOrder>> = const { RefCell::new(None) };
}

/// Carries out orders until none is left.
pub fn finish_all(records: &DurableTable) {
    while let Some(order) = FinishOrder::take() {
        IN_HAND.set(Some(order.clone()));
        finish(&order, records);
        IN_HAND.set(None);
    }
}

/// The process ends: what it has in hand is for another one. An order that got lost would leave its transaction prepared until the arbiter starts
/// again.
pub fn give_back() {
    if let Some(order) = IN_HAND.take() {
        for _ in 0..GIVE_BACK_TRIES {
            if order.push() {
                return;
            }
            process::pause_ms(1);
        }
    }
}

fn finish(order: &FinishOrder, records: &DurableTable) {
    let name = order.gid.text(shared().cluster_tag());
    let commit = shared::is_commit(order.decision);
    if let Some((tuple, body)) = &order.record
        && let Ok(body) = body.as_slice().try_into()
    {
        // Rides on the flush of the finish (architecture.md, "Exactly once").
        process::in_transaction(|| records.write(&mut [(*tuple, body)]));
    }
    loop {
        match twophase::finish(&name, commit) {
            Finished::Done | Finished::Unknown => break,
            Finished::Busy | Finished::Failed => {
                process::wait_latch(BUSY_PAUSE, Wait::Work);
                process::exit_if_terminated();
            }
        }
    }
    submit(&LocalEvent::Finished { gid: order.gid });
}

/// Body of the background worker `multimaster finisher`.
pub fn main() {
    process::attach_signals();
    process::stay_local();
    if !shared().finisher.claim() {
        return;
    }
    process::at_exit(|| {
        give_back();
        shared().finisher.release();
    });
    process::connect_to_cluster();
    process::tag_as_applied();
    let records = process::in_transaction(|| DurableTable::open(c"records", 0));
    loop {
        finish_all(&records);
        process::check_interrupts();
        if shared().finishes.is_empty() {
            process::wait_latch(Duration::from_secs(1), Wait::Work);
        }
    }
}
