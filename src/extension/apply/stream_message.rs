//! Messages of the replication protocol around those of the stream (see "Streaming Replication Protocol" in PostgreSQL's manual).

use crate::pg::clock;
use protocol::Lsn;

/// Header of a data message: kind, start, end, time.
pub const DATA_HEADER_BYTES: usize = 25;

/// A standby status update: written, flushed and applied positions, time, no reply wanted.
pub fn status_message(written: Lsn, stored: Lsn) -> Vec<u8> {
    let mut message = vec![b'r'];
    message.extend_from_slice(&written.0.max(stored.0).to_be_bytes());
    message.extend_from_slice(&stored.0.to_be_bytes());
    message.extend_from_slice(&stored.0.to_be_bytes());
    message.extend_from_slice(&clock::now_us().to_be_bytes());
    message.push(0);
    message
}

/// The big-endian number that begins at a place of a message.
pub fn number(message: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&message[at..at + 8]);
    u64::from_be_bytes(bytes)
}
