//! ALTER TABLE that computes new contents for existing rows differently on each node.
//!
//! A rewrite is not in the stream: every node computes the new column by itself. Stable expressions give the same everywhere, because the
//! transaction's clock and role travel with the statement. Volatile ones (random(), nextval() of serial and identity) do not and are
//! refused, unless there are no rows.

use super::early::Findings;
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
/// `alter` is a valid ALTER TABLE on a permanent relation, of which `findings` tells.
pub unsafe fn check(alter: *mut pg_sys::AlterTableStmt, findings: Findings) {
    // SAFETY: stated above; commands are AlterTableCmds.
    unsafe {
        let commands = || node::items::<pg_sys::AlterTableCmd>((*alter).cmds);
        let adds = findings.volatile_default
            || commands().any(|command| {
                (*command).subtype == AlterTableType::AT_AddColumn
                    && adds_generated((*command).def.cast())
            });
        // A sequence has one row, and each node its own position in it.
        let sets_logged = (*alter).objtype != pg_sys::ObjectType::OBJECT_SEQUENCE
            && commands().any(|command| (*command).subtype == AlterTableType::AT_SetLogged);
        let (what, hint) = if adds {
            ("adding a column with a volatile default", ADD_COLUMN_HINT)
        } else if findings.volatile_conversion {
            (
                "changing a column's type with a volatile expression",
                ALTER_TYPE_HINT,
            )
        } else if sets_logged {
            ("SET LOGGED", SET_LOGGED_HINT)
        } else {
            return;
        };
        if has_rows((*alter).relation) {
            refuse::raise(
                format!("{what} is not supported on a table with rows in a multimaster cluster"),
                hint,
            );
        }
    }
}

/// Whether the values of a new column come from a sequence or from a volatile default of its domain.
unsafe fn adds_generated(column: *const pg_sys::ColumnDef) -> bool {
    // SAFETY: a valid column as the grammar makes it; constraints are Constraints.
    unsafe {
        if is_serial((*column).typeName) {
            return true;
        }
        let mut has_default = false;
        for constraint in node::items::<pg_sys::Constraint>((*column).constraints) {
            match (*constraint).contype {
                ConstrType::CONSTR_IDENTITY => return true,
                ConstrType::CONSTR_DEFAULT => has_default = true,
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
