//! Statements on a node that may not serve them.
//!
//! A node without a majority, or one that has not caught up, must not answer from its tables: others may have changed what it shows. Every
//! statement that touches data therefore ends with 57P03, on which drivers and pools go to another server, while catalogs, settings and the
//! `mtm` views stay readable. The check comes after the statement's snapshot was taken and looks at a lease (`protocol::Leases`), so a
//! process that was stopped between the two answers nothing stale either; `stretch` replaces a snapshot that is too old by then. It is repeated whenever a query is run on: rows of a cursor, or of a
//! portal of the extended protocol, are data too. `multimaster.minority_reads` lets plain reads pass.
//!
//! A session that begins on such a node says `default_transaction_read_only = on`, which libpq's `target_session_attrs=read-write` reads: with
//! several hosts it goes on to the next. When the node serves again the session's next statement takes that back.

use super::process::{self, Wait};
use super::shared::{self, NodeStatus};
use super::{clock, fixed_text::FixedText, hooks, raw, refusal};
use crate::guc;
use pgrx::pg_sys;
use protocol::NodeSet;
use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often a statement looks whether the lease has been renewed.
const LOOK_AROUND: Duration = Duration::from_millis(5);

/// First oid that is not part of every new database (`FirstNormalObjectId` of access/transam.h).
const FIRST_NORMAL_OID: u32 = 16384;

thread_local! {
    /// This session has been made read-only because its node did not serve.
    static MADE_READ_ONLY: Cell<bool> = const { Cell::new(false) };
    /// The session's start has been looked at.
    static STARTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this node takes reads and writes at this moment.
pub fn serves() -> bool {
    let shared = shared::shared();
    shared.serving() && shared.lease_holds()
}

/// Whether the statements of this process are to be looked at.
pub fn applies() -> bool {
    // SAFETY: a plain variable of this process.
    shared::exists() && unsafe { pg_sys::ParallelWorkerNumber < 0 } && hooks::in_cluster()
}

/// A statement that is about to run, whatever it is.
#[derive(Clone, Copy)]
pub enum Reader<'a> {
    Query(&'a pg_sys::PlannedStmt),
    Command(*mut pg_sys::Node),
}

impl Reader<'_> {
    /// Raises when this node does not serve it; waits while that is being found out. Returns whether the node serves; if not, that does not matter to the statement.
    ///
    /// # Safety
    /// As [`check_query`].
    pub unsafe fn check(self) -> bool {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Reader::Query(plan) => check_query(plan),
                Reader::Command(statement) => check_utility(statement),
            }
        }
    }

    /// Whether it shows or changes rows of users' tables itself, and not only by queries that it runs.
    ///
    /// # Safety
    /// As [`check_query`].
    pub unsafe fn touches_data(self) -> bool {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Reader::Query(plan) => touches_data(plan),
                Reader::Command(statement) => !is_harmless(statement),
            }
        }
    }

    /// Views of the extension must tell what stands in the way of those who wait.
    ///
    /// # Safety
    /// As [`check_query`].
    pub unsafe fn shows_only_the_cluster(self) -> bool {
        match self {
            // SAFETY: as the caller promises.
            Reader::Query(plan) => unsafe { shows_only_the_cluster(plan) },
            Reader::Command(_) => false,
        }
    }
}

/// A query is about to begin, or to run on. Returns whether this node serves.
///
/// # Safety
/// From the executor's hooks: raises by `longjmp`, so no frame owns anything.
pub unsafe fn check_query(plan: &pg_sys::PlannedStmt) -> bool {
    if !shared::exists() || serves() {
        return true;
    }
    // SAFETY: as the caller promises; the plan's lists are valid.
    unsafe {
        if !applies() || !touches_data(plan) {
            return false;
        }
        let reads_only = plan.commandType == pg_sys::CmdType::CMD_SELECT
            && !plan.hasModifyingCTE
            && plan.rowMarks.is_null();
        await_service(reads_only)
    }
}

/// A utility command is about to run. Returns whether this node serves.
///
/// # Safety
/// As [`check_query`].
pub unsafe fn check_utility(statement: *mut pg_sys::Node) -> bool {
    if !shared::exists() || serves() {
        return true;
    }
    // SAFETY: as the caller promises; the node's tag says what it is.
    unsafe {
        if !applies() || is_harmless(statement) {
            return false;
        }
        await_service(only_reads(statement))
    }
}

/// COMMIT PREPARED or ROLLBACK PREPARED is about to run: a node without a majority could not tell the others, who keep it prepared.
///
/// # Safety
/// As [`check_query`].
pub unsafe fn check_finish() {
    if !serves() {
        // SAFETY: as the caller promises.
        unsafe { await_service(false) };
    }
}

/// Whether a command that touches data changes nothing. Locks are this server's own; pg_dump takes them on what it reads.
unsafe fn only_reads(statement: *mut pg_sys::Node) -> bool {
    // SAFETY: the node's tag says what it is.
    unsafe {
        match (*statement).type_ {
            pg_sys::NodeTag::T_CopyStmt => !(*statement.cast::<pg_sys::CopyStmt>()).is_from,
            pg_sys::NodeTag::T_LockStmt => true,
            _ => false,
        }
    }
}

/// Whether COPY leaves users' tables alone. The query of `COPY (...) TO` is looked at when it begins.
unsafe fn copies_no_data(copy: *mut pg_sys::CopyStmt) -> bool {
    // SAFETY: a valid statement. A name that leads nowhere is reported by COPY itself.
    unsafe {
        if (*copy).relation.is_null() {
            return true;
        }
        let relation = raw::RangeVarGetRelidExtended(
            (*copy).relation,
            pg_sys::NoLock as i32,
            pg_sys::RVROption::RVR_MISSING_OK,
            std::ptr::null(),
            std::ptr::null_mut(),
        );
        relation != pg_sys::Oid::INVALID && !is_data(relation, own_schema())
    }
}

/// Whether some table of the plan is a user's. Temporary ones are the session's own business.
///
/// # Safety
/// As [`check_query`].
pub unsafe fn touches_data(plan: &pg_sys::PlannedStmt) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        let own_schema = own_schema();
        has_relation(plan, |relation| is_data(relation, own_schema))
    }
}

/// Whether the plan reads views of the extension, and no user's table.
unsafe fn shows_only_the_cluster(plan: &pg_sys::PlannedStmt) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        let own_schema = own_schema();
        has_relation(plan, |relation| {
            pg_sys::get_rel_namespace(relation) == own_schema
        }) && !touches_data(plan)
    }
}

unsafe fn own_schema() -> pg_sys::Oid {
    // SAFETY: a catalog look-up in a transaction.
    unsafe { pg_sys::get_namespace_oid(c"mtm".as_ptr(), true) }
}

unsafe fn has_relation(
    plan: &pg_sys::PlannedStmt,
    mut is_meant: impl FnMut(pg_sys::Oid) -> bool,
) -> bool {
    // SAFETY: the range table is a list of range table entries.
    unsafe {
        !plan.rtable.is_null()
            && (0..(*plan.rtable).length).any(|position| {
                let entry = (*(*plan.rtable).elements.add(position as usize)).ptr_value
                    as *const pg_sys::RangeTblEntry;
                (*entry).rtekind == pg_sys::RTEKind::RTE_RELATION && is_meant((*entry).relid)
            })
    }
}

/// The schema of this extension.
/// Views hold nothing themselves: what they read stands beside them in the range table.
unsafe fn is_data(relation: pg_sys::Oid, own_schema: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        relation.to_u32() >= FIRST_NORMAL_OID
            && pg_sys::get_rel_relkind(relation) as u8 != pg_sys::RELKIND_VIEW
            && pg_sys::get_rel_namespace(relation) != own_schema
            && pg_sys::get_rel_persistence(relation) != pg_sys::RELPERSISTENCE_TEMP as c_char
    }
}

/// Commands that touch no data, or whose queries are looked at one by one.
unsafe fn is_harmless(statement: *mut pg_sys::Node) -> bool {
    use pg_sys::NodeTag::*;
    // SAFETY: the node's tag says what it is.
    unsafe {
        if (*statement).type_ == T_CopyStmt {
            return copies_no_data(statement.cast());
        }
        matches!(
            (*statement).type_,
            T_TransactionStmt
                | T_VariableSetStmt
                | T_VariableShowStmt
                | T_ExplainStmt
                | T_PrepareStmt
                | T_ExecuteStmt
                | T_DeallocateStmt
                | T_DeclareCursorStmt
                | T_FetchStmt
                | T_ClosePortalStmt
                | T_DiscardStmt
                | T_ListenStmt
                | T_UnlistenStmt
                | T_NotifyStmt
                | T_LoadStmt
                | T_DoStmt
                | T_CallStmt
                | T_ConstraintsSetStmt
                | T_CheckPointStmt
                | T_AlterSystemStmt
                | T_VacuumStmt
        )
    }
}

/// Returns true when the node serves, and false when this statement may read all the same; raises when the node is known not to serve, or when its lease is not
/// renewed for as long as a node may be silent.
unsafe fn await_service(reads_only: bool) -> bool {
    if reads_only && guc::minority_reads() {
        return false;
    }
    let begun = Instant::now();
    while !serves() {
        let settling = match shared::shared().status() {
            NodeStatus::Online | NodeStatus::Degraded => lease_may_return(),
            NodeStatus::Switching => true,
            _ => false,
        };
        // SAFETY: as check_query.
        unsafe {
            if !settling || begun.elapsed() >= guc::heartbeat_recv_timeout() {
                refuse();
            }
            process::wait_latch(LOOK_AROUND, Wait::Work);
            raw::check_for_interrupts();
        }
    }
    // A session that began a moment too early would hear of a read-only transaction now.
    // SAFETY: as check_query; called from the same hooks.
    unsafe { refresh_session() };
    true
}

/// Whether this node serves, or is so likely to in a moment that it is worth waiting for.
pub fn may_serve() -> bool {
    serves() || lease_may_return()
}

/// Whether enough nodes are there to renew the lease, or it has ended so short a time ago that they may only be slow. A node that has been cut off
/// for longer refuses at once.
fn lease_may_return() -> bool {
    let there = shared::shared()
        .node_id()
        .map_or(NodeSet::EMPTY, |node| shared::connected_nodes().with(node));
    if there.is_quorum_of(shared::shared().configured_nodes()) {
        return true;
    }
    let ended = shared::shared().lease_until_ms.load(Ordering::Acquire);
    let patience = u64::try_from(guc::heartbeat_recv_timeout().as_millis()).unwrap_or(u64::MAX);
    clock::monotonic_ms() < ended.saturating_add(patience)
}

/// Waits while it is being found out who goes on with this node; raises when this node cannot commit.
///
/// # Safety
/// As [`check_query`].
pub unsafe fn await_online() {
    let begun = Instant::now();
    loop {
        let shared = shared::shared();
        let settling = match shared.status() {
            NodeStatus::Online => return,
            NodeStatus::Degraded => shared.lease_holds() || lease_may_return(),
            NodeStatus::Switching => true,
            _ => false,
        };
        // SAFETY: as the caller promises.
        unsafe {
            if !settling || begun.elapsed() >= guc::heartbeat_recv_timeout() {
                refuse();
            }
            process::wait_latch(LOOK_AROUND, Wait::Work);
            raw::check_for_interrupts();
        }
    }
}

/// Ends the statement: it can be run on another node.
///
/// # Safety
/// As [`check_query`].
unsafe fn refuse() {
    let mut message = FixedText::<256>::new();
    let mut detail = FixedText::<256>::new();
    describe(&mut message, &mut detail);
    // SAFETY: as the caller promises; the texts are plain arrays.
    unsafe {
        refusal::raise(
            pgrx::PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW as i32,
            message.as_c_str(),
            detail.as_c_str(),
            c"Connect to another node; with several hosts and target_session_attrs=read-write, libpq does so by itself. See mtm.status() for this node's state.",
        );
    }
}

/// This node's state in words, and who is there.
pub fn describe(message: &mut impl Write, detail: &mut impl Write) {
    let shared = shared::shared();
    let node = shared.node_id().map_or(0, protocol::NodeId::get);
    let state = match shared.status() {
        NodeStatus::Online => "cut off from a majority of the nodes",
        NodeStatus::NeedsCopy => "in need of a new copy",
        status => status.name(),
    };
    // A text that is too long is cut.
    let _ = write!(
        message,
        "node {node} is {state} and takes no reads or writes"
    );
    let connected = shared::connected_nodes();
    let _ = if connected.is_empty() {
        write!(detail, "It is connected with no other node.")
    } else {
        write!(detail, "Nodes it is connected with: {connected}.")
    };
}

/// The first transaction of a session ends: its start. Called before the client is told of its settings.
///
/// # Safety
/// From the transaction callback, before commit.
pub unsafe fn at_session_start() {
    if STARTED.replace(true) || !shared::exists() {
        return;
    }
    // SAFETY: plain variables of this process; see set_read_only.
    unsafe {
        if pg_sys::MyBackendType != pg_sys::BackendType::B_BACKEND
            || !belongs_to_cluster()
            || serves()
            || pg_sys::DefaultXactReadOnly
        {
            return;
        }
        set_read_only(c"on");
    }
    MADE_READ_ONLY.set(true);
}

/// Whether this session's database is the cluster's, as far as it is known; waits for nothing.
unsafe fn belongs_to_cluster() -> bool {
    let shared = shared::shared();
    // SAFETY: a plain variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId.to_u32() };
    !process::is_local_process()
        && !process::is_standby()
        && database == shared.database.load(Ordering::Acquire)
        && shared.node_id().is_some()
}

/// A session that was made read-only at its start is so no longer once its node serves.
///
/// # Safety
/// From the hooks, at the start of a statement in a transaction.
pub unsafe fn refresh_session() {
    if !MADE_READ_ONLY.get() || !serves() {
        return;
    }
    // SAFETY: as the caller promises.
    unsafe {
        if pg_sys::DefaultXactReadOnly {
            set_read_only(c"off");
            // Taken over at the start of this transaction, which has done nothing yet.
            if !raw::IsTransactionBlock() {
                raw::XactReadOnly = false;
            }
        }
    }
}

unsafe fn set_read_only(value: &CStr) {
    // SAFETY: zero-terminated literals; a boolean setting that takes any value at any time.
    unsafe {
        pg_sys::SetConfigOption(
            c"default_transaction_read_only".as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
        );
    }
}
