//! What heartbeats carry besides the fields that `wire` knows: pairs of a tag and bytes. Who does not know a tag skips it.

use serde::{Serialize, de::DeserializeOwned};
use wire::frame::Heartbeat;

/// A tag and its bytes.
pub type Extra = (u16, Vec<u8>);

/// The nodes that the sender talks to and whose streams it receives, as bits: `u16`.
pub const RECEIVING: u16 = 1;
/// The sender's promises: `Vec<Grant>`.
pub const GRANTS: u16 = 2;
/// The sender's times for heartbeats and stuck nodes, milliseconds: `(u64, u64, u64)`. Tag 3 is the presence, which `wire` knows.
pub const TIMES: u16 = 4;
/// The nodes for which the sender keeps no WAL any more, as bits: `u16`. Left out while there are none.
pub const NEEDS_COPY: u16 = 5;
/// What makes no progress at the sender: `Idle`. Left out while everything does.
pub const IDLE: u16 = 6;
/// Bytes of WAL that the sender has still to recover: `u64`. Left out while it does not recover.
pub const LAG: u16 = 7;
/// The referee that the sender has met last: `RefereeId`. Left out while it has met none.
pub const REFEREE: u16 = 8;

/// A value under its tag.
pub fn put(tag: u16, value: &impl Serialize) -> Option<Extra> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard()).ok()?;
    Some((tag, bytes))
}

/// The value that a heartbeat carries under a tag.
pub fn get<T: DeserializeOwned>(heartbeat: &Heartbeat, tag: u16) -> Option<T> {
    let (_, bytes) = heartbeat.extras.iter().find(|(found, _)| *found == tag)?;
    let (value, _) = bincode::serde::decode_from_slice(bytes, bincode::config::standard()).ok()?;
    Some(value)
}
