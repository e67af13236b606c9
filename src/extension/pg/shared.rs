//! The extension's shared memory: fixed-size plain data that every process of the server sees.
//!
//! Written by one party at a time by construction (each field says by whom), read by anybody. The tokio thread of the arbiter uses only
//! what is here, `SetLatch` and the eventfd.

use super::board::{Board, RecentLog};
use super::queue::{Queue, Ring};
use super::raw;
use crate::latency::Latencies;
use pgrx::pg_sys;
use protocol::membership::{Admission, Phase, Standing};
use protocol::{Csn, Decision, Generation, GenerationNum, Gid, NodeId, NodeSet, Refusal};
use std::cell::UnsafeCell;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU32, AtomicU64, Ordering,
};

/// Node ids are 1 to 16; index 0 of per-node arrays is unused.
pub const NODES: usize = 17;
/// Longest encoded event from a process to the arbiter, bytes.
pub const EVENT_BYTES: usize = 1280;
/// Longest encoded order to finish a prepared transaction, bytes.
pub const FINISH_BYTES: usize = 384;
/// Bytes between a receiver and one apply worker.
pub const RING_BYTES: usize = 256 * 1024;
/// Upper limit of `multimaster.max_workers`.
pub const WORKERS_MAX: usize = 256;

/// What this node is, as `mtm.status()` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NodeStatus {
    /// No cluster here (yet).
    Disabled = 0,
    /// The cluster is known; connections and recovery are under way.
    Starting = 1,
    /// Connected to every member in both directions: takes reads and writes.
    Online = 2,
    /// Some member cannot be reached: writes wait or are refused.
    Degraded = 3,
    /// A new generation begins: in a moment it is online or not a member.
    Switching = 4,
    /// A member that is not level yet: the others wait for it.
    Recovery = 5,
    /// Not a member; replays what it has missed.
    Catchup = 6,
    /// Not a member, and nobody to recover from is seen.
    Minority = 7,
}

impl NodeStatus {
    fn from_raw(raw: u32) -> NodeStatus {
        match raw {
            1 => NodeStatus::Starting,
            2 => NodeStatus::Online,
            3 => NodeStatus::Degraded,
            4 => NodeStatus::Switching,
            5 => NodeStatus::Recovery,
            6 => NodeStatus::Catchup,
            7 => NodeStatus::Minority,
            _ => NodeStatus::Disabled,
        }
    }

    /// The word users see.
    pub fn name(self) -> &'static str {
        match self {
            NodeStatus::Disabled => "disabled",
            NodeStatus::Starting => "starting",
            NodeStatus::Online => "online",
            NodeStatus::Degraded => "degraded",
            NodeStatus::Switching => "switching",
            NodeStatus::Recovery => "recovery",
            NodeStatus::Catchup => "catchup",
            NodeStatus::Minority => "minority",
        }
    }
}

/// A process that can be woken: its index in `ProcGlobal->allProcs` plus one; 0 is nobody.
#[repr(transparent)]
pub struct ProcCell(AtomicU32);

impl ProcCell {
    /// Remembers the calling process.
    pub fn set_self(&self) {
        self.0.store(my_proc_number() as u32 + 1, Ordering::Release);
    }

    pub fn clear(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Takes an empty cell for the calling process; false when another process is in it.
    pub fn claim(&self) -> bool {
        self.0
            .compare_exchange(
                0,
                my_proc_number() as u32 + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// Empties the cell, if the calling process is in it; says whether it was.
    pub fn release(&self) -> bool {
        self.0
            .compare_exchange(
                my_proc_number() as u32 + 1,
                0,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// Sets the process's latch, if there is a process. Callable from any thread.
    pub fn wake(&self) {
        let number = self.0.load(Ordering::Acquire);
        if number != 0 {
            wake_proc(number as usize - 1);
        }
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Whether it is the calling process.
    pub fn is_self(&self) -> bool {
        self.0.load(Ordering::Acquire) == my_proc_number() as u32 + 1
    }

    pub fn pid(&self) -> i32 {
        match self.0.load(Ordering::Acquire) {
            0 => 0,
            // SAFETY: allProcs lives as long as shared memory and the index came from a process's own pgprocno.
            number => unsafe { (*(*pg_sys::ProcGlobal).allProcs.add(number as usize - 1)).pid },
        }
    }
}

/// A gid that one process writes and others read.
#[repr(C)]
#[derive(Default)]
pub struct GidCell {
    version: AtomicU32,
    coordinator: AtomicU32,
    generation: AtomicU32,
    members: AtomicU32,
    xid: AtomicU64,
    started_at: AtomicI64,
}

impl GidCell {
    pub fn set(&self, gid: Option<Gid>) {
        self.version.fetch_add(1, Ordering::AcqRel);
        let (node, generation, members, xid, started_at) = match gid {
            Some(gid) => (
                u32::from(gid.coordinator.get()),
                gid.generation.0,
                u32::from(gid.members.bits()),
                gid.xid,
                gid.started_at,
            ),
            None => (0, 0, 0, 0, 0),
        };
        self.coordinator.store(node, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        self.members.store(members, Ordering::Relaxed);
        self.xid.store(xid, Ordering::Relaxed);
        self.started_at.store(started_at, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The gid, or nothing when there is none or it is being changed at this moment.
    pub fn get(&self) -> Option<Gid> {
        let before = self.version.load(Ordering::Acquire);
        let gid = Gid {
            coordinator: NodeId::new(self.coordinator.load(Ordering::Relaxed) as u8)?,
            generation: GenerationNum(self.generation.load(Ordering::Relaxed)),
            members: NodeSet::from_bits(self.members.load(Ordering::Relaxed) as u16),
            xid: self.xid.load(Ordering::Relaxed),
            started_at: self.started_at.load(Ordering::Relaxed),
        };
        std::sync::atomic::fence(Ordering::Acquire);
        (before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed)).then_some(gid)
    }
}

/// Where the node stands: written by the tokio thread, read by all who apply.
#[repr(C)]
#[derive(Default)]
pub struct StandingCell {
    /// Odd while it is being written.
    version: AtomicU32,
    num: AtomicU32,
    members: AtomicU32,
    online_in: AtomicU32,
    recovered_to: AtomicU32,
    phase: AtomicU32,
}

/// In the order of their numbers in [`StandingCell`]; zeroed memory says `Waiting`.
const PHASES: [Phase; 4] = [
    Phase::Waiting,
    Phase::Online,
    Phase::Recovering,
    Phase::Outside,
];

impl StandingCell {
    /// Tokio thread only.
    pub fn set(&self, standing: &Standing) {
        let phase = PHASES.iter().position(|phase| *phase == standing.phase);
        self.version.fetch_add(1, Ordering::AcqRel);
        self.num.store(standing.current.num.0, Ordering::Relaxed);
        self.members.store(
            u32::from(standing.current.members.bits()),
            Ordering::Relaxed,
        );
        self.online_in
            .store(standing.online_in.0, Ordering::Relaxed);
        self.recovered_to
            .store(standing.recovered_to.0, Ordering::Relaxed);
        self.phase
            .store(phase.unwrap_or(0) as u32, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    pub fn get(&self) -> Standing {
        loop {
            let before = self.version.load(Ordering::Acquire);
            let phase = self.phase.load(Ordering::Relaxed) as usize;
            let standing = Standing {
                current: Generation {
                    num: GenerationNum(self.num.load(Ordering::Relaxed)),
                    members: NodeSet::from_bits(self.members.load(Ordering::Relaxed) as u16),
                },
                online_in: GenerationNum(self.online_in.load(Ordering::Relaxed)),
                recovered_to: GenerationNum(self.recovered_to.load(Ordering::Relaxed)),
                phase: PHASES.get(phase).copied().unwrap_or_default(),
            };
            std::sync::atomic::fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed) {
                return standing;
            }
            std::hint::spin_loop();
        }
    }
}

/// A refusal handed from one process to another; the state word beside it says whose it is.
#[repr(C)]
pub struct RefusalCell {
    length: AtomicU32,
    bytes: UnsafeCell<[u8; EVENT_BYTES]>,
}

// SAFETY: written by the one party that the owner's state word names, before it publishes that word with release.
unsafe impl Sync for RefusalCell {}

impl RefusalCell {
    /// Stores a refusal. The caller owns the cell by the protocol of the state word beside it.
    pub fn set(&self, refusal: &Refusal) {
        // SAFETY: see the Sync implementation.
        let bytes = unsafe { &mut *self.bytes.get() };
        let length = bincode::serde::encode_into_slice(refusal, bytes, bincode::config::standard())
            .unwrap_or(0);
        self.length.store(length as u32, Ordering::Release);
    }

    /// Stores that there is none.
    pub fn clear(&self) {
        self.length.store(0, Ordering::Release);
    }

    pub fn get(&self) -> Option<Refusal> {
        let length = self.length.load(Ordering::Acquire) as usize;
        // SAFETY: see the Sync implementation; the length was published after the bytes.
        let bytes = unsafe { &(&*self.bytes.get())[..length.min(EVENT_BYTES)] };
        let (refusal, _) =
            bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
        Some(refusal)
    }
}

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
    /// In the middle of a PREPARE: see `barrier`.
    pub preparing: AtomicBool,
    /// `gid` is a user's own PREPARE TRANSACTION: votes are counted, nothing is decided.
    pub user_prepare: AtomicBool,
    /// The tokio thread's reason of an abort, or the monitor's for a victim.
    pub refusal: RefusalCell,
}

impl BackendSlot {
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
}

pub type WorkerRing = Ring<RING_BYTES>;

/// What this node knows of one node of the cluster.
#[repr(C, align(64))]
pub struct NodeShared {
    /// Highest csn whose finish has begun here (architecture.md, "Causal order").
    pub visible: AtomicU64,
    /// Every commit up to this csn is finished here.
    pub settled: AtomicU64,
    pub configured: AtomicBool,
    /// The arbiters are connected.
    pub linked: AtomicBool,
    /// How often the arbiters have lost each other, so that a receiver knows when its own connection may be dead too.
    pub losses: AtomicU64,
    /// Our receiver streams from this node.
    pub receiving: AtomicBool,
    pub receiver: ProcCell,
    /// Stored mark of this node's stream: confirmed to its slot.
    pub mark: AtomicU64,
    /// End of its WAL when our receiver last connected: everything this server knew by then lies before it.
    pub peer_end: AtomicU64,
    /// End of its flushed WAL, as its last heartbeat said; this node's own for this node.
    pub flushed: AtomicU64,
    /// Last WAL position seen in its stream.
    pub received: AtomicU64,
    pub connectivity: AtomicU32,
    pub heartbeats: AtomicU64,
    /// Microseconds since 2000-01-01.
    pub last_change_us: AtomicI64,
}

/// Counters of outcomes, since the server started.
#[repr(C)]
pub struct Counters {
    pub commits: AtomicU64,
    pub aborts: AtomicU64,
    pub unknown: AtomicU64,
    pub applied: AtomicU64,
    pub refused: AtomicU64,
    pub conflicts_committing: AtomicU64,
    pub conflicts_running: AtomicU64,
    pub log_records_lost: AtomicU64,
    pub events_waited: AtomicU64,
}

/// The head of the shared segment.
#[repr(C)]
pub struct Shared {
    /// Database of the cluster; 0 while there is none.
    pub database: AtomicU32,
    pub node: AtomicU32,
    pub tag: AtomicU32,
    /// The cluster's id, upper and lower half.
    pub cluster_id: [AtomicU64; 2],
    pub generation: AtomicU32,
    /// The generation is being changed: see `barrier`.
    pub barrier_closed: AtomicBool,
    pub members: AtomicU32,
    pub configured: AtomicU32,
    pub status: AtomicU32,
    /// Until when this node may serve reads, by `clock::monotonic_ms`; written by the tokio thread.
    pub lease_until_ms: AtomicU64,
    /// Arbiter starts so far, durable.
    pub epoch: AtomicU32,
    /// The arbiter has found out whether this server belongs to a cluster. Until then no write may commit.
    pub identity_known: AtomicBool,
    /// Slots that the peers need are not there; the process that makes them.
    pub slots_missing: AtomicBool,
    pub slot_maker: ProcCell,
    /// A database that finders can attach to, and whether the finder has answered.
    pub finder_database: AtomicU32,
    pub finder_done: AtomicBool,
    /// Raised by `mtm.init_cluster`: tells the arbiter to look at the catalog again.
    pub identity_changed: AtomicBool,
    pub workers_wanted: AtomicI32,
    pub workers_max: AtomicU32,
    pub arbiter: ProcCell,
    pub monitor: ProcCell,
    /// The monitor sleeps until somebody applies again.
    pub monitor_idle: AtomicBool,
    /// Something was flushed of which the walsenders were not told.
    pub senders_lag: AtomicBool,
    /// Some receiver sleeps until a worker becomes idle.
    pub worker_awaited: AtomicBool,
    pub finisher: ProcCell,
    pub recovery: ProcCell,
    pub referee: ProcCell,
    /// Number and `online_in` of the question for the referee; 0 for none.
    pub referee_question: AtomicU64,
    /// The node to recover from; 0 for none.
    pub recover_from: AtomicU32,
    /// Bytes of the donor's WAL that have not been applied yet.
    pub recovery_lag: AtomicU64,
    /// Where this node stands, for those who apply.
    pub standing: StandingCell,
    /// True while an event has been queued that the tokio thread has not looked at: no second write to the eventfd is needed.
    pub wake_pending: AtomicBool,
    /// Orders to finish that some process has taken and not carried out yet.
    pub finishes_in_hand: AtomicU32,
    /// Position from which the next finish looks for an idle worker.
    pub finish_cursor: AtomicU32,
    pub nodes: [NodeShared; NODES],
    pub counters: Counters,
    pub latencies: Latencies,
    pub board: Board,
    pub conflicts: RecentLog,
    pub member_events: RecentLog,
    pub events: Queue<EVENT_BYTES, 2048>,
    pub finishes: Queue<FINISH_BYTES, 2048>,
    #[cfg(feature = "failpoints")]
    pub failpoint: super::failpoint::Armed,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
static BACKENDS: AtomicPtr<BackendSlot> = AtomicPtr::new(std::ptr::null_mut());
static WORKERS: AtomicPtr<WorkerSlot> = AtomicPtr::new(std::ptr::null_mut());
static RINGS: AtomicPtr<WorkerRing> = AtomicPtr::new(std::ptr::null_mut());
static WAKE_FD: AtomicI32 = AtomicI32::new(-1);

static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// `AddinShmemInitLock` of storage/lwlocknames.h in PostgreSQL 15.
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// The shared segment.
///
/// # Panics
/// Before the postmaster has made it, which only our own start-up code could see.
pub fn shared() -> &'static Shared {
    // SAFETY: the segment is made before any process that calls this is started, and never moves in the life of a process.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
        .expect("shared memory is made at server start")
}

/// True in a server that has our shared memory (false in `postgres --single` and during `initdb`).
pub fn exists() -> bool {
    !SHARED.load(Ordering::Acquire).is_null()
}

fn backend_count() -> usize {
    // SAFETY: set once by the postmaster before shared memory is sized. Auxiliary processes have numbers above MaxBackends.
    unsafe { pg_sys::MaxBackends as usize + pg_sys::NUM_AUXILIARY_PROCS as usize }
}

/// The slot of each process.
pub fn backends() -> &'static [BackendSlot] {
    // SAFETY: made together with `Shared`, for `backend_count()` entries.
    unsafe { std::slice::from_raw_parts(BACKENDS.load(Ordering::Acquire), backend_count()) }
}

/// The calling process's slot.
pub fn my_backend() -> &'static BackendSlot {
    &backends()[my_proc_number()]
}

fn my_proc_number() -> usize {
    // SAFETY: MyProc is set in every process that attached to shared memory.
    unsafe { (*pg_sys::MyProc).pgprocno as usize }
}

/// Index of the calling process among `backends()`.
pub fn my_backend_index() -> u32 {
    my_proc_number() as u32
}

/// The slots of the apply workers, `multimaster.max_workers` of them.
pub fn workers() -> &'static [WorkerSlot] {
    let count = shared().workers_max.load(Ordering::Relaxed) as usize;
    // SAFETY: made together with `Shared` for that many entries.
    unsafe { std::slice::from_raw_parts(WORKERS.load(Ordering::Acquire), count) }
}

/// The ring of an apply worker.
pub fn ring(worker: usize) -> &'static WorkerRing {
    assert!(worker < workers().len());
    // SAFETY: as many rings as workers.
    unsafe { &*RINGS.load(Ordering::Acquire).add(worker) }
}

/// Sets the latch of a process by its number in `allProcs`. Callable from any thread.
pub fn wake_proc(number: usize) {
    // SAFETY: allProcs lives as long as shared memory; SetLatch touches shared memory and kill(2) only.
    unsafe { raw::SetLatch(&raw mut (*(*pg_sys::ProcGlobal).allProcs.add(number)).procLatch) }
}

/// Descriptor of the eventfd that wakes the tokio thread.
pub fn wake_fd() -> i32 {
    WAKE_FD.load(Ordering::Relaxed)
}

impl Shared {
    pub fn status(&self) -> NodeStatus {
        NodeStatus::from_raw(self.status.load(Ordering::Acquire))
    }

    pub fn set_status(&self, status: NodeStatus) {
        self.status.store(status as u32, Ordering::Release);
    }

    /// Whether this node may serve reads and writes, as far as it knows.
    pub fn serving(&self) -> bool {
        matches!(self.status(), NodeStatus::Online | NodeStatus::Degraded)
    }

    /// Whether a majority has promised to do nothing without this node at this moment.
    pub fn lease_holds(&self) -> bool {
        super::clock::monotonic_ms() < self.lease_until_ms.load(Ordering::Acquire)
    }

    /// This node's id, once it belongs to a cluster.
    pub fn node_id(&self) -> Option<NodeId> {
        NodeId::new(self.node.load(Ordering::Acquire) as u8)
    }

    pub fn cluster_tag(&self) -> protocol::ClusterTag {
        protocol::ClusterTag(self.tag.load(Ordering::Acquire))
    }

    pub fn generation(&self) -> GenerationNum {
        GenerationNum(self.generation.load(Ordering::Acquire))
    }

    /// A new generation. The members first: see [`Shared::current`].
    pub fn set_generation(&self, num: GenerationNum, members: NodeSet) {
        self.members
            .store(u32::from(members.bits()), Ordering::Release);
        self.generation.store(num.0, Ordering::Release);
    }

    /// The last generation that this node was online in.
    pub fn online_in(&self) -> GenerationNum {
        self.standing.get().online_in
    }

    /// What to do with a PREPARE of another node that is not prepared here and has no outcome on record.
    pub fn admit(&self, gid: Gid) -> Admission {
        match self.node_id() {
            Some(node) => self.standing.get().admit(node, gid),
            None => Admission::Hold,
        }
    }

    /// The node to recover from.
    pub fn recover_from(&self) -> Option<NodeId> {
        NodeId::new(self.recover_from.load(Ordering::Acquire) as u8)
    }

    /// The generation with its members. They are changed before the number, behind a closed barrier.
    pub fn current(&self) -> Generation {
        loop {
            let num = self.generation();
            let members = NodeSet::from_bits(self.members.load(Ordering::Acquire) as u16);
            if num == self.generation() {
                return Generation { num, members };
            }
        }
    }

    /// The configured nodes.
    pub fn configured_nodes(&self) -> NodeSet {
        (1..NODES as u8)
            .filter(|node| {
                self.nodes[*node as usize]
                    .configured
                    .load(Ordering::Acquire)
            })
            .filter_map(NodeId::new)
            .collect()
    }

    pub fn node(&self, node: NodeId) -> &NodeShared {
        &self.nodes[node.get() as usize]
    }

    /// Raises `visible` of the coordinator: its commit `csn` is about to be finished here.
    pub fn raise_visible(&self, coordinator: NodeId, csn: Csn) {
        self.node(coordinator)
            .visible
            .fetch_max(csn.0, Ordering::AcqRel);
    }

    /// Wakes the tokio thread.
    pub fn wake_arbiter_thread(&self) {
        if self.wake_pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let one = 1u64;
        // SAFETY: the descriptor is inherited from the postmaster; the buffer is eight bytes long.
        unsafe { libc::write(wake_fd(), (&raw const one).cast(), 8) };
    }

    /// Queues an order to finish a prepared transaction and wakes somebody who will do it. False when the queue is full.
    pub fn push_finish(&self, record: &[u8]) -> bool {
        if !self.finishes.push(record) {
            return false;
        }
        let workers = workers();
        let start = self.finish_cursor.fetch_add(1, Ordering::Relaxed) as usize;
        let idle = (0..workers.len())
            .map(|step| &workers[(start + step) % workers.len()])
            .find(|slot| slot.state.load(Ordering::Acquire) == worker::IDLE);
        match idle {
            Some(slot) => slot.process.wake(),
            None => self.finisher.wake(),
        }
        true
    }
}

/// The nodes this one is connected with in both ways, for messages.
pub fn connected_nodes() -> NodeSet {
    shared()
        .configured_nodes()
        .iter()
        .filter(|node| {
            let state = shared().node(*node);
            state.linked.load(Ordering::Acquire) && state.receiving.load(Ordering::Acquire)
        })
        .collect()
}

/// Whether a decision commits, as core's functions want it.
pub fn is_commit(decision: Decision) -> bool {
    decision == Decision::Commit
}

/// Registers the requests for shared memory and makes the eventfd. Called from `_PG_init` in the postmaster.
pub fn register(workers_max: usize) {
    // SAFETY: runs in the postmaster before any child exists; hook variables are plain function pointers.
    unsafe {
        WORKERS_REQUESTED.store(workers_max as u32, Ordering::Relaxed);
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
        WAKE_FD.store(
            libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC),
            Ordering::Relaxed,
        );
    }
}

static WORKERS_REQUESTED: AtomicU32 = AtomicU32::new(0);

fn workers_requested() -> usize {
    WORKERS_REQUESTED.load(Ordering::Relaxed) as usize
}

unsafe extern "C-unwind" fn request() {
    // SAFETY: called by the postmaster in its shared memory request phase.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(
            size_of::<Shared>()
                + backend_count() * size_of::<BackendSlot>()
                + workers_requested() * (size_of::<WorkerSlot>() + size_of::<WorkerRing>())
                + 4096,
        );
    }
}

/// Attaches to or makes one zeroed area; returns it and whether it was there already.
unsafe fn area<T>(name: &std::ffi::CStr, count: usize) -> (*mut T, bool) {
    let mut found = false;
    // SAFETY: the caller holds AddinShmemInitLock; the space was requested.
    unsafe {
        let start =
            pg_sys::ShmemInitStruct(name.as_ptr(), count * size_of::<T>(), &mut found).cast::<T>();
        if !found {
            std::ptr::write_bytes(start, 0, count);
        }
        (start, found)
    }
}

unsafe extern "C-unwind" fn startup() {
    // SAFETY: called by the postmaster (also after a crash restart) when shared memory is being set up. All-zero bytes are valid for every
    // area: atomics, plain arrays and enums stored as numbers.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
        pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let (shared, found) = area::<Shared>(c"multimaster", 1);
        BACKENDS.store(
            area(c"multimaster backends", backend_count()).0,
            Ordering::Release,
        );
        WORKERS.store(
            area(c"multimaster workers", workers_requested()).0,
            Ordering::Release,
        );
        RINGS.store(
            area(c"multimaster rings", workers_requested()).0,
            Ordering::Release,
        );
        if !found {
            (*shared).events.init();
            (*shared).finishes.init();
            (*shared)
                .workers_max
                .store(workers_requested() as u32, Ordering::Relaxed);
        }
        SHARED.store(shared, Ordering::Release);
        pg_sys::LWLockRelease(lock);
    }
}
