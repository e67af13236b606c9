//! SQL on another server through `libpqwalreceiver`, the libpq client that PostgreSQL itself loads.
//!
//! Every call can be cancelled like a query of this session, and ends at a deadline: core's functions have none of their own, so a timer
//! requests a query cancel which is caught here and becomes [`RemoteError`].

use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::AssertUnwindSafe;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use super::report::CaughtError;
use pgrx::pg_sys;
use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;
use pgrx::prelude::*;

/// `USER_TIMEOUT` of `utils/timeout.h`: asks for a free timer.
#[cfg(feature = "pg15")]
const USER_TIMEOUT: u32 = 12;

/// No timer has been registered in this process yet.
const NO_TIMER: u32 = u32::MAX;

unsafe extern "C-unwind" {
    fn RegisterTimeout(id: u32, handler: extern "C-unwind" fn()) -> u32;
    fn enable_timeout_after(id: u32, delay_ms: c_int);
    fn disable_timeout(id: u32, keep_indicator: bool);
}

static TIMER: AtomicU32 = AtomicU32::new(NO_TIMER);
static TIMED_OUT: AtomicBool = AtomicBool::new(false);

/// Why a call to another server did not succeed: the text of libpq or of that server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RemoteError(pub String);

/// One row of text values.
pub type Row = Vec<Option<String>>;

/// A connection to a database of another (or this) server; closed when dropped.
pub struct Connection {
    raw: *mut pg_sys::WalReceiverConn,
    timeout: Duration,
}

impl Connection {
    /// Connects. The connection is a walsender of the other server, with an empty `search_path` and this database's encoding.
    ///
    /// `timeout` bounds this call and, unless changed, each later one. Raises only when the session is cancelled.
    pub fn open(conninfo: &str, application: &str, timeout: Duration) -> Result<Self, RemoteError> {
        let conninfo = c_string(conninfo)?;
        let application = c_string(application)?;
        let connect = functions().walrcv_connect.ok_or_else(unavailable)?;
        let mut message: *mut c_char = ptr::null_mut();
        let raw = within(timeout, || {
            // SAFETY: the strings outlive the call, `message` is a valid place for a pointer, and the closure owns nothing.
            unsafe {
                pg_guard_ffi_boundary(|| {
                    connect(conninfo.as_ptr(), true, application.as_ptr(), &mut message)
                })
            }
        })?;
        if raw.is_null() {
            return Err(RemoteError(copy_text(message)));
        }
        Ok(Connection { raw, timeout })
    }

    /// Changes the time that each later call may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Host name, address or socket directory, and port, to which libpq has connected.
    pub fn address(&self) -> Option<(String, u16)> {
        let sender_info = functions().walrcv_get_senderinfo?;
        let mut host: *mut c_char = ptr::null_mut();
        let mut port: c_int = 0;
        // SAFETY: the connection is open, both out-pointers are valid, and the closure owns nothing.
        unsafe { pg_guard_ffi_boundary(|| sender_info(self.raw, &mut host, &mut port)) };
        let host = (!host.is_null()).then(|| copy_text(host))?;
        Some((host, u16::try_from(port).ok()?))
    }

    /// Runs one command whose rows, if any, do not matter.
    pub fn run(&self, sql: &str) -> Result<(), RemoteError> {
        match self.exec(sql, 0) {
            // The number of columns is checked only when rows come back.
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Runs one query that returns `columns` columns, all read as text.
    pub fn query(&self, sql: &str, columns: usize) -> Result<Vec<Row>, RemoteError> {
        self.exec(sql, columns)
    }

    fn exec(&self, sql: &str, columns: usize) -> Result<Vec<Row>, RemoteError> {
        let sql = c_string(sql)?;
        let exec = functions().walrcv_exec.ok_or_else(unavailable)?;
        let types = vec![pg_sys::TEXTOID; columns];
        let count = c_int::try_from(columns).map_err(|_| RemoteError("too many columns".into()))?;
        let result = within(self.timeout, || {
            // SAFETY: the connection is open, query and types outlive the call, and the closure owns nothing.
            unsafe { pg_guard_ffi_boundary(|| exec(self.raw, sql.as_ptr(), count, types.as_ptr())) }
        })?;
        // SAFETY: walrcv_exec returns a result in the current memory context, never null.
        unsafe { take_result(result, columns) }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(disconnect) = functions().walrcv_disconnect {
            // SAFETY: the connection is open and not used after this.
            unsafe { pg_guard_ffi_boundary(|| disconnect(self.raw)) }
        }
    }
}

/// Lets libpq judge a connection string; the error is its parser's message.
pub fn check_conninfo(conninfo: &str) -> Result<(), RemoteError> {
    let conninfo = c_string(conninfo)?;
    let check = functions().walrcv_check_conninfo.ok_or_else(unavailable)?;
    PgTryBuilder::new(AssertUnwindSafe(|| {
        // SAFETY: the string outlives the call and the closure owns nothing.
        unsafe { pg_guard_ffi_boundary(|| check(conninfo.as_ptr())) };
        Ok(())
    }))
    .catch_when(PgSqlErrorCode::ERRCODE_SYNTAX_ERROR, |cause| {
        Err(RemoteError(message_of(&cause).trim_end().to_owned()))
    })
    .execute()
}

/// The functions of `libpqwalreceiver`, which is loaded on first use.
fn functions() -> &'static pg_sys::WalReceiverFunctionsType {
    // SAFETY: loading a library of the server through the guarded binding; once loaded, the pointer refers to a table that lives as long as
    // the process.
    unsafe {
        if pg_sys::WalReceiverFunctions.is_null() {
            pg_sys::load_file(c"libpqwalreceiver".as_ptr(), false);
        }
        &*pg_sys::WalReceiverFunctions
    }
}

fn unavailable() -> RemoteError {
    RemoteError("this server's libpqwalreceiver lacks a function".into())
}

fn c_string(text: &str) -> Result<CString, RemoteError> {
    CString::new(text).map_err(|_| RemoteError("the text contains a zero byte".into()))
}

fn copy_text(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: not null, and PostgreSQL's texts are terminated.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .trim_end()
        .to_owned()
}

fn message_of(cause: &CaughtError) -> String {
    match cause {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => {
            report.message().to_owned()
        }
        CaughtError::RustPanic { ereport, .. } => ereport.message().to_owned(),
    }
}

/// Runs `call`, and makes it fail when it takes longer than `timeout`.
///
/// A connection attempt that is cut off leaves its socket behind until the session ends, as in core.
fn within<R>(timeout: Duration, call: impl FnOnce() -> R) -> Result<R, RemoteError> {
    let timer = start_timer(timeout);
    PgTryBuilder::new(AssertUnwindSafe(|| Ok(call())))
        .catch_when(PgSqlErrorCode::ERRCODE_QUERY_CANCELED, |cause| {
            if TIMED_OUT.load(Ordering::Relaxed) {
                Err(RemoteError(format!(
                    "no answer within {} s",
                    timeout.as_secs_f32()
                )))
            } else {
                cause.rethrow()
            }
        })
        .finally(move || stop_timer(timer))
        .execute()
}

fn start_timer(timeout: Duration) -> u32 {
    let millis = c_int::try_from(timeout.as_millis())
        .unwrap_or(c_int::MAX)
        .max(1);
    TIMED_OUT.store(false, Ordering::Relaxed);
    // SAFETY: timers exist in every process that runs SQL; the handler only stores flags. The calls raise for a misuse only, and this
    // frame owns nothing that would have to be dropped.
    unsafe {
        if TIMER.load(Ordering::Relaxed) == NO_TIMER {
            TIMER.store(RegisterTimeout(USER_TIMEOUT, on_timeout), Ordering::Relaxed);
        }
        let timer = TIMER.load(Ordering::Relaxed);
        enable_timeout_after(timer, millis);
        timer
    }
}

fn stop_timer(timer: u32) {
    // SAFETY: `timer` was registered by `start_timer`.
    unsafe { disable_timeout(timer, false) };
    if TIMED_OUT.load(Ordering::Relaxed) {
        // The cancel was meant for the call alone, which may have ended by itself in the same moment.
        // SAFETY: a flag of this process.
        unsafe { pg_sys::QueryCancelPending = 0 };
    }
}

/// Runs in PostgreSQL's SIGALRM handler, which also wakes the process by its latch.
extern "C-unwind" fn on_timeout() {
    TIMED_OUT.store(true, Ordering::Relaxed);
    // SAFETY: stores to flags that PostgreSQL's own signal handlers store to in the same way.
    unsafe {
        pg_sys::QueryCancelPending = 1;
        pg_sys::InterruptPending = 1;
    }
}

/// Copies a result out of PostgreSQL's memory and frees it.
///
/// # Safety
/// `result` must come from `walrcv_exec`, with `columns` columns of type text.
unsafe fn take_result(
    result: *mut pg_sys::WalRcvExecResult,
    columns: usize,
) -> Result<Vec<Row>, RemoteError> {
    // SAFETY: the caller's promise; the fields are set according to the status.
    unsafe {
        let outcome = match (*result).status {
            pg_sys::WalRcvExecStatus::WALRCV_ERROR => Err(RemoteError(copy_text((*result).err))),
            pg_sys::WalRcvExecStatus::WALRCV_OK_TUPLES => Ok(read_rows(&*result, columns)),
            _ => Ok(Vec::new()),
        };
        if !(*result).tuplestore.is_null() {
            pg_sys::tuplestore_end((*result).tuplestore);
        }
        if !(*result).err.is_null() {
            pg_sys::pfree((*result).err.cast());
        }
        pg_sys::pfree(result.cast());
        outcome
    }
}

/// # Safety
/// `result` must hold tuples of `columns` columns of type text.
unsafe fn read_rows(result: &pg_sys::WalRcvExecResult, columns: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    // SAFETY: tuplestore and descriptor belong together (the caller's promise); the slot lives until it is dropped below, and values are
    // copied before the next tuple replaces them.
    unsafe {
        let slot = pg_sys::MakeSingleTupleTableSlot(
            result.tupledesc,
            &raw const pg_sys::TTSOpsMinimalTuple,
        );
        while pg_sys::tuplestore_gettupleslot(result.tuplestore, true, false, slot) {
            pg_sys::slot_getallattrs(slot);
            let value = |column: usize| {
                let datum = *(*slot).tts_values.add(column);
                let is_null = *(*slot).tts_isnull.add(column);
                String::from_datum(datum, is_null)
            };
            rows.push((0..columns).map(value).collect());
        }
        pg_sys::ExecDropSingleTupleTableSlot(slot);
    }
    rows
}

/// Sleeps, unless the session is cancelled, which raises.
pub fn pause(time: Duration) {
    let millis = std::ffi::c_long::try_from(time.as_millis()).unwrap_or(std::ffi::c_long::MAX);
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: waits on this process's own latch through guarded bindings.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            events as c_int,
            millis,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}
