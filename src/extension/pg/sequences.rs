//! Sequences of a cluster: every node yields only values of its own share.
//!
//! The rule is in `wire::ddl::sequence_plan`. Here it is carried out: after a command that made or changed a sequence ([`share`]), and after
//! `setval()`, whose position is also sent to the other nodes. `setval()` cannot be intercepted, but PostgreSQL announces every function
//! that a query is going to call; the sequences it may have set are then those that this transaction has locked.

use super::ddl::{self, DdlError, applying, execute_text, log_message};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode, Spi, ereport, pg_guard, pg_sys};
use protocol::NodeId;
use std::cell::Cell;
use wire::ddl::sequence_plan::{Plan, Sequence};
use wire::ddl::{SEQUENCE_PREFIX, SequencePosition};

/// `setval(regclass, bigint)` and `setval(regclass, bigint, boolean)`.
const SETVAL: [u32; 2] = [1576, 1765];
const SETVAL_WITH_CALLED: u32 = 1765;

/// `pg_sequence`.
const SEQUENCE_CATALOG: pg_sys::Oid = pg_sys::Oid::from_u32(2224);

/// Columns of `pg_sequence`, the same in all supported servers.
const START: i16 = 3;
const INCREMENT: i16 = 4;
const MAX: i16 = 5;
const MIN: i16 = 6;
const CYCLE: i16 = 8;
const COLUMNS: usize = 8;

thread_local! {
    /// A query that calls setval() was started and its sequences have not been looked at yet.
    static SETVAL_CALLED: Cell<bool> = const { Cell::new(false) };
}

static mut PREVIOUS_EXECUTOR_END: pg_sys::ExecutorEnd_hook_type = None;

/// Installs the hook that sees the end of a query. Called once, from `_PG_init` in the postmaster.
pub fn install() {
    // SAFETY: hook variables are plain function pointers, set before any child process exists.
    unsafe {
        PREVIOUS_EXECUTOR_END = pg_sys::ExecutorEnd_hook;
        pg_sys::ExecutorEnd_hook = Some(executor_end);
    }
}

/// Notes that a function is going to be called. Never raises.
pub fn note_function(function: pg_sys::Oid) {
    if SETVAL.contains(&function.to_u32()) && ddl::is_own_change() {
        SETVAL_CALLED.set(true);
    }
}

/// Whether `setval()` may have set something that [`ship`] has not seen.
pub fn has_changes() -> bool {
    SETVAL_CALLED.get()
}

pub fn end_of_transaction() {
    SETVAL_CALLED.set(false);
}

unsafe extern "C-unwind" fn executor_end(query: *mut pg_sys::QueryDesc) {
    // SAFETY: called by PostgreSQL; this frame owns nothing, ship() is guarded.
    unsafe {
        match PREVIOUS_EXECUTOR_END {
            Some(previous) => previous(query),
            None => standard_ExecutorEnd(query),
        }
        if SETVAL_CALLED.get() {
            ship();
        }
    }
}

unsafe extern "C-unwind" {
    /// Without pgrx's guard: errors of the executor pass with all their fields.
    fn standard_ExecutorEnd(query: *mut pg_sys::QueryDesc);
}

/// Sends the positions that `setval()` gave, and moves each sequence here to its first own value beyond.
///
/// # Safety
/// In a transaction that can still write, from a frame that owns nothing with a destructor.
#[pg_guard]
pub unsafe extern "C-unwind" fn ship() {
    SETVAL_CALLED.set(false);
    for sequence in locked_sequences() {
        ship_position(sequence);
    }
}

fn ship_position(oid: pg_sys::Oid) {
    let Some((sequence, log_count)) = read(oid) else {
        return;
    };
    // What nextval() leaves is an own value that was handed out, with a count of values logged ahead that is rarely zero.
    let left_by_nextval = sequence.is_called && sequence.is_at_own_position(ddl::node_number());
    if left_by_nextval && log_count != 0 {
        return;
    }
    let Some((schema, name)) = qualified_name(oid) else {
        return;
    };
    let position = SequencePosition {
        schema,
        name,
        last_value: sequence.last_value,
        is_called: sequence.is_called,
        follow: !left_by_nextval,
    };
    match position.encode() {
        Ok(payload) => log_message(SEQUENCE_PREFIX, &payload),
        Err(error) => raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            error.to_string(),
        ),
    }
    ddl::note_write();
    if let Some(own) = sequence.beyond(ddl::node_number(), sequence.last_value, sequence.is_called)
        && own != sequence
    {
        store_position(oid, &own);
    }
}

/// Takes over a position that `setval()` gave on another node: the first own value beyond it.
///
/// Never goes back, unless the position was certainly set; then through a new file of the sequence, so that a rollback restores it.
/// Raises 42P01 when the sequence does not exist. Errors unwind.
pub fn apply(payload: &[u8]) -> Result<(), DdlError> {
    let position = SequencePosition::decode(payload)?;
    applying(|| {
        let oid = find(&position.schema, &position.name);
        let Some((current, _)) = read(oid) else {
            return Ok(());
        };
        let (last_value, is_called) = (position.last_value, position.is_called);
        let target = current
            .beyond(ddl::node_number(), last_value, is_called)
            .unwrap_or(Sequence {
                last_value,
                is_called,
                ..current
            });
        if !target.is_before(&current) {
            store_position(oid, &target);
        } else if position.follow {
            go_back(oid, &position, &target)?;
        }
        Ok(())
    })
}

fn go_back(
    oid: pg_sys::Oid,
    position: &SequencePosition,
    target: &Sequence,
) -> Result<(), DdlError> {
    if target.is_called {
        store_position(oid, target);
        return Ok(());
    }
    let (schema, name) = (ddl::quoted(&position.schema), ddl::quoted(&position.name));
    let restart = format!(
        "ALTER SEQUENCE {schema}.{name} RESTART WITH {}",
        target.last_value
    );
    as_superuser(|| execute_text(&restart))
}

/// Gives this node its share of a sequence; other sequences than permanent ones are left alone. Repeating it changes nothing.
pub fn share(oid: pg_sys::Oid, node: u8) {
    // SAFETY: a guarded look-up.
    if unsafe { pg_sys::get_rel_persistence(oid) } as u8 != pg_sys::RELPERSISTENCE_PERMANENT {
        return;
    }
    let Some((sequence, _)) = read(oid) else {
        return;
    };
    match sequence.plan(node) {
        Plan::Shared(shared) => store(oid, &sequence, &shared),
        Plan::TooSmall => warn_too_small(oid),
    }
}

/// Gives this node its shares of the sequences of serial and identity columns of a table.
pub fn share_owned_by(table: pg_sys::Oid) {
    // SAFETY: guarded; a list of oids.
    unsafe {
        let owned = pg_sys::getOwnedSequences(table);
        let count = owned.as_ref().map_or(0, |list| list.length as usize);
        for position in 0..count {
            share(
                (*(*owned).elements.add(position)).oid_value,
                ddl::node_number(),
            );
        }
    }
}

/// Shares every existing permanent sequence of the database, but for this extension's own. Locks each against use.
///
/// To be run once on each node that joins, also on a copy of another node: shares depend on values alone.
pub fn prepare_existing_sequences(node: NodeId) {
    let query = "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'S' AND c.relpersistence = 'p' AND n.nspname <> 'mtm'";
    for oid in oids(query) {
        // SAFETY: guarded; the lock lasts until the end of the transaction.
        unsafe { pg_sys::LockRelationOid(oid, pg_sys::ShareRowExclusiveLock as i32) };
        share(oid, node.get());
    }
}

/// The oids a query yields.
pub fn oids(query: &str) -> Vec<pg_sys::Oid> {
    let found: Result<Vec<pg_sys::Oid>, pgrx::spi::Error> = Spi::connect(|client| {
        let mut oids = Vec::new();
        for row in client.select(query, None, &[])? {
            oids.extend(row.get::<pg_sys::Oid>(1)?);
        }
        Ok(oids)
    });
    match found {
        Ok(oids) => oids,
        Err(error) => raise(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, error.to_string()),
    }
}

/// Does `work` as the bootstrap superuser: the user may lack rights on what follows from the user's own statement.
pub fn as_superuser<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the former user comes back here, or, after an error, with the abort of the (sub)transaction.
    unsafe {
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let superuser = pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID);
        pg_sys::SetUserIdAndSecContext(
            superuser,
            context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
        );
        let result = work();
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

fn raise(code: PgSqlErrorCode, message: String) -> ! {
    ErrorReport::new(code, message, "multimaster sequences").report(PgLogLevel::ERROR);
    unreachable!("an error report does not return")
}

fn warn_too_small(oid: pg_sys::Oid) {
    let name = qualified_name(oid).map_or_else(
        || oid.to_u32().to_string(),
        |(schema, name)| format!("{schema}.{name}"),
    );
    ereport!(
        WARNING,
        PgSqlErrorCode::ERRCODE_WARNING,
        format!("sequence {name} has too few values to be shared among nodes"),
        "Each node counts on its own and yields the same values as the others."
    );
}

/// Definition and position, and how many values are logged ahead; `None` when it is no sequence.
fn read(oid: pg_sys::Oid) -> Option<(Sequence, i64)> {
    // SAFETY: guarded; values are copied before the tuple is released.
    let mut sequence = unsafe {
        let cache = pg_sys::SysCacheIdentifier::SEQRELID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, oid.into());
        if tuple.is_null() {
            return None;
        }
        let mut is_null = false;
        let mut column =
            |number| pg_sys::SysCacheGetAttr(cache, tuple, number, &mut is_null).value() as i64;
        let sequence = Sequence {
            start: column(START),
            increment: column(INCREMENT),
            min: column(MIN),
            max: column(MAX),
            cycle: column(CYCLE) != 0,
            last_value: 0,
            is_called: false,
        };
        pg_sys::ReleaseSysCache(tuple);
        sequence
    };
    let log_count = read_position(oid, &mut sequence)?;
    Some((sequence, log_count))
}

/// The one row of a sequence relation.
#[repr(C)]
struct SequenceRow {
    last_value: i64,
    log_count: i64,
    is_called: bool,
}

/// Reads the row from its page: a SELECT would need rights that the user may not have.
fn read_position(oid: pg_sys::Oid, sequence: &mut Sequence) -> Option<i64> {
    // SAFETY: a sequence has one page with one row, which is overwritten in place under the buffer's lock.
    unsafe {
        let relation = pg_sys::try_relation_open(oid, pg_sys::AccessShareLock as i32);
        if relation.is_null() {
            return None;
        }
        let buffer = pg_sys::ReadBuffer(relation, 0);
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
        let page = pg_sys::BufferGetPage(buffer);
        let tuple = pg_sys::PageGetItem(page, pg_sys::PageGetItemId(page, 1))
            .cast::<pg_sys::HeapTupleHeaderData>();
        let row = tuple
            .cast::<u8>()
            .add((*tuple).t_hoff as usize)
            .cast::<SequenceRow>();
        sequence.last_value = (*row).last_value;
        sequence.is_called = (*row).is_called;
        let log_count = (*row).log_count;
        pg_sys::UnlockReleaseBuffer(buffer);
        pg_sys::relation_close(relation, pg_sys::AccessShareLock as i32);
        Some(log_count)
    }
}

fn store(oid: pg_sys::Oid, former: &Sequence, wanted: &Sequence) {
    let with_former_position = Sequence {
        last_value: former.last_value,
        is_called: former.is_called,
        ..*wanted
    };
    if with_former_position != *former {
        store_definition(oid, wanted);
    }
    if with_former_position != *wanted {
        store_position(oid, wanted);
    }
}

/// Writes the definition straight into the catalog: ALTER SEQUENCE would check ranges that hold for the whole cluster only.
fn store_definition(oid: pg_sys::Oid, wanted: &Sequence) {
    let mut values = [pg_sys::Datum::from(0usize); COLUMNS];
    let mut replace = [false; COLUMNS];
    let mut nulls = [false; COLUMNS];
    for (column, value) in [
        (START, wanted.start),
        (INCREMENT, wanted.increment),
        (MAX, wanted.max),
        (MIN, wanted.min),
    ] {
        values[column as usize - 1] = pg_sys::Datum::from(value);
        replace[column as usize - 1] = true;
    }
    // SAFETY: guarded; the arrays are as long as the catalog is wide.
    unsafe {
        let catalog = pg_sys::table_open(SEQUENCE_CATALOG, pg_sys::RowExclusiveLock as i32);
        let none = pg_sys::Datum::from(0usize);
        let tuple = pg_sys::SearchSysCacheCopy(
            pg_sys::SysCacheIdentifier::SEQRELID as i32,
            oid.into(),
            none,
            none,
            none,
        );
        if !tuple.is_null() {
            let changed = pg_sys::heap_modify_tuple(
                tuple,
                (*catalog).rd_att,
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
                replace.as_mut_ptr(),
            );
            pg_sys::CatalogTupleUpdate(catalog, &mut (*tuple).t_self, changed);
        }
        pg_sys::table_close(catalog, pg_sys::RowExclusiveLock as i32);
        pg_sys::CommandCounterIncrement();
    }
}

/// Moves the sequence as `setval()` does. Not undone by a rollback, unless the sequence got a new file in this transaction.
fn store_position(oid: pg_sys::Oid, wanted: &Sequence) {
    // SAFETY: guarded call of a function with these arguments.
    as_superuser(|| unsafe {
        pg_sys::OidFunctionCall3Coll(
            pg_sys::Oid::from(SETVAL_WITH_CALLED),
            pg_sys::InvalidOid,
            oid.into(),
            pg_sys::Datum::from(wanted.last_value),
            pg_sys::Datum::from(wanted.is_called),
        );
    });
}

/// The permanent sequences on which this transaction holds the lock that `setval()` takes.
fn locked_sequences() -> Vec<pg_sys::Oid> {
    let lock_bit = 1 << pg_sys::RowExclusiveLock;
    // SAFETY: guarded; the snapshot of all locks is palloced.
    unsafe {
        let data = &*pg_sys::GetLockStatusData();
        let mut sequences = Vec::new();
        for position in 0..data.nelements as usize {
            let lock = &*data.locks.add(position);
            if lock.pid == pg_sys::MyProcPid
                && lock.holdMask & lock_bit != 0
                && lock.locktag.locktag_type == pg_sys::LockTagType::LOCKTAG_RELATION as u8
                && lock.locktag.locktag_field1 == pg_sys::MyDatabaseId.to_u32()
            {
                let relation = pg_sys::Oid::from(lock.locktag.locktag_field2);
                if pg_sys::get_rel_relkind(relation) as u8 == pg_sys::RELKIND_SEQUENCE
                    && pg_sys::get_rel_persistence(relation) as u8
                        == pg_sys::RELPERSISTENCE_PERMANENT
                    && !sequences.contains(&relation)
                {
                    sequences.push(relation);
                }
            }
        }
        sequences
    }
}

fn qualified_name(oid: pg_sys::Oid) -> Option<(String, String)> {
    // SAFETY: guarded look-ups.
    unsafe {
        let name = pg_sys::get_rel_name(oid);
        if name.is_null() {
            return None;
        }
        let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(oid));
        Some((ddl::text(schema), ddl::text(name)))
    }
}

fn find(schema: &str, name: &str) -> pg_sys::Oid {
    let (c_schema, c_name) = (ddl::server_text(schema), ddl::server_text(name));
    // SAFETY: valid C strings; guarded.
    let oid = unsafe {
        let namespace = pg_sys::get_namespace_oid(c_schema.as_ptr(), true);
        pg_sys::get_relname_relid(c_name.as_ptr(), namespace)
    };
    if oid == pg_sys::InvalidOid {
        let message = format!("sequence \"{schema}.{name}\" does not exist");
        raise(PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, message);
    }
    oid
}
