//! Decoding: from WAL to the replication stream.
//!
//! The output plugin runs in core's walsenders and decodes each transaction at its PREPARE. It sends what ran on this node only:
//! whatever carries a replication origin was applied here and belongs to another node's stream. Transactions that committed without
//! PREPARE are local by construction (maintenance, our own bookkeeping) and are left out.
//!
//! Left out of a transaction, too: the tables of the extension itself, tables made local, materialized views (each node
//! refreshes its own), and with them whatever is not in WAL (temporary and unlogged tables).
//!
//! This module holds what needs no PostgreSQL; the callbacks are in [`crate::pg::decode`].

mod environment;
mod options;
mod plain;

pub use environment::{Environment, environment, set_environment};
pub use options::{RECOVERY, recovers, same_major};
pub use plain::travels_raw;

/// Prefix of a transactional logical message whose payload becomes a `Ddl` frame.
pub const DDL_PREFIX: &std::ffi::CStr = c"mtm-ddl";
/// Prefix of a transactional logical message whose payload becomes a `Sequence` frame.
pub const SEQUENCE_PREFIX: &std::ffi::CStr = c"mtm-seq";
/// Prefix of a non-transactional logical message: a user's COMMIT or ROLLBACK PREPARED, see `wire::stream::UserFinish`.
pub const FINISH_PREFIX: &std::ffi::CStr = c"mtm-finish";

/// Prefix of a non-transactional logical message: a generation begins here, see `wire::stream::Marker`.
pub const MARKER_PREFIX: &std::ffi::CStr = c"mtm-marker";
/// Prefix of the first message of a transaction that was applied while this node recovered: its gid as text. It committed without PREPARE.
pub const RECOVERED_PREFIX: &std::ffi::CStr = c"mtm-recovered";

/// Whether a transactional message with this prefix becomes a frame.
pub fn is_ours(prefix: &std::ffi::CStr) -> bool {
    prefix == DDL_PREFIX || prefix == SEQUENCE_PREFIX
}

/// Schema of the extension; nothing in it is replicated.
pub const OWN_SCHEMA: &[u8] = b"mtm";
