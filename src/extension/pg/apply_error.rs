//! Errors of applying, caught so that they become a no vote.

use super::report::CaughtError;
use crate::apply::rows::ApplyError;
use pgrx::PgTryBuilder;
use wire::stream::Malformed;

/// Why a transaction could not be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyFailure {
    pub sqlstate: [u8; 5],
    pub message: String,
    pub detail: String,
    /// Table and key in hand, as `table "s.t", key (...)`.
    pub target: Option<String>,
}

impl ApplyFailure {
    /// The stream cannot be read: different versions, or a bug.
    pub fn malformed(error: Malformed) -> ApplyFailure {
        ApplyFailure {
            sqlstate: *b"08P01",
            message: format!("the replication stream cannot be read: {error}"),
            detail: String::new(),
            target: None,
        }
    }

    /// The set of members has changed while the transaction was applied.
    pub fn generation_over() -> ApplyFailure {
        ApplyFailure {
            sqlstate: *b"40001",
            message: "the set of working nodes has changed".to_owned(),
            detail: String::new(),
            target: None,
        }
    }

    /// Whether nothing but room is missing, on a disk or in memory (class 53, "Insufficient Resources"): it may succeed at another time.
    pub fn wants_room(&self) -> bool {
        self.sqlstate.starts_with(b"53")
    }

    fn caught(error: &CaughtError) -> ApplyFailure {
        let (CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic {
            ereport: report, ..
        }) = error;
        ApplyFailure {
            sqlstate: sqlstate_text(report.sql_error_code() as i32),
            message: report.message().to_owned(),
            detail: report.detail().unwrap_or_default().to_owned(),
            target: super::rows::current_target(),
        }
    }
}

/// Runs `work`; an error of PostgreSQL or a panic in it becomes a failure. The transaction is left for the caller to abort.
pub fn attempt<T>(work: impl FnOnce() -> Result<T, ApplyFailure>) -> Result<T, ApplyFailure> {
    PgTryBuilder::new(std::panic::AssertUnwindSafe(work))
        .catch_others(|error| Err(ApplyFailure::caught(&error)))
        .catch_rust_panic(|error| Err(ApplyFailure::caught(&error)))
        .execute()
}

/// The five letters of a packed SQLSTATE (`PGUNSIXBIT` of utils/elog.h).
fn sqlstate_text(code: i32) -> [u8; 5] {
    std::array::from_fn(|place| ((code >> (6 * place)) & 0x3f) as u8 + b'0')
}

impl From<ApplyError> for ApplyFailure {
    fn from(error: ApplyError) -> Self {
        ApplyFailure {
            sqlstate: error.sqlstate(),
            message: error.to_string(),
            detail: error.detail(),
            target: super::rows::current_target(),
        }
    }
}
