//! The hooks into PostgreSQL's commit pipeline and into its utility commands.
//!
//! Explicit COMMIT is caught in `ProcessUtility_hook`, every other commit (autocommit, implicit blocks, procedures, background workers) in
//! the transaction callback at PRE_COMMIT, nested inside core's CommitTransaction. Both end in `commit::commit_globally`. The library
//! must come first in `shared_preload_libraries`: transaction callbacks run last-registered-first, and one that ran after ours would
//! see an empty transaction and could raise an error for what is already committed.

use super::shared;
use super::{
    age, commit, ddl_bridge, gate, process, raw, refusal, stretch, strict, user_2pc, victim,
};
use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::Ordering;

static mut PREVIOUS_UTILITY: pg_sys::ProcessUtility_hook_type = None;
static mut PREVIOUS_EXECUTOR_START: pg_sys::ExecutorStart_hook_type = None;
static mut PREVIOUS_EXECUTOR_RUN: pg_sys::ExecutorRun_hook_type = None;

/// What the running transaction is known to have done; reset at its end.
#[derive(Clone, Copy, Default)]
struct Footprint {
    /// Rows of some table were to be written, or DDL ran.
    wrote: bool,
    /// Only row locks, sequences or temporary objects explain its xid and WAL.
    harmless: bool,
}

thread_local! {
    static FOOTPRINT: Cell<Footprint> = const { Cell::new(Footprint { wrote: false, harmless: false }) };
    /// Nesting of commands that run transactions of their own (VACUUM, ...).
    static LOCAL_DEPTH: Cell<u32> = const { Cell::new(0) };
    /// Portals will restore a context and owner of a subtransaction that is gone: repair them (see `release_savepoints`).
    static REPAIR_CONTEXT: Cell<bool> = const { Cell::new(false) };
}

/// Installs the hooks. Called once, from `_PG_init` in the postmaster.
pub fn register() {
    // SAFETY: hook variables are plain function pointers, set before any child process exists.
    unsafe {
        PREVIOUS_UTILITY = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(utility);
        PREVIOUS_EXECUTOR_START = pg_sys::ExecutorStart_hook;
        pg_sys::ExecutorStart_hook = Some(executor_start);
        PREVIOUS_EXECUTOR_RUN = pg_sys::ExecutorRun_hook;
        pg_sys::ExecutorRun_hook = Some(executor_run);
        pg_sys::RegisterXactCallback(Some(transaction_event), std::ptr::null_mut());
    }
}

/// Notes that the running transaction wrote something that must be replicated.
pub fn note_write() {
    FOOTPRINT.set(Footprint {
        wrote: true,
        ..FOOTPRINT.get()
    });
    show_age();
}

/// Notes an explanation for the transaction's WAL that needs no replication.
pub fn note_harmless() {
    FOOTPRINT.set(Footprint {
        harmless: true,
        ..FOOTPRINT.get()
    });
}

/// Before the first lock that somebody may wait for.
fn show_age() {
    if shared::exists() && has_proc() {
        age::show();
    }
}

/// Whether commits of this process can be global at all.
pub fn in_cluster() -> bool {
    // A standby takes no writes, and its arbiter starts when it is promoted.
    if !shared::exists() || process::is_local_process() || process::is_standby() {
        return false;
    }
    wait_for_identity();
    // SAFETY: plain variables of this process.
    unsafe {
        let database = shared::shared().database.load(Ordering::Relaxed);
        database != 0
            && shared::shared().node_id().is_some()
            && pg_sys::MyDatabaseId.to_u32() == database
            && pg_sys::IsUnderPostmaster
            && pg_sys::MyBackendType != pg_sys::BackendType::B_AUTOVAC_WORKER
    }
}

/// Right after the server's start it is not known yet whether it belongs to a cluster: wait for the arbiter to find out.
fn wait_for_identity() {
    while !shared::shared().identity_known.load(Ordering::Acquire)
        && has_proc()
        && !process::terminate_pending()
    {
        process::wait_latch(std::time::Duration::from_millis(20), process::Wait::Work);
    }
}

/// The same, and a cancel ends the wait with an error.
unsafe fn wait_for_identity_or_cancel() {
    if !shared::exists() || process::is_local_process() || process::is_standby() {
        return;
    }
    while !shared::shared().identity_known.load(Ordering::Acquire) && has_proc() {
        process::wait_latch(std::time::Duration::from_millis(20), process::Wait::Work);
        // SAFETY: the caller's frames own nothing with a destructor.
        unsafe { raw::check_for_interrupts() };
    }
}

/// Whether the running transaction must be committed on all nodes.
///
/// It has an xid and wrote WAL, and that is not explained by row locks, sequences or temporary objects alone. C code that writes tables behind
/// the executor's back is counted as writing: losing its rows would be divergence, an empty global transaction is only slow.
unsafe fn needs_global_commit() -> bool {
    // SAFETY: reads this backend's transaction state.
    unsafe {
        if raw::GetTopTransactionIdIfAny() == pg_sys::InvalidTransactionId || commit::in_sequence()
        {
            return false;
        }
        let footprint = FOOTPRINT.get();
        LOCAL_DEPTH.get() == 0
            // A session that ends drops its temporary tables.
            && !pg_sys::proc_exit_inprogress
            && pg_sys::XactLastRecEnd != 0
            && (footprint.wrote || !footprint.harmless)
            && pg_sys::MyXactFlags as u32 & pg_sys::XACT_FLAGS_NEEDIMMEDIATECOMMIT == 0
            && {
                wait_for_identity_or_cancel();
                in_cluster()
            }
    }
}

unsafe extern "C-unwind" fn executor_start(query: *mut pg_sys::QueryDesc, flags: i32) {
    // SAFETY: PostgreSQL passes a valid query; this frame owns nothing.
    unsafe {
        victim::check();
        let plan = &*(*query).plannedstmt;
        gate::refresh_session();
        if flags as u32 & pg_sys::EXEC_FLAG_EXPLAIN_ONLY == 0 {
            let first = strict::before_query(query);
            stretch::pass_failpoint(gate::Reader::Query(plan));
            let serves = gate::check_query(plan);
            stretch::check_query(query, first, serves);
        }
        if plan.commandType != pg_sys::CmdType::CMD_SELECT || plan.hasModifyingCTE {
            if flags as u32 & pg_sys::EXEC_FLAG_EXPLAIN_ONLY == 0 {
                age::let_pass();
                note_plan_writes(plan);
            }
        } else if !plan.rowMarks.is_null() {
            age::let_pass();
            show_age();
            note_harmless();
        }
        match PREVIOUS_EXECUTOR_START {
            Some(previous) => previous(query, flags),
            None => raw::standard_ExecutorStart(query, flags),
        }
    }
}

unsafe extern "C-unwind" fn executor_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    execute_once: bool,
) {
    // SAFETY: PostgreSQL passes a valid query; this frame owns nothing.
    unsafe {
        gate::check_query(&*(*query).plannedstmt);
        match PREVIOUS_EXECUTOR_RUN {
            Some(previous) => previous(query, direction, count, execute_once),
            None => raw::standard_ExecutorRun(query, direction, count, execute_once),
        }
    }
}

/// Notes a write when some result relation of the plan is permanent.
unsafe fn note_plan_writes(plan: &pg_sys::PlannedStmt) {
    // SAFETY: resultRelations are range table indexes of this plan; the relations are locked by it.
    unsafe {
        let count = if plan.resultRelations.is_null() {
            0
        } else {
            (*plan.resultRelations).length
        };
        let mut permanent = count == 0;
        for position in 0..count {
            let index = (*(*plan.resultRelations).elements.add(position as usize)).int_value;
            let entry = (*(*plan.rtable).elements.add(index as usize - 1)).ptr_value
                as *const pg_sys::RangeTblEntry;
            permanent |= pg_sys::get_rel_persistence((*entry).relid)
                == pg_sys::RELPERSISTENCE_PERMANENT as c_char;
        }
        if permanent {
            note_write();
        } else {
            note_harmless();
        }
    }
}

unsafe extern "C-unwind" fn transaction_event(
    event: pg_sys::XactEvent::Type,
    _argument: *mut c_void,
) {
    // SAFETY: called by xact.c; see commit_globally for the nested sequence.
    unsafe {
        match event {
            pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => {
                gate::at_session_start();
                if REPAIR_CONTEXT.replace(false) {
                    pg_sys::CurrentResourceOwner = pg_sys::TopTransactionResourceOwner;
                    pg_sys::CurrentMemoryContext = pg_sys::TopTransactionContext;
                }
                if !raw::IsTransactionBlock() && needs_global_commit() {
                    raw::BeginTransactionBlock();
                    raw::CommitTransactionCommand();
                    commit::commit_globally();
                }
            }
            pg_sys::XactEvent::XACT_EVENT_COMMIT | pg_sys::XactEvent::XACT_EVENT_PREPARE => {
                end_of_transaction();
            }
            pg_sys::XactEvent::XACT_EVENT_ABORT => {
                if shared::exists() && has_proc() && shared::my_backend().is_victim() {
                    age::lost_running();
                }
                commit::reset();
                end_of_transaction();
                LOCAL_DEPTH.set(0);
                REPAIR_CONTEXT.set(false);
            }
            _ => {}
        }
    }
}

fn end_of_transaction() {
    FOOTPRINT.set(Footprint::default());
    ddl_bridge::end_of_transaction();
    if !shared::exists() || !has_proc() {
        return;
    }
    stretch::remember();
    if !commit::in_sequence() {
        shared::my_backend().end_transaction();
    }
}

fn has_proc() -> bool {
    // SAFETY: a plain pointer of this process.
    unsafe { !pg_sys::MyProc.is_null() }
}

/// Refuses to drop what a running cluster consists of: its database, from whatever database it is said, and this extension in it. The arbiter
/// has both in use for as long as the server runs, so the command would only wait.
unsafe fn keep_cluster(node: *mut pg_sys::Node) {
    // SAFETY: the node's tag says what it is; the caller's frame owns nothing.
    unsafe {
        let message = match (*node).type_ {
            pg_sys::NodeTag::T_DropdbStmt if drops_cluster_database(node.cast()) => {
                c"cannot drop the database of a multimaster cluster"
            }
            pg_sys::NodeTag::T_DropStmt if drops_extension(node.cast()) && in_cluster() => {
                c"cannot drop the extension of a multimaster cluster"
            }
            _ => return,
        };
        refusal::raise(
            pgrx::PgSqlErrorCode::ERRCODE_OBJECT_IN_USE as i32,
            message,
            c"This node replicates through it.",
            c"To take the node out of the cluster, stop the server and remove its data directory.",
        );
    }
}

unsafe fn drops_cluster_database(statement: *mut pg_sys::DropdbStmt) -> bool {
    // SAFETY: a valid statement.
    unsafe {
        let cluster = if shared::exists() {
            shared::shared().database.load(Ordering::Relaxed)
        } else {
            0
        };
        cluster != 0 && raw::get_database_oid((*statement).dbname, true).to_u32() == cluster
    }
}

/// DROP EXTENSION multimaster, or DROP SCHEMA of its schema, which would cascade to it.
unsafe fn drops_extension(statement: *mut pg_sys::DropStmt) -> bool {
    // SAFETY: both kinds of DROP have a list of strings.
    unsafe {
        let name = match (*statement).removeType {
            pg_sys::ObjectType::OBJECT_EXTENSION => c"multimaster",
            pg_sys::ObjectType::OBJECT_SCHEMA => c"mtm",
            _ => return false,
        };
        let objects = (*statement).objects;
        (0..(*objects).length).any(|position| {
            let object =
                (*(*objects).elements.add(position as usize)).ptr_value as *const pg_sys::String;
            CStr::from_ptr((*object).sval) == name
        })
    }
}

/// Commands that run transactions of their own, or touch only this server.
unsafe fn is_local_command(node: *mut pg_sys::Node) -> bool {
    use pg_sys::NodeTag::*;
    // SAFETY: the node's tag says what it is.
    unsafe {
        match (*node).type_ {
            T_VacuumStmt
            | T_ClusterStmt
            | T_ReindexStmt
            | T_CreatedbStmt
            | T_DropdbStmt
            | T_CreateTableSpaceStmt
            | T_DropTableSpaceStmt
            | T_AlterTableSpaceOptionsStmt
            | T_AlterSystemStmt
            | T_CreateSubscriptionStmt
            | T_AlterSubscriptionStmt
            | T_DropSubscriptionStmt
            | T_CheckPointStmt => true,
            T_IndexStmt => (*node.cast::<pg_sys::IndexStmt>()).concurrent,
            T_DropStmt => (*node.cast::<pg_sys::DropStmt>()).concurrent,
            T_TransactionStmt => matches!(
                (*node.cast::<pg_sys::TransactionStmt>()).kind,
                pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED
                    | pg_sys::TransactionStmtKind::TRANS_STMT_ROLLBACK_PREPARED
            ),
            _ => false,
        }
    }
}

unsafe extern "C-unwind" fn utility(
    pstmt: *mut pg_sys::PlannedStmt,
    query_string: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    query_env: *mut pg_sys::QueryEnvironment,
    dest: *mut pg_sys::DestReceiver,
    qc: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: PostgreSQL passes valid pointers; errors jump over this frame, which owns nothing.
    unsafe {
        let node = (*pstmt).utilityStmt;
        let is_transaction = (*node).type_ == pg_sys::NodeTag::T_TransactionStmt;
        wait_for_identity_or_cancel();
        let in_cluster = in_cluster();
        gate::refresh_session();
        if !is_transaction {
            victim::check();
            let first = strict::before_command(pstmt);
            stretch::pass_failpoint(gate::Reader::Command(node));
            let serves = gate::check_utility(node);
            stretch::check_command(pstmt, first, serves);
        } else {
            stretch::before_transaction_command();
        }
        keep_cluster(node);
        if is_transaction && in_cluster && run_transaction_command(node.cast()) {
            return;
        }
        let local = context == pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL
            && !raw::IsTransactionBlock()
            && is_local_command(node);
        if local {
            LOCAL_DEPTH.set(LOCAL_DEPTH.get() + 1);
        }
        let plan = ddl_bridge::before_utility(pstmt, query_string, context);
        match PREVIOUS_UTILITY {
            Some(previous) => previous(
                pstmt,
                query_string,
                read_only_tree,
                context,
                params,
                query_env,
                dest,
                qc,
            ),
            None => raw::standard_ProcessUtility(
                pstmt,
                query_string,
                read_only_tree,
                context,
                params,
                query_env,
                dest,
                qc,
            ),
        }
        ddl_bridge::after_utility(plan, pstmt);
        if local {
            LOCAL_DEPTH.set(LOCAL_DEPTH.get() - 1);
            // What it did in the transaction it leaves behind is local. In a pipeline, others may follow in the same transaction.
            note_harmless();
        }
        strict::after_command(node);
        if is_transaction && in_cluster {
            user_2pc::after_command(node.cast());
        }
    }
}

/// Handles COMMIT of a block and PREPARE TRANSACTION of something that replicates; true when nothing is left to do.
unsafe fn run_transaction_command(statement: *mut pg_sys::TransactionStmt) -> bool {
    use pg_sys::TransactionStmtKind::*;
    // SAFETY: as utility().
    unsafe {
        match (*statement).kind {
            TRANS_STMT_COMMIT => commit_block((*statement).chain),
            TRANS_STMT_PREPARE => {
                user_2pc::check_name((*statement).gid);
                if !raw::IsTransactionBlock()
                    || raw::IsAbortedTransactionBlockState()
                    || !needs_global_commit()
                {
                    return false;
                }
                raw::disable_timeout(raw::STATEMENT_TIMEOUT, false);
                release_savepoints();
                commit::prepare_for_user((*statement).gid);
                true
            }
            TRANS_STMT_COMMIT_PREPARED | TRANS_STMT_ROLLBACK_PREPARED => {
                user_2pc::check_name((*statement).gid);
                user_2pc::before_command((*statement).gid);
                false
            }
            _ => false,
        }
    }
}

/// COMMIT and COMMIT AND CHAIN of a transaction block.
unsafe fn commit_block(chain: bool) -> bool {
    // SAFETY: as utility().
    unsafe {
        if !raw::IsTransactionBlock()
            || raw::IsAbortedTransactionBlockState()
            || !needs_global_commit()
        {
            return false;
        }
        // finish_xact_command() disarms it before the commit work; without that, deferred triggers are cancelled that core would let run.
        raw::disable_timeout(raw::STATEMENT_TIMEOUT, false);
        if chain {
            // In an implicit block AND CHAIN is core's error. Ending the implicit state shows whether it was one.
            raw::EndImplicitTransactionBlock();
            if !raw::IsTransactionBlock() {
                raw::BeginImplicitTransactionBlock();
                return false;
            }
        }
        release_savepoints();
        let (isolation, read_only, deferrable) =
            (raw::XactIsoLevel, raw::XactReadOnly, raw::XactDeferrable);
        commit::commit_globally();
        if chain {
            // A new empty block with the same characteristics, which core's own COMMIT AND CHAIN then ends.
            raw::BeginTransactionBlock();
            raw::CommitTransactionCommand();
            raw::XactIsoLevel = isolation;
            raw::XactReadOnly = read_only;
            raw::XactDeferrable = deferrable;
            raw::EndTransactionBlock(true);
        }
        true
    }
}

/// Releases open savepoints, which PREPARE refuses.
///
/// PortalRun() has saved the innermost subtransaction's memory context and resource owner and restores both after the hook. The context is kept
/// alive until MessageContext is reset; the owner is repaired in the next PRE_COMMIT callback, the first thing that runs.
unsafe fn release_savepoints() {
    // SAFETY: as utility().
    unsafe {
        if !raw::IsSubTransaction() {
            return;
        }
        let innermost = pg_sys::CurTransactionContext;
        // An empty context would be deleted by the release.
        pg_sys::MemoryContextAlloc(innermost, 8);
        while raw::IsSubTransaction() {
            raw::ReleaseCurrentSubTransaction();
        }
        pg_sys::MemoryContextSetParent(innermost, pg_sys::MessageContext);
        REPAIR_CONTEXT.set(true);
    }
}
