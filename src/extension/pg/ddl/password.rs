//! Role statements with a password: what is shipped holds the stored verifier, never the password.

use super::{node, refuse};
use pgrx::pg_sys;
use pgrx::pg_sys::NodeTag;
use std::ffi::c_char;

/// Whether this option sets a password.
///
/// # Safety
/// `option` is a valid DefElem.
pub unsafe fn is_set(option: *const pg_sys::DefElem) -> bool {
    // SAFETY: stated above.
    unsafe { node::text((*option).defname) == "password" && !(*option).arg.is_null() }
}

/// The text of a role statement that has run, with the role's verifier in place of the password.
///
/// # Safety
/// `pstmt` is CREATE ROLE or ALTER ROLE with a password, `query_string` its text.
pub unsafe fn redacted(pstmt: *const pg_sys::PlannedStmt, query_string: *const c_char) -> String {
    // SAFETY: stated above; positions lie within the query string.
    unsafe {
        let (role, options) = role_and_options((*pstmt).utilityStmt);
        let option = node::items::<pg_sys::DefElem>(options).find(|option| is_set(*option));
        let start = (*pstmt).stmt_location.max(0);
        let position = option.map_or(-1, |option| (*option).location);
        let text = super::capture::statement_text(pstmt, query_string);
        let escapes = !pg_sys::standard_conforming_strings;
        let replaced = (position >= start).then(|| {
            // Positions count bytes of the database's encoding, the text is UTF-8.
            let before = node::text_of_length(
                query_string.add(start as usize),
                (position - start) as usize,
            );
            wire::ddl::password::replace(&text, before.len(), escapes, &verifier(role))
        });
        match replaced.flatten() {
            Some(text) => text,
            None => refuse::raise(
                "the password in this statement cannot be replaced by its verifier",
                "Write the password as a plain string constant.",
            ),
        }
    }
}

unsafe fn role_and_options(statement: *mut pg_sys::Node) -> (pg_sys::Oid, *mut pg_sys::List) {
    // SAFETY: the tag says what the node is.
    unsafe {
        if (*statement).type_ == NodeTag::T_CreateRoleStmt {
            let create: *mut pg_sys::CreateRoleStmt = statement.cast();
            (
                pg_sys::get_role_oid((*create).role, false),
                (*create).options,
            )
        } else {
            let alter: *mut pg_sys::AlterRoleStmt = statement.cast();
            (
                pg_sys::get_rolespec_oid((*alter).role, false),
                (*alter).options,
            )
        }
    }
}

/// What is stored for the role; empty when nothing is, which every node treats as no password.
fn verifier(role: pg_sys::Oid) -> String {
    // SAFETY: guarded catalog access; the value is copied before the tuple is released.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::AUTHOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, role.into());
        if tuple.is_null() {
            return String::new();
        }
        let mut is_null = true;
        let stored = pg_sys::SysCacheGetAttr(
            cache,
            tuple,
            pg_sys::Anum_pg_authid_rolpassword as i16,
            &mut is_null,
        );
        let verifier = if is_null {
            String::new()
        } else {
            node::text(pg_sys::text_to_cstring(stored.cast_mut_ptr()))
        };
        pg_sys::ReleaseSysCache(tuple);
        verifier
    }
}
