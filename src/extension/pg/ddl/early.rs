//! Questions that only parse analysis answers, asked without pgrx's guard.
//!
//! Analysis raises the user's own mistakes (a column that does not exist, a function that is not there). Raised from here they reach the client
//! exactly as the statement itself would raise them, with their position in its text; the guard would drop that. So these frames
//! own nothing with a destructor, and an error leaves them by longjmp.

use super::node;
use pgrx::pg_sys;
use pgrx::pg_sys::{AlterTableType, ConstrType, NodeTag, ParseExprKind};
use std::ffi::{c_char, c_int};

/// The prototypes of PostgreSQL, without a guard.
mod raw {
    use super::*;

    unsafe extern "C-unwind" {
        pub fn parse_analyze_fixedparams(
            tree: *mut pg_sys::RawStmt,
            source: *const c_char,
            types: *const pg_sys::Oid,
            count: c_int,
            environment: *mut pg_sys::QueryEnvironment,
        ) -> *mut pg_sys::Query;
        pub fn isQueryUsingTempRelation(query: *mut pg_sys::Query) -> bool;
        pub fn copyObjectImpl(object: *const std::ffi::c_void) -> *mut std::ffi::c_void;
        pub fn palloc0(size: usize) -> *mut std::ffi::c_void;
        pub fn make_parsestate(parent: *mut pg_sys::ParseState) -> *mut pg_sys::ParseState;
        pub fn transformExpr(
            parse: *mut pg_sys::ParseState,
            expression: *mut pg_sys::Node,
            kind: ParseExprKind::Type,
        ) -> *mut pg_sys::Node;
        pub fn expression_planner(expression: *mut pg_sys::Expr) -> *mut pg_sys::Expr;
        pub fn contain_volatile_functions(clause: *mut pg_sys::Node) -> bool;
        pub fn RangeVarGetRelidExtended(
            relation: *const pg_sys::RangeVar,
            lock: c_int,
            flags: u32,
            callback: *const std::ffi::c_void,
            argument: *mut std::ffi::c_void,
        ) -> pg_sys::Oid;
        pub fn try_relation_open(relation: pg_sys::Oid, lock: c_int) -> pg_sys::Relation;
        pub fn relation_close(relation: pg_sys::Relation, lock: c_int);
        pub fn addRangeTableEntryForRelation(
            parse: *mut pg_sys::ParseState,
            relation: pg_sys::Relation,
            lock: c_int,
            alias: *mut pg_sys::Alias,
            inherits: bool,
            in_from: bool,
        ) -> *mut pg_sys::ParseNamespaceItem;
        pub fn addNSItemToQuery(
            parse: *mut pg_sys::ParseState,
            item: *mut pg_sys::ParseNamespaceItem,
            join: bool,
            relations: bool,
            columns: bool,
        );
    }
}

/// What analysis found out about a statement.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Findings {
    /// CREATE VIEW of temporary relations: such a view is temporary by itself.
    pub temporary_view: bool,
    /// ALTER TABLE ADD COLUMN with a volatile default.
    pub volatile_default: bool,
    /// ALTER COLUMN TYPE with a volatile USING expression.
    pub volatile_conversion: bool,
}

/// # Safety
/// `pstmt` is a utility statement of `query_string`; the caller's frames own nothing with a destructor.
pub unsafe fn examine(pstmt: *const pg_sys::PlannedStmt, query_string: *const c_char) -> Findings {
    // SAFETY: the tag says what the node is.
    unsafe {
        let statement = (*pstmt).utilityStmt;
        match (*statement).type_ {
            NodeTag::T_ViewStmt => Findings {
                temporary_view: is_temporary_view(pstmt, query_string),
                ..Findings::default()
            },
            NodeTag::T_AlterTableStmt => examine_alter(statement.cast(), query_string),
            _ => Findings::default(),
        }
    }
}

unsafe fn is_temporary_view(
    pstmt: *const pg_sys::PlannedStmt,
    query_string: *const c_char,
) -> bool {
    // SAFETY: the raw query is copied, because analysis scribbles on it.
    unsafe {
        let view: *const pg_sys::ViewStmt = (*pstmt).utilityStmt.cast();
        let statement = raw::palloc0(size_of::<pg_sys::RawStmt>()).cast::<pg_sys::RawStmt>();
        (*statement).type_ = NodeTag::T_RawStmt;
        (*statement).stmt = raw::copyObjectImpl((*view).query.cast()).cast();
        (*statement).stmt_location = (*pstmt).stmt_location;
        (*statement).stmt_len = (*pstmt).stmt_len;
        let none = std::ptr::null_mut();
        let query = raw::parse_analyze_fixedparams(statement, query_string, none, 0, none.cast());
        // What else CREATE VIEW refuses here (SELECT INTO) it refuses better itself.
        (*query).commandType == pg_sys::CmdType::CMD_SELECT && raw::isQueryUsingTempRelation(query)
    }
}

unsafe fn examine_alter(
    alter: *const pg_sys::AlterTableStmt,
    query_string: *const c_char,
) -> Findings {
    // SAFETY: commands of ALTER TABLE are AlterTableCmds, which carry ColumnDefs where these are looked at.
    unsafe {
        let mut findings = Findings::default();
        for command in node::items::<pg_sys::AlterTableCmd>((*alter).cmds) {
            match (*command).subtype {
                AlterTableType::AT_AddColumn => {
                    findings.volatile_default |=
                        has_volatile_default((*command).def.cast(), query_string);
                }
                AlterTableType::AT_AlterColumnType => {
                    let column: *const pg_sys::ColumnDef = (*command).def.cast();
                    if !(*column).raw_default.is_null() {
                        findings.volatile_conversion |= is_volatile_conversion(
                            (*alter).relation,
                            (*column).raw_default,
                            query_string,
                        );
                    }
                }
                _ => {}
            }
        }
        findings
    }
}

unsafe fn has_volatile_default(
    column: *const pg_sys::ColumnDef,
    query_string: *const c_char,
) -> bool {
    // SAFETY: constraints of a raw column are Constraints.
    unsafe {
        node::items::<pg_sys::Constraint>((*column).constraints).any(|constraint| {
            (*constraint).contype == ConstrType::CONSTR_DEFAULT && {
                let parse = raw::make_parsestate(std::ptr::null_mut());
                (*parse).p_sourcetext = query_string;
                is_volatile(
                    parse,
                    (*constraint).raw_expr,
                    ParseExprKind::EXPR_KIND_COLUMN_DEFAULT,
                )
            }
        })
    }
}

unsafe fn is_volatile_conversion(
    relation: *const pg_sys::RangeVar,
    expression: *mut pg_sys::Node,
    query_string: *const c_char,
) -> bool {
    let lock = pg_sys::AccessShareLock as c_int;
    // SAFETY: the relation stays open while its columns are looked up.
    unsafe {
        let none = std::ptr::null_mut();
        let flags = pg_sys::RVROption::RVR_MISSING_OK;
        let oid =
            raw::RangeVarGetRelidExtended(relation, pg_sys::NoLock as c_int, flags, none, none);
        if oid == pg_sys::InvalidOid {
            return false;
        }
        let table = raw::try_relation_open(oid, lock);
        if table.is_null() {
            return false;
        }
        let parse = raw::make_parsestate(std::ptr::null_mut());
        (*parse).p_sourcetext = query_string;
        let item = raw::addRangeTableEntryForRelation(
            parse,
            table,
            lock,
            std::ptr::null_mut(),
            false,
            true,
        );
        raw::addNSItemToQuery(parse, item, false, true, true);
        let answer = is_volatile(
            parse,
            expression,
            ParseExprKind::EXPR_KIND_ALTER_COL_TRANSFORM,
        );
        // Given back at once: the statement takes a stronger lock, and two sessions that upgraded would deadlock.
        raw::relation_close(table, lock);
        answer
    }
}

unsafe fn is_volatile(
    parse: *mut pg_sys::ParseState,
    expression: *mut pg_sys::Node,
    kind: ParseExprKind::Type,
) -> bool {
    // SAFETY: the raw expression is copied, because analysis scribbles on it.
    unsafe {
        let copy = raw::copyObjectImpl(expression.cast()).cast();
        let cooked = raw::transformExpr(parse, copy, kind);
        raw::contain_volatile_functions(raw::expression_planner(cooked.cast()).cast())
    }
}
