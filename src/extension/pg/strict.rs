//! Strict reads: a statement sees every transaction whose COMMIT was answered before the statement was sent, on whatever node.
//!
//! With `multimaster.strict_reads` a client's statement waits until what is prepared here when it begins is finished, and takes its snapshot then. That is
//! enough because every member has prepared a transaction before anybody commits it (docs/protocol.md, "Strict reads").
//!
//! PostgreSQL takes the snapshot of a statement before it calls any hook. So the wait comes in the first hook of the statement, and the snapshot is taken
//! again (`snapshot`).
//!
//! | isolation | waits |
//! |---|---|
//! | read committed | each statement |
//! | repeatable read | the first statement of the transaction |
//! | serializable | BEGIN; a snapshot cannot be replaced there, since predicate locking has begun with it |

use super::gate::Reader;
use super::in_flight::{Pending, Prepared};
use super::snapshot::{self, Place};
use super::{gate, raw, refusal, shared, stretch};
use crate::guc;
use pgrx::pg_sys;
use protocol::GenerationNum;
use std::cell::Cell;
use std::ffi::{CStr, c_long};
use std::time::{Duration, Instant};

/// How often a reader that waits looks whether this node still serves, and for a transaction that ended without telling.
const LOOK_AROUND: Duration = Duration::from_millis(50);

thread_local! {
    /// The last transaction of this session, by its local number, that has run a statement which uses a snapshot.
    static HAS_READ: Cell<u32> = const { Cell::new(0) };
    /// The last one for which BEGIN has waited, and the generation in which this node was online then.
    static WAITED_AT_BEGIN: Cell<(u32, GenerationNum)> = const { Cell::new((0, GenerationNum(0))) };
}

/// A query is about to run. Returns whether it is known to be the first statement of its transaction that uses a snapshot.
///
/// # Safety
/// From the executor's start hook: raises by `longjmp`, so no frame owns anything.
pub unsafe fn before_query(query: *mut pg_sys::QueryDesc) -> bool {
    // SAFETY: as the caller promises; PostgreSQL passes a valid query.
    unsafe {
        let plan = &*(*query).plannedstmt;
        snapshot::is_statement(plan) && before_statement(Reader::Query(plan), Place::Query(query))
    }
}

/// A utility command is about to run. Those that read have a snapshot of their portal's. Returns the same.
///
/// # Safety
/// From the utility hook; as [`before_query`].
pub unsafe fn before_command(pstmt: *mut pg_sys::PlannedStmt) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        let command = (*pstmt).utilityStmt;
        runs_queries((*command).type_)
            && snapshot::is_statement(pstmt)
            && before_statement(Reader::Command(command), Place::Portal)
    }
}

unsafe fn before_statement(reader: Reader, place: Place) -> bool {
    // SAFETY: as the callers promise.
    unsafe {
        if !place.is_replaceable() {
            return false;
        }
        let first = begin_statement();
        if waits(first) {
            in_one_generation(reader, place);
        }
        first
    }
}

/// A utility command has run: BEGIN or SET may have made the transaction a serializable one.
///
/// # Safety
/// As [`before_command`].
pub unsafe fn after_command(command: *mut pg_sys::Node) {
    use pg_sys::NodeTag::{T_TransactionStmt, T_VariableSetStmt};
    // SAFETY: the node's tag says what it is.
    unsafe {
        if !matches!((*command).type_, T_TransactionStmt | T_VariableSetStmt) {
            return;
        }
        if imports_snapshot(command) {
            // It must not be replaced.
            begin_statement();
            stretch::forget();
        } else if guc::strict_reads()
            && raw::XactIsoLevel == pg_sys::XACT_SERIALIZABLE as i32
            && raw::IsTransactionBlock()
            && !raw::IsAbortedTransactionBlockState()
            && !pg_sys::FirstSnapshotSet
            && gate::applies()
        {
            let generation = shared::shared().online_in();
            await_prepared(Reader::Command(command));
            WAITED_AT_BEGIN.set((transaction(), generation));
        }
    }
}

/// SET TRANSACTION SNAPSHOT: the transaction sees what another one saw.
unsafe fn imports_snapshot(command: *mut pg_sys::Node) -> bool {
    // SAFETY: the node's tag says what it is; a name is zero-terminated.
    unsafe {
        (*command).type_ == pg_sys::NodeTag::T_VariableSetStmt && {
            let statement = &*command.cast::<pg_sys::VariableSetStmt>();
            statement.kind == pg_sys::VariableSetKind::VAR_SET_MULTI
                && CStr::from_ptr(statement.name) == c"TRANSACTION SNAPSHOT"
        }
    }
}

/// The local number of this session's transaction.
fn transaction() -> u32 {
    // SAFETY: a plain field of this process's own entry.
    unsafe { (*pg_sys::MyProc).lxid }
}

/// Whether it is the first statement of its transaction.
fn begin_statement() -> bool {
    let transaction = transaction();
    HAS_READ.replace(transaction) != transaction
}

/// Commands that read tables with their portal's snapshot, or run something that does.
fn runs_queries(tag: pg_sys::NodeTag) -> bool {
    use pg_sys::NodeTag::*;
    matches!(
        tag,
        T_CopyStmt
            | T_ExplainStmt
            | T_ExecuteStmt
            | T_DeclareCursorStmt
            | T_CreateTableAsStmt
            | T_RefreshMatViewStmt
            | T_CallStmt
            | T_DoStmt
    )
}

/// Whether a statement of the running transaction waits, and gets another snapshot; raises when it had to, and cannot.
unsafe fn waits(first: bool) -> bool {
    if !guc::strict_reads() || !gate::applies() {
        return false;
    }
    // SAFETY: a variable of this process; raises as the callers do.
    unsafe {
        match raw::XactIsoLevel as u32 {
            pg_sys::XACT_SERIALIZABLE => {
                if first {
                    check_wait_at_begin();
                }
                false
            }
            pg_sys::XACT_REPEATABLE_READ => first,
            _ => true,
        }
    }
}

/// Raises unless the BEGIN of a serializable transaction has waited, and its snapshot is of the same generation.
unsafe fn check_wait_at_begin() {
    let (waited, generation) = WAITED_AT_BEGIN.get();
    // SAFETY: as the callers of the hooks' functions promise.
    unsafe {
        if waited != transaction() {
            refusal::raise(
                pgrx::PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED as i32,
                c"a serializable transaction with strict reads must start with BEGIN",
                c"Its snapshot was taken before the wait for transactions that are being committed.",
                c"Use BEGIN, or repeatable read, or set multimaster.strict_reads to off.",
            );
        } else if generation != shared::shared().online_in() {
            refusal::raise(
                pgrx::PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32,
                c"the set of working nodes has changed since the transaction began",
                c"",
                c"Run the transaction again.",
            );
        }
    }
}

/// Waits, and has the snapshot replaced if it is not what a new one is, while this node is online in one and the same generation; it serves when this returns.
///
/// A node that was away in between was told of what it had missed after the snapshot, and serves again all the same.
unsafe fn in_one_generation(reader: Reader, place: Place) {
    // SAFETY: as the callers of the hooks' functions promise.
    unsafe {
        loop {
            let generation = shared::shared().online_in();
            reader.check();
            await_prepared(reader);
            let fresh = snapshot::take();
            if !snapshot::is_same(&*place.snapshot(), &*fresh) {
                place.replace(fresh);
            }
            reader.check();
            if shared::shared().online_in() == generation {
                return;
            }
        }
    }
}

/// Waits until what is prepared here at this moment is finished. Interrupts and timeouts end the wait with their errors, and so does the loss of the majority.
///
/// Nobody waits for ever, and there is no cycle: a prepared transaction has all its locks and needs nothing of this session. What it waits for are other
/// nodes' votes; where those wait for a lock of this session, this session is running, and the conflict rule makes it a victim.
unsafe fn await_prepared(reader: Reader) {
    let Some(prepared) = Prepared::now() else {
        return;
    };
    let begun = Instant::now();
    // SAFETY: as the callers promise; the list lies in shared memory.
    unsafe {
        if reader.shows_only_the_cluster() {
            return;
        }
        while let Some(pending) = prepared.pending() {
            raw::ConditionVariablePrepareToSleep(pending.list());
            if pending.is_there() {
                sleep(pending, begun);
            }
            raw::ConditionVariableCancelSleep();
            if !gate::serves() {
                reader.check();
                if !gate::serves() {
                    break;
                }
            }
        }
    }
}

/// Sleeps until something on the list has ended, or a while.
unsafe fn sleep(pending: Pending, begun: Instant) {
    // SAFETY: as await_prepared.
    unsafe {
        let limit = Duration::from_millis(pg_sys::LockTimeout as u64);
        let waited = begun.elapsed();
        let mut timeout = LOOK_AROUND;
        if !limit.is_zero() {
            if waited >= limit {
                refusal::raise(
                    pgrx::PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE as i32,
                    c"canceling statement due to lock timeout",
                    c"It waited for transactions that are prepared on this node to be finished, as multimaster.strict_reads demands.",
                    c"",
                );
            }
            timeout = timeout.min(limit - waited);
        }
        raw::ConditionVariableTimedSleep(
            pending.list(),
            timeout.as_millis().max(1) as c_long,
            pg_sys::PG_WAIT_EXTENSION,
        );
    }
}
