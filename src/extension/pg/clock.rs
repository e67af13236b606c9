//! The server's clock.

use pgrx::pg_sys;

/// Microseconds since 2000-01-01, as PostgreSQL counts. Main thread only.
pub fn now_us() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}
