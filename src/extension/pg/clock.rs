//! The server's clock.

use pgrx::pg_sys;

/// Milliseconds since the machine was started, by the clock that nobody sets; the same in all its processes and threads.
///
/// It goes on while the machine is suspended. By one that stands still meanwhile, a node that wakes up would still hold the lease that the
/// others have long waited for.
pub fn monotonic_ms() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the structure; this clock exists since Linux 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Processor time that a process of this server has used, milliseconds; zero when there is none of this id. Callable from any thread.
pub fn cpu_ms_of(pid: i32) -> u64 {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both fill what they are given; a process that is gone is an error.
    unsafe {
        if pid == 0
            || libc::clock_getcpuclockid(pid, &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
        {
            return 0;
        }
    }
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Microseconds since 2000-01-01, as PostgreSQL counts. Main thread only.
pub fn now_us() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}
