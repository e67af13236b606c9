//! Applying what the peers did.
//!
//! One receiver per peer cuts the peer's stream into transactions and hands each to a free worker of a pool. A worker applies, PREPAREs under the
//! origin's gid and votes. Workers finish out of order; `progress` keeps the mark up to which everything is safe here.

mod ends;
pub mod feed;
pub mod finish;
mod order;
pub mod progress;
pub mod receiver;
pub mod recovery;
pub mod rows;
mod spool;
mod stream_message;
mod streamed;
pub mod worker;
