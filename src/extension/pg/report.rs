//! Errors on their way to the client and back.

pub use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::prelude::*;

/// Raises an error (level ERROR) by unwinding.
pub fn raise(report: ErrorReport) -> ! {
    report.report(PgLogLevel::ERROR);
    unreachable!("an error report of level ERROR does not return")
}
