//! The replication stream: what the output plugin writes and apply reads.
//!
//! One logical-decoding output message carries one or more *frames* (a small transaction is a single message, so that it costs one
//! send and one receive). A message never spans two transactions: it either belongs to one transaction (its first message
//! [begins](Message::begins) with `Begin`, its last one [ends](Message::ends) with `Prepare`) or consists of frames that belong to none
//! (`CommitPrepared`, `RollbackPrepared`, `FinishUser`, `Marker`, `Undo`). A large transaction is sent while it runs: then its changes come in messages of
//! their own, which may lie between those of others and begin with `Piece`; at its PREPARE, `Resume` and `Prepare` follow in a message each.
//!
//! ```text
//! message = version u8, flags u8, frame...
//! frame   = tag u8, length u32, body[length]
//! row     = columns u16, length u32, column...
//! column  = 0 null | 1 unchanged | 2 length u32 bytes | n >= 3: n - 3 bytes
//! ```
//!
//! Everything is little-endian. Rows are the hot path: they are read in place, column by column, without allocation. Whatever the bytes
//! are, decoding returns [`Malformed`] and neither panics nor reads or reserves beyond the message.
//!
//! Names travel as bytes in the encoding of the database, which every node shares; relations and types are named, never numbered:
//! [`RelationId`] is only a handle within one transaction.

mod bytes;
mod frame;
mod message;
mod relation;
mod row;
#[cfg(test)]
mod tests;

pub use bytes::{Malformed, Text};
pub use frame::{
    Begin, Deps, Marker, OldRow, Piece, Prepare, Prepared, Resume, StreamFrame, Truncate, Undo,
    UserFinish,
};
pub use message::{Frames, Message, MessageWriter, OldRowWriter, STREAM_VERSION};
pub use relation::{
    Column, Columns, Relation, RelationId, RelationKind, ReplicaIdentity, ValueFormat,
};
pub use row::{Field, Fields, Row, RowWriter};
