//! ALTER TABLE that computes new contents for existing rows differently on each node.
//!
//! A rewrite is not in the stream: every node computes the new column by itself. Stable expressions give the same everywhere, because the
//! transaction's clock and role travel with the statement. Volatile ones (random(), nextval() of serial and identity) do not and are
//! refused, unless there are no rows.

use super::{node, refuse};
use crate::pg::sequences::as_superuser;
use pgrx::pg_sys;
use pgrx::pg_sys::{AlterTableType, ConstrType};

const ADD_COLUMN_HINT: &str =
    "Add the column without the default, fill it with UPDATE, then set the default (and NOT NULL).";
const ALTER_TYPE_HINT: &str = "Add a column of the new type, fill it with UPDATE, then drop the old column and rename the new one.";
const SET_LOGGED_HINT: &str =
    "Create a new table and fill it with INSERT ... SELECT from the unlogged one.";

/// Raises what this ALTER TABLE may not do in a cluster.
///
/// # Safety
/// `alter` is a valid ALTER TABLE on a permanent relation.
pub unsafe fn check(alter: *mut pg_sys::AlterTableStmt) {
    // SAFETY: stated above; commands are AlterTableCmds.
    unsafe {
        for command in node::items::<pg_sys::AlterTableCmd>((*alter).cmds) {
            let (computes, what, hint) = match (*command).subtype {
                AlterTableType::AT_AddColumn => (
                    adds_volatile((*command).def.cast()),
                    "adding a column with a volatile default",
                    ADD_COLUMN_HINT,
                ),
                AlterTableType::AT_AlterColumnType => (
                    converts_volatile((*alter).relation, (*command).def.cast()),
                    "changing a column's type with a volatile expression",
                    ALTER_TYPE_HINT,
                ),
                AlterTableType::AT_SetLogged => (true, "SET LOGGED", SET_LOGGED_HINT),
                _ => continue,
            };
            if computes && has_rows((*alter).relation) {
                refuse::raise(
                    format!(
                        "{what} is not supported on a table with rows in a multimaster cluster"
                    ),
                    hint,
                );
            }
        }
    }
}

/// Whether the values of a new column are computed by something volatile.
unsafe fn adds_volatile(column: *const pg_sys::ColumnDef) -> bool {
    // SAFETY: a valid column as the grammar makes it; constraints are Constraints.
    unsafe {
        if is_serial((*column).typeName) {
            return true;
        }
        let mut has_default = false;
        for constraint in node::items::<pg_sys::Constraint>((*column).constraints) {
            match (*constraint).contype {
                ConstrType::CONSTR_IDENTITY => return true,
                ConstrType::CONSTR_DEFAULT => {
                    has_default = true;
                    let parse = pg_sys::make_parsestate(std::ptr::null_mut());
                    let kind = pg_sys::ParseExprKind::EXPR_KIND_COLUMN_DEFAULT;
                    if is_volatile(parse, (*constraint).raw_expr, kind) {
                        return true;
                    }
                }
                _ => {}
            }
        }
        !has_default && has_volatile_domain((*column).typeName)
    }
}

/// `serial` and its kin are no types but an order to make a sequence.
unsafe fn is_serial(name: *const pg_sys::TypeName) -> bool {
    // SAFETY: a valid TypeName; names are Strings.
    unsafe {
        if name.is_null()
            || (*name).names.is_null()
            || (*(*name).names).length != 1
            || (*name).pct_type
        {
            return false;
        }
        node::items::<pg_sys::String>((*name).names).all(|word| {
            matches!(
                node::string(word).as_str(),
                "serial" | "serial2" | "serial4" | "serial8" | "smallserial" | "bigserial"
            )
        })
    }
}

/// A domain may bring a default of its own.
unsafe fn has_volatile_domain(name: *const pg_sys::TypeName) -> bool {
    // SAFETY: a valid TypeName; guarded.
    unsafe {
        let oid = pg_sys::LookupTypeNameOid(std::ptr::null_mut(), name, true);
        if oid == pg_sys::InvalidOid {
            return false;
        }
        let default = pg_sys::get_typdefault(oid);
        !default.is_null() && pg_sys::contain_volatile_functions(default)
    }
}

/// Whether ALTER COLUMN TYPE has a volatile USING expression.
unsafe fn converts_volatile(
    relation: *const pg_sys::RangeVar,
    column: *const pg_sys::ColumnDef,
) -> bool {
    // SAFETY: a valid column; the relation stays open while its columns are looked up.
    unsafe {
        if (*column).raw_default.is_null() {
            return false;
        }
        let Some(oid) = node::find_relation(relation) else {
            return false;
        };
        let table = pg_sys::try_relation_open(oid, pg_sys::AccessShareLock as i32);
        if table.is_null() {
            return false;
        }
        let parse = pg_sys::make_parsestate(std::ptr::null_mut());
        let lock = pg_sys::AccessShareLock as i32;
        let item = pg_sys::addRangeTableEntryForRelation(
            parse,
            table,
            lock,
            std::ptr::null_mut(),
            false,
            true,
        );
        pg_sys::addNSItemToQuery(parse, item, false, true, true);
        let kind = pg_sys::ParseExprKind::EXPR_KIND_ALTER_COL_TRANSFORM;
        let answer = is_volatile(parse, (*column).raw_default, kind);
        // Given back at once: the statement takes a stronger lock, and two sessions that upgraded would deadlock.
        pg_sys::relation_close(table, lock);
        answer
    }
}

unsafe fn is_volatile(
    parse: *mut pg_sys::ParseState,
    expression: *mut pg_sys::Node,
    kind: pg_sys::ParseExprKind::Type,
) -> bool {
    // SAFETY: the raw expression is copied, because parse analysis scribbles on it.
    unsafe {
        let copy = pg_sys::copyObjectImpl(expression.cast()).cast();
        let cooked = pg_sys::transformExpr(parse, copy, kind);
        pg_sys::contain_volatile_functions(pg_sys::expression_planner(cooked.cast()).cast())
    }
}

/// Whether the table or one that inherits from it holds anything. Keeps the table from being filled afterwards.
unsafe fn has_rows(relation: *const pg_sys::RangeVar) -> bool {
    // SAFETY: a valid RangeVar; guarded.
    unsafe {
        let Some(oid) = node::find_relation(relation) else {
            return false;
        };
        if !pg_sys::pg_class_ownercheck(oid, pg_sys::GetUserId()) {
            // Core refuses the statement; nobody may lock a table that way.
            return false;
        }
        pg_sys::LockRelationOid(oid, pg_sys::AccessExclusiveLock as i32);
        let query = format!(
            "WITH RECURSIVE tree(oid) AS (SELECT {0}::pg_catalog.oid UNION \
             SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree t ON i.inhparent OPERATOR(pg_catalog.=) t.oid) \
             SELECT pg_catalog.sum(pg_catalog.pg_relation_size(oid)) OPERATOR(pg_catalog.>) 0 FROM tree",
            oid.to_u32()
        );
        as_superuser(|| pgrx::Spi::get_one::<bool>(&query))
            .ok()
            .flatten()
            .unwrap_or(true)
    }
}
