//! The settings of the extension: `multimaster.*`.
//!
//! All of them live here; other modules see typed values. `docs/configuration.md` tells the same story for users, and must change
//! together with this file.

use std::ffi::CString;
use std::time::Duration;

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::prelude::*;

use crate::pg::settings;

static ARBITER_PORT: GucSetting<i32> = GucSetting::<i32>::new(7432);
static ARBITER_LISTEN_ADDRESSES: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"*"));
static HEARTBEAT_SEND_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(200);
static HEARTBEAT_RECV_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(2000);
static REFEREE_CONNSTRING: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c""));
static SLOW_NODE_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static MAX_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(32);
static WAIT_PEER_COMMITS: GucSetting<bool> = GucSetting::<bool>::new(true);
static STRICT_READS: GucSetting<bool> = GucSetting::<bool>::new(false);
static COMMIT_MODE: GucSetting<CommitMode> = GucSetting::<CommitMode>::new(CommitMode::Fast);
static MIN_RECOVERY_LAG: GucSetting<i32> = GucSetting::<i32>::new(100);
static MAX_RECOVERY_LAG: GucSetting<i32> = GucSetting::<i32>::new(1024 * 1024);
static CONFLICT_GRACE: GucSetting<i32> = GucSetting::<i32>::new(10);
static STREAM_IN_PROGRESS: GucSetting<bool> = GucSetting::<bool>::new(true);
static MINORITY_READS: GucSetting<bool> = GucSetting::<bool>::new(false);
static INIT_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(60);

/// How a commit is decided; `docs/protocol.md` tells when each is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
enum CommitMode {
    /// By the votes of all members, where at most four nodes are configured: one round trip.
    #[name = c"fast"]
    Fast,
    /// By a majority of durable precommits: two round trips.
    #[name = c"e3pc"]
    E3pc,
}

/// Bounds of `multimaster.max_workers`: shared memory and background worker slots are reserved for that many.
pub const MAX_WORKERS_RANGE: std::ops::RangeInclusive<i32> = 2..=512;

/// Declares every setting and reserves the prefix, so that a misspelt `multimaster.*` name is reported.
///
/// Call once, from `_PG_init` in the postmaster.
pub fn register() {
    register_arbiter();
    register_heartbeats();
    register_referee();
    register_commit();
    register_recovery();
    settings::reserve_prefix(c"multimaster");
}

fn register_arbiter() {
    GucRegistry::define_int_guc(
        c"multimaster.arbiter_port",
        c"TCP port on which this node's arbiter listens for its peers.",
        c"Peers learn the port when mtm.init_cluster runs; it must stay the same afterwards.",
        &ARBITER_PORT,
        1,
        65_535,
        GucContext::Postmaster,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"multimaster.arbiter_listen_addresses",
        c"Addresses on which this node's arbiter listens, separated by commas.",
        c"An asterisk means all addresses. Host names are looked up when the server starts.",
        &ARBITER_LISTEN_ADDRESSES,
        GucContext::Postmaster,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"multimaster.init_timeout",
        c"Time that mtm.init_cluster gives each of its steps on a node, and the nodes to come online.",
        c"Raise it when the comparison of large tables before the start takes longer.",
        &INIT_TIMEOUT,
        1,
        86_400,
        GucContext::Userset,
        GucFlags::UNIT_S,
    );
}

fn register_heartbeats() {
    GucRegistry::define_int_guc(
        c"multimaster.heartbeat_send_timeout",
        c"Time between heartbeats to each peer.",
        c"A peer silent for multimaster.heartbeat_recv_timeout is excluded. Lower finds failures sooner and suspects slow links more often.",
        &HEARTBEAT_SEND_TIMEOUT,
        10,
        60_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"multimaster.heartbeat_recv_timeout",
        c"Time without a heartbeat after which a peer counts as dead.",
        c"At least twice multimaster.heartbeat_send_timeout, or one lost heartbeat excludes a healthy node.",
        &HEARTBEAT_RECV_TIMEOUT,
        100,
        600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"multimaster.slow_node_timeout",
        c"Time without any progress of its database after which a node that still answers heartbeats is excluded.",
        c"Zero excludes only nodes that do not answer.",
        &SLOW_NODE_TIMEOUT,
        0,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
}

fn register_referee() {
    GucRegistry::define_string_guc(
        c"multimaster.referee_connstring",
        c"Connection string of the referee, which lets one of two nodes go on alone.",
        c"A database with the extension multimaster_referee, on a third machine. The same on both nodes; ignored where more than two are configured.",
        &REFEREE_CONNSTRING,
        GucContext::Postmaster,
        GucFlags::SUPERUSER_ONLY,
    );
}

fn register_commit() {
    GucRegistry::define_int_guc(
        c"multimaster.max_workers",
        c"Largest number of processes that apply the peers' transactions on this node.",
        c"max_worker_processes must have room for them and for one receiver per peer.",
        &MAX_WORKERS,
        *MAX_WORKERS_RANGE.start(),
        *MAX_WORKERS_RANGE.end(),
        GucContext::Postmaster,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"multimaster.wait_peer_commits",
        c"COMMIT returns only when the transaction is visible on the peers too.",
        c"When off, COMMIT returns as soon as the outcome is final; another node may show the old rows for a moment.",
        &WAIT_PEER_COMMITS,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"multimaster.strict_reads",
        c"A statement sees every transaction whose COMMIT was answered before, on whatever node.",
        c"It waits until what is prepared on this node when it begins is finished.",
        &STRICT_READS,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_enum_guc(
        c"multimaster.commit_mode",
        c"How a commit is decided: in one round trip to the other nodes (fast), or in two (e3pc).",
        c"With more than four nodes every commit takes two.",
        &COMMIT_MODE,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"multimaster.stream_in_progress",
        c"Large transactions are sent, and applied, while they still run.",
        c"Sent: those above logical_decoding_work_mem, by connections that begin later. Applied: those whose first piece comes later.",
        &STREAM_IN_PROGRESS,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"multimaster.minority_reads",
        c"Lets this session read on a node that is not part of a working majority.",
        c"What it reads may be older than what other nodes have committed.",
        &MINORITY_READS,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"multimaster.conflict_grace",
        c"Time that an older running transaction gets to commit before it is cancelled in favour of a younger committing one.",
        c"A transaction that commits on another node never waits longer than this for a lock that a running one holds here. A younger running one gives way at once.",
        &CONFLICT_GRACE,
        0,
        60_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
}

fn register_recovery() {
    GucRegistry::define_int_guc(
        c"multimaster.min_recovery_lag",
        c"Lag at which a returning node asks to become a member again.",
        c"From then on new commits wait for it until it is level, so a larger value makes that wait longer.",
        &MIN_RECOVERY_LAG,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"multimaster.max_recovery_lag",
        c"Lag at which this node stops keeping WAL for an absent node.",
        c"The absent node then has to be copied from a live one. Zero keeps WAL without limit.",
        &MAX_RECOVERY_LAG,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
}

/// TCP port of this node's arbiter.
pub fn arbiter_port() -> u16 {
    u16::try_from(ARBITER_PORT.get()).expect("the setting's range is that of a port")
}

/// Addresses on which the arbiter listens, as written: `*`, or names and numbers separated by commas.
pub fn arbiter_listen_addresses() -> String {
    ARBITER_LISTEN_ADDRESSES
        .get()
        .map(|addresses| addresses.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Time between two heartbeats to one peer.
pub fn heartbeat_send_timeout() -> Duration {
    millis(&HEARTBEAT_SEND_TIMEOUT)
}

/// Silence after which a peer counts as dead.
pub fn heartbeat_recv_timeout() -> Duration {
    millis(&HEARTBEAT_RECV_TIMEOUT)
}

/// Where the referee is, if there is one. On a main thread.
pub fn referee_connstring() -> Option<String> {
    let text = REFEREE_CONNSTRING.get()?;
    let text = text.to_str().ok()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Time without progress after which a node that answers is excluded; zero for never.
pub fn slow_node_timeout() -> Duration {
    millis(&SLOW_NODE_TIMEOUT)
}

/// Size of the pool of apply workers.
pub fn max_workers() -> usize {
    usize::try_from(MAX_WORKERS.get()).expect("the setting's range is positive")
}

/// Whether COMMIT waits until the peers have committed too.
pub fn wait_peer_commits() -> bool {
    WAIT_PEER_COMMITS.get()
}

/// Whether statements wait for what is prepared here when they begin.
pub fn strict_reads() -> bool {
    STRICT_READS.get()
}

/// Whether COMMIT is to be decided on the votes alone, where the number of nodes allows it.
pub fn commits_fast() -> bool {
    COMMIT_MODE.get() == CommitMode::Fast
}

/// Whether large transactions are sent and applied while they run.
pub fn stream_in_progress() -> bool {
    STREAM_IN_PROGRESS.get()
}

/// Whether plain reads are allowed on a node that must not answer from its tables.
pub fn minority_reads() -> bool {
    MINORITY_READS.get()
}

/// Time that a running transaction may hold up a committing one.
pub fn conflict_grace() -> Duration {
    millis(&CONFLICT_GRACE)
}

/// Lag in bytes at which a returning node asks to be a member again.
pub fn min_recovery_lag() -> u64 {
    kilobytes(&MIN_RECOVERY_LAG)
}

/// Lag in bytes at which WAL for an absent node is given up; `None` when it is kept without limit.
pub fn max_recovery_lag() -> Option<u64> {
    Some(kilobytes(&MAX_RECOVERY_LAG)).filter(|&bytes| bytes > 0)
}

/// Patience of `mtm.init_cluster` with each step on a node.
pub fn init_timeout() -> Duration {
    Duration::from_secs(unsigned(&INIT_TIMEOUT))
}

fn millis(setting: &GucSetting<i32>) -> Duration {
    Duration::from_millis(unsigned(setting))
}

fn kilobytes(setting: &GucSetting<i32>) -> u64 {
    unsigned(setting) * 1024
}

fn unsigned(setting: &GucSetting<i32>) -> u64 {
    u64::try_from(setting.get()).expect("the setting's range is not negative")
}
