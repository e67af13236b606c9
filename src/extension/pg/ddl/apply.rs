//! Running a shipped statement in an apply worker, inside its transaction.

use super::node;
use crate::pg::apply_error::ApplyFailure;
use pgrx::pg_sys;
use pgrx::pg_sys::{NodeTag, ObjectType};
use std::cell::Cell;
use std::ffi::CStr;
use wire::ddl::{Ddl, PayloadError};

/// A shipped statement or position that is not what a node of this version ships.
#[derive(Debug, thiserror::Error)]
pub enum DdlError {
    #[error(transparent)]
    Payload(#[from] PayloadError),
    #[error("{0} statements where one was expected")]
    NotOneStatement(usize),
    #[error("a statement that is no utility command")]
    NotUtility,
}

impl From<DdlError> for ApplyFailure {
    fn from(error: DdlError) -> Self {
        Self {
            sqlstate: *b"08P01",
            message: format!("shipped DDL cannot be read: {error}"),
            detail: String::new(),
            target: None,
        }
    }
}

thread_local! {
    static APPLYING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this process is just applying another node's change.
pub fn is_applying() -> bool {
    APPLYING.get()
}

/// Marks the process as applying while `work` runs, also when it ends by unwinding.
pub fn applying<T>(work: impl FnOnce() -> T) -> T {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            APPLYING.set(self.0);
        }
    }
    let _reset = Reset(APPLYING.replace(true));
    work()
}

/// Runs a statement as the node that shipped it did: same role, names, settings and clock.
///
/// Must be called in a transaction; its `now()` is the origin's from here on. User triggers on events fire only when ENABLE REPLICA or ALWAYS:
/// what others did was shipped as it happened. Errors of the statement itself unwind as PostgreSQL's guarded functions do, and leave the
/// session as it was when the transaction is aborted.
pub fn execute(payload: &[u8]) -> Result<(), DdlError> {
    let ddl = Ddl::decode(payload)?;
    applying(|| {
        set_clock(&ddl);
        with_settings(&ddl, || run(&ddl.statement, &ddl.database))
    })
}

/// Runs one statement of our own making as [`execute`] does, with the session's own role and settings.
pub fn execute_text(statement: &str) -> Result<(), DdlError> {
    applying(|| run(statement, ""))
}

/// Makes `now()` the origin's.
fn set_clock(ddl: &Ddl) {
    // SAFETY: the function only stores both times. It asserts that the process is a parallel worker, which is told by this variable alone.
    unsafe {
        let number = pg_sys::ParallelWorkerNumber;
        pg_sys::ParallelWorkerNumber = 0;
        pg_sys::SetParallelStartTimestamps(ddl.transaction_time, ddl.statement_time);
        pg_sys::ParallelWorkerNumber = number;
    }
}

/// Does `work` as the statement's role and with its settings.
fn with_settings(ddl: &Ddl, work: impl FnOnce() -> Result<(), DdlError>) -> Result<(), DdlError> {
    // SAFETY: guarded; an error aborts the transaction, which restores settings and user as the end of this function does.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        set("session_replication_role", "replica");
        set("session_authorization", &ddl.session_role);
        for (name, value) in &ddl.settings {
            set(name, value);
        }
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let role = pg_sys::get_role_oid(node::server_text(&ddl.role).as_ptr(), false);
        pg_sys::SetUserIdAndSecContext(role, context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32);
        let result = work();
        pg_sys::SetUserIdAndSecContext(user, context);
        pg_sys::AtEOXact_GUC(true, level);
        result
    }
}

/// Sets a setting until the nest level ends. One that this server does not have is left out.
unsafe fn set(name: &str, value: &str) {
    let (name, value) = (node::server_text(name), node::server_text(value));
    // SAFETY: valid C strings; guarded.
    unsafe {
        if pg_sys::GetConfigOption(name.as_ptr(), true, false).is_null() {
            return;
        }
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
}

/// Parses and runs exactly one utility command; `database` is what the origin's database is called there.
fn run(statement: &str, database: &str) -> Result<(), DdlError> {
    let text = node::server_text(statement);
    // SAFETY: guarded calls in a transaction; the trees live in a context that goes when the statement is done.
    unsafe {
        let context = pg_sys::AllocSetContextCreateExtended(
            pg_sys::CurrentMemoryContext,
            c"multimaster statement".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        let former = pg_sys::MemoryContextSwitchTo(context);
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let result = plan(&text, database).map(|pstmt| process(pstmt, &text));
        if pg_sys::ActiveSnapshotSet() {
            pg_sys::PopActiveSnapshot();
        }
        pg_sys::CommandCounterIncrement();
        pg_sys::MemoryContextSwitchTo(former);
        pg_sys::MemoryContextDelete(context);
        result
    }
}

unsafe fn plan(text: &CStr, database: &str) -> Result<*mut pg_sys::PlannedStmt, DdlError> {
    // SAFETY: guarded; every list is what the called function says.
    unsafe {
        let parsed: Vec<*mut pg_sys::RawStmt> =
            node::items(pg_sys::pg_parse_query(text.as_ptr())).collect();
        let [raw] = parsed[..] else {
            return Err(DdlError::NotOneStatement(parsed.len()));
        };
        use_own_database((*raw).stmt, database);
        let queries = pg_sys::pg_analyze_and_rewrite_fixedparams(
            raw,
            text.as_ptr(),
            std::ptr::null(),
            0,
            std::ptr::null_mut(),
        );
        let analyzed: Vec<*mut pg_sys::Query> = node::items(queries).collect();
        match analyzed[..] {
            [query] if (*query).commandType == pg_sys::CmdType::CMD_UTILITY => {}
            [_] => return Err(DdlError::NotUtility),
            _ => return Err(DdlError::NotOneStatement(analyzed.len())),
        }
        let plans = pg_sys::pg_plan_queries(queries, text.as_ptr(), 0, std::ptr::null_mut());
        node::items(plans).next().ok_or(DdlError::NotUtility)
    }
}

unsafe fn process(pstmt: *mut pg_sys::PlannedStmt, text: &CStr) {
    // SAFETY: a planned utility statement; guarded.
    unsafe {
        let mut completion = pg_sys::QueryCompletion::default();
        pg_sys::ProcessUtility(
            pstmt,
            text.as_ptr(),
            false,
            pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            pg_sys::None_Receiver,
            &mut completion,
        );
    }
}

/// A statement that names the origin's database means this node's, whatever that is called.
unsafe fn use_own_database(statement: *mut pg_sys::Node, origins: &str) {
    use NodeTag::*;
    // SAFETY: the tag says what the node is; the tree is ours to change.
    unsafe {
        match (*statement).type_ {
            T_AlterDatabaseStmt => rename(
                &raw mut (*statement.cast::<pg_sys::AlterDatabaseStmt>()).dbname,
                origins,
            ),
            T_AlterDatabaseSetStmt => {
                rename(
                    &raw mut (*statement.cast::<pg_sys::AlterDatabaseSetStmt>()).dbname,
                    origins,
                );
            }
            T_AlterRoleSetStmt => rename(
                &raw mut (*statement.cast::<pg_sys::AlterRoleSetStmt>()).database,
                origins,
            ),
            T_GrantStmt => {
                let grant: *mut pg_sys::GrantStmt = statement.cast();
                if (*grant).objtype == ObjectType::OBJECT_DATABASE {
                    for name in node::items::<pg_sys::String>((*grant).objects) {
                        rename(&raw mut (*name).sval, origins);
                    }
                }
            }
            T_CommentStmt => {
                let comment: *mut pg_sys::CommentStmt = statement.cast();
                rename_object((*comment).objtype, (*comment).object, origins);
            }
            T_AlterOwnerStmt => {
                let owner: *mut pg_sys::AlterOwnerStmt = statement.cast();
                rename_object((*owner).objectType, (*owner).object, origins);
            }
            T_SecLabelStmt => {
                let label: *mut pg_sys::SecLabelStmt = statement.cast();
                rename_object((*label).objtype, (*label).object, origins);
            }
            _ => {}
        }
    }
}

unsafe fn rename_object(kind: ObjectType::Type, object: *mut pg_sys::Node, origins: &str) {
    if kind == ObjectType::OBJECT_DATABASE {
        // SAFETY: databases are named by a String node.
        unsafe { rename(&raw mut (*object.cast::<pg_sys::String>()).sval, origins) }
    }
}

unsafe fn rename(name: *mut *mut std::ffi::c_char, origins: &str) {
    // SAFETY: the name is null or a C string of the tree; the new one is palloced.
    unsafe {
        if !(*name).is_null() && node::text(*name) == origins {
            *name = pg_sys::get_database_name(pg_sys::MyDatabaseId);
        }
    }
}
