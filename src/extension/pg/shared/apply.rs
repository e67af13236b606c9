//! The slots of the apply workers.

use super::RING_BYTES;
use super::cells::{GidCell, RefusalCell};
use super::process::ProcCell;
use crate::pg::queue::Ring;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

/// Life of an apply worker's slot.
pub mod worker {
    /// No process.
    pub const FREE: u32 = 0;
    /// A process has been asked for.
    pub const STARTING: u32 = 1;
    /// Waits for work.
    pub const IDLE: u32 = 2;
    /// A receiver feeds it a transaction.
    pub const BUSY: u32 = 3;
}

/// One per apply worker; the ring lies in `WorkerRing` of the same index.
#[repr(C, align(64))]
pub struct WorkerSlot {
    pub state: AtomicU32,
    pub process: ProcCell,
    /// The receiver that feeds it.
    pub feeder: ProcCell,
    /// The feeder sleeps until the ring has room.
    pub feeder_waits: AtomicBool,
    /// The worker is about to wait for a transaction that has a row in hand, or does so.
    pub waits_for_row: AtomicBool,
    /// The xid, on this server, of the transaction that has the row.
    pub awaited_xid: AtomicU32,
    /// Jobs given, and jobs whose effect is durable (or that were refused).
    pub jobs_given: AtomicU64,
    pub jobs_done: AtomicU64,
    /// A receiver may still write into the ring. While this or `lost` is set, no new process gets the slot.
    pub fed: AtomicBool,
    /// The process went away before it knew which transaction it had been given: the receiver must ask for it again.
    pub lost: AtomicBool,
    /// The transaction being applied; empty between transactions.
    pub gid: GidCell,
    /// Counts applied transactions, so that the monitor's cancellation cannot hit the next one.
    pub applying: AtomicU64,
    /// `applying` of the transaction that must die by the conflict rule: whoever sets it writes `refusal`, and then `cancel_said`.
    pub cancel: AtomicU64,
    pub cancel_said: AtomicU64,
    pub refusal: RefusalCell,
    /// The transaction that `cancel` is for the benefit of.
    pub winner: GidCell,
    /// Table and key of the row the worker waits for, as the detail of a refusal; written before it waits, read while it does.
    pub target: RefusalCell,
    /// Waits until `settled` has reached what its transaction depends on.
    pub waits_for_order: AtomicBool,
    /// The last job whose receiver went away in the middle of it: it is to be dropped.
    pub broken_job: AtomicU64,
    /// Applies a transaction that still runs at its origin (apply::streamed).
    pub ahead: AtomicBool,
    /// The last job that was begun ahead and whose PREPARE has come; the last one that the worker dropped before that.
    pub resumed_job: AtomicU64,
    pub dropped_job: AtomicU64,
}

pub type WorkerRing = Ring<RING_BYTES>;
