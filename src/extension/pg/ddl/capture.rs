//! Writing a statement to WAL for the other nodes, and settling what it touched here.

use super::early::Findings;
use super::route::{self, Route};
use super::touched::Touched;
use super::{
    DdlPlan, FollowUp, NOTHING, identity, local_rows, node, password, refuse, table_as, touched,
};
use crate::pg::raw;
use pgrx::pg_sys::NodeTag;
use pgrx::{pg_guard, pg_sys};
use std::ffi::{CString, c_char};
use wire::ddl::{DDL_PREFIX, Ddl};

/// Settings that change what a statement means. All may be set by any user.
const SETTINGS: [&str; 19] = [
    "search_path",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "standard_conforming_strings",
    "backslash_quote",
    "transform_null_equals",
    "array_nulls",
    "xmloption",
    "xmlbinary",
    "extra_float_digits",
    "bytea_output",
    "lc_monetary",
    "check_function_bodies",
    "default_tablespace",
    "default_table_access_method",
    "default_toast_compression",
    "default_text_search_config",
    "row_security",
];

/// Ships the statement, or plans to, or raises.
///
/// # Safety
/// As `super::before_utility`; the boundary at which Rust's unwinding becomes PostgreSQL's longjmp.
#[pg_guard]
pub unsafe extern "C-unwind" fn before(
    pstmt: *mut pg_sys::PlannedStmt,
    query_string: *const c_char,
    findings: Findings,
) -> DdlPlan {
    // SAFETY: a valid utility statement and its text.
    unsafe {
        if raw::XactReadOnly {
            // Core refuses every statement that would be shipped.
            return NOTHING;
        }
        let plan = DdlPlan {
            follow_up: FollowUp::Settle,
            mark: touched::mark(),
            query_string,
        };
        match route::of((*pstmt).utilityStmt, findings) {
            Route::Local => {
                super::note_local();
                NOTHING
            }
            Route::None => NOTHING,
            Route::Rows => {
                super::note_write();
                NOTHING
            }
            Route::Ship => {
                ship(statement_text(pstmt, query_string));
                plan
            }
            Route::ShipTable(create) => {
                ship(table_as::definition(create));
                plan
            }
            Route::ShipRole => DdlPlan {
                follow_up: FollowUp::ShipRole,
                ..plan
            },
            Route::ShipWithRows => {
                ship(statement_text(pstmt, query_string));
                local_rows::begin();
                DdlPlan {
                    follow_up: FollowUp::EndLocalRows,
                    ..plan
                }
            }
        }
    }
}

/// Does what [`before`] planned.
///
/// # Safety
/// As [`before`], with the same statement.
#[pg_guard]
pub unsafe extern "C-unwind" fn after(plan: DdlPlan, pstmt: *mut pg_sys::PlannedStmt) {
    match plan.follow_up {
        FollowUp::Nothing => return,
        FollowUp::Settle => {}
        FollowUp::EndLocalRows => local_rows::end(),
        // SAFETY: the plan was made for a role statement with a password.
        FollowUp::ShipRole => ship(unsafe { password::redacted(pstmt, plan.query_string) }),
    }
    let mut touched = touched::take_since(plan.mark);
    // SAFETY: a valid utility statement.
    touched.extend(unsafe { altered_table(pstmt) });
    identity::settle(&touched);
}

/// The table of an ALTER TABLE: not every change of it (SET LOGGED, REPLICA IDENTITY) is announced.
unsafe fn altered_table(pstmt: *const pg_sys::PlannedStmt) -> Option<Touched> {
    // SAFETY: the tag says what the node is.
    unsafe {
        let statement = (*pstmt).utilityStmt;
        if (*statement).type_ != NodeTag::T_AlterTableStmt {
            return None;
        }
        let relation = (*statement.cast::<pg_sys::AlterTableStmt>()).relation;
        node::find_relation(relation).map(Touched::Relation)
    }
}

/// The part of the query string that is this statement.
///
/// # Safety
/// `pstmt` is a statement of `query_string`.
pub unsafe fn statement_text(
    pstmt: *const pg_sys::PlannedStmt,
    query_string: *const c_char,
) -> String {
    // SAFETY: location and length lie within the query string.
    unsafe {
        let start = (*pstmt).stmt_location.max(0) as usize;
        match (*pstmt).stmt_len {
            length @ 1.. => node::text_of_length(query_string.add(start), length as usize),
            _ => node::text(query_string.add(start)),
        }
    }
}

/// Writes the statement to WAL, as part of the transaction.
fn ship(statement: String) {
    // SAFETY: reads the session's state; guarded.
    let ddl = unsafe {
        Ddl {
            statement,
            database: node::text(pg_sys::get_database_name(pg_sys::MyDatabaseId)),
            role: node::text(pg_sys::GetUserNameFromId(pg_sys::GetUserId(), false)),
            session_role: node::text(pg_sys::GetUserNameFromId(pg_sys::GetSessionUserId(), false)),
            settings: settings(),
            transaction_time: pg_sys::GetCurrentTransactionStartTimestamp(),
            statement_time: pg_sys::GetCurrentStatementStartTimestamp(),
        }
    };
    match ddl.encode() {
        Ok(payload) => log_message(DDL_PREFIX, &payload),
        Err(error) => refuse::raise(
            format!("statement cannot be replicated: {error}"),
            "Split it into smaller statements.",
        ),
    }
    super::note_write();
}

fn settings() -> Vec<(String, String)> {
    let mut settings = Vec::with_capacity(SETTINGS.len());
    for name in SETTINGS {
        let c_name = CString::new(name).expect("names of settings have no zero byte");
        // SAFETY: a valid name; a setting that this server does not have gives null.
        let value = unsafe { pg_sys::GetConfigOption(c_name.as_ptr(), true, false) };
        if !value.is_null() {
            // SAFETY: a valid C string.
            settings.push((name.to_owned(), unsafe { node::text(value) }));
        }
    }
    settings
}

/// Writes a logical message that belongs to the transaction. Raises as PostgreSQL's guarded functions do.
pub fn log_message(prefix: &str, payload: &[u8]) {
    let prefix = CString::new(prefix).expect("prefixes have no zero byte");
    let (prefix, message, size) = (prefix.as_ptr(), payload.as_ptr().cast(), payload.len());
    // SAFETY: valid for the time of the call; an error is caught inside the boundary and goes on as unwinding.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| raw::LogLogicalMessage(prefix, message, size, true));
    }
}
