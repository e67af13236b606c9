//! How the rows of one relation are sent; worked out once and kept until the relation changes.

use super::super::invalidation::{self, Moment};
use super::super::memory::OwnedContext;
use super::super::names;
use crate::decode::{self, Environment};
use pgrx::pg_sys;
use std::collections::BTreeMap;
use std::ffi::CStr;
use wire::stream::{Column, Relation, RelationKind, ReplicaIdentity, Text, ValueFormat};

/// Relations whose plans are kept; beyond that all are worked out again.
const PLANS_MAX: usize = 8192;

/// How the values of a column leave.
pub enum Send {
    /// The low bytes of the datum.
    ByValue(usize),
    /// So many bytes at the datum's address.
    Fixed(usize),
    /// The bytes after the varlena header.
    Varlena,
    /// What the type's output function writes. The function lives in the relation's `_functions`.
    Text(*mut pg_sys::FmgrInfo),
}

pub struct ColumnPlan {
    /// Position in the tuple descriptor, from 0.
    pub index: usize,
    pub send: Send,
    /// Values may be TOASTed.
    pub varlena: bool,
    /// Belongs to the replica identity.
    pub key: bool,
}

pub struct RelationPlan {
    /// `None` for a relation that is not replicated.
    pub sent: Option<SentRelation>,
    built: Moment,
}

pub struct SentRelation {
    pub fingerprint: Vec<u8>,
    pub columns: Vec<ColumnPlan>,
    pub identity: ReplicaIdentity,
    /// The transaction (counted by the decoder) in which the receiver was last told of it.
    pub told_in: u64,
    /// Holds what output functions remember between calls.
    _functions: Option<OwnedContext>,
}

/// The plans of all relations seen.
#[derive(Default)]
pub struct Plans {
    plans: BTreeMap<u32, RelationPlan>,
}

impl Plans {
    /// The plan of a relation that the caller holds open; `raw` allows stored bytes.
    ///
    /// # Safety
    /// `relation` is an open relation.
    pub unsafe fn of(
        &mut self,
        relation: pg_sys::Relation,
        environment: &Environment,
        raw: bool,
    ) -> &mut RelationPlan {
        // SAFETY: the caller's open relation.
        let relid = unsafe { (*relation).rd_id };
        let key = relid.to_u32();
        let current = self
            .plans
            .get(&key)
            .is_some_and(|plan| invalidation::unchanged_since(relid, plan.built));
        if !current {
            if self.plans.len() >= PLANS_MAX {
                self.plans.clear();
            }
            let built = invalidation::now();
            let sent = {
                // The walsender's own context lives as long as the connection: what look-ups leave behind must not gather there.
                let look_ups = OwnedContext::new(c"multimaster look-ups");
                let _entered = look_ups.enter();
                // SAFETY: as above.
                unsafe { describe(relation, environment, raw) }
            };
            self.plans.insert(key, RelationPlan { sent, built });
        }
        self.plans.get_mut(&key).expect("inserted above, or found")
    }
}

/// # Safety
/// `relation` is an open relation.
unsafe fn describe(
    relation: pg_sys::Relation,
    environment: &Environment,
    raw: bool,
) -> Option<SentRelation> {
    // SAFETY: an open relation has its pg_class row.
    let form = unsafe { &*(*relation).rd_rel };
    let kind = match form.relkind as u8 {
        pg_sys::RELKIND_RELATION => RelationKind::Table,
        pg_sys::RELKIND_PARTITIONED_TABLE => RelationKind::Partitioned,
        _ => return None,
    };
    let schema = names::schema_name(form.relnamespace);
    // SAFETY: a zero-terminated array.
    let name = unsafe { CStr::from_ptr(form.relname.data.as_ptr()) }.to_bytes();
    let permanent = form.relpersistence as u8 == pg_sys::RELPERSISTENCE_PERMANENT;
    if !permanent || schema == decode::OWN_SCHEMA || (environment.is_local)(&schema, name) {
        return None;
    }
    // SAFETY: as above.
    let identity = unsafe { replica_identity(relation) };
    let functions = OwnedContext::new(c"multimaster output functions");
    // SAFETY: as above; the context outlives the plans of the columns.
    let described = unsafe { describe_columns(relation, &identity, raw, &functions) };
    let columns: Vec<_> = described.iter().map(DescribedColumn::borrow).collect();
    let fingerprint = Relation::describe(kind, identity.kind, Text(&schema), Text(name), &columns);
    let columns: Vec<_> = described.into_iter().map(|column| column.plan).collect();
    let keep = columns
        .iter()
        .any(|column| matches!(column.send, Send::Text(_)));
    Some(SentRelation {
        fingerprint,
        columns,
        identity: identity.kind,
        told_in: 0,
        _functions: keep.then_some(functions),
    })
}

struct Identity {
    kind: ReplicaIdentity,
    key: *mut pg_sys::Bitmapset,
}

/// # Safety
/// `relation` is an open relation.
unsafe fn replica_identity(relation: pg_sys::Relation) -> Identity {
    // SAFETY: an open relation; the bitmap is a copy in the current memory context.
    unsafe {
        if (*(*relation).rd_rel).relreplident as u8 == pg_sys::REPLICA_IDENTITY_FULL {
            return Identity {
                kind: ReplicaIdentity::Full,
                key: std::ptr::null_mut(),
            };
        }
        let key = pg_sys::RelationGetIdentityKeyBitmap(relation);
        let kind = if key.is_null() {
            ReplicaIdentity::Nothing
        } else {
            ReplicaIdentity::Key
        };
        Identity { kind, key }
    }
}

struct DescribedColumn {
    name: Vec<u8>,
    type_name: names::QualifiedName,
    format: ValueFormat,
    plan: ColumnPlan,
}

impl DescribedColumn {
    fn borrow(&self) -> Column<'_> {
        Column {
            name: Text(&self.name),
            type_schema: Text(&self.type_name.schema),
            type_name: Text(&self.type_name.name),
            format: self.format,
            key: self.plan.key,
        }
    }
}

/// # Safety
/// `relation` is an open relation; `functions` outlives the result.
unsafe fn describe_columns(
    relation: pg_sys::Relation,
    identity: &Identity,
    raw: bool,
    functions: &OwnedContext,
) -> Vec<DescribedColumn> {
    // SAFETY: an open relation's descriptor has natts attributes.
    let attributes = unsafe {
        (*(*relation).rd_att)
            .attrs
            .as_slice((*(*relation).rd_att).natts as usize)
    };
    let mut columns = Vec::with_capacity(attributes.len());
    for (index, attribute) in attributes.iter().enumerate() {
        if attribute.attisdropped || attribute.attgenerated != 0 {
            continue;
        }
        let Some(described) = names::describe_type(attribute.atttypid) else {
            pgrx::error!(
                "cache lookup failed for type {}",
                attribute.atttypid.to_u32()
            );
        };
        let number = i32::from(attribute.attnum) - pg_sys::FirstLowInvalidHeapAttributeNumber;
        // SAFETY: null or a bitmap, see replica_identity.
        let key = unsafe { pg_sys::bms_is_member(number, identity.key) };
        let raw = raw && decode::travels_raw(described.base);
        let send = if raw {
            raw_send(attribute)
        } else {
            text_send(attribute.atttypid, functions)
        };
        columns.push(DescribedColumn {
            // SAFETY: a zero-terminated array.
            name: unsafe { CStr::from_ptr(attribute.attname.data.as_ptr()) }
                .to_bytes()
                .to_vec(),
            type_name: described.name,
            format: if raw {
                ValueFormat::Raw {
                    base_type: described.base,
                }
            } else {
                ValueFormat::Text
            },
            plan: ColumnPlan {
                index,
                send,
                varlena: attribute.attlen == -1,
                key,
            },
        });
    }
    columns
}

fn raw_send(attribute: &pg_sys::FormData_pg_attribute) -> Send {
    match usize::try_from(attribute.attlen) {
        Ok(length) if attribute.attbyval => Send::ByValue(length),
        Ok(length) => Send::Fixed(length),
        Err(_) => Send::Varlena,
    }
}

fn text_send(type_oid: pg_sys::Oid, functions: &OwnedContext) -> Send {
    let mut function = pg_sys::Oid::INVALID;
    let mut varlena = false;
    // SAFETY: out parameters of these types; the function and what it remembers live in `functions`, as long as the plan.
    unsafe {
        pg_sys::getTypeOutputInfo(type_oid, &mut function, &mut varlena);
        let size = size_of::<pg_sys::FmgrInfo>();
        let info =
            pg_sys::MemoryContextAllocZero(functions.as_ptr(), size).cast::<pg_sys::FmgrInfo>();
        pg_sys::fmgr_info_cxt(function, info, functions.as_ptr());
        Send::Text(info)
    }
}
