//! How the row that an UPDATE or DELETE means is found: by which index, or by comparing which columns.

use super::super::memory::OwnedContext;
use super::unbound;
use super::values::RowArrays;
use crate::apply::rows::matching::MatchedColumn;
use pgrx::{pg_sys, varlena};
use wire::stream::{ReplicaIdentity, ValueFormat};

/// Where the row is looked for.
#[derive(Debug)]
pub enum Search {
    /// In a unique index on columns that are never null; positions of its columns in the row, from 0, and how each is compared.
    Index {
        index: pg_sys::Oid,
        attributes: Vec<usize>,
        keys: Vec<IndexKey>,
    },
    /// Row by row, comparing these columns.
    Scan { columns: Vec<Compared> },
    /// The origin tells nothing about the old row.
    Impossible,
}

/// The equality operator of an index column.
#[derive(Debug)]
pub struct IndexKey {
    pub procedure: pg_sys::RegProcedure,
    pub collation: pg_sys::Oid,
}

#[derive(Debug)]
pub struct Compared {
    index: usize,
    comparison: Comparison,
}

#[derive(Debug)]
enum Comparison {
    /// The type's equality operator; it lives in the plan's context.
    Operator {
        function: *mut pg_sys::FmgrInfo,
        collation: pg_sys::Oid,
    },
    /// Equal bytes. For types that travel as they are stored this is stricter than their operator, which may call
    /// different values equal (1.0 and 1.00): the very row of the origin is wanted.
    Image { by_value: bool, length: i16 },
}

/// Chooses how rows of the open table are found. Functions are made in `functions`.
///
/// # Safety
/// `table` is open and locked; `functions` outlives the result.
pub unsafe fn search(
    table: pg_sys::Relation,
    identity: ReplicaIdentity,
    columns: &[MatchedColumn],
    functions: &OwnedContext,
) -> Search {
    let told: Vec<_> = match identity {
        ReplicaIdentity::Nothing => return Search::Impossible,
        ReplicaIdentity::Full => columns.iter().collect(),
        ReplicaIdentity::Key => columns.iter().filter(|column| column.key).collect(),
    };
    // SAFETY: as the caller promises.
    if let Some(found) = unsafe { usable_index(table, &told) } {
        return found;
    }
    // SAFETY: an open table's descriptor has natts attributes.
    let attributes = unsafe {
        (*(*table).rd_att)
            .attrs
            .as_slice((*(*table).rd_att).natts as usize)
    };
    let compared = told.into_iter().map(|column| {
        let attribute = &attributes[column.index];
        Compared {
            index: column.index,
            comparison: comparison(attribute, column.format, functions),
        }
    });
    Search::Scan {
        columns: compared.collect(),
    }
}

/// The primary key if it can be used, else the replica identity, else any other unique index.
///
/// # Safety
/// `table` is open and locked.
unsafe fn usable_index(table: pg_sys::Relation, told: &[&MatchedColumn]) -> Option<Search> {
    // SAFETY: as the caller promises; the list is a copy in the current memory context.
    unsafe {
        let indexes = pg_sys::RelationGetIndexList(table);
        let count = if indexes.is_null() {
            0
        } else {
            (*indexes).length
        };
        let preferred = [
            pg_sys::RelationGetPrimaryKeyIndex(table),
            pg_sys::RelationGetReplicaIndex(table),
        ];
        let others = (0..count).map(|place| pg_sys::list_nth_oid(indexes, place));
        preferred
            .into_iter()
            .filter(|index| *index != pg_sys::Oid::INVALID)
            .chain(others)
            .find_map(|index| index_search(table, index, told))
    }
}

/// # Safety
/// `table` is open and locked, and `index` is one of its indexes.
unsafe fn index_search(
    table: pg_sys::Relation,
    index: pg_sys::Oid,
    told: &[&MatchedColumn],
) -> Option<Search> {
    // SAFETY: as the caller promises; the index is open between opening and closing.
    unsafe {
        let open = pg_sys::index_open(index, pg_sys::AccessShareLock as i32);
        let attributes = unique_columns(table, open, told);
        let keys = attributes
            .as_ref()
            .and_then(|attributes| index_keys(open, attributes.len()));
        pg_sys::index_close(open, pg_sys::NoLock as i32);
        Some(Search::Index {
            index,
            attributes: attributes?,
            keys: keys?,
        })
    }
}

/// The columns of an index that has at most one row for any values of them; `None` when it has not, or when the origin does not
/// tell their values.
///
/// # Safety
/// Both are open.
unsafe fn unique_columns(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    told: &[&MatchedColumn],
) -> Option<Vec<usize>> {
    // SAFETY: an open index has its pg_index row; indkey has indnatts elements.
    unsafe {
        let form = &*(*index).rd_index;
        let whole = pg_sys::RelationGetIndexPredicate(index).is_null();
        if !(form.indisunique && form.indisvalid && form.indimmediate && whole) {
            return None;
        }
        let numbers = form.indkey.values.as_slice(form.indnkeyatts as usize);
        let columns = (*(*table).rd_att)
            .attrs
            .as_slice((*(*table).rd_att).natts as usize);
        numbers
            .iter()
            .map(|number| {
                // 0 is an expression, below are system columns.
                let place = usize::try_from(*number).ok()?.checked_sub(1)?;
                let known = told.iter().any(|column| column.index == place);
                (known && columns.get(place)?.attnotnull).then_some(place)
            })
            .collect()
    }
}

/// # Safety
/// `index` is open.
unsafe fn index_keys(index: pg_sys::Relation, count: usize) -> Option<Vec<IndexKey>> {
    // SAFETY: an open index has these arrays, one element per key column.
    (0..count)
        .map(|place| unsafe {
            let input = *(*index).rd_opcintype.add(place);
            let family = *(*index).rd_opfamily.add(place);
            let equal = pg_sys::BTEqualStrategyNumber as i16;
            let operator = pg_sys::get_opfamily_member(family, input, input, equal);
            (operator != pg_sys::Oid::INVALID).then(|| IndexKey {
                procedure: pg_sys::get_opcode(operator),
                collation: *(*index).rd_indcollation.add(place),
            })
        })
        .collect()
}

fn comparison(
    attribute: &pg_sys::FormData_pg_attribute,
    format: ValueFormat,
    functions: &OwnedContext,
) -> Comparison {
    let image = Comparison::Image {
        by_value: attribute.attbyval,
        length: attribute.attlen,
    };
    if let ValueFormat::Raw { .. } = format {
        return image;
    }
    // SAFETY: entries of the type cache stay; the function is copied into the plan's context, as it may be redefined.
    unsafe {
        let flags = pg_sys::TYPECACHE_EQ_OPR_FINFO as i32;
        let entry = pg_sys::lookup_type_cache(attribute.atttypid, flags);
        if (*entry).eq_opr_finfo.fn_oid == pg_sys::Oid::INVALID {
            return image;
        }
        let size = size_of::<pg_sys::FmgrInfo>();
        let function =
            pg_sys::MemoryContextAllocZero(functions.as_ptr(), size).cast::<pg_sys::FmgrInfo>();
        pg_sys::fmgr_info_copy(function, &raw mut (*entry).eq_opr_finfo, functions.as_ptr());
        Comparison::Operator {
            function,
            collation: attribute.attcollation,
        }
    }
}

/// Whether two rows agree in the compared columns.
///
/// # Safety
/// Both rows are of the table the columns were chosen for, taken apart completely.
pub unsafe fn agree(columns: &[Compared], left: RowArrays, right: RowArrays) -> bool {
    // SAFETY: as the caller promises.
    columns.iter().all(|column| unsafe {
        match (
            *left.nulls.add(column.index),
            *right.nulls.add(column.index),
        ) {
            (true, true) => true,
            (false, false) => {
                let (left, right) = (
                    *left.values.add(column.index),
                    *right.values.add(column.index),
                );
                equal(&column.comparison, left, right)
            }
            _ => false,
        }
    })
}

/// # Safety
/// Two non-null values of the column's type.
unsafe fn equal(comparison: &Comparison, left: pg_sys::Datum, right: pg_sys::Datum) -> bool {
    match *comparison {
        Comparison::Image { by_value: true, .. } => left.value() == right.value(),
        // SAFETY: as the caller promises.
        Comparison::Image { by_value, length } => unsafe {
            same_bytes(left, right, by_value, length)
        },
        // SAFETY: as the caller promises.
        Comparison::Operator {
            function,
            collation,
        } => unsafe { pg_sys::FunctionCall2Coll(function, collation, left, right).value() != 0 },
    }
}

/// Whether two values are stored as the same bytes. Plain ones are compared here; TOASTed ones by PostgreSQL.
///
/// # Safety
/// Two non-null values, not passed by value, of a type of this length.
pub unsafe fn same_bytes(
    left: pg_sys::Datum,
    right: pg_sys::Datum,
    by_value: bool,
    length: i16,
) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        match (bytes_of(left, length), bytes_of(right, length)) {
            (Some(left), Some(right)) => left == right,
            _ => unbound::same_image(left, right, by_value, length),
        }
    }
}

/// The bytes of a by-reference value that is neither compressed nor out of line.
///
/// # Safety
/// A non-null value, not passed by value, of a type of this length; the result lives as long as the value.
unsafe fn bytes_of<'v>(value: pg_sys::Datum, length: i16) -> Option<&'v [u8]> {
    // SAFETY: as the caller promises.
    unsafe {
        match length {
            -1 => {
                let value = value.cast_mut_ptr::<pg_sys::varlena>();
                let plain = varlena::varatt_is_4b_u(value)
                    || (varlena::varatt_is_1b(value) && !varlena::varatt_is_1b_e(value));
                plain.then(|| {
                    let (data, size) = (
                        varlena::vardata_any(value),
                        varlena::varsize_any_exhdr(value),
                    );
                    std::slice::from_raw_parts(data.cast(), size)
                })
            }
            length => {
                let length = usize::try_from(length).ok()?;
                Some(std::slice::from_raw_parts(
                    value.cast_mut_ptr::<u8>(),
                    length,
                ))
            }
        }
    }
}
