//! The marker by which the arbiter finds the database of the cluster: a replication origin named `mtm_<database oid>`.
//!
//! Replication origins are a shared catalog, which a worker can read before it attaches to a database, and which base backups, crash recovery
//! and standbys carry.

use pgrx::pg_sys;

const PREFIX: &str = "mtm_";

/// Oid of the database that the marker names. Runs in a transaction.
pub fn cluster_database() -> Option<u32> {
    origin_names()
        .into_iter()
        .find_map(|name| database_of(&name))
}

/// Oid of some database that takes connections. Readable without being attached to one, because pg_database is nailed in the relation cache.
pub fn any_database() -> Option<u32> {
    let mut found = None;
    each_tuple(pg_sys::DatabaseRelationId, |tuple, _| {
        // SAFETY: a tuple of pg_database; its fixed-width head is laid out as the struct.
        let row = unsafe { &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>() };
        if row.datallowconn && (found.is_none() || !row.datistemplate) {
            found = Some(row.oid.to_u32());
        }
    });
    found
}

/// Whether the marker is still there. Runs in a transaction.
pub fn has_cluster_marker() -> bool {
    origin_names()
        .iter()
        .any(|name| database_of(name).is_some())
}

fn database_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

fn origin_names() -> Vec<String> {
    let mut names = Vec::new();
    each_tuple(pg_sys::ReplicationOriginRelationId, |tuple, descriptor| {
        let mut is_null = false;
        // SAFETY: a tuple of this descriptor; the name is copied.
        let name = unsafe {
            let value = pg_sys::heap_getattr(tuple, NAME_COLUMN, descriptor, &mut is_null);
            <String as pgrx::FromDatum>::from_datum(value, is_null)
        };
        names.extend(name);
    });
    names
}

/// Visits the visible tuples of a small shared catalog.
fn each_tuple(catalog: pg_sys::Oid, mut visit: impl FnMut(pg_sys::HeapTuple, pg_sys::TupleDesc)) {
    // SAFETY: a sequential scan in a transaction; tuples are used only until the scan goes on.
    unsafe {
        let relation = pg_sys::table_open(catalog, pg_sys::AccessShareLock as i32);
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
            visit(tuple, (*relation).rd_att);
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
    }
}

/// `Anum_pg_replication_origin_roname` of catalog/pg_replication_origin.h.
const NAME_COLUMN: i32 = 2;
