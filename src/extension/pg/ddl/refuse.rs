//! Statements that a cluster refuses, and what it says then.

use super::node;
use super::scope::{self, Scope};
use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pg_sys::{AlterTableType, NodeTag};
use pgrx::{PgLogLevel, PgSqlErrorCode};

/// Raises 0A000 with a hint.
pub fn raise(message: impl Into<String>, hint: &str) -> ! {
    ErrorReport::new(
        PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
        message.into(),
        "multimaster ddl",
    )
    .set_hint(hint)
    .report(PgLogLevel::ERROR);
    unreachable!("an error report does not return")
}

pub fn mixed() -> ! {
    raise(
        "cannot handle temporary and permanent objects in one statement in a multimaster cluster",
        "Use one statement for the temporary and one for the permanent objects.",
    )
}

/// OIDs in pg_proc.dat of the functions that write large objects: lo_creat, lo_create, lo_import (both), lo_from_bytea, lo_put, lowrite,
/// lo_truncate (both), lo_unlink.
const LARGE_OBJECT_WRITERS: [u32; 10] = [957, 715, 764, 767, 3457, 3460, 955, 1004, 3172, 964];

/// Whether calling the function changes a large object.
pub fn writes_large_objects(function: pg_sys::Oid) -> bool {
    LARGE_OBJECT_WRITERS.contains(&function.to_u32())
}

/// Large objects live in a catalog that is not decoded: written on one node, they would be missing on the others.
pub fn large_object() -> ! {
    raise(
        "large objects are not supported in a multimaster cluster",
        "Store the data in a column of type bytea.",
    )
}

/// Commands that run several transactions cannot be part of one.
///
/// # Safety
/// `statement` is a valid utility statement on permanent objects.
pub unsafe fn not_transactional(statement: *mut pg_sys::Node) {
    // SAFETY: the tag says what the node is.
    let command = unsafe {
        match (*statement).type_ {
            NodeTag::T_IndexStmt if (*statement.cast::<pg_sys::IndexStmt>()).concurrent => {
                "CREATE INDEX CONCURRENTLY"
            }
            NodeTag::T_DropStmt if (*statement.cast::<pg_sys::DropStmt>()).concurrent => {
                "DROP INDEX CONCURRENTLY"
            }
            NodeTag::T_AlterTableStmt if detaches_concurrently(statement.cast()) => {
                "DETACH PARTITION CONCURRENTLY"
            }
            _ => return,
        }
    };
    raise(
        format!("{command} is not supported in a multimaster cluster"),
        "Use the command without CONCURRENTLY; it locks the table on every node while it runs.",
    )
}

unsafe fn detaches_concurrently(alter: *mut pg_sys::AlterTableStmt) -> bool {
    // SAFETY: commands of ALTER TABLE are AlterTableCmds; these carry a PartitionCmd.
    unsafe {
        node::items::<pg_sys::AlterTableCmd>((*alter).cmds).any(|command| {
            match (*command).subtype {
                AlterTableType::AT_DetachPartition => {
                    (*(*command).def.cast::<pg_sys::PartitionCmd>()).concurrent
                }
                AlterTableType::AT_DetachPartitionFinalize => true,
                _ => false,
            }
        })
    }
}

/// CREATE TABLE (LIKE ...) of a temporary table, which the other nodes do not have.
///
/// # Safety
/// `create` is a valid CREATE TABLE of a permanent table.
pub unsafe fn like_temporary(create: *const pg_sys::CreateStmt) {
    // SAFETY: elements are nodes whose tag says what they are.
    unsafe {
        for element in node::items::<pg_sys::Node>((*create).tableElts) {
            if (*element).type_ == NodeTag::T_TableLikeClause
                && scope::of_relation((*element.cast::<pg_sys::TableLikeClause>()).relation)
                    == Scope::Local
            {
                raise(
                    "a permanent table cannot be made LIKE a temporary one in a multimaster cluster",
                    "Use CREATE TABLE ... AS SELECT ... WITH NO DATA, or write out the columns.",
                );
            }
        }
    }
}

const CATALOG_HINT: &str = "Other nodes cannot read this node's changes while a system catalog is locked, and a commit would wait for them without end.";

/// # Safety
/// `lock` is a valid LOCK TABLE statement.
pub unsafe fn catalog_lock(lock: *mut pg_sys::LockStmt) {
    // SAFETY: stated above. Weaker modes let decoding read.
    unsafe {
        if (*lock).mode == pg_sys::AccessExclusiveLock as i32 {
            refuse_catalogs((*lock).relations, "LOCK TABLE ... IN ACCESS EXCLUSIVE MODE");
        }
    }
}

/// # Safety
/// `truncate` is a valid TRUNCATE statement.
pub unsafe fn catalog_truncate(truncate: *mut pg_sys::TruncateStmt) {
    // SAFETY: stated above.
    unsafe { refuse_catalogs((*truncate).relations, "TRUNCATE") }
}

/// # Safety
/// `cluster` is a valid CLUSTER statement.
pub unsafe fn catalog_cluster(cluster: *mut pg_sys::ClusterStmt) {
    // SAFETY: stated above.
    unsafe {
        if !(*cluster).relation.is_null() && in_block() {
            refuse_catalog((*cluster).relation, "CLUSTER in a transaction block");
        }
    }
}

/// # Safety
/// `reindex` is a valid REINDEX statement.
pub unsafe fn catalog_reindex(reindex: *mut pg_sys::ReindexStmt) {
    // SAFETY: stated above.
    unsafe {
        if !(*reindex).relation.is_null() && in_block() {
            refuse_catalog((*reindex).relation, "REINDEX in a transaction block");
        }
    }
}

pub fn explained_view() -> ! {
    raise(
        "EXPLAIN ANALYZE of CREATE MATERIALIZED VIEW is not supported in a multimaster cluster",
        "Use EXPLAIN ANALYZE of the view's query.",
    )
}

fn in_block() -> bool {
    // SAFETY: reads the transaction state.
    unsafe { pg_sys::IsTransactionBlock() }
}

unsafe fn refuse_catalogs(relations: *mut pg_sys::List, command: &str) {
    // SAFETY: a list of RangeVars.
    unsafe {
        node::items::<pg_sys::RangeVar>(relations)
            .for_each(|relation| refuse_catalog(relation, command))
    }
}

unsafe fn refuse_catalog(relation: *mut pg_sys::RangeVar, command: &str) {
    // SAFETY: a valid RangeVar; look-ups are guarded.
    unsafe {
        let Some(oid) = node::find_relation(relation) else {
            return;
        };
        let table = match pg_sys::get_rel_relkind(oid) as u8 {
            pg_sys::RELKIND_INDEX => pg_sys::IndexGetRelation(oid, true),
            _ => oid,
        };
        if table != pg_sys::InvalidOid && pg_sys::IsCatalogRelationOid(table) {
            let name = node::text((*relation).relname);
            raise(
                format!(
                    "{command} of system catalog \"{name}\" is not supported in a multimaster cluster"
                ),
                CATALOG_HINT,
            );
        }
    }
}
