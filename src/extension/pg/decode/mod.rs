//! The output plugin: core's decoding callbacks, turned into the replication stream.
//!
//! Frames of a transaction gather in one buffer that leaves at the PREPARE, or earlier when it is full: the walsender pays a system call
//! per message, and the receiver another.
//!
//! Every callback is guarded: an error of PostgreSQL unwinds through our frames and is raised again at their edge. That
//! matters for a transaction that is rolled back while it is being decoded: core stops it with an error raised inside a callback, catches the
//! error itself, and goes on to the prepare callback.

mod ahead;
mod decoder;
mod pieces;
mod plan;
mod values;

use super::standby;
use crate::decode;
use crate::failpoint::{Failpoint, hit};
use crate::guc;
use decoder::Decoder;
use pgrx::pg_sys;
use pgrx::prelude::*;
use protocol::Lsn;
use std::ffi::{CStr, c_char};

type Context = *mut pg_sys::LogicalDecodingContext;
type Transaction = *mut pg_sys::ReorderBufferTXN;

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
    callbacks.stream_start_cb = Some(stream_start);
    callbacks.stream_stop_cb = Some(stream_stop);
    callbacks.stream_abort_cb = Some(stream_abort);
    callbacks.stream_prepare_cb = Some(stream_prepare);
    callbacks.stream_commit_cb = Some(stream_commit);
    callbacks.stream_change_cb = Some(stream_change);
    callbacks.stream_message_cb = Some(stream_message);
    callbacks.stream_truncate_cb = Some(stream_truncate);
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
    let decoder = Box::new(Decoder::new(environment, &named));
    // A node that recovers gets each transaction whole.
    let streams = !decoder.recovers() && guc::stream_in_progress();
    // SAFETY: the context keeps the pointer for us until `shutdown`. A slot that was copied knows nothing of PREPARE: with the option given, core asks
    // `filter_prepare`, which is how the name of a transaction is learnt that is decoded at its commit.
    unsafe {
        (*context).twophase_opt_given = true;
        (*context).streaming &= streams;
        (*context).output_plugin_private = Box::into_raw(decoder).cast();
    }
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

/// What was applied here is in the stream of the node where it ran; a node that recovers gets it from here nevertheless.
#[pg_guard]
unsafe extern "C-unwind" fn filter_by_origin(
    context: Context,
    origin: pg_sys::RepOriginId,
) -> bool {
    // SAFETY: core calls with the context given to `startup`, within its decoding of a record. While a slot is being made there is no decoder yet.
    unsafe {
        let Some(recovers) = (*context)
            .output_plugin_private
            .cast::<Decoder>()
            .as_ref()
            .map(Decoder::recovers)
        else {
            return origin != 0;
        };
        ahead::read_on(context) || (origin != 0 && !recovers)
    }
}

/// Every prepared transaction is decoded at its PREPARE, the users' own included; for a node that recovers, the cluster's at their commit.
#[pg_guard]
unsafe extern "C-unwind" fn filter_prepare(
    context: Context,
    xid: pg_sys::TransactionId,
    name: *const c_char,
) -> bool {
    // SAFETY: core calls with the context given to `startup`, and a zero-terminated name.
    unsafe {
        // A slot that is being made decodes nothing, but asks, when transactions are prepared meanwhile.
        let decoder = (*context).output_plugin_private.cast::<Decoder>().as_mut();
        decoder.is_some_and(|decoder| decoder.is_for_commit(xid, CStr::from_ptr(name)))
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(context: Context, transaction: Transaction) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe { decoder(context).begin_commit(&*transaction) }
}

#[pg_guard]
unsafe extern "C-unwind" fn commit(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        if decoder(context).end_commit(&*transaction) {
            flush(context);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin_prepare(context: Context, transaction: Transaction) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe { decoder(context).begin(&*transaction) }
}

#[pg_guard]
unsafe extern "C-unwind" fn prepare(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        decoder(context).prepare(&*transaction);
        standby::await_flush(Lsn((*transaction).end_lsn));
        hit(Failpoint::DecodePrepare);
        flush(context);
        decoder(context).take_name(transaction);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn commit_prepared(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        finish(context, transaction, true);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn rollback_prepared(
    context: Context,
    transaction: Transaction,
    _prepare_end: pg_sys::XLogRecPtr,
    _prepared_at: pg_sys::TimestampTz,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        finish(context, transaction, false);
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
        if decoder.is_sending() && decoder.change(relation, &*change) {
            if decoder.is_full() {
                flush(context);
            }
        } else if decoder.skip() {
            // Many changes that are not sent must not look like a dead walsender.
            pg_sys::OutputPluginUpdateProgress(context, false);
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
        truncate_by(decoder(context), count, relations, change);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn message(
    context: Context,
    transaction: Transaction,
    _end: pg_sys::XLogRecPtr,
    transactional: bool,
    prefix: *const c_char,
    length: pg_sys::Size,
    payload: *const c_char,
) {
    // SAFETY: core's context, a zero-terminated prefix and `length` bytes of payload, valid for this call.
    unsafe {
        let decoder = decoder(context);
        let prefix = CStr::from_ptr(prefix);
        let payload = payload_of(payload, length);
        if transactional {
            decoder.transactional_message(prefix, payload, &*transaction);
        } else {
            // Where the message begins, which is what decides whether it comes again.
            let begins = Lsn((*(*context).reader).ReadRecPtr);
            if decoder.lone_message(prefix, payload, begins) {
                flush(context);
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_start(context: Context, transaction: Transaction) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe { decoder(context).begin_piece((*transaction).xid) }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_stop(context: Context, _transaction: Transaction) {
    // SAFETY: core's context, valid for this call.
    unsafe {
        if decoder(context).end_piece() {
            flush(context);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_abort(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        if decoder(context).undo(&*transaction) {
            flush(context);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_prepare(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        decoder(context).resume(&*transaction);
        standby::await_flush(Lsn((*transaction).end_lsn));
        hit(Failpoint::DecodePrepare);
        flush(context);
        decoder(context).prepare(&*transaction);
        flush(context);
        decoder(context).take_name(transaction);
    }
}

/// What commits without PREPARE is local, whatever was sent of it.
#[pg_guard]
unsafe extern "C-unwind" fn stream_commit(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: core's context and transaction, valid for this call.
    unsafe {
        if decoder(context).undo(&*transaction) {
            flush(context);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_change(
    context: Context,
    _transaction: Transaction,
    relation: pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: core's context, an open relation and a change of one of its rows, valid for this call.
    unsafe {
        let decoder = turn_to(context, (*(*change).txn).xid, false);
        if decoder.change(relation, &*change) {
            if decoder.is_full() {
                flush(context);
            }
        } else if decoder.skip() {
            pg_sys::OutputPluginUpdateProgress(context, false);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_truncate(
    context: Context,
    _transaction: Transaction,
    count: i32,
    relations: *mut pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: core's context, `count` open relations and a change of kind TRUNCATE, valid for this call.
    unsafe {
        let decoder = turn_to(context, (*(*change).txn).xid, true);
        truncate_by(decoder, count, relations, change);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_message(
    context: Context,
    transaction: Transaction,
    _lsn: pg_sys::XLogRecPtr,
    transactional: bool,
    prefix: *const c_char,
    length: pg_sys::Size,
    payload: *const c_char,
) {
    // SAFETY: core's context and transaction, a zero-terminated prefix and `length` bytes of payload, valid for this call.
    unsafe {
        let prefix = CStr::from_ptr(prefix);
        if !transactional || !decode::is_ours(prefix) {
            return;
        }
        let payload = payload_of(payload, length);
        // Core does not say to which subtransaction a message belongs, but this is the one whose end it watches for while it decodes the message.
        let watched = pg_sys::CheckXidAlive;
        let sub = if watched == pg_sys::InvalidTransactionId {
            (*transaction).xid
        } else {
            watched
        };
        turn_to(context, sub, true).transactional_message(prefix, payload, &*transaction);
    }
}

/// Sends how a prepared transaction ended, when whoever follows this server as a standby has it, too.
///
/// # Safety
/// As [`flush`], with core's transaction.
unsafe fn finish(context: Context, transaction: Transaction, commits: bool) {
    // SAFETY: as the caller promises.
    unsafe {
        decoder(context).finish(&*transaction, commits);
        standby::await_flush(Lsn((*transaction).end_lsn));
        hit(Failpoint::DecodeOutcome);
        flush(context);
    }
}

/// # Safety
/// `count` open relations and a change of kind TRUNCATE.
unsafe fn truncate_by(
    decoder: &mut Decoder,
    count: i32,
    relations: *mut pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let relations = std::slice::from_raw_parts(relations, usize::try_from(count).unwrap_or(0));
        decoder.truncate(relations, (*change).data.truncate.restart_seqs);
    }
}

/// # Safety
/// `length` bytes that live as long as the callback; without any the pointer means nothing.
unsafe fn payload_of<'c>(payload: *const c_char, length: pg_sys::Size) -> &'c [u8] {
    match length {
        0 => &[],
        // SAFETY: as the caller promises.
        length => unsafe { std::slice::from_raw_parts(payload.cast::<u8>(), length) },
    }
}

/// The decoder, with a message open for a change of this subtransaction.
///
/// # Safety
/// As [`flush`].
unsafe fn turn_to<'c>(context: Context, sub: pg_sys::TransactionId, hold: bool) -> &'c mut Decoder {
    // SAFETY: as the caller promises.
    unsafe {
        if decoder(context).must_leave(sub, hold) {
            flush(context);
        }
        let decoder = decoder(context);
        decoder.continue_piece(sub, hold);
        decoder
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
        let bytes = decoder.message();
        pg_sys::OutputPluginPrepareWrite(context, true);
        pg_sys::appendBinaryStringInfo((*context).out, bytes.as_ptr().cast(), bytes.len() as i32);
        pg_sys::OutputPluginWrite(context, true);
        decoder.sent();
    }
}
