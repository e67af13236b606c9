//! The output plugin: core's decoding callbacks, turned into the replication stream.
//!
//! Frames of a transaction gather in one buffer that leaves at the PREPARE, or earlier when it is full: the walsender pays a system call
//! per message, and the receiver another.
//!
//! Every callback is guarded: an error of PostgreSQL unwinds through our frames and is raised again at their edge. That
//! matters for a transaction that is rolled back while it is being decoded: core stops it with an error raised inside a callback, catches the
//! error itself, and goes on to the prepare callback.

mod plan;
mod values;

use crate::decode::{self, Environment};
use pgrx::pg_sys;
use pgrx::prelude::*;
use plan::{Plans, SentRelation};
use protocol::{Csn, Gid, Lsn, NodeId};
use std::ffi::{CStr, c_char};
use values::{Deformed, Scratch};
use wire::stream::{
    Begin, Deps, MessageWriter, OldRowWriter, Prepare, Prepared, RelationId, ReplicaIdentity,
    RowWriter, StreamFrame, Text, UserFinish,
};

/// A message leaves when it is longer than this.
const MESSAGE_BYTES: usize = 32 * 1024;
/// A buffer swollen beyond this by a huge row is given back.
const BUFFER_BYTES_MAX: usize = 1024 * 1024;
/// So many changes that are not sent, and the receiver is told that we are alive.
const SKIPPED_CHANGES_MAX: u32 = 256;

type Context = *mut pg_sys::LogicalDecodingContext;
type Transaction = *mut pg_sys::ReorderBufferTXN;

/// State of one walsender's decoding.
struct Decoder {
    environment: Environment,
    /// Stored bytes may be sent: the receiver runs this major version.
    raw: bool,
    plans: Plans,
    out: MessageWriter,
    old: Deformed,
    new: Deformed,
    scratch: Scratch,
    /// Counts transactions, so that each is told of its relations anew.
    transaction: u64,
    /// The changes that come now belong to a transaction that is sent.
    sending: bool,
    skipped: u32,
    deps: Vec<(NodeId, Csn)>,
    dep_bytes: Vec<u8>,
}

/// Called by core when it loads the library as an output plugin.
///
/// # Safety
/// `callbacks` is core's table, to be filled in.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn _PG_output_plugin_init(
    callbacks: *mut pg_sys::OutputPluginCallbacks,
) {
    // SAFETY: as the caller promises.
    let callbacks = unsafe { &mut *callbacks };
    callbacks.startup_cb = Some(startup);
    callbacks.shutdown_cb = Some(shutdown);
    callbacks.filter_by_origin_cb = Some(filter_by_origin);
    callbacks.filter_prepare_cb = Some(filter_prepare);
    callbacks.begin_cb = Some(begin);
    callbacks.commit_cb = Some(commit);
    callbacks.begin_prepare_cb = Some(begin_prepare);
    callbacks.prepare_cb = Some(prepare);
    callbacks.commit_prepared_cb = Some(commit_prepared);
    callbacks.rollback_prepared_cb = Some(rollback_prepared);
    callbacks.change_cb = Some(change);
    callbacks.truncate_cb = Some(truncate);
    callbacks.message_cb = Some(message);
}

#[pg_guard]
unsafe extern "C-unwind" fn startup(
    context: Context,
    options: *mut pg_sys::OutputPluginOptions,
    is_init: bool,
) {
    // SAFETY: core's context and options, valid for this call.
    let named = unsafe {
        (*options).output_type = pg_sys::OutputPluginOutputType::OUTPUT_PLUGIN_BINARY_OUTPUT;
        named_publications((*context).output_plugin_options)
    };
    // Creating a slot decodes nothing.
    let Some(environment) = decode::environment().filter(|_| !is_init) else {
        if !is_init {
            pgrx::error!("multimaster must be loaded through shared_preload_libraries");
        }
        return;
    };
    let decoder = Box::new(Decoder {
        environment,
        raw: decode::same_major(&named, pg_sys::PG_VERSION_NUM / 10_000),
        plans: Plans::default(),
        out: MessageWriter::new(),
        old: Deformed::default(),
        new: Deformed::default(),
        scratch: Scratch::new(),
        transaction: 0,
        sending: false,
        skipped: 0,
        deps: Vec::new(),
        dep_bytes: Vec::new(),
    });
    // SAFETY: the context keeps the pointer for us until `shutdown`.
    unsafe { (*context).output_plugin_private = Box::into_raw(decoder).cast() };
}

/// The value of the option `publication_names`; all other options are core's business and mean nothing here.
///
/// # Safety
/// `options` is core's list of plugin options.
unsafe fn named_publications(options: *mut pg_sys::List) -> String {
    // SAFETY: a list of DefElem, with zero-terminated names.
    unsafe {
        let length = if options.is_null() {
            0
        } else {
            (*options).length
        };
        for index in 0..length {
            let option = pg_sys::list_nth(options, index).cast::<pg_sys::DefElem>();
            if CStr::from_ptr((*option).defname) == c"publication_names" && !(*option).arg.is_null()
            {
                return CStr::from_ptr(pg_sys::defGetString(option))
                    .to_string_lossy()
                    .into_owned();
            }
        }
    }
    String::new()
}

#[pg_guard]
unsafe extern "C-unwind" fn shutdown(context: Context) {
    // SAFETY: what `startup` left there, and nobody uses any more.
    unsafe {
        let decoder = (*context).output_plugin_private.cast::<Decoder>();
        (*context).output_plugin_private = std::ptr::null_mut();
        if !decoder.is_null() {
            drop(Box::from_raw(decoder));
        }
    }
}

/// What was applied here is in the stream of the node where it ran.
#[pg_guard]
unsafe extern "C-unwind" fn filter_by_origin(
    _context: Context,
    origin: pg_sys::RepOriginId,
) -> bool {
    origin != 0
}

/// Every prepared transaction is decoded at its PREPARE, the users' own included.
#[pg_guard]
unsafe extern "C-unwind" fn filter_prepare(
    _context: Context,
    _xid: pg_sys::TransactionId,
    _name: *const c_char,
) -> bool {
    false
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(context: Context, _transaction: Transaction) {
    // SAFETY: core calls with the context given to `startup`.
    unsafe { decoder(context) }.sending = false;
}

#[pg_guard]
unsafe extern "C-unwind" fn commit(
    _context: Context,
    _transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
}

#[pg_guard]
unsafe extern "C-unwind" fn begin_prepare(context: Context, transaction: Transaction) {
    // SAFETY: core's context and transaction, valid for this call.
    let (decoder, transaction) = unsafe { (decoder(context), &*transaction) };
    decoder.out.reset(BUFFER_BYTES_MAX);
    decoder.transaction += 1;
    decoder.sending = true;
    decoder.deps.clear();
    decoder.dep_bytes.clear();
    (decoder.environment.visible)(&mut decoder.deps);
    Deps::describe(&decoder.deps, &mut decoder.dep_bytes);
    // SAFETY: a prepared transaction has a name.
    let name = unsafe { Text(CStr::from_ptr(transaction.gid).to_bytes()) };
    decoder.out.frame(&StreamFrame::Begin(Begin {
        gid: gid_of(&decoder.environment, transaction, name),
        name,
        prepare_lsn: Lsn(transaction.final_lsn),
        deps: Deps::from_bytes(&decoder.dep_bytes).unwrap_or(Deps::NONE),
    }));
}

#[pg_guard]
unsafe extern "C-unwind" fn prepare(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        let (decoder, transaction) = (decoder(context), &*transaction);
        decoder.sending = false;
        let name = Text(CStr::from_ptr(transaction.gid).to_bytes());
        decoder.out.frame(&StreamFrame::Prepare(Prepare {
            gid: gid_of(&decoder.environment, transaction, name),
            end_lsn: Lsn(transaction.end_lsn),
            aborted: transaction.concurrent_abort,
        }));
        flush(context);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn commit_prepared(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe { finished(context, transaction, true) }
}

#[pg_guard]
unsafe extern "C-unwind" fn rollback_prepared(
    context: Context,
    transaction: Transaction,
    _prepare_end: pg_sys::XLogRecPtr,
    _prepared_at: pg_sys::TimestampTz,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe { finished(context, transaction, false) }
}

/// # Safety
/// Core's context and a transaction that was prepared.
unsafe fn finished(context: Context, transaction: Transaction, committed: bool) {
    // SAFETY: as the caller promises.
    unsafe {
        let (decoder, transaction) = (decoder(context), &*transaction);
        let name = Text(CStr::from_ptr(transaction.gid).to_bytes());
        let gid = gid_of(&decoder.environment, transaction, name);
        decoder.out.reset(BUFFER_BYTES_MAX);
        let end = Prepared {
            gid,
            name,
            end_lsn: Lsn(transaction.end_lsn),
        };
        decoder.out.frame(&if committed {
            StreamFrame::CommitPrepared(end)
        } else {
            StreamFrame::RollbackPrepared(end)
        });
        flush(context);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn change(
    context: Context,
    _transaction: Transaction,
    relation: pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: core's context, an open relation and a change of one of its rows, valid for this call.
    unsafe {
        let decoder = decoder(context);
        if !(decoder.sending && decoder.change(relation, &*change)) {
            return decoder.skip(context);
        }
        if decoder.out.len() > MESSAGE_BYTES {
            flush(context);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn truncate(
    context: Context,
    _transaction: Transaction,
    count: i32,
    relations: *mut pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: core's context, `count` open relations and a change of kind TRUNCATE, valid for this call.
    unsafe {
        let decoder = decoder(context);
        if !decoder.sending {
            return;
        }
        let mut ids = Vec::new();
        for relation in std::slice::from_raw_parts(relations, usize::try_from(count).unwrap_or(0)) {
            ids.extend(decoder.introduce(*relation));
        }
        if !ids.is_empty() {
            decoder
                .out
                .truncate((*change).data.truncate.restart_seqs, &ids);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn message(
    context: Context,
    _transaction: Transaction,
    lsn: pg_sys::XLogRecPtr,
    transactional: bool,
    prefix: *const c_char,
    length: pg_sys::Size,
    payload: *const c_char,
) {
    // SAFETY: core's context, a zero-terminated prefix and `length` bytes of payload, valid for this call.
    unsafe {
        let decoder = decoder(context);
        let prefix = CStr::from_ptr(prefix);
        let payload = if length == 0 {
            &[][..]
        } else {
            std::slice::from_raw_parts(payload.cast::<u8>(), length)
        };
        if !transactional {
            if prefix == decode::FINISH_PREFIX {
                decoder.finish_user(payload, Lsn(lsn));
                flush(context);
            }
            return;
        }
        if !decoder.sending {
            return;
        }
        if prefix == decode::DDL_PREFIX {
            decoder.out.frame(&StreamFrame::Ddl(payload));
        } else if prefix == decode::SEQUENCE_PREFIX {
            decoder.out.frame(&StreamFrame::Sequence(payload));
        }
    }
}

/// # Safety
/// `context` was given to `startup`, and `shutdown` was not called.
unsafe fn decoder<'c>(context: Context) -> &'c mut Decoder {
    // SAFETY: the pointer is `startup`'s; callbacks never overlap.
    unsafe { (*context).output_plugin_private.cast::<Decoder>().as_mut() }
        .expect("core starts a plugin before it decodes")
}

/// Sends what has gathered.
///
/// # Safety
/// Core's context, within a callback that may write.
unsafe fn flush(context: Context) {
    // SAFETY: as the caller promises; PrepareWrite leaves an output buffer, to which the message is appended.
    unsafe {
        let decoder = decoder(context);
        let bytes = decoder.out.bytes();
        pg_sys::OutputPluginPrepareWrite(context, true);
        pg_sys::appendBinaryStringInfo((*context).out, bytes.as_ptr().cast(), bytes.len() as i32);
        pg_sys::OutputPluginWrite(context, true);
        decoder.out.reset(BUFFER_BYTES_MAX);
        decoder.skipped = 0;
    }
}

/// The transaction as the cluster knows it; a user's own prepared transaction gets a number here.
fn gid_of(
    environment: &Environment,
    transaction: &pg_sys::ReorderBufferTXN,
    name: Text<'_>,
) -> Gid {
    if let Some((_, gid)) = std::str::from_utf8(name.as_bytes())
        .ok()
        .and_then(Gid::parse)
    {
        return gid;
    }
    let Some(node) = (environment.node)() else {
        pgrx::error!("this node does not belong to a multimaster cluster");
    };
    Gid {
        coordinator: node,
        xid: full_xid(transaction.xid),
        generation: (environment.generation)(),
        // SAFETY: both members of the union are timestamps.
        started_at: unsafe { transaction.xact_time.prepare_time },
    }
}

/// The 64-bit form of a transaction id that is younger than the oldest one in use.
fn full_xid(xid: pg_sys::TransactionId) -> u64 {
    // SAFETY: reads shared memory under a lock.
    let next = unsafe { pg_sys::ReadNextFullTransactionId() }.value;
    let epoch = next >> 32;
    let xid = u64::from(xid.into_inner());
    // An id above the next one to be given belongs to the epoch before.
    if xid > (next & 0xFFFF_FFFF) {
        (epoch.saturating_sub(1) << 32) | xid
    } else {
        (epoch << 32) | xid
    }
}

impl Decoder {
    /// A change that is not sent. Many in a row must not look like a dead walsender.
    ///
    /// # Safety
    /// Core's context, within a callback that may write.
    unsafe fn skip(&mut self, context: Context) {
        self.skipped += 1;
        if self.skipped >= SKIPPED_CHANGES_MAX {
            self.skipped = 0;
            // SAFETY: as the caller promises.
            unsafe { pg_sys::OutputPluginUpdateProgress(context, false) };
        }
    }

    /// Tells the receiver of a relation, once per transaction and again when it has changed; `None` when it is not replicated.
    ///
    /// # Safety
    /// `relation` is an open relation.
    unsafe fn introduce(&mut self, relation: pg_sys::Relation) -> Option<RelationId> {
        // SAFETY: as the caller promises.
        let (plan, id) = unsafe {
            let id = RelationId((*relation).rd_id.to_u32());
            (self.plans.of(relation, &self.environment, self.raw), id)
        };
        let sent = plan.sent.as_mut()?;
        tell(&mut self.out, sent, id, self.transaction);
        Some(id)
    }

    /// Sends a change of a row; false when its relation is not replicated.
    ///
    /// # Safety
    /// `relation` is open and `change` concerns it.
    unsafe fn change(
        &mut self,
        relation: pg_sys::Relation,
        change: &pg_sys::ReorderBufferChange,
    ) -> bool {
        // SAFETY: as the caller promises. The tuples stay where they are during this call, and belong to the relation.
        unsafe {
            let id = RelationId((*relation).rd_id.to_u32());
            let Some(sent) = self
                .plans
                .of(relation, &self.environment, self.raw)
                .sent
                .as_mut()
            else {
                return false;
            };
            tell(&mut self.out, sent, id, self.transaction);
            let tuples = change.data.tp;
            if !tuples.oldtuple.is_null() {
                self.old.load(relation, tuples.oldtuple);
            }
            if !tuples.newtuple.is_null() {
                self.new.load(relation, tuples.newtuple);
            }
            let has_old = !tuples.oldtuple.is_null();
            let (out, old, new) = (&mut self.out, &self.old, &self.new);
            self.scratch
                .run(|| write_change(out, sent, id, change.action, has_old.then_some(old), new));
        }
        true
    }

    fn finish_user(&mut self, payload: &[u8], lsn: Lsn) {
        self.out.reset(BUFFER_BYTES_MAX);
        match UserFinish::from_payload(payload, lsn) {
            Ok(finish) => self.out.frame(&StreamFrame::FinishUser(finish)),
            Err(error) => pgrx::error!("cannot decode a logical message: {error}"),
        }
    }
}

fn tell(out: &mut MessageWriter, relation: &mut SentRelation, id: RelationId, transaction: u64) {
    if relation.told_in != transaction {
        out.relation(id, &relation.fingerprint);
        relation.told_in = transaction;
    }
}

/// # Safety
/// The rows are loaded from tuples of the relation that are still there: the new one for an insert or update, the old one
/// if given.
unsafe fn write_change(
    out: &mut MessageWriter,
    relation: &SentRelation,
    id: RelationId,
    action: pg_sys::ReorderBufferChangeType::Type,
    old: Option<&Deformed>,
    new: &Deformed,
) {
    use pg_sys::ReorderBufferChangeType::*;
    let full = relation.identity == ReplicaIdentity::Full;
    let columns = &relation.columns;
    let mut write_old = |row: &mut RowWriter<'_>| {
        if let Some(old) = old {
            let sent = columns.iter().filter(|column| full || column.key);
            // SAFETY: as the caller promises.
            unsafe { old.write(sent, row) }
        }
    };
    // SAFETY: as the caller promises.
    let write_new = |row: &mut RowWriter<'_>| unsafe { new.write(columns.iter(), row) };
    let old_row = match old {
        None => OldRowWriter::Absent,
        Some(_) if full => OldRowWriter::Full(&mut write_old),
        Some(_) => OldRowWriter::Key(&mut write_old),
    };
    match action {
        REORDER_BUFFER_CHANGE_INSERT => out.insert(id, write_new),
        REORDER_BUFFER_CHANGE_UPDATE => out.update(id, old_row, write_new),
        REORDER_BUFFER_CHANGE_DELETE => out.delete(id, old_row),
        other => pgrx::error!("unexpected kind of change in the WAL: {other}"),
    }
}
