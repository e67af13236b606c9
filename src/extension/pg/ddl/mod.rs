//! DDL replication: statements travel as text inside their transaction, in order with the rows.
//!
//! The utility hook calls [`before_utility`] and [`after_utility`] around every utility command. Before the command runs, a statement that
//! concerns the cluster is written to WAL as a logical message; when it then fails, the (sub)transaction and with it the message are
//! gone. After it, this node alone settles what the command touched: replica identities (`identity`) and shares of sequences
//! (`super::sequences`). The same follow-up runs where the statement is applied (`apply`), for shares differ from node to node.
//!
//! No state says "a statement is being captured": what belongs to another statement shows itself, by its context (PROCESS_UTILITY_SUBCOMMAND, which
//! core uses for the parts of CREATE SCHEMA, serial columns and the like) or by `creating_extension`. So nothing has to be reset when
//! a statement fails inside a savepoint or an exception block.
//!
//! `docs/ddl.md` lists what is replicated, local and refused. Elsewhere: rows and TRUNCATE (decoding), when a transaction replicates (`hooks`).

mod apply;
mod capture;
mod early;
mod identity;
mod local_rows;
mod node;
mod password;
mod refuse;
mod route;
mod scope;
mod table_as;
mod touched;
mod volatile;

pub use apply::{DdlError, execute};
pub(super) use apply::{applying, execute_text};
pub(super) use capture::log_message;
pub use identity::prepare_existing_tables;
pub(super) use node::{quoted, server_text, text};

use crate::pg::sequences;
use pgrx::{pg_guard, pg_sys};
use protocol::NodeId;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

/// What DDL replication must know about this process and its transaction.
#[derive(Clone, Copy)]
pub struct Environment {
    /// Whether DDL of this process concerns a cluster. Called often: must cost nanoseconds.
    pub replicating: fn() -> bool,
    /// This node's number. Called only while `replicating` or applying.
    pub node: fn() -> NodeId,
    /// Told that the transaction now contains something for the other nodes.
    pub note_write: fn(),
    /// Told that the transaction changes something that is this server's own.
    pub note_local: fn(),
}

static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
static mut PREVIOUS_OBJECT_ACCESS: pg_sys::object_access_hook_type = None;

/// What is to be done after a utility command.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct DdlPlan {
    follow_up: FollowUp,
    /// Relations that were touched before this command belong to the command around it.
    mark: usize,
    query_string: *const c_char,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
enum FollowUp {
    Nothing,
    Settle,
    /// Ship the statement now that the role's verifier is stored.
    ShipRole,
    /// Rows written meanwhile were this node's own (extension scripts): replicate rows again.
    EndLocalRows,
}

const NOTHING: DdlPlan = DdlPlan {
    follow_up: FollowUp::Nothing,
    mark: 0,
    query_string: std::ptr::null(),
};

/// Installs the environment and the hooks of this module. Called once, from `_PG_init` in the postmaster.
pub fn install(environment: Environment) {
    if ENVIRONMENT.set(environment).is_err() {
        return;
    }
    // SAFETY: hook variables are plain function pointers, set before any child process exists.
    unsafe {
        PREVIOUS_OBJECT_ACCESS = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(object_access);
    }
    local_rows::install();
    sequences::install();
}

/// Whether DDL of this process concerns a cluster, as origin.
fn is_origin() -> bool {
    ENVIRONMENT
        .get()
        .is_some_and(|environment| (environment.replicating)())
        && !apply::is_applying()
}

/// Whether sequences and replica identities are to be settled in this process.
pub(super) fn is_active() -> bool {
    apply::is_applying() || is_origin()
}

/// Whether this process changes sequences on behalf of its own client.
pub(super) fn is_own_change() -> bool {
    is_origin()
}

/// This node's number, 1..=16.
pub(super) fn node_number() -> u8 {
    ENVIRONMENT
        .get()
        .map_or(1, |environment| (environment.node)().get())
}

pub(super) fn note_write() {
    if let Some(environment) = ENVIRONMENT.get() {
        (environment.note_write)();
    }
}

fn note_local() {
    if let Some(environment) = ENVIRONMENT.get() {
        (environment.note_local)();
    }
}

/// Looks at a utility command before it runs, and ships it when the other nodes must run it too.
///
/// Returns what [`after_utility`] has to do. May raise, by longjmp as PostgreSQL does.
///
/// # Safety
/// Only from the utility hook, with what PostgreSQL passed to it, from a frame that owns nothing with a destructor.
pub unsafe fn before_utility(
    pstmt: *mut pg_sys::PlannedStmt,
    query_string: *const c_char,
    context: pg_sys::ProcessUtilityContext::Type,
) -> DdlPlan {
    // SAFETY: the statement is valid; pg_guard turns unwinding back into PostgreSQL's own way of raising.
    unsafe {
        let tag = (*(*pstmt).utilityStmt).type_;
        if context == pg_sys::ProcessUtilityContext::PROCESS_UTILITY_SUBCOMMAND
            || route::is_never_ddl(tag)
        {
            return NOTHING;
        }
        if pg_sys::creating_extension {
            // Part of a script, whose statement settles everything at its end: on the origin as where it is applied.
            return NOTHING;
        }
        if apply::is_applying() {
            return DdlPlan {
                follow_up: FollowUp::Settle,
                mark: touched::mark(),
                query_string,
            };
        }
        if !is_origin() {
            return NOTHING;
        }
        let findings = early::examine(pstmt, query_string);
        capture::before(pstmt, query_string, findings)
    }
}

/// Completes what [`before_utility`] planned, once the command has succeeded. May raise as that does.
///
/// # Safety
/// As [`before_utility`], with the same statement.
pub unsafe fn after_utility(plan: DdlPlan, pstmt: *mut pg_sys::PlannedStmt) {
    if plan.follow_up != FollowUp::Nothing {
        // SAFETY: passed on as received.
        unsafe { capture::after(plan, pstmt) }
    }
}

/// Ships what `setval()` did in this transaction. May raise by longjmp.
///
/// # Safety
/// Only from the commit sequence, while the transaction can still write; from a frame that owns nothing with a destructor.
pub unsafe fn before_prepare() {
    if sequences::has_changes() {
        // SAFETY: the caller's frame owns nothing.
        unsafe { sequences::ship() }
    }
}

/// Forgets what the transaction touched. To be called at every end of a transaction, good or bad; never raises.
pub fn end_of_transaction() {
    touched::clear();
    sequences::end_of_transaction();
    local_rows::end();
}

/// `nextval(regclass)` of pg_proc.dat.
const NEXTVAL: pg_sys::Oid = pg_sys::Oid::from_u32(1574);

unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub: c_int,
    argument: *mut c_void,
) {
    // SAFETY: called by PostgreSQL; this frame owns nothing, note() is guarded.
    unsafe {
        if let Some(previous) = PREVIOUS_OBJECT_ACCESS {
            previous(access, class, object, sub, argument);
        }
        if access == pg_sys::ObjectAccessType::OAT_FUNCTION_EXECUTE {
            sequences::note_function(object);
            if object == NEXTVAL
                && let Some(environment) = ENVIRONMENT.get()
            {
                // Each node has its own positions: alone, they are nothing to commit on all of them.
                (environment.note_local)();
            }
            if refuse::writes_large_objects(object) && is_own_change() {
                refuse_large_object();
            }
        } else if touched::is_interesting(access, class) && is_active() {
            note_touched(access, class, object);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn refuse_large_object() {
    refuse::large_object()
}

#[pg_guard]
unsafe extern "C-unwind" fn note_touched(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
) {
    touched::note(access, class, object);
}
