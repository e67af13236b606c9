//! What a statement is about: objects of the cluster, or objects only this server has.
//!
//! Temporary objects, other databases and this extension itself are a server's own. The answer is found from names, without locks: it may not
//! delay or block anybody, and the statement looks again when it runs.

use super::node;
use pgrx::pg_sys;
use pgrx::pg_sys::{NodeTag, ObjectType};
use std::ffi::{CStr, c_char};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Cluster,
    Local,
    /// Some objects are the cluster's, some this server's own.
    Mixed,
}

impl Scope {
    fn local_if(local: bool) -> Self {
        if local { Self::Local } else { Self::Cluster }
    }

    fn of_all(mut locals: impl Iterator<Item = bool>) -> Self {
        match locals.next() {
            None => Self::Cluster,
            Some(first) if locals.all(|local| local == first) => Self::local_if(first),
            Some(_) => Self::Mixed,
        }
    }
}

const EXTENSION: &str = "multimaster";

/// `temporary_view` is what [`is_temporary_view`] said of a CREATE VIEW.
///
/// # Safety
/// `statement` is a valid utility statement.
pub unsafe fn of(statement: *mut pg_sys::Node, temporary_view: bool) -> Scope {
    // SAFETY: the tag says what the node is.
    unsafe {
        if temporary_view {
            return Scope::Local;
        }
        if let Some(local) = creates_temporary(statement) {
            return Scope::local_if(local);
        }
        if let Some(relation) = subject(statement) {
            return Scope::local_if(is_temporary(relation));
        }
        of_objects(statement)
    }
}

/// # Safety
/// `relations` is a list of valid RangeVars.
pub unsafe fn of_relations(relations: *mut pg_sys::List) -> Scope {
    // SAFETY: stated above.
    unsafe {
        Scope::of_all(
            node::items::<pg_sys::RangeVar>(relations).map(|relation| is_temporary(relation)),
        )
    }
}

/// # Safety
/// `relation` is a valid RangeVar.
pub unsafe fn of_relation(relation: *const pg_sys::RangeVar) -> Scope {
    // SAFETY: stated above.
    unsafe { Scope::local_if(is_temporary(relation)) }
}

/// Whether a CREATE makes a temporary object; `None` for other statements.
unsafe fn creates_temporary(statement: *mut pg_sys::Node) -> Option<bool> {
    use NodeTag::*;
    // SAFETY: as of().
    unsafe {
        Some(match (*statement).type_ {
            T_CreateStmt | T_CreateForeignTableStmt => {
                is_new_temporary((*statement.cast::<pg_sys::CreateStmt>()).relation)
            }
            T_CreateSeqStmt => {
                is_new_temporary((*statement.cast::<pg_sys::CreateSeqStmt>()).sequence)
            }
            T_CreateTableAsStmt => {
                is_new_temporary((*(*statement.cast::<pg_sys::CreateTableAsStmt>()).into).rel)
            }
            T_CompositeTypeStmt => {
                is_new_temporary((*statement.cast::<pg_sys::CompositeTypeStmt>()).typevar)
            }
            T_ViewStmt => is_new_temporary((*statement.cast::<pg_sys::ViewStmt>()).view),
            T_CreateDomainStmt => {
                is_name_temporary((*statement.cast::<pg_sys::CreateDomainStmt>()).domainname)
            }
            T_CreateEnumStmt => {
                is_name_temporary((*statement.cast::<pg_sys::CreateEnumStmt>()).typeName)
            }
            T_CreateRangeStmt => {
                is_name_temporary((*statement.cast::<pg_sys::CreateRangeStmt>()).typeName)
            }
            T_DefineStmt => is_name_temporary((*statement.cast::<pg_sys::DefineStmt>()).defnames),
            T_CreateFunctionStmt => {
                is_name_temporary((*statement.cast::<pg_sys::CreateFunctionStmt>()).funcname)
            }
            _ => return None,
        })
    }
}

/// The one existing relation that a statement is about.
unsafe fn subject(statement: *mut pg_sys::Node) -> Option<*mut pg_sys::RangeVar> {
    use NodeTag::*;
    // SAFETY: as of().
    let relation = unsafe {
        match (*statement).type_ {
            T_AlterTableStmt => (*statement.cast::<pg_sys::AlterTableStmt>()).relation,
            T_AlterSeqStmt => (*statement.cast::<pg_sys::AlterSeqStmt>()).sequence,
            T_IndexStmt => (*statement.cast::<pg_sys::IndexStmt>()).relation,
            T_CreateTrigStmt => (*statement.cast::<pg_sys::CreateTrigStmt>()).relation,
            T_RuleStmt => (*statement.cast::<pg_sys::RuleStmt>()).relation,
            T_CreatePolicyStmt => (*statement.cast::<pg_sys::CreatePolicyStmt>()).table,
            T_AlterPolicyStmt => (*statement.cast::<pg_sys::AlterPolicyStmt>()).table,
            T_RenameStmt => (*statement.cast::<pg_sys::RenameStmt>()).relation,
            T_AlterObjectSchemaStmt => {
                (*statement.cast::<pg_sys::AlterObjectSchemaStmt>()).relation
            }
            T_AlterObjectDependsStmt => {
                (*statement.cast::<pg_sys::AlterObjectDependsStmt>()).relation
            }
            T_AlterOwnerStmt => (*statement.cast::<pg_sys::AlterOwnerStmt>()).relation,
            T_CreateStatsStmt => {
                return node::items::<pg_sys::RangeVar>(
                    (*statement.cast::<pg_sys::CreateStatsStmt>()).relations,
                )
                .find(|relation| (**relation).type_ == T_RangeVar);
            }
            _ => return None,
        }
    };
    (!relation.is_null()).then_some(relation)
}

/// Statements about objects that are not given as one relation.
unsafe fn of_objects(statement: *mut pg_sys::Node) -> Scope {
    use NodeTag::*;
    // SAFETY: as of().
    unsafe {
        match (*statement).type_ {
            T_DropStmt => of_drop(statement.cast()),
            T_GrantStmt => of_grant(statement.cast()),
            T_CommentStmt => {
                let comment: *mut pg_sys::CommentStmt = statement.cast();
                Scope::local_if(is_local((*comment).objtype, (*comment).object))
            }
            T_SecLabelStmt => {
                let label: *mut pg_sys::SecLabelStmt = statement.cast();
                Scope::local_if(is_local((*label).objtype, (*label).object))
            }
            T_RenameStmt => {
                let rename: *mut pg_sys::RenameStmt = statement.cast();
                let local = match (*rename).renameType {
                    ObjectType::OBJECT_DATABASE => true,
                    ObjectType::OBJECT_TABLESPACE => true,
                    kind if (*rename).object.is_null() => kind == ObjectType::OBJECT_SUBSCRIPTION,
                    kind => is_local(kind, (*rename).object),
                };
                Scope::local_if(local)
            }
            T_AlterOwnerStmt => {
                let owner: *mut pg_sys::AlterOwnerStmt = statement.cast();
                Scope::local_if(is_local((*owner).objectType, (*owner).object))
            }
            T_AlterObjectSchemaStmt => {
                let schema: *mut pg_sys::AlterObjectSchemaStmt = statement.cast();
                Scope::local_if(is_local((*schema).objectType, (*schema).object))
            }
            T_AlterDomainStmt => Scope::local_if(is_type_name_temporary(
                (*statement.cast::<pg_sys::AlterDomainStmt>()).typeName,
            )),
            T_AlterEnumStmt => Scope::local_if(is_type_name_temporary(
                (*statement.cast::<pg_sys::AlterEnumStmt>()).typeName,
            )),
            T_AlterTypeStmt => Scope::local_if(is_type_name_temporary(
                (*statement.cast::<pg_sys::AlterTypeStmt>()).typeName,
            )),
            T_RefreshMatViewStmt => Scope::Cluster,
            T_AlterDatabaseStmt => of_database_options(statement.cast()),
            T_AlterDatabaseSetStmt => Scope::local_if(!is_this_database(&node::text(
                (*statement.cast::<pg_sys::AlterDatabaseSetStmt>()).dbname,
            ))),
            T_AlterRoleSetStmt => {
                let database = (*statement.cast::<pg_sys::AlterRoleSetStmt>()).database;
                Scope::local_if(!database.is_null() && !is_this_database(&node::text(database)))
            }
            T_CreateExtensionStmt => Scope::local_if(
                node::text((*statement.cast::<pg_sys::CreateExtensionStmt>()).extname) == EXTENSION,
            ),
            T_AlterExtensionStmt => Scope::local_if(
                node::text((*statement.cast::<pg_sys::AlterExtensionStmt>()).extname) == EXTENSION,
            ),
            T_AlterExtensionContentsStmt => Scope::local_if(
                node::text((*statement.cast::<pg_sys::AlterExtensionContentsStmt>()).extname)
                    == EXTENSION,
            ),
            _ => Scope::Cluster,
        }
    }
}

unsafe fn of_drop(drop: *mut pg_sys::DropStmt) -> Scope {
    // SAFETY: as of().
    unsafe {
        let kind = (*drop).removeType;
        Scope::of_all(
            node::items::<pg_sys::Node>((*drop).objects).map(|object| is_local(kind, object)),
        )
    }
}

unsafe fn of_grant(grant: *mut pg_sys::GrantStmt) -> Scope {
    // SAFETY: as of(); objects of relation kinds are RangeVars.
    unsafe {
        if (*grant).targtype != pg_sys::GrantTargetType::ACL_TARGET_OBJECT {
            return Scope::Cluster;
        }
        match (*grant).objtype {
            ObjectType::OBJECT_TABLE | ObjectType::OBJECT_SEQUENCE => Scope::of_all(
                node::items::<pg_sys::RangeVar>((*grant).objects)
                    .map(|relation| is_temporary(relation)),
            ),
            kind @ (ObjectType::OBJECT_DATABASE
            | ObjectType::OBJECT_TABLESPACE
            | ObjectType::OBJECT_LARGEOBJECT) => Scope::of_all(
                node::items::<pg_sys::Node>((*grant).objects).map(|object| is_local(kind, object)),
            ),
            _ => Scope::Cluster,
        }
    }
}

/// ALTER DATABASE of this database replicates, but for what only a server can have.
unsafe fn of_database_options(alter: *mut pg_sys::AlterDatabaseStmt) -> Scope {
    // SAFETY: as of(); options are DefElems.
    unsafe {
        let moves = node::items::<pg_sys::DefElem>((*alter).options)
            .any(|option| node::text((*option).defname) == "tablespace");
        Scope::local_if(moves || !is_this_database(&node::text((*alter).dbname)))
    }
}

/// Whether an object named in a statement is this server's own.
unsafe fn is_local(kind: ObjectType::Type, object: *mut pg_sys::Node) -> bool {
    use ObjectType::*;
    // SAFETY: the grammar gives these kinds these nodes.
    unsafe {
        match kind {
            OBJECT_TABLE | OBJECT_SEQUENCE | OBJECT_VIEW | OBJECT_MATVIEW | OBJECT_INDEX
            | OBJECT_FOREIGN_TABLE => is_relation_name_temporary(object.cast(), 0),
            OBJECT_COLUMN | OBJECT_TABCONSTRAINT | OBJECT_TRIGGER | OBJECT_RULE | OBJECT_POLICY => {
                is_relation_name_temporary(object.cast(), 1)
            }
            OBJECT_TYPE | OBJECT_DOMAIN if (*object).type_ == NodeTag::T_TypeName => {
                is_type_temporary(object.cast())
            }
            OBJECT_FUNCTION | OBJECT_PROCEDURE | OBJECT_ROUTINE | OBJECT_AGGREGATE
            | OBJECT_OPERATOR
                if (*object).type_ == NodeTag::T_ObjectWithArgs =>
            {
                is_name_temporary_schema((*object.cast::<pg_sys::ObjectWithArgs>()).objname)
            }
            OBJECT_DATABASE => !is_this_database(&node::string(object.cast())),
            OBJECT_EXTENSION => node::string(object.cast()) == EXTENSION,
            OBJECT_TABLESPACE | OBJECT_SUBSCRIPTION | OBJECT_LARGEOBJECT => true,
            _ => false,
        }
    }
}

unsafe fn is_temporary(relation: *const pg_sys::RangeVar) -> bool {
    // SAFETY: a valid RangeVar.
    unsafe {
        node::find_relation(relation).is_some_and(|oid| {
            pg_sys::get_rel_persistence(oid) as u8 == pg_sys::RELPERSISTENCE_TEMP
        })
    }
}

/// Whether the relation named by a list, without its last `more` names, is temporary.
unsafe fn is_relation_name_temporary(names: *mut pg_sys::List, more: i32) -> bool {
    // SAFETY: a valid list of String nodes; it is copied before it is cut.
    unsafe {
        let copy = pg_sys::list_copy(names);
        let count = (*copy).length - more;
        // More names than catalog, schema and relation are the statement's error.
        if !(1..=3).contains(&count) {
            return false;
        }
        let relation = pg_sys::list_truncate(copy, count);
        is_temporary(pg_sys::makeRangeVarFromNameList(relation))
    }
}

unsafe fn is_new_temporary(relation: *const pg_sys::RangeVar) -> bool {
    // SAFETY: a valid RangeVar.
    unsafe {
        (*relation).relpersistence as u8 == pg_sys::RELPERSISTENCE_TEMP
            || is_temporary_schema((*relation).schemaname)
    }
}

/// Whether the new object of that name goes to the temporary schema.
unsafe fn is_name_temporary(names: *mut pg_sys::List) -> bool {
    // SAFETY: a valid list of String nodes; the schema is the last name but one.
    unsafe {
        let count = node::items::<pg_sys::String>(names).count();
        let schema = node::items::<pg_sys::String>(names).nth(count.wrapping_sub(2));
        is_temporary_schema(schema.map_or(std::ptr::null(), |schema| (*schema).sval))
    }
}

/// Whether what is created in that schema, or without one (null), is temporary.
///
/// Never complains about the name: the statement will, and knows where in its text it stands.
unsafe fn is_temporary_schema(schema: *const c_char) -> bool {
    // SAFETY: null or a valid C string; guarded look-ups.
    unsafe {
        if schema.is_null() {
            let path = pg_sys::fetch_search_path(false);
            return !path.is_null()
                && (*path).length > 0
                && pg_sys::isTempNamespace((*(*path).elements).oid_value);
        }
        CStr::from_ptr(schema) == c"pg_temp"
            || pg_sys::isTempNamespace(pg_sys::get_namespace_oid(schema, true))
    }
}

/// Functions and operators of the temporary schema are found only when the schema is named.
unsafe fn is_name_temporary_schema(names: *mut pg_sys::List) -> bool {
    // SAFETY: a valid list of String nodes.
    unsafe {
        let mut names = node::items::<pg_sys::String>(names);
        matches!((names.next(), names.next()), (Some(schema), Some(_)) if node::string(schema).starts_with("pg_temp"))
    }
}

unsafe fn is_type_name_temporary(names: *mut pg_sys::List) -> bool {
    // SAFETY: a valid list of String nodes.
    unsafe { is_type_temporary(pg_sys::makeTypeNameFromNameList(names)) }
}

unsafe fn is_type_temporary(name: *const pg_sys::TypeName) -> bool {
    // SAFETY: a valid TypeName; guarded look-ups.
    unsafe {
        let oid = pg_sys::LookupTypeNameOid(std::ptr::null_mut(), name, true);
        if oid == pg_sys::InvalidOid {
            return false;
        }
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::TYPEOID as i32, oid.into());
        if tuple.is_null() {
            return false;
        }
        let namespace = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_type>()).typnamespace;
        pg_sys::ReleaseSysCache(tuple);
        pg_sys::isAnyTempNamespace(namespace)
    }
}

fn is_this_database(name: &str) -> bool {
    // SAFETY: a catalog look-up; guarded.
    unsafe { node::text(pg_sys::get_database_name(pg_sys::MyDatabaseId)) == name }
}
