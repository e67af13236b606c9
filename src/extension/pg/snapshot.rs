//! The snapshot of a statement that is about to run, and putting a later one in its place.
//!
//! PostgreSQL takes it before it calls any hook. Only one that nobody but the statement itself uses can be replaced. What runs inside of a statement (functions,
//! triggers) takes later snapshots, or shares the statement's.

use super::raw;
use pgrx::pg_sys;

/// Who holds the snapshot.
#[derive(Clone, Copy)]
pub enum Place {
    /// A query that is about to begin.
    Query(*mut pg_sys::QueryDesc),
    /// A utility command that the active portal is about to run.
    Portal,
    /// Somebody else's, which is looked at only.
    Active,
}

impl Place {
    /// The snapshot, or null.
    ///
    /// # Safety
    /// From the hook of the statement that it is about.
    pub unsafe fn snapshot(self) -> pg_sys::Snapshot {
        // SAFETY: as the caller promises: the query, and the portal of a command, are valid.
        unsafe {
            match self {
                Place::Query(query) => (*query).snapshot,
                Place::Portal => (*pg_sys::ActivePortal).portalSnapshot,
                Place::Active if raw::ActiveSnapshotSet() => raw::GetActiveSnapshot(),
                Place::Active => std::ptr::null_mut(),
            }
        }
    }

    /// Whether the snapshot is on top of the stack, and nobody but this statement uses it.
    ///
    /// # Safety
    /// As [`Place::snapshot`].
    pub unsafe fn is_replaceable(self) -> bool {
        // SAFETY: as the caller promises.
        unsafe {
            let snapshot = self.snapshot();
            match self {
                Place::Query(_) => is_used_once(snapshot, 1) && !is_portals(snapshot),
                Place::Portal => {
                    // The portal of a command with an answer holds it, too, only so that nothing is removed that the answer refers to.
                    let held = (*pg_sys::ActivePortal).holdSnapshot == snapshot;
                    is_used_once(snapshot, u32::from(held))
                }
                Place::Active => false,
            }
        }
    }

    /// Puts a later snapshot in its place, of which a copy is made.
    ///
    /// # Safety
    /// As [`Place::snapshot`]; it is replaceable.
    pub unsafe fn replace(self, fresh: pg_sys::Snapshot) {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Place::Query(query) => {
                    raw::PopActiveSnapshot();
                    raw::PushActiveSnapshot(fresh);
                    raw::UnregisterSnapshot((*query).snapshot);
                    (*query).snapshot = raw::RegisterSnapshot(raw::GetActiveSnapshot());
                }
                Place::Portal => {
                    let portal = &mut *pg_sys::ActivePortal;
                    portal.portalSnapshot = std::ptr::null_mut();
                    raw::PopActiveSnapshot();
                    raw::PushActiveSnapshotWithLevel(fresh, portal.createLevel);
                    portal.portalSnapshot = raw::GetActiveSnapshot();
                }
                Place::Active => {}
            }
        }
    }
}

/// Whether `plan` is what the client has sent, not something that runs inside of it. Of what a rule makes of one statement, the first.
///
/// # Safety
/// From a hook.
pub unsafe fn is_statement(plan: *const pg_sys::PlannedStmt) -> bool {
    // SAFETY: the active portal and its list of statements are valid while it is active.
    unsafe {
        let portal = pg_sys::ActivePortal;
        !portal.is_null()
            && !(*portal).stmts.is_null()
            && std::ptr::eq((*(*(*portal).stmts).elements).ptr_value.cast(), plan)
    }
}

/// Whether the snapshot is on top of the stack, and its place there and `registered` references are all that keeps it.
unsafe fn is_used_once(snapshot: pg_sys::Snapshot, registered: u32) -> bool {
    // SAFETY: looks at this process's stack of snapshots; a snapshot that a statement has is valid.
    unsafe {
        !snapshot.is_null()
            && raw::ActiveSnapshotSet()
            && raw::GetActiveSnapshot() == snapshot
            && (*snapshot).active_count == 1
            && (*snapshot).regd_count == registered
    }
}

/// Whether the active portal will take it off the stack itself: a query of a procedure.
unsafe fn is_portals(snapshot: pg_sys::Snapshot) -> bool {
    // SAFETY: the active portal is valid.
    unsafe {
        let portal = pg_sys::ActivePortal;
        !portal.is_null() && (*portal).portalSnapshot == snapshot
    }
}

/// A snapshot of this moment that is also the transaction's, if that has one.
///
/// In repeatable read PostgreSQL keeps the first snapshot. It gives a new one where it believes itself in read committed, and returns that
/// one from then on. The first one stays registered, so nothing that the new one needs is removed.
///
/// # Safety
/// From a hook, in a transaction that is not serializable.
pub unsafe fn take() -> pg_sys::Snapshot {
    // SAFETY: a variable of this process. An error in between ends the transaction, and with it the level.
    unsafe {
        let level = raw::XactIsoLevel;
        raw::XactIsoLevel = pg_sys::XACT_READ_COMMITTED as i32;
        let snapshot = raw::GetTransactionSnapshot();
        raw::XactIsoLevel = level;
        snapshot
    }
}

/// Whether two snapshots show the same: taking one is cheap while nothing ends, putting it in the place of another one is not.
pub fn is_same(old: &pg_sys::SnapshotData, new: &pg_sys::SnapshotData) -> bool {
    if old.suboverflowed || new.suboverflowed {
        // A copy lacks the list of subtransactions then.
        return false;
    }
    let list = |start: *mut pg_sys::TransactionId, count: usize| {
        if count == 0 {
            &[][..]
        } else {
            // SAFETY: the array has as many elements as the count says.
            unsafe { std::slice::from_raw_parts(start, count) }
        }
    };
    let running = |snapshot: &pg_sys::SnapshotData| {
        (
            list(snapshot.xip, snapshot.xcnt as usize),
            list(snapshot.subxip, snapshot.subxcnt.max(0) as usize),
        )
    };
    (old.xmin, old.xmax) == (new.xmin, new.xmax) && running(old) == running(new)
}
