//! WAL kept for nodes that are away, up to `multimaster.max_recovery_lag`.
//!
//! A slot keeps WAL until its node has confirmed it, which a node that is away does not. Beyond the limit this node gives up: it notes in `mtm.needs_copy`, durably, that
//! the node cannot recover any more, and drops the slot, in this order. The row says two things:
//!
//! - here, about another node: its slot is gone, and is not made again while the row is there;
//! - on the node itself, about itself: it neither recovers nor asks to be a member. It writes the row when a member tells it so.
//!
//! A new copy of the node starts without the row about itself; whoever makes it takes the rows about it away on the other nodes, when they have slots for it
//! again.

use super::event_kind::EventKind;
use crate::cluster::slot_name;
use crate::guc;
use crate::pg::apply_error::attempt;
use crate::pg::process;
use crate::pg::records;
use crate::pg::shared::shared;
use pgrx::Spi;
use protocol::{NodeId, NodeSet};
use std::time::{Duration, Instant};

/// How often the slots of absent nodes are looked at.
const PAUSE: Duration = Duration::from_secs(1);
/// Part of the limit at which it is said that it comes near, percent.
const WARNING_PERCENT: u64 = 80;

/// What is to be told about a node.
pub struct Notice {
    pub node: NodeId,
    pub event: EventKind,
    pub text: String,
}

/// Looks after the slots of absent nodes.
pub struct Retention {
    looked_at: Instant,
    warned: NodeSet,
}

impl Default for Retention {
    fn default() -> Retention {
        Retention {
            looked_at: Instant::now(),
            warned: NodeSet::EMPTY,
        }
    }
}

impl Retention {
    /// Looks, not more often than every second; returns what is to be told.
    pub fn look(&mut self) -> Vec<Notice> {
        if self.looked_at.elapsed() < PAUSE {
            return Vec::new();
        }
        self.looked_at = Instant::now();
        let absent = absent();
        self.warned = self.warned.intersection(absent);
        let mut notices = Vec::new();
        for node in absent.iter() {
            if shared().needs_copy().contains(node) {
                drop_slot(node);
            } else if let Some(limit) = guc::max_recovery_lag()
                && let Some(kept) = process::in_transaction(|| kept_for(node))
            {
                notices.extend(self.judge(node, kept, limit));
            }
        }
        notices
    }

    fn judge(&mut self, node: NodeId, kept: u64, limit: u64) -> Option<Notice> {
        if kept > limit {
            let text = format!(
                "{kept} bytes of WAL were kept for it, more than multimaster.max_recovery_lag: its slot is dropped, and it needs a new copy"
            );
            note(node, &text);
            drop_slot(node);
            let event = EventKind::NeedsCopy;
            return Some(Notice { node, event, text });
        }
        if kept > limit / 100 * WARNING_PERCENT && !self.warned.contains(node) {
            self.warned.insert(node);
            let text = format!(
                "{kept} bytes of WAL are kept for it, of the {limit} that multimaster.max_recovery_lag allows"
            );
            let event = EventKind::Lag;
            return Some(Notice { node, event, text });
        }
        None
    }
}

/// Nodes that the cluster goes on without, as far as this node takes part in that.
fn absent() -> NodeSet {
    let shared = shared();
    if !shared.is_open() {
        return NodeSet::EMPTY;
    }
    shared
        .configured_nodes()
        .difference(shared.current().members)
}

/// Notes durably that a node needs a copy.
pub fn note(node: NodeId, reason: &str) {
    process::in_transaction(|| {
        let sql =
            "INSERT INTO mtm.needs_copy VALUES ($1, pg_catalog.now(), $2) ON CONFLICT DO NOTHING";
        let id = i32::from(node.get());
        if let Err(error) = Spi::run_with_args(sql, &[id.into(), reason.into()]) {
            pgrx::error!("multimaster cannot write mtm.needs_copy: {error}");
        }
    });
    records::flush_all();
    shared().set_needs_copy(shared().needs_copy().with(node));
}

/// Reads what earlier lives have noted. Runs in a transaction.
pub fn load() {
    let found = Spi::connect(|client| {
        let rows = client.select("SELECT node_id FROM mtm.needs_copy", None, &[])?;
        rows.map(|row| row.get::<i32>(1))
            .filter_map(Result::transpose)
            .collect::<Result<Vec<i32>, _>>()
    });
    match found {
        Ok(ids) => {
            let nodes = ids.into_iter().filter_map(|id| NodeId::new(id as u8));
            shared().set_needs_copy(nodes.collect());
        }
        Err(error) => pgrx::error!("multimaster cannot read mtm.needs_copy: {error}"),
    }
}

/// Bytes of WAL that the node's slot keeps. Runs in a transaction.
fn kept_for(node: NodeId) -> Option<u64> {
    // Slot names are made of digits, letters and underscores.
    let sql = format!(
        "SELECT (pg_catalog.pg_current_wal_flush_lsn() - restart_lsn)::pg_catalog.int8 FROM pg_catalog.pg_replication_slots WHERE slot_name = '{}'",
        slot_name(shared().cluster_tag(), node)
    );
    let kept = Spi::get_one::<i64>(&sql).ok().flatten();
    kept.and_then(|bytes| u64::try_from(bytes).ok())
}

/// Drops the node's slot; one that is in use is freed first, and dropped when it is looked at next.
fn drop_slot(node: NodeId) {
    let name = slot_name(shared().cluster_tag(), node);
    let dropped = attempt(|| {
        process::in_transaction(|| {
            for sql in [
                format!(
                    "SELECT pg_catalog.pg_terminate_backend(active_pid) FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}' AND active_pid IS NOT NULL"
                ),
                format!(
                    "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}' AND active_pid IS NULL"
                ),
            ] {
                if let Err(error) = Spi::run(&sql) {
                    pgrx::error!("{error}");
                }
            }
        });
        Ok(())
    });
    if let Err(failure) = dropped {
        process::abort_transaction();
        pgrx::log!(
            "multimaster could not drop the replication slot \"{name}\": {}",
            failure.message
        );
    }
}
