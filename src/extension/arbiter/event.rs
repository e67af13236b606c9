//! What the processes of a server tell its arbiter, and what they are told to finish: records of the two queues in shared memory.

use super::referee::RefereeId;
use crate::pg::process::{self, Wait};
use crate::pg::shared::{EVENT_BYTES, FINISH_BYTES, shared};
use protocol::membership::RefereeAnswer;
use protocol::{Decision, GenerationNum, Gid, Lsn, NodeId, NodeSet, Vote};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A fact about this server, for the protocol core.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum LocalEvent {
    /// The backend `backend` has durably prepared its transaction and waits. `wait_peers`: it will also wait for the peers' commits.
    /// `fast`: it wants one round trip where the number of nodes allows it.
    Committing {
        gid: Gid,
        backend: u32,
        wait_peers: bool,
        fast: bool,
    },
    /// An apply worker prepared a peer's transaction durably, or could not. `lsn` is the PREPARE's end in the peer's WAL.
    Voted { gid: Gid, vote: Vote, lsn: Lsn },
    /// The backend `backend` is about to prepare the user's own two-phase transaction and will wait for the votes.
    UserPreparing { gid: Gid, backend: u32 },
    /// An apply worker prepared a user's two-phase transaction, or could not.
    UserVoted { gid: Gid, vote: Vote },
    /// COMMIT or ROLLBACK PREPARED was seen in the coordinator's stream.
    StreamOutcome { gid: Gid, decision: Decision },
    /// The local database has finished the transaction.
    Finished { gid: Gid },
    /// The process that was to finish the transaction went away.
    FinishLost { gid: Gid },
    /// The waiting backend was asked to cancel, terminate or time out.
    Interrupted { gid: Gid },
    /// The backend went away and left its transaction prepared.
    Abandoned { gid: Gid },
    /// A view asks; the answer goes to the board under this number.
    Ask { number: u64, question: Question },
    /// In the recovery stream of `from`, everything before its marker of the generation is applied and flushed here.
    MarkerReached { from: NodeId, num: GenerationNum },
    /// Whether this node is level with its donor but for a small rest.
    RecoveryLevel { from: NodeId, level: bool },
    /// What is committed elsewhere cannot be applied here.
    RecoveryFailed { reason: String },
    /// The recovery stream of `from` has ended.
    RecoveryLost { from: NodeId },
    /// What the referee has said.
    Refereed {
        answer: RefereeAnswer,
        referee: RefereeId,
    },
    /// The referee could be asked.
    RefereeSeen { referee: RefereeId },
    /// The referee could not be asked.
    RefereeFails { reason: String },
    /// The stored mark of a peer's stream has reached this position.
    MarkStored { node: NodeId, lsn: Lsn },
}

/// What a view wants to know from the protocol core.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Question {
    /// The transactions in flight; answered by `Vec<InFlight>`.
    Transactions,
    /// How many transactions ended in which way; answered by `Vec<Ended>`.
    Counters,
    /// How a transaction ended; answered by [`Fate`].
    Fate { gid: Gid },
}

/// A line of `mtm.transactions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InFlight {
    pub gid: Gid,
    pub state: String,
    /// The highest promised, if any.
    pub ballot: Option<String>,
    pub resolving: bool,
    pub age_ms: u64,
    pub missing: NodeSet,
}

/// A line of `mtm.stat_commits`: how many transactions this arbiter has seen end in one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    pub outcome: String,
    pub reason: String,
    pub count: u64,
}

/// What the core knows of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    Decided(Decision),
    InFlight,
    Unknown,
}

/// A settled conflict, as `mtm.conflicts` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conflict {
    /// Microseconds since 2000-01-01.
    pub happened_at: i64,
    pub kind: String,
    pub node: NodeId,
    /// Table and key, as `table "s.t", key (...)`.
    pub target: String,
    pub loser: Option<Gid>,
    pub winner: Option<Gid>,
}

/// Something that happened to the set of working nodes, as `mtm.events` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberEvent {
    /// Microseconds since 2000-01-01.
    pub happened_at: i64,
    /// Whom it concerns.
    pub node: NodeId,
    pub event: String,
    pub reason: String,
    /// The generation that this node is in since.
    pub generation: u32,
    /// How long the state lasted that has ended, milliseconds.
    pub lasted_ms: Option<u64>,
}

/// An order to finish a prepared transaction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishOrder {
    pub gid: Gid,
    pub decision: Decision,
    /// The durable record that must precede the finish in WAL: its tuple and bytes.
    pub record: Option<(u32, Vec<u8>)>,
}

/// Hands an event to the arbiter. Waits while the queue is full: the arbiter is then the bottleneck and losing an event is not an option.
pub fn submit(event: &LocalEvent) {
    let mut buffer = [0u8; EVENT_BYTES];
    let length = bincode::serde::encode_into_slice(event, &mut buffer, bincode::config::standard())
        .expect("refusals are cut so that every event fits");
    let shared = shared();
    while !shared.events.push(&buffer[..length]) {
        shared
            .counters
            .events_waited
            .fetch_add(1, Ordering::Relaxed);
        shared.wake_arbiter_thread();
        process::pause_ms(1);
    }
    shared.wake_arbiter_thread();
}

/// Takes the next event. Only the tokio thread calls this.
pub fn take(buffer: &mut [u8; EVENT_BYTES]) -> Option<LocalEvent> {
    let record = shared().events.pop(buffer)?;
    let (event, _) = bincode::serde::decode_from_slice(record, bincode::config::standard())
        .expect("the queue holds only what submit() encoded");
    Some(event)
}

impl FinishOrder {
    /// Queues the order for the apply workers and the finisher; false when the queue is full.
    pub fn push(&self) -> bool {
        let mut buffer = [0u8; FINISH_BYTES];
        let length =
            bincode::serde::encode_into_slice(self, &mut buffer, bincode::config::standard())
                .expect("a gid and a record fit");
        shared().push_finish(&buffer[..length])
    }

    /// Takes the next order; the caller says [`FinishOrder::put_down`] when it is carried out or lost.
    pub fn take() -> Option<FinishOrder> {
        let mut buffer = [0u8; FINISH_BYTES];
        shared().finishes_in_hand.fetch_add(1, Ordering::AcqRel);
        let Some(record) = shared().finishes.pop(&mut buffer) else {
            FinishOrder::put_down();
            return None;
        };
        let (order, _) = bincode::serde::decode_from_slice(record, bincode::config::standard())
            .expect("the queue holds only what push() encoded");
        Some(order)
    }

    /// The calling process no longer has the order that it took.
    pub fn put_down() {
        shared().finishes_in_hand.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Drops the orders of an earlier life of the arbiter and waits until those in hand are carried out: their records must not be written after this
/// life has given their tuples to others.
pub fn await_finishes() {
    loop {
        while FinishOrder::take().is_some() {
            FinishOrder::put_down();
        }
        if shared().finishes_in_hand.load(Ordering::Acquire) == 0 {
            return;
        }
        process::wait_latch(Duration::from_millis(5), Wait::Work);
        process::check_interrupts();
    }
}
