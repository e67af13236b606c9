//! Whether this node and a peer go on where they were, or one of them is an old copy.

use crate::pg::remote::Connection;
use crate::pg::shared::shared;
use protocol::{Lsn, NodeId};
use std::time::Duration;

/// How long the peer is given to tell the end of its WAL.
const POSITION_PATIENCE: Duration = Duration::from_secs(5);

/// Where the peer's WAL ends, and up to where this node has held it once: by the slot, unless nothing was confirmed since that was made (see
/// `arbiter::slots`), and by what the peer has noted. PostgreSQL 15 forgets at a shutdown what a slot was confirmed last.
pub struct Ends {
    pub wal: Lsn,
    pub confirmed: Lsn,
}

/// Why this node and a peer do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    #[error(
        "this server has forgotten what it had confirmed: its mark is {mark}, the peer knows of {confirmed}. It seems to be an old copy of its node and must not take part"
    )]
    OldCopyHere { mark: Lsn, confirmed: Lsn },
    #[error(
        "the peer's WAL ends at {end}, before this server's mark {mark}. The peer seems to be an old copy of its node"
    )]
    OldCopyThere { mark: Lsn, end: Lsn },
}

impl Ends {
    /// A server that was restored from a backup lacks what its node had promised or committed since; going on would be divergence.
    pub fn check(&self, mark: Lsn) -> Result<(), Mismatch> {
        self.check_here(mark)?;
        if self.wal < mark {
            return Err(Mismatch::OldCopyThere {
                mark,
                end: self.wal,
            });
        }
        Ok(())
    }

    /// The part that concerns this server. `mark` may have been read later than the peer was asked: it is stored before it is told.
    pub fn check_here(&self, mark: Lsn) -> Result<(), Mismatch> {
        if self.confirmed > mark {
            return Err(Mismatch::OldCopyHere {
                mark,
                confirmed: self.confirmed,
            });
        }
        Ok(())
    }
}

/// Asks the peer, as of now, and frees its slot for a new stream, unless this server is an old copy of its node. The error says why it did not answer.
pub fn take_over(conninfo: &str, slot: &str, mark: Lsn) -> Result<Ends, String> {
    let connection = connect(conninfo)?;
    // The stream may be that of the server which has taken the place of this one.
    let before = ask(&connection, slot)?;
    if before.check_here(mark).is_err() {
        return Ok(before);
    }
    // A walsender of an earlier connection that broke without telling still has the slot.
    let free = format!(
        "SELECT pg_catalog.pg_terminate_backend(active_pid, {})::pg_catalog.text FROM pg_catalog.pg_replication_slots \
          WHERE slot_name = '{slot}' AND active_pid IS NOT NULL",
        POSITION_PATIENCE.as_millis()
    );
    connection.query(&free, 1).map_err(|error| error.0)?;
    ask(&connection, slot)
}

/// The same, beside a stream that may use the slot.
pub fn ends_of(conninfo: &str, slot: &str) -> Result<Ends, String> {
    ask(&connect(conninfo)?, slot)
}

fn connect(conninfo: &str) -> Result<Connection, String> {
    Connection::open(conninfo, "multimaster receiver", POSITION_PATIENCE).map_err(|error| error.0)
}

fn ask(connection: &Connection, slot: &str) -> Result<Ends, String> {
    let own = shared().node_id().map_or(0, NodeId::get);
    // Slot names are made of digits, letters and underscores.
    let sql = format!(
        "SELECT (pg_catalog.pg_current_wal_flush_lsn() - '0/0'::pg_catalog.pg_lsn)::pg_catalog.text, \
                greatest(CASE WHEN m.made_at IS DISTINCT FROM s.confirmed_flush_lsn THEN s.confirmed_flush_lsn - '0/0'::pg_catalog.pg_lsn END, \
                         (SELECT b2 FROM mtm.marks WHERE id = {own}), 0)::pg_catalog.text \
           FROM pg_catalog.pg_replication_slots s LEFT JOIN mtm.slots_made m USING (slot_name) \
          WHERE slot_name = '{slot}'"
    );
    let rows = connection.query(&sql, 2).map_err(|error| error.0)?;
    let row = rows
        .first()
        .ok_or_else(|| format!("the peer has no slot \"{slot}\""))?;
    let number = |column: usize| row.get(column)?.as_deref()?.parse().ok().map(Lsn);
    match (number(0), number(1)) {
        (Some(wal), Some(confirmed)) => Ok(Ends { wal, confirmed }),
        _ => Err("the peer did not tell where its WAL ends".to_owned()),
    }
}
