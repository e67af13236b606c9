//! Applying rows: what needs no PostgreSQL.
//!
//! A relation of the stream is matched with a table here by names ([`matching`]); whatever stands in the way of applying
//! is an [`ApplyError`]; [`key_text`] shows a row's key to the one whose transaction met it. The executor's side is in
//! [`crate::pg::rows`].

pub mod key_text;
pub mod matching;

mod error;

pub use error::{ApplyError, TableName};
