//! What travels between nodes, as bytes: encodings, versions, limits, and the handshake that comes first.
//!
//! Nothing here opens a socket. Every decoder is given bytes that anybody may have written; it answers with a value or an
//! error, never panics, and takes no more memory than the named limits allow. `docs/wire.md` shows the layouts.
//!
//! - [`hello`], [`handshake`]: the fixed-size records with which two arbiters meet and prove that they hold the secret;
//! - [`channel`]: sealing and opening of frames afterwards;
//! - [`frame`]: what is inside a frame;
//! - [`stream`], [`ddl`]: what the output plugin writes and apply reads.
#![forbid(unsafe_code)]

pub mod channel;
pub mod ddl;
pub mod frame;
pub mod handshake;
pub mod hello;
pub mod stream;
