//! Replica identities: which old columns an UPDATE or DELETE puts into WAL, so that the other nodes find the row.
//!
//! A table with a primary key needs nothing. One without gets REPLICA IDENTITY FULL, else its deleted rows could not be named. The identity
//! is a node's own matter: every node runs this after the same statements and comes to the same answer.

use super::touched::Touched;
use crate::pg::sequences;
use pgrx::pg_sys;
use std::collections::BTreeMap;

const DEFAULT: u8 = b'd';
const FULL: u8 = b'f';
const INDEX: u8 = b'i';

/// Settles what a command touched: identities of tables, shares of sequences.
pub fn settle(touched: &[Touched]) {
    // Whether the relation got a primary key, by oid.
    let mut relations: BTreeMap<u32, bool> = BTreeMap::new();
    for entry in touched {
        let (relation, new_key) = match *entry {
            Touched::Relation(relation) => (Some(relation), false),
            Touched::NewIndex(index) => (table_of_new_key(index), true),
        };
        if let Some(relation) = relation {
            *relations.entry(relation.to_u32()).or_default() |= new_key;
        }
    }
    for (oid, new_key) in relations {
        let oid = pg_sys::Oid::from(oid);
        // SAFETY: a guarded look-up; 0 when the relation is gone.
        match unsafe { pg_sys::get_rel_relkind(oid) } as u8 {
            pg_sys::RELKIND_RELATION | pg_sys::RELKIND_PARTITIONED_TABLE => {
                settle_table(oid, new_key);
                // They change from unlogged to logged together with their table.
                sequences::share_owned_by(oid);
            }
            pg_sys::RELKIND_SEQUENCE => sequences::share(oid, super::node_number()),
            _ => {}
        }
    }
}

/// Gives every existing table of the database, but for this extension's own, the identity it needs. Locks each against writing.
pub fn prepare_existing_tables() {
    let query = "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND c.oid >= 16384 AND n.nspname <> 'mtm'";
    for table in sequences::oids(query) {
        // SAFETY: guarded; the lock lasts until the end of the transaction.
        unsafe { pg_sys::LockRelationOid(table, pg_sys::ShareRowExclusiveLock as i32) };
        settle_table(table, false);
    }
}

fn settle_table(table: pg_sys::Oid, new_key: bool) {
    // SAFETY: guarded; the relation is closed before its catalog row changes.
    let wanted = unsafe {
        let relation = pg_sys::try_relation_open(table, pg_sys::AccessShareLock as i32);
        if relation.is_null() {
            return;
        }
        let wanted = wanted_identity(relation, new_key);
        pg_sys::relation_close(relation, pg_sys::NoLock as i32);
        wanted
    };
    if let Some(identity) = wanted {
        store_identity(table, identity);
    }
}

/// The identity the table must get, `None` when the one it has is right.
unsafe fn wanted_identity(relation: pg_sys::Relation, new_key: bool) -> Option<u8> {
    // SAFETY: an open relation.
    unsafe {
        let form = &*(*relation).rd_rel;
        if form.relpersistence as u8 == pg_sys::RELPERSISTENCE_TEMP
            || pg_sys::IsCatalogRelation(relation)
        {
            return None;
        }
        let has_key = pg_sys::RelationGetPrimaryKeyIndex(relation) != pg_sys::InvalidOid;
        let current = form.relreplident as u8;
        let wanted = match current {
            // The user's choice, as long as its index is there.
            INDEX if pg_sys::RelationGetReplicaIndex(relation) != pg_sys::InvalidOid => INDEX,
            // FULL beside an older primary key is the user's choice; a new key replaces what was set here.
            FULL if !(has_key && new_key) => FULL,
            _ if has_key => DEFAULT,
            _ => FULL,
        };
        (wanted != current).then_some(wanted)
    }
}

/// Writes the identity straight into the catalog: ALTER TABLE would fire the users' event triggers.
fn store_identity(table: pg_sys::Oid, identity: u8) {
    // SAFETY: guarded catalog update of a copied tuple; the caller's command holds a lock on the table.
    unsafe {
        let catalog =
            pg_sys::table_open(pg_sys::RelationRelationId, pg_sys::RowExclusiveLock as i32);
        let none = pg_sys::Datum::from(0usize);
        let tuple = pg_sys::SearchSysCacheCopy(
            pg_sys::SysCacheIdentifier::RELOID as i32,
            table.into(),
            none,
            none,
            none,
        );
        if !tuple.is_null() {
            (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relreplident =
                identity as _;
            pg_sys::CatalogTupleUpdate(catalog, &mut (*tuple).t_self, tuple);
            pg_sys::heap_freetuple(tuple);
        }
        pg_sys::table_close(catalog, pg_sys::RowExclusiveLock as i32);
        pg_sys::CommandCounterIncrement();
    }
}

/// The table of an index that is a primary key.
fn table_of_new_key(index: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: guarded; the tuple is released after its fields are copied.
    unsafe {
        let tuple =
            pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::INDEXRELID as i32, index.into());
        if tuple.is_null() {
            return None;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_index>();
        let table = (*form).indisprimary.then_some((*form).indrelid);
        pg_sys::ReleaseSysCache(tuple);
        table
    }
}
