//! CREATE TABLE AS and SELECT INTO: the table is shipped as a definition, its rows follow as rows.
//!
//! The query may read temporary tables, prepared statements, or functions that answer differently on each node; its result
//! was computed once, here. So the text that is shipped names columns and types, not the query.

use super::node;
use pgrx::pg_sys;
use pgrx::pg_sys::NodeTag;

/// CREATE TABLE with the columns that the statement's query yields.
///
/// # Safety
/// `create` is a valid, analyzed CREATE TABLE AS.
pub unsafe fn definition(create: *const pg_sys::CreateTableAsStmt) -> String {
    // SAFETY: stated above.
    unsafe {
        let into = (*create).into;
        let relation = (*into).rel;
        let mut text = String::from("CREATE ");
        if (*relation).relpersistence as u8 == pg_sys::RELPERSISTENCE_UNLOGGED {
            text.push_str("UNLOGGED ");
        }
        text.push_str("TABLE ");
        if (*create).if_not_exists {
            text.push_str("IF NOT EXISTS ");
        }
        text.push_str(&format!(
            "{} ({})",
            qualified_name(relation),
            columns(create)
        ));
        if !(*into).accessMethod.is_null() {
            text.push_str(&format!(
                " USING {}",
                node::quoted(&node::text((*into).accessMethod))
            ));
        }
        text.push_str(&options((*into).options));
        if !(*into).tableSpaceName.is_null() {
            text.push_str(&format!(
                " TABLESPACE {}",
                node::quoted(&node::text((*into).tableSpaceName))
            ));
        }
        text
    }
}

/// The new table's name, in the schema where it will be made; without one when the statement is going to fail for that.
unsafe fn qualified_name(relation: *const pg_sys::RangeVar) -> String {
    // SAFETY: a valid RangeVar; the search path is a list of oids.
    unsafe {
        let name = node::quoted(&node::text((*relation).relname));
        let schema = if (*relation).schemaname.is_null() {
            let path = pg_sys::fetch_search_path(false);
            if path.is_null() || (*path).length == 0 {
                return name;
            }
            node::text(pg_sys::get_namespace_name((*(*path).elements).oid_value))
        } else {
            node::text((*relation).schemaname)
        };
        format!("{}.{name}", node::quoted(&schema))
    }
}

unsafe fn columns(create: *const pg_sys::CreateTableAsStmt) -> String {
    // SAFETY: an analyzed statement; entries of a target list are TargetEntries, column names are Strings.
    unsafe {
        let mut names = node::items::<pg_sys::String>((*(*create).into).colNames);
        let columns: Vec<String> = node::items::<pg_sys::TargetEntry>(target_list(create))
            .filter(|entry| !(**entry).resjunk)
            .map(|entry| {
                let name = names
                    .next()
                    .map_or_else(|| node::text((*entry).resname), |name| node::string(name));
                column(&name, (*entry).expr.cast())
            })
            .collect();
        columns.join(", ")
    }
}

unsafe fn target_list(create: *const pg_sys::CreateTableAsStmt) -> *mut pg_sys::List {
    // SAFETY: the query of an analyzed CREATE TABLE AS is a Query.
    unsafe {
        let query: *mut pg_sys::Query = (*create).query.cast();
        let utility = (*query).utilityStmt;
        if utility.is_null() || (*utility).type_ != NodeTag::T_ExecuteStmt {
            return (*query).targetList;
        }
        let prepared =
            pg_sys::FetchPreparedStatement((*utility.cast::<pg_sys::ExecuteStmt>()).name, true);
        pg_sys::CachedPlanGetTargetList((*prepared).plansource, std::ptr::null_mut())
    }
}

unsafe fn column(name: &str, expression: *const pg_sys::Node) -> String {
    // SAFETY: a valid expression; look-ups are guarded.
    unsafe {
        let oid = pg_sys::exprType(expression);
        let flags = pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN | pg_sys::FORMAT_TYPE_FORCE_QUALIFY;
        let type_name = node::text(pg_sys::format_type_extended(
            oid,
            pg_sys::exprTypmod(expression),
            flags as u16,
        ));
        let mut column = format!("{} {type_name}", node::quoted(name));
        let collation = pg_sys::exprCollation(expression);
        if collation != pg_sys::InvalidOid && collation != pg_sys::get_typcollation(oid) {
            column.push_str(&format!(" COLLATE {}", collation_name(collation)));
        }
        column
    }
}

fn collation_name(collation: pg_sys::Oid) -> String {
    // SAFETY: guarded catalog access.
    unsafe {
        let tuple =
            pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::COLLOID as i32, collation.into());
        if tuple.is_null() {
            return node::quoted("default");
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_collation>();
        let schema = node::text(pg_sys::get_namespace_name((*form).collnamespace));
        let name = node::text((*form).collname.data.as_ptr());
        pg_sys::ReleaseSysCache(tuple);
        format!("{}.{}", node::quoted(&schema), node::quoted(&name))
    }
}

/// The WITH clause; empty when there is none.
unsafe fn options(options: *mut pg_sys::List) -> String {
    // SAFETY: options are DefElems.
    let options: Vec<String> = unsafe {
        node::items::<pg_sys::DefElem>(options)
            .map(|option| {
                let mut text = String::new();
                if !(*option).defnamespace.is_null() {
                    text.push_str(&format!(
                        "{}.",
                        node::quoted(&node::text((*option).defnamespace))
                    ));
                }
                text.push_str(&node::quoted(&node::text((*option).defname)));
                if !(*option).arg.is_null() {
                    let value = node::text(pg_sys::defGetString(option));
                    text.push_str(&format!(" = '{}'", value.replace('\'', "''")));
                }
                text
            })
            .collect()
    };
    if options.is_empty() {
        String::new()
    } else {
        format!(" WITH ({})", options.join(", "))
    }
}
