//! The armed failpoint in shared memory, the setting that arms it, and the death of the server.

use super::shared;
use crate::failpoint::{Action, Failpoint, LISTED, parse};
use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_sys;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

static FAILPOINT: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static FAILPOINTS: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(match CStr::from_bytes_with_nul(LISTED.as_bytes()) {
        Ok(text) => Some(text),
        Err(_) => None,
    });

const CRASH: u32 = 1;
const SLEEP: u32 = 2;
const ERROR: u32 = 3;
const HOLD: u32 = 4;

/// The armed point, in shared memory.
#[repr(C)]
pub struct Armed {
    /// Number of the point plus one; 0 while none is armed.
    point: AtomicU32,
    action: AtomicU32,
    /// Passages until the crash, or milliseconds of sleep.
    count: AtomicI64,
}

/// Declares the settings. Called from `_PG_init` in the postmaster.
pub fn register() {
    // SAFETY: the hooks own nothing with a destructor when PostgreSQL raises, and do not panic.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            c"multimaster.failpoint",
            c"What happens at which point of the commit path; for tests.",
            c"NAME=crash, NAME=crash@N, NAME=sleep:MS or NAME=error.",
            &FAILPOINT,
            GucContext::Suset,
            GucFlags::NO_SHOW_ALL,
            Some(check),
            Some(assign),
            None,
        );
    }
    GucRegistry::define_string_guc(
        c"multimaster.failpoints",
        c"The points that multimaster.failpoint can name.",
        c"Each with the role of the nodes that pass it.",
        &FAILPOINTS,
        GucContext::Internal,
        GucFlags::NO_SHOW_ALL,
    );
}

unsafe extern "C-unwind" fn check(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes a zero-terminated value or null.
    let text = unsafe { text_of(*value) };
    text.is_empty() || parse(text).is_some()
}

unsafe extern "C-unwind" fn assign(value: *const c_char, _extra: *mut c_void) {
    if shared::exists() {
        // SAFETY: as check().
        arm(unsafe { text_of(value) });
    }
}

unsafe fn text_of<'a>(value: *const c_char) -> &'a str {
    if value.is_null() {
        return "";
    }
    // SAFETY: a zero-terminated string that lives as long as the hook runs.
    unsafe { CStr::from_ptr(value) }.to_str().unwrap_or("")
}

/// Arms what the configuration files say; the arbiter does so when it starts, because they are read before there is shared memory.
pub fn arm_as_configured() {
    if let Some(value) = FAILPOINT.get() {
        arm(value.to_str().unwrap_or(""));
    }
}

fn arm(value: &str) {
    let armed = &shared::shared().failpoint;
    armed.point.store(0, Ordering::SeqCst);
    let Some((point, action)) = parse(value) else {
        return;
    };
    let (action, count) = match action {
        Action::Crash { at } => (CRASH, i64::from(at)),
        Action::Sleep { ms } => (SLEEP, i64::from(ms)),
        Action::Hold => (HOLD, 1),
        Action::Error => (ERROR, 1),
    };
    armed.action.store(action, Ordering::SeqCst);
    armed.count.store(count, Ordering::SeqCst);
    armed.point.store(point as u32 + 1, Ordering::SeqCst);
}

/// Whether the postmaster has died: who waits without a latch hears of it in no other way. Callable from any thread.
pub fn is_orphan() -> bool {
    // SAFETY: a plain variable of this process, set before it was forked; a plain system call.
    unsafe { libc::getppid() != pg_sys::PostmasterPid }
}

/// What has to happen now that the point is passed. Callable from any thread.
pub fn take(point: Failpoint) -> Option<Action> {
    let armed = &shared::shared().failpoint;
    if armed.point.load(Ordering::Relaxed) != point as u32 + 1 {
        return None;
    }
    match armed.action.load(Ordering::SeqCst) {
        SLEEP => Some(Action::Sleep {
            ms: armed.count.load(Ordering::SeqCst) as u32,
        }),
        HOLD => Some(Action::Hold),
        _ if armed.count.fetch_sub(1, Ordering::SeqCst) != 1 => None,
        CRASH => Some(Action::Crash { at: 1 }),
        _ => Some(Action::Error),
    }
}

/// Raises an error in the commit sequence of a backend.
pub fn raise_in_backend() {
    // SAFETY: the callers are the commit sequence's frames, which own nothing with a destructor.
    unsafe {
        super::refusal::raise(
            pgrx::PgSqlErrorCode::ERRCODE_INTERNAL_ERROR as i32,
            c"failpoint in the commit sequence",
            c"",
            c"",
        );
    }
}

/// Writes into the server log what happens at a point, so that a test can tell. Callable from any thread.
pub fn log_line(point: Failpoint, what: &str) {
    let name = Failpoint::ALL
        .get(point as usize)
        .map_or("", |(_, name)| name);
    let line = format!("failpoint {name}: {what}\n");
    // SAFETY: a plain system call.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}

/// Kills the postmaster and then every process of the server, this one last: what was not flushed is lost. Callable from any thread.
///
/// The server log says at which point, so that a test can tell this death from others.
pub fn lose_power(point: Failpoint) -> ! {
    log_line(point, "the server dies");
    // SAFETY: ProcGlobal lives in shared memory, which stays mapped; plain system calls otherwise. The postmaster dies first, so that
    // it neither restarts nor reports anything.
    unsafe {
        libc::kill(pg_sys::PostmasterPid, libc::SIGKILL);
        let own = libc::getpid();
        let all = &*pg_sys::ProcGlobal;
        for number in 0..all.allProcCount as usize {
            let pid = (*all.allProcs.add(number)).pid;
            if pid > 0 && pid != own {
                libc::kill(pid, libc::SIGKILL);
            }
        }
        libc::kill(own, libc::SIGKILL);
    }
    unreachable!("SIGKILL cannot be survived")
}
