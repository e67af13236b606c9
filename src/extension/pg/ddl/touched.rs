//! Which relations the running command touched: created, altered, or changed by what was dropped.
//!
//! Collected from PostgreSQL's object-access hook, so that the parts of a command (serial columns, partitions, extension scripts) count too. The list
//! may name relations that are gone or were rolled back; whoever reads it looks again.

use pgrx::pg_sys;
use std::cell::RefCell;

/// A relation to look at after the command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    /// A relation of any kind: table, sequence or index.
    Relation(pg_sys::Oid),
    /// An index just created, or made that of a constraint: perhaps a primary key.
    NewIndex(pg_sys::Oid),
}

thread_local! {
    static TOUCHED: RefCell<Vec<Touched>> = const { RefCell::new(Vec::new()) };
}

pub fn mark() -> usize {
    TOUCHED.with_borrow(Vec::len)
}

/// Takes what was touched since the mark.
pub fn take_since(mark: usize) -> Vec<Touched> {
    TOUCHED.with_borrow_mut(|touched| {
        let from = mark.min(touched.len());
        touched.split_off(from)
    })
}

pub fn clear() {
    TOUCHED.with_borrow_mut(Vec::clear);
}

pub fn is_interesting(access: pg_sys::ObjectAccessType::Type, class: pg_sys::Oid) -> bool {
    use pg_sys::ObjectAccessType::*;
    match access {
        OAT_POST_ALTER => class == pg_sys::RelationRelationId || class == pg_sys::IndexRelationId,
        OAT_POST_CREATE | OAT_DROP => class == pg_sys::RelationRelationId,
        _ => false,
    }
}

pub fn note(access: pg_sys::ObjectAccessType::Type, class: pg_sys::Oid, object: pg_sys::Oid) {
    if access == pg_sys::ObjectAccessType::OAT_DROP {
        if let Some(table) = table_of_index(object) {
            push(Touched::Relation(table));
        }
    } else if class == pg_sys::IndexRelationId {
        push(Touched::NewIndex(object));
    } else {
        push(Touched::Relation(object));
        if access == pg_sys::ObjectAccessType::OAT_POST_CREATE {
            // Its catalog row is not visible yet: whether it is an index shows later.
            push(Touched::NewIndex(object));
        }
    }
}

fn push(entry: Touched) {
    TOUCHED.with_borrow_mut(|touched| {
        if touched.last() != Some(&entry) {
            touched.push(entry);
        }
    });
}

/// The table of an index that is about to be dropped, `None` when it is no index.
fn table_of_index(relation: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: catalog look-ups by oid; guarded.
    unsafe {
        let kind = pg_sys::get_rel_relkind(relation) as u8;
        if kind != pg_sys::RELKIND_INDEX && kind != pg_sys::RELKIND_PARTITIONED_INDEX {
            return None;
        }
        let table = pg_sys::IndexGetRelation(relation, true);
        (table != pg_sys::InvalidOid).then_some(table)
    }
}
