//! The SQL functions that show this node and its cluster.
//!
//! What they show lives in shared memory; its owner hands it out as plain rows through [`Source`]. Columns that come from PostgreSQL's
//! own catalogs are joined in `sql/`. Times are microseconds since 2000-01-01 UTC.

#![expect(
    clippy::type_complexity,
    reason = "pgrx reads the columns of a result from the function's signature"
)]

use std::sync::OnceLock;

use pgrx::datum::Uuid;
use pgrx::prelude::*;

use crate::cluster::Conninfo;
use crate::pg::report::{self, ErrorReport};

/// What the node knows about itself and its generation.
#[derive(Debug, Clone, Default)]
pub struct StatusRow {
    /// Missing while the server belongs to no cluster.
    pub node_id: Option<i32>,
    pub name: Option<String>,
    /// `online` when the node takes reads and writes.
    pub status: String,
    pub connected: Vec<i32>,
    pub generation: Option<i64>,
    pub members: Vec<i32>,
    pub members_online: Vec<i32>,
    pub configured: Vec<i32>,
    pub cluster_id: Option<u128>,
}

/// What shared memory knows of one configured node; this node has a row too.
#[derive(Debug, Clone, Default)]
pub struct NodeStateRow {
    pub id: i32,
    /// The node is a member of the current generation.
    pub enabled: bool,
    /// Its arbiter answers heartbeats; true for this node.
    pub connected: bool,
    /// It takes no part on purpose, or because it needs a new copy.
    pub stopped: bool,
    /// It is replaying what it missed.
    pub catch_up: bool,
    /// Mean time in microseconds from a PREPARE here to that node's vote.
    pub avg_trans_delay_us: Option<i64>,
    pub last_status_change: Option<i64>,
    pub receiver_pid: Option<i32>,
    /// Bit n-1 is set when that node does *not* hear node n; missing before its first heartbeat.
    pub connectivity_mask: Option<i64>,
    /// Heartbeats received from it.
    pub heartbeats: i64,
    /// Bytes of WAL that it has still to replay; missing while it does not recover.
    pub recovery_lag: Option<i64>,
    /// Position in this node's WAL up to which it holds that durably, as it has said; missing before it has said so, and for this node.
    pub confirmed: Option<i64>,
}

/// One transaction between its PREPARE and its end on all nodes.
#[derive(Debug, Clone, Default)]
pub struct TransactionRow {
    pub gid: String,
    pub coordinator: i32,
    /// Part that this node plays: coordinator, participant or resolver.
    pub role: String,
    pub state: String,
    pub ballot: Option<String>,
    pub started_at: Option<i64>,
    /// Nodes whose answer is awaited.
    pub missing: Vec<i32>,
}

/// One settled conflict.
#[derive(Debug, Clone, Default)]
pub struct ConflictRow {
    pub happened_at: i64,
    pub kind: String,
    /// Node on which the two met.
    pub node_id: i32,
    pub relation: Option<String>,
    pub key: Option<String>,
    pub loser: Option<String>,
    pub winner: Option<String>,
}

/// Something that happened to the set of working nodes.
#[derive(Debug, Clone, Default)]
pub struct EventRow {
    pub happened_at: i64,
    /// Whom it concerns.
    pub node_id: i32,
    pub event: String,
    pub reason: String,
    pub generation: i64,
    /// How long the state lasted that has ended, milliseconds.
    pub lasted_ms: Option<i64>,
}

/// Number of this node's transactions that ended in one way.
#[derive(Debug, Clone, Default)]
pub struct CounterRow {
    pub outcome: String,
    pub reason: Option<String>,
    pub transactions: i64,
}

/// The recovery of this node, or what a failed one has left.
#[derive(Debug, Clone, Default)]
pub struct RecoveryRow {
    /// Missing once it has failed.
    pub donor: Option<i32>,
    /// Missing when it failed before it began.
    pub began_at: Option<i64>,
    /// Bytes of the donor's WAL.
    pub bytes_done: i64,
    pub bytes_left: i64,
    pub transactions: i64,
    /// Bytes in a second.
    pub rate: i64,
    pub retries: i64,
    /// What could not be applied, and is tried again or has made the node fail.
    pub error: Option<String>,
}

/// How long one phase of this node's commits took.
#[derive(Debug, Clone, Default)]
pub struct LatencyRow {
    pub phase: String,
    /// The node that was waited for; missing for all of them together.
    pub peer: Option<i32>,
    pub count: i64,
    /// Milliseconds; missing where nothing was counted.
    pub p50_ms: Option<f64>,
    pub p95_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub max_ms: Option<f64>,
}

/// Fate of a transaction as far as this node can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionStatus {
    Committed,
    Aborted,
    InProgress,
    /// Never seen here, or forgotten since.
    Unknown,
}

impl TransactionStatus {
    /// The word that SQL shows.
    pub fn as_str(self) -> &'static str {
        match self {
            TransactionStatus::Committed => "committed",
            TransactionStatus::Aborted => "aborted",
            TransactionStatus::InProgress => "in progress",
            TransactionStatus::Unknown => "unknown",
        }
    }
}

/// Where the rows come from. The methods are called in backends and may raise.
pub trait Source: Sync {
    fn status(&self) -> StatusRow;
    fn nodes(&self) -> Vec<NodeStateRow>;
    fn transactions(&self) -> Vec<TransactionRow>;
    fn conflicts(&self) -> Vec<ConflictRow>;
    fn events(&self) -> Vec<EventRow>;
    fn counters(&self) -> Vec<CounterRow>;
    fn latencies(&self) -> Vec<LatencyRow>;
    /// None while this node does not recover and has not failed to.
    fn recovery(&self) -> Option<RecoveryRow>;
    fn reset_latencies(&self);
    fn transaction_status(&self, gid: &str) -> TransactionStatus;
    /// Name of the running transaction; missing outside a cluster.
    fn current_gid(&self) -> Option<String>;
}

static SOURCE: OnceLock<&'static dyn Source> = OnceLock::new();

/// Says where the rows come from. Call once, in the postmaster; later calls change nothing.
pub fn set_source(source: &'static dyn Source) {
    SOURCE.get_or_init(|| source);
}

fn source() -> &'static dyn Source {
    match SOURCE.get() {
        Some(source) => *source,
        None => report::raise(ErrorReport::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "multimaster has not started",
            function_name!(),
        )),
    }
}

/// A time of shared memory as SQL shows it; missing when it is out of SQL's range.
fn timestamp(micros: i64) -> Option<TimestampWithTimeZone> {
    TimestampWithTimeZone::try_from(micros).ok()
}

#[pg_extern]
fn status() -> TableIterator<
    'static,
    (
        name!(my_node_id, Option<i32>),
        name!(name, Option<String>),
        name!(status, String),
        name!(connected, Vec<i32>),
        name!(gen_num, Option<i64>),
        name!(gen_members, Vec<i32>),
        name!(gen_members_online, Vec<i32>),
        name!(gen_configured, Vec<i32>),
        name!(cluster_id, Option<Uuid>),
    ),
> {
    let row = source().status();
    TableIterator::once((
        row.node_id,
        row.name,
        row.status,
        row.connected,
        row.generation,
        row.members,
        row.members_online,
        row.configured,
        row.cluster_id.map(|id| Uuid::from_bytes(id.to_be_bytes())),
    ))
}

#[pg_extern]
fn peer_states() -> TableIterator<
    'static,
    (
        name!(id, i32),
        name!(enabled, bool),
        name!(connected, bool),
        name!(stopped, bool),
        name!(catch_up, bool),
        name!(avg_trans_delay, Option<i64>),
        name!(last_status_change, Option<TimestampWithTimeZone>),
        name!(receiver_pid, Option<i32>),
        name!(connectivity_mask, Option<i64>),
        name!(n_heartbeats, i64),
        name!(recovery_lag, Option<i64>),
        name!(confirmed, Option<i64>),
    ),
> {
    TableIterator::new(source().nodes().into_iter().map(|row| {
        (
            row.id,
            row.enabled,
            row.connected,
            row.stopped,
            row.catch_up,
            row.avg_trans_delay_us,
            row.last_status_change.and_then(timestamp),
            row.receiver_pid,
            row.connectivity_mask,
            row.heartbeats,
            row.recovery_lag,
            row.confirmed,
        )
    }))
}

#[pg_extern]
fn in_flight() -> TableIterator<
    'static,
    (
        name!(gid, String),
        name!(coordinator, i32),
        name!(role, String),
        name!(state, String),
        name!(ballot, Option<String>),
        name!(started_at, Option<TimestampWithTimeZone>),
        name!(missing, Vec<i32>),
    ),
> {
    TableIterator::new(source().transactions().into_iter().map(|row| {
        (
            row.gid,
            row.coordinator,
            row.role,
            row.state,
            row.ballot,
            row.started_at.and_then(timestamp),
            row.missing,
        )
    }))
}

#[pg_extern]
fn recent_conflicts() -> TableIterator<
    'static,
    (
        name!(happened_at, Option<TimestampWithTimeZone>),
        name!(kind, String),
        name!(node_id, i32),
        name!(relation, Option<String>),
        name!(key, Option<String>),
        name!(loser, Option<String>),
        name!(winner, Option<String>),
    ),
> {
    TableIterator::new(source().conflicts().into_iter().map(|row| {
        (
            timestamp(row.happened_at),
            row.kind,
            row.node_id,
            row.relation,
            row.key,
            row.loser,
            row.winner,
        )
    }))
}

#[pg_extern]
fn recent_events() -> TableIterator<
    'static,
    (
        name!(happened_at, Option<TimestampWithTimeZone>),
        name!(node_id, i32),
        name!(event, String),
        name!(reason, String),
        name!(generation, i64),
        name!(lasted_ms, Option<i64>),
    ),
> {
    TableIterator::new(source().events().into_iter().map(|row| {
        (
            timestamp(row.happened_at),
            row.node_id,
            row.event,
            row.reason,
            row.generation,
            row.lasted_ms,
        )
    }))
}

#[pg_extern]
fn counters() -> TableIterator<
    'static,
    (
        name!(outcome, String),
        name!(reason, Option<String>),
        name!(transactions, i64),
    ),
> {
    let rows = source().counters().into_iter();
    TableIterator::new(rows.map(|row| (row.outcome, row.reason, row.transactions)))
}

#[pg_extern]
fn latencies() -> TableIterator<
    'static,
    (
        name!(phase, String),
        name!(peer, Option<i32>),
        name!(count, i64),
        name!(p50, Option<f64>),
        name!(p95, Option<f64>),
        name!(p99, Option<f64>),
        name!(max, Option<f64>),
    ),
> {
    TableIterator::new(source().latencies().into_iter().map(|row| {
        (
            row.phase, row.peer, row.count, row.p50_ms, row.p95_ms, row.p99_ms, row.max_ms,
        )
    }))
}

#[pg_extern]
fn recovery_progress() -> TableIterator<
    'static,
    (
        name!(donor, Option<i32>),
        name!(began_at, Option<TimestampWithTimeZone>),
        name!(bytes_done, i64),
        name!(bytes_left, i64),
        name!(transactions, i64),
        name!(rate, i64),
        name!(retries, i64),
        name!(error, Option<String>),
    ),
> {
    TableIterator::new(source().recovery().into_iter().map(|row| {
        (
            row.donor,
            row.began_at.and_then(timestamp),
            row.bytes_done,
            row.bytes_left,
            row.transactions,
            row.rate,
            row.retries,
            row.error,
        )
    }))
}

#[pg_extern]
fn reset_commit_latency() {
    source().reset_latencies();
}

#[pg_extern]
fn transaction_status(gid: &str) -> &'static str {
    source().transaction_status(gid).as_str()
}

#[pg_extern]
fn current_gid() -> Option<String> {
    source().current_gid()
}

#[pg_extern]
fn without_secrets(conninfo: &str) -> String {
    Conninfo::parse(conninfo).without_secrets()
}
