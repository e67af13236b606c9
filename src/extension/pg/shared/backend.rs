//! The slot of each process of the server: what its transaction waits for, and who may end it.

use super::cells::{GidCell, RefusalCell};
use super::replay::name_hash;
use crate::pg::handed_record::HandedRecord;
use protocol::Refusal;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};

/// How the commit of a backend stands.
pub mod outcome {
    pub const WAITING: u32 = 0;
    pub const COMMIT: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const UNKNOWN: u32 = 3;
}

/// Room of the word of `outcome` beside the xid.
const OUTCOME_BITS: u32 = 2;
const OUTCOME_MASK: u64 = (1 << OUTCOME_BITS) - 1;

const fn outcome_word(xid: u64, code: u32) -> u64 {
    (xid << OUTCOME_BITS) | code as u64
}

/// Where a backend's transaction stands for the conflict rule.
pub mod stage {
    /// Nothing special: running, or no transaction.
    pub const RUNNING: u32 = 0;
    /// COMMIT has begun; the outcome belongs to the protocol.
    pub const COMMITTING: u32 = 1;
    /// The monitor is writing why the transaction must die.
    pub const MARKING: u32 = 2;
    /// The transaction must die; the reason is in `refusal`.
    pub const VICTIM: u32 = 3;
}

/// One per process slot of the server (`pgprocno`).
#[repr(C, align(64))]
pub struct BackendSlot {
    pub stage: AtomicU32,
    /// The `xid` of the transaction that it is about and a word of `outcome`: an answer that comes late never reaches another transaction.
    outcome: AtomicU64,
    /// `xid` of the last transaction of this backend that every member is known to have finished.
    peers_finished: AtomicU64,
    pub gid: GidCell,
    /// What it has to write before its COMMIT PREPARED; belongs to `outcome`.
    pub record: HandedRecord,
    /// When the first attempt of the running transaction started, once it has begun to write; 0 before. See `age`.
    pub started_at: AtomicI64,
    /// In the middle of a PREPARE: see `barrier`.
    pub preparing: AtomicBool,
    /// [`name_hash`] of the user's own PREPARE TRANSACTION that `gid` is: votes are counted, nothing is decided. 0 for anything else.
    pub user_prepare: AtomicU64,
    /// The tokio thread's reason of an abort, or the monitor's for a victim.
    pub refusal: RefusalCell,
}

impl BackendSlot {
    /// Whether what it waits for is a user's own PREPARE TRANSACTION.
    pub fn is_user_prepare(&self) -> bool {
        self.user_prepare.load(Ordering::Relaxed) != 0
    }

    /// Whether it waits for the votes on a user's own PREPARE TRANSACTION of this name.
    pub fn awaits_votes_on(&self, name: &[u8]) -> bool {
        self.user_prepare.load(Ordering::Acquire) == name_hash(name) && self.gid.get().is_some()
    }

    /// The backend begins to wait for the outcome of its transaction.
    pub fn await_outcome(&self, xid: u64) {
        self.outcome
            .store(outcome_word(xid, outcome::WAITING), Ordering::Release);
    }

    /// How the backend's transaction `xid` stands; waiting if the slot is about another one.
    pub fn outcome(&self, xid: u64) -> u32 {
        let word = self.outcome.load(Ordering::Acquire);
        let code = (word & OUTCOME_MASK) as u32;
        if word == outcome_word(xid, code) {
            code
        } else {
            outcome::WAITING
        }
    }

    /// Answers the backend; false when it does not wait for this transaction (any more).
    pub fn tell_outcome(&self, xid: u64, code: u32) -> bool {
        self.outcome
            .compare_exchange(
                outcome_word(xid, outcome::WAITING),
                outcome_word(xid, code),
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// Every member has finished the backend's transaction `xid`. An earlier one of the same slot may be told of later.
    pub fn tell_peers_finished(&self, xid: u64) {
        self.peers_finished.fetch_max(xid, Ordering::AcqRel);
    }

    /// Whether every member is known to have finished the backend's transaction `xid`.
    pub fn have_peers_finished(&self, xid: u64) -> bool {
        self.peers_finished.load(Ordering::Acquire) >= xid
    }

    /// Claims the backend's running transaction as a victim of the conflict rule; false when it has begun to commit.
    ///
    /// While it is being marked, the backend can neither begin to commit nor leave the transaction. So `still_running` is the truth about the
    /// transaction that gets marked, and the signal that `interrupt` sends cannot hit the next one.
    pub fn make_victim(
        &self,
        refusal: &Refusal,
        still_running: impl FnOnce() -> bool,
        interrupt: impl FnOnce() -> bool,
    ) -> bool {
        let claimed = self
            .stage
            .compare_exchange(
                stage::RUNNING,
                stage::MARKING,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok();
        if !claimed {
            return false;
        }
        if !still_running() {
            self.stage.store(stage::RUNNING, Ordering::Release);
            return false;
        }
        self.refusal.set(refusal);
        let interrupted = interrupt();
        self.stage.store(stage::VICTIM, Ordering::Release);
        interrupted
    }

    /// Whether the backend's own transaction must die. Waits while that is just being written.
    pub fn is_victim(&self) -> bool {
        loop {
            match self.stage.load(Ordering::Acquire) {
                stage::MARKING => std::hint::spin_loop(),
                stage => return stage == stage::VICTIM,
            }
        }
    }

    /// The backend's transaction has ended, one way or the other.
    pub fn end_transaction(&self) {
        self.started_at.store(0, Ordering::Release);
        loop {
            match self.stage.load(Ordering::Acquire) {
                stage::RUNNING => return,
                stage::MARKING => std::hint::spin_loop(),
                seen => {
                    let changed = self.stage.compare_exchange(
                        seen,
                        stage::RUNNING,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    );
                    if changed.is_ok() {
                        return;
                    }
                }
            }
        }
    }
}
