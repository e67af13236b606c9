//! Snapshots that are older than the present stretch of service.
//!
//! A statement's snapshot is taken before the gate finds that the node serves. In between the process may stop, or wait until the node serves
//! again, and the node may have missed commits meanwhile. So each session remembers a number of the stretch (`shared::service`) that it read *before* its snapshot:
//! at the end of its last transaction, at BEGIN, or when a statement was last looked at here. If the number is still the same when the node serves, the snapshot was
//! taken in this stretch. Otherwise it must show everything that had ended here when the stretch began: it is looked at, replaced where that can be, and refused (40001)
//! where not. docs/membership.md, "Reads of a node that was away", says why that is enough.
//!
//! While the number remembered is the present one, every snapshot that the transaction uses has been found good, or was taken inside of a statement whose own was. One
//! that nobody looked at, because the statement needs no data, keeps the transaction from remembering any until it ends.

use super::gate::{self, Reader};
use super::snapshot::{self, Place};
use super::{outcome, raw, refusal, shared};
use crate::failpoint::{Failpoint, hit_in_backend};
use crate::guc;
use pgrx::pg_sys;
use std::cell::Cell;

/// How far back 32 bits of an xid say which one is meant, with room to spare.
const RECENT_XIDS: u64 = 1 << 30;
/// Remembered by who has to look at each snapshot: no stretch has this number when a node serves.
const NONE: u64 = 0;

thread_local! {
    /// A stretch that had begun when the oldest snapshot of this transaction was taken, or since when it is known to be good.
    static REMEMBERED: Cell<u64> = const { Cell::new(NONE) };
    /// The last transaction, by its local number, of which a snapshot was found good, and the stretch then.
    static FOUND_GOOD: Cell<(u32, u64)> = const { Cell::new((0, NONE)) };
    /// The last transaction that has a snapshot which nobody looked at.
    static UNSEEN: Cell<u32> = const { Cell::new(0) };
}

/// What the snapshot is for.
#[derive(Clone, Copy)]
struct Statement<'a> {
    reader: Reader<'a>,
    place: Place,
    /// It is the first of its transaction that uses a snapshot.
    first: bool,
}

/// The session has no snapshot at this moment: what it takes later is of this stretch or a later one.
pub fn remember() {
    REMEMBERED.set(shared::shared().service.stretch());
}

/// The transaction has taken over the snapshot of another session.
pub fn forget() {
    REMEMBERED.set(NONE);
}

/// BEGIN is about to run.
///
/// # Safety
/// From the utility hook.
pub unsafe fn before_transaction_command() {
    // SAFETY: variables of this process.
    unsafe {
        if shared::exists() && !pg_sys::FirstSnapshotSet && !raw::ActiveSnapshotSet() {
            remember();
        }
    }
}

/// A query is about to begin; `serves` says whether the node was found to serve after its snapshot was taken.
///
/// # Safety
/// From the executor's start hook: raises by `longjmp`, so no frame owns anything.
pub unsafe fn check_query(query: *mut pg_sys::QueryDesc, first: bool, serves: bool) {
    if !shared::exists() {
        return;
    }
    // SAFETY: as the caller promises.
    unsafe {
        let reader = Reader::Query(&*(*query).plannedstmt);
        let place = Place::Query(query);
        check(
            Statement {
                reader,
                place,
                first,
            },
            serves,
        );
    }
}

/// A utility command is about to run. Of those inside of others only COPY of a table reads with what it finds.
///
/// # Safety
/// As [`check_query`].
pub unsafe fn check_command(pstmt: *mut pg_sys::PlannedStmt, first: bool, serves: bool) {
    // SAFETY: as the caller promises.
    unsafe {
        let command = (*pstmt).utilityStmt;
        let place = if snapshot::is_statement(pstmt) {
            Place::Portal
        } else if (*command).type_ == pg_sys::NodeTag::T_CopyStmt {
            Place::Active
        } else {
            return;
        };
        if shared::exists() && !place.snapshot().is_null() {
            let reader = Reader::Command(command);
            check(
                Statement {
                    reader,
                    place,
                    first,
                },
                serves,
            );
        }
    }
}

unsafe fn check(statement: Statement, serves: bool) {
    if !serves {
        leave_unseen();
    } else if REMEMBERED.get() == shared::shared().service.stretch() {
        FOUND_GOOD.set((transaction(), REMEMBERED.get()));
    } else {
        // SAFETY: as the callers promise.
        unsafe { look_at(statement) };
    }
}

/// The local number of this session's transaction.
fn transaction() -> u32 {
    // SAFETY: a plain field of this process's own entry.
    unsafe { (*pg_sys::MyProc).lxid }
}

fn leave_unseen() {
    UNSEEN.set(transaction());
    forget();
}

/// Finds out whether the snapshot shows what it has to, and replaces it if not.
#[cold]
unsafe fn look_at(statement: Statement) {
    let service = &shared::shared().service;
    // SAFETY: as the callers promise.
    unsafe {
        if !gate::applies() || guc::minority_reads() {
            return leave_unseen();
        }
        loop {
            let stretch = service.stretch();
            if keeps_snapshot() {
                if service.returned_since(FOUND_GOOD.get().1) {
                    refuse_or_leave(statement);
                }
                return;
            }
            if !shows_all(statement.place.snapshot()) {
                if !may_replace(statement) {
                    return refuse_or_leave(statement);
                }
                statement.place.replace(snapshot::take());
            }
            if !statement.reader.check() {
                return leave_unseen();
            }
            if service.stretch() == stretch {
                return found_good(stretch);
            }
        }
    }
}

/// The snapshot shows everything that had ended here when the stretch began.
fn found_good(stretch: u64) {
    let transaction = transaction();
    FOUND_GOOD.set((transaction, stretch));
    // SAFETY: a plain variable of this process. A call of a function by the protocol's fast path has a snapshot of its own, and no portal.
    let is_in_portal = unsafe { !pg_sys::ActivePortal.is_null() };
    if UNSEEN.get() != transaction && is_in_portal {
        REMEMBERED.set(stretch);
    }
}

/// Whether the transaction has one snapshot for all its statements, which was good when it was first used.
unsafe fn keeps_snapshot() -> bool {
    // SAFETY: a variable of this process.
    let repeatable = unsafe { raw::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32;
    repeatable && FOUND_GOOD.get().0 == transaction()
}

/// Whether a snapshot of this moment may take the place of the statement's.
unsafe fn may_replace(statement: Statement) -> bool {
    // SAFETY: as the callers promise.
    unsafe {
        let level_allows = match raw::XactIsoLevel as u32 {
            // Predicate locking has begun with it.
            pg_sys::XACT_SERIALIZABLE => false,
            pg_sys::XACT_REPEATABLE_READ => statement.first,
            _ => true,
        };
        level_allows && !raw::IsInParallelMode() && statement.place.is_replaceable()
    }
}

/// Whether the snapshot shows everything that had ended here when the present stretch began: it sees all transactions with older xids as ended, or is what
/// a new one would be.
unsafe fn shows_all(snapshot: pg_sys::Snapshot) -> bool {
    // SAFETY: a snapshot that a statement has is valid.
    unsafe {
        if snapshot.is_null() || (*snapshot).snapshot_type != pg_sys::SnapshotType::SNAPSHOT_MVCC {
            return true;
        }
        let first = shared::shared().service.first_xid();
        // No snapshot is older than what 32 bits can tell.
        outcome::next_xid().saturating_sub(first) > RECENT_XIDS
            || !pg_sys::TransactionIdPrecedes((*snapshot).xmin, (first as u32).into())
            || (!raw::IsInParallelMode()
                && snapshot::is_same(&*snapshot, &*raw::GetLatestSnapshot()))
    }
}

/// Ends a statement that would show too little. One that needs no data goes on.
unsafe fn refuse_or_leave(statement: Statement) {
    // SAFETY: as the callers promise.
    unsafe {
        if !statement.reader.touches_data() {
            return leave_unseen();
        }
        refusal::raise(
            pgrx::PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32,
            c"this node has not served all the time since the snapshot was taken",
            c"What it would have read may be older than what other nodes have committed.",
            c"Run the transaction again.",
        );
    }
}

/// Where tests stop a statement that has its snapshot.
///
/// # Safety
/// As [`check_query`].
pub unsafe fn pass_failpoint(reader: Reader) {
    // SAFETY: as the caller promises.
    if cfg!(feature = "failpoints") && unsafe { reader.touches_data() } {
        hit_in_backend(Failpoint::StatementBeforeCheck);
    }
}
