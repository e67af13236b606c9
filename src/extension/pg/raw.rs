//! Hand-declared prototypes, called without pgrx's guard.
//!
//! An error raised inside one of these functions leaves by `longjmp`, through every Rust frame up to PostgreSQL's handler. A frame that calls
//! one must therefore own nothing with a destructor at that moment, and must not be a place that relies on unwinding. The commit path
//! needs exactly that: pgrx's guard would re-raise the error from five of its fields (constraint, table and column names are lost) and
//! restore a memory context that the callee may have deleted.

use pgrx::pg_sys;
use std::ffi::{c_char, c_int, c_long};

unsafe extern "C-unwind" {
    // access/xact.h
    pub fn PrepareTransactionBlock(gid: *const c_char) -> bool;
    pub fn BeginTransactionBlock();
    pub fn EndTransactionBlock(chain: bool) -> bool;
    pub fn BeginImplicitTransactionBlock();
    pub fn EndImplicitTransactionBlock();
    pub fn StartTransactionCommand();
    pub fn CommitTransactionCommand();
    pub fn ReleaseCurrentSubTransaction();
    pub fn IsSubTransaction() -> bool;
    pub fn IsTransactionBlock() -> bool;
    pub fn IsInParallelMode() -> bool;
    pub fn IsAbortedTransactionBlockState() -> bool;
    pub fn GetTopTransactionIdIfAny() -> pg_sys::TransactionId;
    pub static mut XactIsoLevel: c_int;
    pub static mut XactReadOnly: bool;
    pub static mut XactDeferrable: bool;

    // utils/guc.h
    pub fn set_config_option(
        name: *const c_char,
        value: *const c_char,
        context: pg_sys::GucContext::Type,
        source: pg_sys::GucSource::Type,
        action: pg_sys::GucAction::Type,
        change: bool,
        elevel: c_int,
        is_reload: bool,
    ) -> c_int;

    // utils/snapmgr.h
    pub fn GetTransactionSnapshot() -> pg_sys::Snapshot;
    pub fn GetLatestSnapshot() -> pg_sys::Snapshot;
    pub fn GetActiveSnapshot() -> pg_sys::Snapshot;
    pub fn ActiveSnapshotSet() -> bool;
    pub fn PushActiveSnapshot(snapshot: pg_sys::Snapshot);
    pub fn PushActiveSnapshotWithLevel(snapshot: pg_sys::Snapshot, level: c_int);
    pub fn PopActiveSnapshot();
    pub fn RegisterSnapshot(snapshot: pg_sys::Snapshot) -> pg_sys::Snapshot;
    pub fn UnregisterSnapshot(snapshot: pg_sys::Snapshot);

    // access/twophase.h, storage/procarray.h
    pub static max_prepared_xacts: c_int;
    pub fn TransactionIdIsInProgress(xid: pg_sys::TransactionId) -> bool;

    // storage/condition_variable.h
    pub fn ConditionVariableInit(variable: *mut pg_sys::ConditionVariable);
    pub fn ConditionVariablePrepareToSleep(variable: *mut pg_sys::ConditionVariable);
    pub fn ConditionVariableTimedSleep(
        variable: *mut pg_sys::ConditionVariable,
        timeout_ms: c_long,
        wait_event: u32,
    ) -> bool;
    pub fn ConditionVariableCancelSleep();
    pub fn ConditionVariableBroadcast(variable: *mut pg_sys::ConditionVariable);

    // commands/trigger.h, utils/portal.h, commands/tablecmds.h, commands/async.h
    pub fn AfterTriggerFireDeferred();
    pub fn PreCommit_Portals(is_prepare: bool) -> bool;
    pub fn PreCommit_on_commit_actions();
    pub fn PreCommit_Notify();
    pub fn AtCommit_Notify();
    pub fn Async_Notify(channel: *const c_char, payload: *const c_char);

    // tcop/utility.h
    pub fn standard_ProcessUtility(
        pstmt: *mut pg_sys::PlannedStmt,
        query_string: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        query_env: *mut pg_sys::QueryEnvironment,
        dest: *mut pg_sys::DestReceiver,
        qc: *mut pg_sys::QueryCompletion,
    );

    // executor/executor.h
    pub fn standard_ExecutorStart(query: *mut pg_sys::QueryDesc, flags: c_int);
    pub fn standard_ExecutorRun(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
        execute_once: bool,
    );

    // catalog/namespace.h
    pub fn RangeVarGetRelidExtended(
        relation: *const pg_sys::RangeVar,
        lock: c_int,
        flags: u32,
        callback: *const std::ffi::c_void,
        argument: *mut std::ffi::c_void,
    ) -> pg_sys::Oid;

    // utils/elog.h
    pub fn errstart(level: c_int, domain: *const c_char) -> bool;
    pub fn errcode(code: c_int) -> c_int;
    pub fn errmsg_internal(format: *const c_char, ...) -> c_int;
    pub fn errdetail_internal(format: *const c_char, ...) -> c_int;
    pub fn errhint(format: *const c_char, ...) -> c_int;
    pub fn errfinish(file: *const c_char, line: c_int, function: *const c_char);

    // access/xlog.h, catalog/namespace.h, utils/syscache.h
    pub fn RecoveryInProgress() -> bool;
    pub fn GetTempNamespaceState(namespace: *mut pg_sys::Oid, toast: *mut pg_sys::Oid);
    pub fn SearchSysCache1(cache: c_int, key: pg_sys::Datum) -> pg_sys::HeapTuple;
    pub fn ReleaseSysCache(tuple: pg_sys::HeapTuple);
    pub fn TransactionIdIsCurrentTransactionId(xid: pg_sys::TransactionId) -> bool;
    pub fn get_database_oid(name: *const c_char, missing_ok: bool) -> pg_sys::Oid;

    // storage/latch.h: touch shared memory and kill(2) only, so SetLatch may also be called from a thread that is not PostgreSQL's.
    pub fn SetLatch(latch: *mut pg_sys::Latch);
    pub fn ResetLatch(latch: *mut pg_sys::Latch);
    pub fn WaitLatch(
        latch: *mut pg_sys::Latch,
        events: c_int,
        timeout: c_long,
        wait_event: u32,
    ) -> c_int;

    // replication/walsender.h
    pub fn WalSndWakeup();

    // tcop/tcopprot.h: signal handlers
    pub fn die(signal: c_int);
    pub fn StatementCancelHandler(signal: c_int);
    pub fn ProcessInterrupts();

    // storage/procsignal.h
    pub fn ProcessProcSignalBarrier();

    // utils/timeout.h
    pub fn disable_timeout(id: u32, keep_indicator: bool);

    // replication/message.h
    pub fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
    ) -> pg_sys::XLogRecPtr;
}

/// `CHECK_FOR_INTERRUPTS()`: raises a pending cancel or terminate by `longjmp`.
///
/// # Safety
/// The caller's frames own nothing with a destructor.
pub unsafe fn check_for_interrupts() {
    // SAFETY: a flag that signal handlers of this process set; volatile in C.
    unsafe {
        if std::ptr::read_volatile(&raw const pg_sys::InterruptPending) != 0 {
            ProcessInterrupts();
        }
    }
}

/// `STATEMENT_TIMEOUT` of utils/timeout.h, the same in 15 to 18.
pub const STATEMENT_TIMEOUT: u32 = 3;
