//! What kind of statement goes which way.

use super::early::Findings;
use super::scope::{self, Scope};
use super::{node, refuse};
use pgrx::pg_sys;
use pgrx::pg_sys::NodeTag;

/// The way of a statement.
pub enum Route {
    /// It concerns this server only.
    Local,
    /// It changes nothing.
    None,
    /// It writes rows that the stream carries by itself.
    Rows,
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
/// `statement` is a valid utility statement, of which `findings` tells.
pub unsafe fn of(statement: *mut pg_sys::Node, findings: Findings) -> Route {
    use NodeTag::*;
    // SAFETY: the tag says what the node is.
    unsafe {
        match (*statement).type_ {
            T_LockStmt => refuse::catalog_lock(statement.cast()),
            T_TruncateStmt => {
                refuse::catalog_truncate(statement.cast());
                return of_rows(scope::of_relations(
                    (*statement.cast::<pg_sys::TruncateStmt>()).relations,
                ));
            }
            T_CopyStmt => return of_copy(statement.cast()),
            T_ClusterStmt => refuse::catalog_cluster(statement.cast()),
            T_ReindexStmt => refuse::catalog_reindex(statement.cast()),
            T_ExplainStmt => return of_explain(statement.cast()),
            _ => return of_definition(statement, findings),
        }
    }
    Route::Local
}

/// Neither TRUNCATE nor COPY runs through the executor, which tells of every other statement that it writes.
fn of_rows(scope: Scope) -> Route {
    if scope == Scope::Local {
        Route::Local
    } else {
        Route::Rows
    }
}

/// EXPLAIN ANALYZE of CREATE TABLE AS creates the table.
unsafe fn of_explain(explain: *const pg_sys::ExplainStmt) -> Route {
    // SAFETY: the query of an analyzed EXPLAIN is a Query, options are DefElems.
    unsafe {
        let query: *const pg_sys::Query = (*explain).query.cast();
        let inner = (*query).utilityStmt;
        let creates = !inner.is_null() && (*inner).type_ == NodeTag::T_CreateTableAsStmt;
        let runs = || {
            node::items::<pg_sys::DefElem>((*explain).options).any(|option| {
                node::text((*option).defname) == "analyze" && pg_sys::defGetBoolean(option)
            })
        };
        if !creates || !runs() {
            return Route::None;
        }
        match of_definition(inner, Findings::default()) {
            // The text around the statement cannot be shipped.
            Route::Ship => refuse::explained_view(),
            route => route,
        }
    }
}

unsafe fn of_copy(copy: *const pg_sys::CopyStmt) -> Route {
    // SAFETY: a valid COPY; its relation is null when it copies a query.
    unsafe {
        match (*copy).relation.as_ref() {
            Some(relation) if (*copy).is_from => of_rows(scope::of_relation(relation)),
            _ => Route::None,
        }
    }
}

unsafe fn of_definition(statement: *mut pg_sys::Node, findings: Findings) -> Route {
    // SAFETY: as of().
    unsafe {
        match scope::of(statement, findings.temporary_view) {
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
            NodeTag::T_CreateStmt => {
                refuse::like_temporary(statement.cast());
                Route::Ship
            }
            NodeTag::T_AlterTableStmt => {
                super::volatile::check(statement.cast(), findings);
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
