//! Being a process of the server: latches, interrupts, background workers, wait events.

use super::raw;
use pgrx::pg_sys;
use std::ffi::{CStr, c_int, c_long};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// True in processes whose commits never become global: apply workers, arbiter, receivers, monitor.
static NEVER_GLOBAL: AtomicBool = AtomicBool::new(false);

/// Marks the calling process as one whose transactions stay local.
pub fn stay_local() {
    NEVER_GLOBAL.store(true, Ordering::Relaxed);
}

/// See [`stay_local`].
pub fn is_local_process() -> bool {
    NEVER_GLOBAL.load(Ordering::Relaxed)
}

/// Whether the server is a standby or still recovers.
pub fn is_standby() -> bool {
    // SAFETY: reads shared memory once, then a flag of this process.
    unsafe { raw::RecoveryInProgress() }
}

/// Sleeps without looking at interrupts, milliseconds.
pub fn pause_ms(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// What our processes wait for, as `pg_stat_activity.wait_event` (type `Extension`) shows it.
///
/// PostgreSQL 15 and 16 show every wait of an extension as `Extension`; the number is kept for servers that can name it.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Wait {
    Votes = 0,
    PeerCommits = 1,
    Work = 2,
    CausalOrder = 3,
    Stream = 4,
    Worker = 5,
    Ring = 6,
}

/// Waits until the process's latch is set or the time is over, then resets the latch. Returns whether the latch was set.
///
/// Interrupts are not processed. Never raises; the process exits when the postmaster has died.
pub fn wait_latch(timeout: Duration, _wait: Wait) -> bool {
    let events = (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as c_int;
    // SAFETY: MyLatch is this process's own latch; neither call raises for it.
    unsafe {
        let fired = raw::WaitLatch(
            pg_sys::MyLatch,
            events,
            timeout.as_millis().min(i64::MAX as u128) as c_long,
            pg_sys::PG_WAIT_EXTENSION,
        );
        let woken = fired as u32 & pg_sys::WL_LATCH_SET != 0;
        if woken {
            raw::ResetLatch(pg_sys::MyLatch);
        }
        absorb_barriers();
        woken
    }
}

/// Takes part in what every process of the server is waited for, as DROP DATABASE and DROP TABLESPACE do before they remove files. Elsewhere that is
/// a part of CHECK_FOR_INTERRUPTS, which a wait for votes must not do.
fn absorb_barriers() {
    // SAFETY: a flag that a signal handler of this process sets; what is done (closing files) raises no errors.
    unsafe {
        if std::ptr::read_volatile(&raw const pg_sys::ProcSignalBarrierPending) != 0 {
            raw::ProcessProcSignalBarrier();
        }
    }
}

/// What a process with a socket waits for: its latch, the socket, the end of the postmaster. Kept by the kernel between waits, where
/// `WaitLatchOrSocket` would cost seven system calls for each.
pub struct SocketWait {
    set: *mut pg_sys::WaitEventSet,
    socket: i32,
}

impl SocketWait {
    /// For a socket that stays open at least as long as this is used.
    pub fn new(socket: i32) -> SocketWait {
        let add = |set, events, socket, latch| {
            // SAFETY: a set made with room for three; the latch is this process's own.
            unsafe { pg_sys::AddWaitEventToSet(set, events, socket, latch, std::ptr::null_mut()) }
        };
        // SAFETY: the set lives in a context that lives as long as the process, and is freed when this is dropped.
        let set = unsafe { pg_sys::CreateWaitEventSet(pg_sys::TopMemoryContext, 3) };
        // SAFETY: this process's own latch.
        let latch = unsafe { pg_sys::MyLatch };
        add(set, pg_sys::WL_LATCH_SET, pg_sys::PGINVALID_SOCKET, latch);
        add(
            set,
            pg_sys::WL_EXIT_ON_PM_DEATH,
            pg_sys::PGINVALID_SOCKET,
            std::ptr::null_mut(),
        );
        add(
            set,
            pg_sys::WL_SOCKET_READABLE,
            socket,
            std::ptr::null_mut(),
        );
        SocketWait { set, socket }
    }

    /// The socket it was made for.
    pub fn socket(&self) -> i32 {
        self.socket
    }

    /// Waits as [`wait_latch`] does, but also for the socket to become readable.
    pub fn wait(&self, timeout: Duration, _wait: Wait) {
        let mut event = pg_sys::WaitEvent::default();
        // SAFETY: a live set and room for one event; the latch is this process's own.
        unsafe {
            let fired = pg_sys::WaitEventSetWait(
                self.set,
                timeout.as_millis() as c_long,
                &mut event,
                1,
                pg_sys::PG_WAIT_EXTENSION,
            );
            if fired > 0 && event.events & pg_sys::WL_LATCH_SET != 0 {
                raw::ResetLatch(pg_sys::MyLatch);
            }
        }
    }
}

impl Drop for SocketWait {
    fn drop(&mut self) {
        // SAFETY: made by new() and not freed elsewhere.
        unsafe { pg_sys::FreeWaitEventSet(self.set) };
    }
}

/// Raises a pending cancel or terminate, and re-reads the configuration after SIGHUP. Guarded: raises by unwinding.
pub fn check_interrupts() {
    pgrx::check_for_interrupts!();
    if sighup_pending() {
        reload();
    }
}

/// Whether the configuration files are to be read again; clears the request.
pub fn sighup_pending() -> bool {
    pgrx::bgworkers::BackgroundWorker::sighup_received()
}

/// Reads the configuration files again. Between transactions only.
pub fn reload() {
    // SAFETY: as core's workers do at the top of their loops.
    unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
}

/// Ends a background worker so that the postmaster starts it again after its restart time.
pub fn exit_to_restart() -> ! {
    // SAFETY: the regular end of a process; exit code 0 would mean that the worker is never needed again.
    unsafe { pg_sys::proc_exit(1) }
}

/// Ends this process in the way that makes the postmaster restart all processes with fresh shared memory.
pub fn crash_server() -> ! {
    std::process::abort()
}

/// Whether the backend was asked to cancel or to go away. Looks only.
pub fn interrupt_pending() -> bool {
    // SAFETY: flags set by signal handlers of this process; volatile in C, read once here.
    unsafe {
        std::ptr::read_volatile(&raw const pg_sys::QueryCancelPending) != 0
            || std::ptr::read_volatile(&raw const pg_sys::ProcDiePending) != 0
    }
}

/// Whether the process was asked to go away. Looks only.
pub fn terminate_pending() -> bool {
    // SAFETY: as above.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::ProcDiePending) != 0 }
}

/// Runs `work` without being ended by a cancel or terminate in it, as writing to the log would (`errfinish` of elog.c looks for them). They stay pending.
pub fn without_interrupts(work: impl FnOnce()) {
    // SAFETY: plain accesses to a variable of this process, as HOLD_INTERRUPTS and RESUME_INTERRUPTS of miscadmin.h make them. An error in between
    // sets it to zero itself.
    unsafe {
        let held = pg_sys::InterruptHoldoffCount;
        pg_sys::InterruptHoldoffCount = held + 1;
        work();
        pg_sys::InterruptHoldoffCount = held;
    }
}

/// Ends the process if it was asked to go away; a cancel stays pending.
pub fn exit_if_terminated() {
    if terminate_pending() {
        pgrx::check_for_interrupts!();
    }
}

/// Attaches a background worker to the database of the cluster as the bootstrap superuser.
pub fn connect(database: u32) {
    let database = pg_sys::Oid::from(database);
    // SAFETY: called once at the start of a background worker that asked for a database connection.
    unsafe { pg_sys::BackgroundWorkerInitializeConnectionByOid(database, pg_sys::Oid::INVALID, 0) };
    super::standby::wait_always();
}

/// Attaches a background worker to the shared catalogs only.
pub fn connect_shared_catalogs() {
    // SAFETY: as connect().
    unsafe { pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0) };
}

/// Tells core to tag this process's WAL as applied from elsewhere, without tracking progress (architecture.md, "Origin of WAL").
pub fn tag_as_applied() {
    // SAFETY: a plain variable of this process. DoNotReplicateId asks for the tag without a progress entry.
    unsafe { pg_sys::replorigin_session_origin = pg_sys::RepOriginId::MAX };
}

/// Runs `work` as if its WAL came from here.
pub fn untagged<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: plain accesses to a variable of this process. An error in between ends the process or is not caught before the next tag_as_applied.
    unsafe {
        let tag = pg_sys::replorigin_session_origin;
        pg_sys::replorigin_session_origin = pg_sys::RepOriginId::MIN;
        let result = work();
        pg_sys::replorigin_session_origin = tag;
        result
    }
}

/// Installs SIGTERM (core's `die`) and SIGHUP handlers and unblocks signals.
pub fn attach_signals() {
    use pgrx::bgworkers::{BackgroundWorker, SignalWakeFlags};
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
    // SAFETY: at the start of a background worker. `die` makes SIGTERM an interrupt that CHECK_FOR_INTERRUPTS raises, also inside lock waits;
    // StatementCancelHandler the same for SIGINT.
    unsafe {
        pg_sys::pqsignal(libc::SIGTERM, Some(raw::die));
        pg_sys::pqsignal(libc::SIGINT, Some(raw::StatementCancelHandler));
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Starts a background worker `function(index)`; false when the server has no free slot for it.
pub fn start_worker(name: &str, function: &str, argument: i32) -> bool {
    use pgrx::IntoDatum;
    use pgrx::bgworkers::BackgroundWorkerBuilder;
    BackgroundWorkerBuilder::new(name)
        .set_type(name)
        .set_library("multimaster")
        .set_function(function)
        .set_argument(argument.into_datum())
        .enable_spi_access()
        .set_restart_time(None)
        .load_dynamic()
        .is_ok()
}

/// Shows what the process does in `pg_stat_activity.query`.
pub fn report_activity(text: &CStr) {
    // SAFETY: copies the text into this backend's status entry.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr()) };
}

/// Runs `work` in a transaction of its own, with a snapshot, and commits it. An error unwinds; the process then ends or aborts.
pub fn in_transaction<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: called by background workers outside of any transaction.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let result = work();
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
        result
    }
}

/// As [`in_transaction`], without a snapshot.
pub fn in_bare_transaction<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: called by background workers outside of any transaction.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        let result = work();
        pg_sys::CommitTransactionCommand();
        result
    }
}

/// Hands on what this process has counted (rows written, WAL, buffers), at most once a second. Autovacuum lives on it. Outside of any transaction.
pub fn report_statistics() {
    // SAFETY: what core's own processes do when they become idle.
    unsafe { pg_sys::pgstat_report_stat(false) };
}

/// Begins a transaction in a background worker, with a snapshot pushed.
pub fn begin_transaction() {
    // SAFETY: outside of any transaction.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
    }
}

/// Commits the transaction of [`begin_transaction`].
pub fn commit_transaction() {
    // SAFETY: in a transaction begun by StartTransactionCommand.
    unsafe { pg_sys::CommitTransactionCommand() };
}

/// Commits of this process do not wait for the disk: what a crash loses comes again.
pub fn commit_asynchronously() {
    // SAFETY: zero-terminated literals; outside of any transaction.
    unsafe {
        pg_sys::SetConfigOption(
            c"synchronous_commit".as_ptr(),
            c"off".as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
}

/// Aborts whatever transaction is open and forgets a cancel that was meant for it.
pub fn abort_transaction() {
    // SAFETY: legal in every transaction state; clears plain flags of this process.
    unsafe {
        pg_sys::AbortOutOfAnyTransaction();
        pg_sys::QueryCancelPending = 0;
    }
}

/// Forgets a pending cancel: it was meant for an earlier transaction.
pub fn forget_cancel() {
    // SAFETY: a plain flag of this process.
    unsafe { pg_sys::QueryCancelPending = 0 };
}

/// Attaches to the database of the cluster, with the settings that applying needs whatever the database's or the server's defaults are.
pub fn connect_to_cluster() {
    connect(super::shared::shared().database.load(Ordering::Acquire));
    for (name, value) in APPLY_SETTINGS {
        // SAFETY: zero-terminated literals; at the start of a background worker, outside of any transaction.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

/// A database made read-only by default, say, must not keep its peers' changes out.
const APPLY_SETTINGS: [(&CStr, &CStr); 7] = [
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    (c"lock_timeout", c"0"),
    (c"session_replication_role", c"origin"),
    (c"row_security", c"off"),
    (c"search_path", c"pg_catalog"),
];

/// Runs a closure when the process ends, however it ends short of a crash.
pub fn at_exit(work: fn()) -> AtExit {
    unsafe extern "C-unwind" fn call(_code: c_int, argument: pg_sys::Datum) {
        // SAFETY: the datum is the function pointer stored below.
        let work: fn() = unsafe { std::mem::transmute(argument.value()) };
        work();
    }
    // SAFETY: the callback only touches shared memory, which is still attached before shmem exit.
    unsafe { pg_sys::before_shmem_exit(Some(call), pg_sys::Datum::from(work as usize)) };
    AtExit
}

/// Says that an exit callback is registered.
pub struct AtExit;
