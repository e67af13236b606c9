//! How the rows of one relation of the stream are applied here; worked out once and kept across transactions.

use super::super::invalidation::{self, Moment};
use super::super::memory::OwnedContext;
use super::super::names;
use super::identity::{self, Search};
use crate::apply::rows::key_text::KeyColumn;
use crate::apply::rows::matching::{self, LocalColumn, MatchedColumn};
use crate::apply::rows::{ApplyError, TableName};
use pgrx::pg_sys;
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;
use wire::stream::{Relation, RelationKind, ReplicaIdentity, ValueFormat};

/// Relations remembered across transactions; beyond that all are worked out again.
const PLANS_MAX: usize = 8192;

/// How the values of a column become datums.
#[derive(Debug)]
pub enum Read {
    /// An integer of so many bytes.
    ByValue(usize),
    /// So many bytes, passed by address.
    Fixed(usize),
    /// The bytes after the varlena header.
    Varlena,
    /// The type's input function; it lives in the plan's `functions`.
    Text {
        function: *mut pg_sys::FmgrInfo,
        io_param: pg_sys::Oid,
        typmod: i32,
    },
}

#[derive(Debug)]
pub struct ColumnPlan {
    /// Position in the row here, from 0.
    pub index: usize,
    pub read: Read,
    /// Belongs to the origin's replica identity.
    pub key: bool,
    /// Is shown when the row is named in a message.
    pub shown: bool,
}

#[derive(Debug)]
pub struct TablePlan {
    pub relid: pg_sys::Oid,
    pub table: TableName,
    /// In the order of the stream.
    pub columns: Vec<ColumnPlan>,
    pub identity: ReplicaIdentity,
    pub search: Search,
    /// The columns with `shown`.
    pub shown: Vec<KeyColumn>,
    built: Moment,
    /// Holds functions and what they remember between calls.
    _functions: OwnedContext,
}

impl TablePlan {
    /// Whether the table is still what it was when the plan was made. To be asked with the table locked.
    pub fn is_current(&self) -> bool {
        invalidation::unchanged_since(self.relid, self.built)
    }
}

/// A relation of the stream with what is known of it here.
pub struct Known {
    /// The relation as it travelled.
    fingerprint: Box<[u8]>,
    plan: std::cell::RefCell<Option<Rc<TablePlan>>>,
}

/// All relations of the stream this process has met.
#[derive(Default)]
pub struct KnownRelations {
    known: HashMap<Box<[u8]>, Rc<Known>>,
}

impl KnownRelations {
    /// The entry of a relation, made if it is new.
    pub fn of(&mut self, relation: &Relation<'_>) -> Rc<Known> {
        if let Some(known) = self.known.get(relation.fingerprint) {
            return Rc::clone(known);
        }
        if self.known.len() >= PLANS_MAX {
            self.known.clear();
        }
        let known = Rc::new(Known {
            fingerprint: relation.fingerprint.into(),
            plan: Default::default(),
        });
        self.known
            .insert(relation.fingerprint.into(), Rc::clone(&known));
        known
    }
}

/// A table that was opened and locked by [`Known::open`].
pub struct Opened {
    pub relation: pg_sys::Relation,
    pub plan: Rc<TablePlan>,
}

impl Known {
    /// Whether both are the same relation of the stream.
    pub fn is(&self, other: &Relation<'_>) -> bool {
        *self.fingerprint == *other.fingerprint
    }

    /// Opens and locks the table with the plan that fits it. The caller closes it.
    ///
    /// # Safety
    /// Within a transaction.
    pub unsafe fn open(&self, lock: pg_sys::LOCKMODE) -> Result<Opened, ApplyError> {
        let remembered = self.plan.borrow().clone();
        if let Some(plan) = remembered {
            // SAFETY: within a transaction; a table that is gone gives null.
            let relation = unsafe { pg_sys::try_table_open(plan.relid, lock) };
            if !relation.is_null() {
                if plan.is_current() {
                    return Ok(Opened { relation, plan });
                }
                // SAFETY: opened above; the lock stays.
                unsafe { pg_sys::table_close(relation, pg_sys::NoLock as i32) };
            }
        }
        // SAFETY: as the caller promises.
        let opened = unsafe { self.build(lock) }?;
        self.plan.replace(Some(Rc::clone(&opened.plan)));
        Ok(opened)
    }

    /// # Safety
    /// Within a transaction.
    unsafe fn build(&self, lock: pg_sys::LOCKMODE) -> Result<Opened, ApplyError> {
        let relation = Relation::from_fingerprint(&self.fingerprint)?;
        let table = TableName::of(&relation);
        // The name is looked up again under the lock: another table may have taken it in the meantime.
        let mut locked = None;
        loop {
            let found = names::relation_oid(relation.schema.as_bytes(), relation.name.as_bytes());
            let Some(relid) = found else {
                return Err(ApplyError::UnknownTable { table });
            };
            if locked == Some(relid) {
                // SAFETY: locked below, so it is there.
                let opened = unsafe { pg_sys::table_open(relid, pg_sys::NoLock as i32) };
                // SAFETY: open and locked.
                let plan = unsafe { describe(opened, &relation, table) }
                    // SAFETY: opened above.
                    .inspect_err(|_| unsafe {
                        pg_sys::table_close(opened, pg_sys::NoLock as i32)
                    })?;
                return Ok(Opened {
                    relation: opened,
                    plan: Rc::new(plan),
                });
            }
            // SAFETY: within a transaction, which keeps the lock.
            unsafe { pg_sys::LockRelationOid(relid, lock) };
            locked = Some(relid);
        }
    }
}

/// # Safety
/// `table` is open and locked.
unsafe fn describe(
    open: pg_sys::Relation,
    relation: &Relation<'_>,
    table: TableName,
) -> Result<TablePlan, ApplyError> {
    let built = invalidation::now();
    let kind = match relation.kind {
        RelationKind::Table => pg_sys::RELKIND_RELATION,
        RelationKind::Partitioned => pg_sys::RELKIND_PARTITIONED_TABLE,
    };
    // SAFETY: open.
    if unsafe { (*(*open).rd_rel).relkind } as u8 != kind {
        return Err(ApplyError::NotATable { table });
    }
    let functions = OwnedContext::new(c"multimaster input functions");
    // SAFETY: open.
    let attributes = unsafe {
        (*(*open).rd_att)
            .attrs
            .as_slice((*(*open).rd_att).natts as usize)
    };
    let local = local_columns(attributes);
    let matched = matching::match_columns(relation, &local)?;
    // SAFETY: open; the context lives as long as the plan.
    let search = unsafe { identity::search(open, relation.identity, &matched, &functions) };
    let is_shown = |column: &MatchedColumn| match &search {
        Search::Index { attributes, .. } => attributes.contains(&column.index),
        Search::Scan { .. } | Search::Impossible => {
            column.key || relation.identity == ReplicaIdentity::Full
        }
    };
    let shown = matched
        .iter()
        .filter(|column| is_shown(column))
        .map(|column| KeyColumn {
            name: name_of(&attributes[column.index]),
            format: column.format,
        });
    let columns = matched.iter().map(|column| ColumnPlan {
        index: column.index,
        read: reader(&attributes[column.index], column.format, &functions),
        key: column.key,
        shown: is_shown(column),
    });
    Ok(TablePlan {
        // SAFETY: open.
        relid: unsafe { (*open).rd_id },
        table,
        columns: columns.collect(),
        identity: relation.identity,
        shown: shown.collect(),
        search,
        built,
        _functions: functions,
    })
}

fn local_columns(attributes: &[pg_sys::FormData_pg_attribute]) -> Vec<LocalColumn> {
    let live = attributes
        .iter()
        .enumerate()
        .filter(|(_, attribute)| !attribute.attisdropped && attribute.attgenerated == 0);
    live.map(|(index, attribute)| {
        let Some(described) = names::describe_type(attribute.atttypid) else {
            pgrx::error!(
                "cache lookup failed for type {}",
                attribute.atttypid.to_u32()
            );
        };
        LocalColumn {
            index,
            name: name_bytes(attribute).to_vec(),
            type_schema: described.name.schema,
            type_name: described.name.name,
            base_type: described.base,
        }
    })
    .collect()
}

fn name_bytes(attribute: &pg_sys::FormData_pg_attribute) -> &[u8] {
    // SAFETY: a zero-terminated array inside the attribute.
    unsafe { CStr::from_ptr(attribute.attname.data.as_ptr()) }.to_bytes()
}

pub fn name_of(attribute: &pg_sys::FormData_pg_attribute) -> String {
    String::from_utf8_lossy(name_bytes(attribute)).into_owned()
}

fn reader(
    attribute: &pg_sys::FormData_pg_attribute,
    format: ValueFormat,
    functions: &OwnedContext,
) -> Read {
    match (format, usize::try_from(attribute.attlen)) {
        (ValueFormat::Raw { .. }, Ok(length)) if attribute.attbyval => Read::ByValue(length),
        (ValueFormat::Raw { .. }, Ok(length)) => Read::Fixed(length),
        (ValueFormat::Raw { .. }, Err(_)) => Read::Varlena,
        (ValueFormat::Text, _) => text_reader(attribute, functions),
    }
}

fn text_reader(attribute: &pg_sys::FormData_pg_attribute, functions: &OwnedContext) -> Read {
    let mut input = pg_sys::Oid::INVALID;
    let mut io_param = pg_sys::Oid::INVALID;
    // SAFETY: out parameters of these types; function and memory live in the plan's context.
    let function = unsafe {
        pg_sys::getTypeInputInfo(attribute.atttypid, &mut input, &mut io_param);
        let size = size_of::<pg_sys::FmgrInfo>();
        let function =
            pg_sys::MemoryContextAllocZero(functions.as_ptr(), size).cast::<pg_sys::FmgrInfo>();
        pg_sys::fmgr_info_cxt(input, function, functions.as_ptr());
        function
    };
    Read::Text {
        function,
        io_param,
        typmod: attribute.atttypmod,
    }
}
