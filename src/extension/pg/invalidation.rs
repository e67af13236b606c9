//! Noticing that cached knowledge about relations and types has become stale.
//!
//! PostgreSQL tells by callback, at any moment in which it reads its catalogs, which relation changed. The callback only
//! notes it on a clock of this process; whoever caches something asks whether it is still current.

use pgrx::pg_sys;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// Relations noted one by one; beyond that all count as changed.
const NOTED_MAX: usize = 4096;

thread_local! {
    static NOTED: Noted = Noted::default();
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

#[derive(Default)]
struct Noted {
    clock: Cell<u64>,
    all_at: Cell<u64>,
    relations: RefCell<HashMap<u32, u64>>,
}

impl Noted {
    fn relation(&self, relid: u32) {
        let now = self.clock.get() + 1;
        self.clock.set(now);
        let mut relations = self.relations.borrow_mut();
        if relations.len() >= NOTED_MAX {
            relations.clear();
            self.all_at.set(now);
        }
        relations.insert(relid, now);
    }

    fn all(&self) {
        let now = self.clock.get() + 1;
        self.clock.set(now);
        self.all_at.set(now);
        self.relations.borrow_mut().clear();
    }
}

/// A moment on this process's clock of invalidations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// The present moment: what is read from the catalogs from now on is current until told otherwise.
pub fn now() -> Moment {
    register();
    Moment(NOTED.with(|noted| noted.clock.get()))
}

/// Whether nothing about the relation has changed since; types and schemas count as part of every relation.
pub fn unchanged_since(relid: pg_sys::Oid, then: Moment) -> bool {
    NOTED.with(|noted| {
        then.0 == noted.clock.get()
            || (then.0 >= noted.all_at.get()
                && noted
                    .relations
                    .borrow()
                    .get(&relid.to_u32())
                    .is_none_or(|at| then.0 >= *at))
    })
}

fn register() {
    if REGISTERED.replace(true) {
        return;
    }
    let none = pg_sys::Datum::null();
    // SAFETY: the callbacks are functions of this library, which is never unloaded; once per process.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(on_relation), none);
        for cache in [
            pg_sys::SysCacheIdentifier::NAMESPACEOID,
            pg_sys::SysCacheIdentifier::TYPEOID,
        ] {
            pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(on_catalog), none);
        }
    }
}

/// Runs while PostgreSQL processes invalidations: calls nothing of PostgreSQL.
unsafe extern "C-unwind" fn on_relation(_argument: pg_sys::Datum, relid: pg_sys::Oid) {
    NOTED.with(|noted| match relid {
        pg_sys::Oid::INVALID => noted.all(),
        relid => noted.relation(relid.to_u32()),
    });
}

/// As [`on_relation`]; a type or schema says not whose it is.
unsafe extern "C-unwind" fn on_catalog(_argument: pg_sys::Datum, _cache: i32, _hash: u32) {
    NOTED.with(Noted::all);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_concerns_its_relation_alone() {
        let noted = Noted::default();
        noted.relation(7);
        assert_eq!(noted.relations.borrow().get(&7), Some(&1));
        assert_eq!(noted.all_at.get(), 0);
        noted.all();
        assert_eq!((noted.all_at.get(), noted.clock.get()), (2, 2));
    }

    #[test]
    fn too_many_changes_concern_everything() {
        let noted = Noted::default();
        (0..=NOTED_MAX as u32).for_each(|relid| noted.relation(relid));
        assert_eq!(noted.all_at.get(), NOTED_MAX as u64 + 1);
        assert_eq!(noted.relations.borrow().len(), 1);
    }
}
