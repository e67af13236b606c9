//! Where the hooks meet DDL replication.

use pgrx::pg_sys;
use std::ffi::c_char;

/// What is to be done after a utility command.
#[derive(Clone, Copy)]
pub struct Plan;

/// # Safety
/// Only from the utility hook.
pub unsafe fn before_utility(
    _active: bool,
    _pstmt: *mut pg_sys::PlannedStmt,
    _query_string: *const c_char,
    _context: pg_sys::ProcessUtilityContext::Type,
) -> Plan {
    Plan
}

/// # Safety
/// Only from the utility hook.
pub unsafe fn after_utility(_plan: Plan, _pstmt: *mut pg_sys::PlannedStmt) {}

/// # Safety
/// Only from the commit sequence.
pub unsafe fn before_prepare() {}

pub fn end_of_transaction() {}
