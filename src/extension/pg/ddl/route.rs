//! What kind of statement goes which way.

use super::scope::{self, Scope};
use super::{node, refuse};
use pgrx::pg_sys;
use pgrx::pg_sys::NodeTag;

/// The way of a statement.
pub enum Route {
    /// It concerns this server only.
    Local,
    /// Its text is run on every node.
    Ship,
    /// As `Ship`, but once it has run here: only then the password's verifier is known.
    ShipRole,
    /// As `Ship`, and the rows it writes are written by its text on every node.
    ShipWithRows,
    /// The table is shipped, its rows follow in the stream.
    ShipTable(*mut pg_sys::CreateTableAsStmt),
}

/// Statements that never define anything: told apart by their tag alone.
pub fn is_never_ddl(tag: NodeTag) -> bool {
    use NodeTag::*;
    matches!(
        tag,
        T_TransactionStmt
            | T_VariableSetStmt
            | T_VariableShowStmt
            | T_FetchStmt
            | T_ClosePortalStmt
            | T_DeclareCursorStmt
            | T_PrepareStmt
            | T_ExecuteStmt
            | T_DeallocateStmt
            | T_DiscardStmt
            | T_CopyStmt
            | T_CallStmt
            | T_DoStmt
            | T_NotifyStmt
            | T_ListenStmt
            | T_UnlistenStmt
            | T_CheckPointStmt
            | T_LoadStmt
            | T_ConstraintsSetStmt
            | T_VacuumStmt
            | T_AlterSystemStmt
            | T_CreatedbStmt
            | T_DropdbStmt
            | T_CreateTableSpaceStmt
            | T_DropTableSpaceStmt
            | T_AlterTableSpaceOptionsStmt
            | T_AlterTableMoveAllStmt
            | T_AlterDatabaseRefreshCollStmt
            | T_CreateSubscriptionStmt
            | T_AlterSubscriptionStmt
            | T_DropSubscriptionStmt
    )
}

/// The way of this statement. Raises what cannot be replicated.
///
/// # Safety
/// `statement` is a valid utility statement.
pub unsafe fn of(statement: *mut pg_sys::Node) -> Route {
    use NodeTag::*;
    // SAFETY: the tag says what the node is.
    unsafe {
        match (*statement).type_ {
            T_LockStmt => refuse::catalog_lock(statement.cast()),
            T_TruncateStmt => refuse::catalog_truncate(statement.cast()),
            T_ClusterStmt => refuse::catalog_cluster(statement.cast()),
            T_ReindexStmt => refuse::catalog_reindex(statement.cast()),
            T_ExplainStmt => refuse::explained_table_as(statement.cast()),
            _ => return of_definition(statement),
        }
    }
    Route::Local
}

unsafe fn of_definition(statement: *mut pg_sys::Node) -> Route {
    // SAFETY: as of().
    unsafe {
        match scope::of(statement) {
            Scope::Local => return Route::Local,
            Scope::Mixed => refuse::mixed(),
            Scope::Cluster => {}
        }
        refuse::not_transactional(statement);
        match (*statement).type_ {
            NodeTag::T_CreateTableAsStmt => {
                let create: *mut pg_sys::CreateTableAsStmt = statement.cast();
                // A materialized view's rows are derived on every node by itself.
                if (*create).objtype == pg_sys::ObjectType::OBJECT_TABLE {
                    Route::ShipTable(create)
                } else {
                    Route::Ship
                }
            }
            NodeTag::T_AlterTableStmt => {
                super::volatile::check(statement.cast());
                Route::Ship
            }
            NodeTag::T_CreateExtensionStmt | NodeTag::T_AlterExtensionStmt => Route::ShipWithRows,
            NodeTag::T_CreateRoleStmt
                if has_password((*statement.cast::<pg_sys::CreateRoleStmt>()).options) =>
            {
                Route::ShipRole
            }
            NodeTag::T_AlterRoleStmt
                if has_password((*statement.cast::<pg_sys::AlterRoleStmt>()).options) =>
            {
                Route::ShipRole
            }
            _ => Route::Ship,
        }
    }
}

unsafe fn has_password(options: *mut pg_sys::List) -> bool {
    // SAFETY: options of role statements are DefElems.
    unsafe { node::items::<pg_sys::DefElem>(options).any(|option| super::password::is_set(option)) }
}
