//! Names of schemas, relations and types, from and to oids. Each may raise what reading a catalog may raise.

use pgrx::pg_sys;
use std::ffi::{CStr, CString};

/// A schema-qualified name, in the encoding of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QualifiedName {
    pub schema: Vec<u8>,
    pub name: Vec<u8>,
}

/// What is needed to know of a type to exchange its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeDescription {
    pub name: QualifiedName,
    /// For a domain, what it is built on in the end; otherwise the type itself.
    pub base: u32,
}

/// Name of the schema; empty when there is none (any more).
pub fn schema_name(schema: pg_sys::Oid) -> Vec<u8> {
    // SAFETY: returns null or a zero-terminated copy.
    unsafe { copied_and_freed(pg_sys::get_namespace_name(schema)) }
}

/// Oid of the relation of this name, if there is one.
pub fn relation_oid(schema: &[u8], name: &[u8]) -> Option<pg_sys::Oid> {
    let schema = CString::new(schema).ok()?;
    let name = CString::new(name).ok()?;
    // SAFETY: zero-terminated strings that outlive the calls.
    let relid = unsafe {
        let schema = pg_sys::get_namespace_oid(schema.as_ptr(), true);
        if schema == pg_sys::Oid::INVALID {
            return None;
        }
        pg_sys::get_relname_relid(name.as_ptr(), schema)
    };
    (relid != pg_sys::Oid::INVALID).then_some(relid)
}

/// The type of this oid; `None` when there is none.
pub fn describe_type(oid: pg_sys::Oid) -> Option<TypeDescription> {
    // SAFETY: a tuple from the syscache is valid until released; typname is a zero-terminated array.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::TYPEOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(oid));
        if tuple.is_null() {
            return None;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_type>();
        let name = CStr::from_ptr((*form).typname.data.as_ptr())
            .to_bytes()
            .to_vec();
        let schema = (*form).typnamespace;
        pg_sys::ReleaseSysCache(tuple);
        let name = QualifiedName {
            schema: schema_name(schema),
            name,
        };
        Some(TypeDescription {
            name,
            base: pg_sys::getBaseType(oid).to_u32(),
        })
    }
}

/// # Safety
/// `text` is null or a zero-terminated string allocated with palloc, which nobody uses afterwards.
unsafe fn copied_and_freed(text: *mut std::ffi::c_char) -> Vec<u8> {
    if text.is_null() {
        return Vec::new();
    }
    // SAFETY: as the caller promises.
    unsafe {
        let copy = CStr::from_ptr(text).to_bytes().to_vec();
        pg_sys::pfree(text.cast());
        copy
    }
}
