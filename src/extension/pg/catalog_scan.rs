//! The marker by which the arbiter finds the database of the cluster: a replication origin named `mtm_<database oid>`.
//!
//! Replication origins are a shared catalog, which a worker can read before it attaches to a database, and which base backups, crash recovery
//! and standbys carry.

use super::process;
use pgrx::pg_sys;

const PREFIX: &str = "mtm_";

/// The database the marker names, if it still exists.
pub fn cluster_database() -> Option<pg_sys::Oid> {
    process::in_transaction(|| origin_names().into_iter().find_map(|name| database_of(&name)))
}

/// Whether the marker is still there. Runs in a transaction.
pub fn has_cluster_marker() -> bool {
    origin_names().iter().any(|name| database_of(name).is_some())
}

fn database_of(name: &str) -> Option<pg_sys::Oid> {
    name.strip_prefix(PREFIX)?.parse::<u32>().ok().map(pg_sys::Oid::from)
}

fn origin_names() -> Vec<String> {
    let mut names = Vec::new();
    // SAFETY: a sequential scan of a small shared catalog in a transaction; each name is copied before the scan goes on.
    unsafe {
        let relation = pg_sys::table_open(pg_sys::ReplicationOriginRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::systable_beginscan(
            relation,
            pg_sys::Oid::INVALID,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let mut is_null = false;
            let value = pg_sys::heap_getattr(tuple, NAME_COLUMN, (*relation).rd_att, &mut is_null);
            if let Some(name) = <String as pgrx::FromDatum>::from_datum(value, is_null) {
                names.push(name);
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
    }
    names
}

/// `Anum_pg_replication_origin_roname` of catalog/pg_replication_origin.h.
const NAME_COLUMN: i32 = 2;
