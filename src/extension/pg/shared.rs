//! The extension's shared memory: fixed-size plain data that every process of the server sees.
//!
//! Written by one party at a time by construction (each field says by whom), read by anybody. The tokio thread of the arbiter uses only
//! what is here, `SetLatch` and the eventfd.
//!
//! Where to read on: `segment` (how it comes to be), `backend` and `apply` (the slots of processes), `cells` (values of several words), `status`.

mod apply;
mod backend;
mod cells;
mod process;
mod recovery;
mod replay;
mod segment;
mod service;
mod status;

pub use apply::{WorkerSlot, worker};
pub use backend::{BackendSlot, outcome, stage};
pub use cells::{GidCell, RefusalCell, StandingCell, TextCell};
pub use process::{ProcCell, my_backend_index, wake_proc};
pub use recovery::RecoveryProgress;
pub use replay::{Clearance, Replay, name_hash};
pub(super) use segment::{area, backend_count};
pub use segment::{backends, exists, my_backend, register, ring, shared, wake_fd, workers};
pub use status::NodeStatus;

use service::Service;

use super::board::{Board, RecentLog};
use super::queue::Queue;
use crate::latency::Latencies;
use protocol::membership::Admission;
use protocol::{Csn, Decision, Generation, GenerationNum, Gid, NodeId, NodeSet};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};

/// Node ids are 1 to 16; index 0 of per-node arrays is unused.
pub const NODES: usize = 17;
/// Longest encoded event from a process to the arbiter, bytes.
pub const EVENT_BYTES: usize = 1280;
/// Longest encoded order to finish a prepared transaction, bytes.
pub const FINISH_BYTES: usize = 384;
/// Bytes between a receiver and one apply worker.
pub const RING_BYTES: usize = 256 * 1024;

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
    /// What its stream may bring again; for users' prepared transactions.
    pub replay: Replay,
    /// Up to where it holds this node's own stream durably, as it has said: an old copy of it holds less.
    pub held: AtomicU64,
    /// The latest life of its arbiter that was heard since this server started, or behind which a copy of the node begins: an older one is that of an old copy.
    pub newest_epoch: AtomicU32,
    /// End of its WAL when our receiver last connected: everything this server knew by then lies before it.
    pub peer_end: AtomicU64,
    /// End of its flushed WAL, as its last heartbeat said; this node's own for this node.
    pub flushed: AtomicU64,
    /// Last WAL position seen in its stream, ever.
    pub received: AtomicU64,
    /// The same, of the present connection.
    pub streamed: AtomicU64,
    pub connectivity: AtomicU32,
    /// Bytes of WAL that it has still to recover, as its last heartbeat said, plus one; 0 while it does not recover.
    recovery_lag: AtomicU64,
    pub heartbeats: AtomicU64,
    /// Microseconds since 2000-01-01.
    pub last_change_us: AtomicI64,
}

impl NodeShared {
    /// Bytes of WAL that the node has still to recover; none while it does not recover.
    pub fn recovery_lag(&self) -> Option<u64> {
        self.recovery_lag.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Tokio thread only.
    pub fn set_recovery_lag(&self, lag: Option<u64>) {
        let stored = lag.map_or(0, |lag| lag.saturating_add(1));
        self.recovery_lag.store(stored, Ordering::Relaxed);
    }
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
    /// The generation in which this node prepares its own transactions; 0 while it is online in none.
    pub opened: AtomicU32,
    pub members: AtomicU32,
    pub configured: AtomicU32,
    pub status: AtomicU32,
    /// Until when this node may serve reads, by `clock::monotonic_ms`; written by the tokio thread.
    pub lease_until_ms: AtomicU64,
    pub service: Service,
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
    /// Nodes that cannot recover any more, as bits: see `arbiter::retention`. Written by the arbiter's main thread.
    needs_copy: AtomicU32,
    /// The order to recover: see [`RecoveryOrder`]; 0 for none.
    recovery_order: AtomicU32,
    /// How far the recovery is.
    pub recovery_progress: RecoveryProgress,
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

impl Shared {
    pub fn status(&self) -> NodeStatus {
        NodeStatus::from_raw(self.status.load(Ordering::Acquire))
    }

    /// Shows another status. One that serves is set by the tokio thread only.
    pub fn set_status(&self, status: NodeStatus) {
        if status.serves() && !self.serving() {
            self.service.begin(false);
        }
        self.status.store(status as u32, Ordering::Release);
    }

    /// Backends may serve until then, by `clock::monotonic_ms`, or for longer if they may already. Tokio thread only.
    ///
    /// A renewal that comes in time leaves no gap, also when it is seen late: the promises behind it were taken before the old ones ended.
    pub fn renew_lease(&self, until: u64) {
        let lapsed = !self.lease_holds();
        if lapsed && until > super::clock::monotonic_ms() {
            self.service.begin(false);
        }
        self.lease_until_ms.fetch_max(until, Ordering::AcqRel);
    }

    /// Whether this node may serve reads and writes, as far as it knows.
    pub fn serving(&self) -> bool {
        self.status().serves()
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

    /// Whether this node prepares its own transactions: it is online.
    pub fn is_open(&self) -> bool {
        self.opened.load(Ordering::Acquire) != 0
    }

    /// Nodes that this one knows to need a new copy, itself maybe among them.
    pub fn needs_copy(&self) -> NodeSet {
        NodeSet::from_bits(self.needs_copy.load(Ordering::Acquire) as u16)
    }

    /// Main thread of the arbiter only.
    pub fn set_needs_copy(&self, nodes: NodeSet) {
        self.needs_copy
            .store(u32::from(nodes.bits()), Ordering::Release);
    }

    /// The node is about to be copied: it no longer counts as one that cannot come back.
    pub fn forget_copy_need(&self, node: NodeId) {
        let bit = u32::from(NodeSet::EMPTY.with(node).bits());
        self.needs_copy.fetch_and(!bit, Ordering::AcqRel);
    }

    /// From whom to recover.
    pub fn recovery_order(&self) -> Option<RecoveryOrder> {
        RecoveryOrder::from_raw(self.recovery_order.load(Ordering::Acquire))
    }

    /// Gives another order to recover, or none. Tokio thread only.
    pub fn order_recovery(&self, from: Option<NodeId>) {
        let given = self.recovery_order.load(Ordering::Acquire);
        let node = from.map_or(0, |node| u32::from(node.get()));
        let number = (given >> NODE_BITS).wrapping_add(1);
        self.recovery_order
            .store(number << NODE_BITS | node, Ordering::Release);
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

/// An order to recover from a node. Each is another one, also from the same node: what a process found out under an earlier order went to somebody who may
/// be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryOrder(u32);

/// Room of the node's id beside the order's number.
const NODE_BITS: u32 = 8;

impl RecoveryOrder {
    fn from_raw(raw: u32) -> Option<RecoveryOrder> {
        NodeId::new(raw as u8).map(|_| RecoveryOrder(raw))
    }

    /// The node to recover from.
    pub fn from(self) -> NodeId {
        NodeId::new(self.0 as u8).expect("an order names a node")
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
