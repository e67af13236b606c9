//! The content of a frame: a kind, then messages or a heartbeat in bincode's standard configuration.
//!
//! Version 1, the only one so far. `tests/golden` holds frames of every version; whoever changes an encoding adds a
//! version and keeps those decoding.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use protocol::membership::Presence;
use protocol::{GenerationNum, Lsn, MAX_NODES, Message, NodeId, NodeSet};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::channel::FRAME_BYTES_MAX;

/// Most bytes of one encoded message. The longest is a vote of no with two full texts.
pub const MESSAGE_BYTES_MAX: usize = 1024;
/// Most bytes of one encoded heartbeat.
pub const HEARTBEAT_BYTES_MAX: usize = 2048;
/// Most messages in one frame.
pub const FRAME_MESSAGES_MAX: usize = 1024;

const KIND_MESSAGES: u8 = 1;
const KIND_HEARTBEAT: u8 = 2;

const MESSAGE: Configuration<LittleEndian, Varint, Limit<MESSAGE_BYTES_MAX>> =
    bincode::config::standard().with_limit::<MESSAGE_BYTES_MAX>();
const HEARTBEAT: Configuration<LittleEndian, Varint, Limit<HEARTBEAT_BYTES_MAX>> =
    bincode::config::standard().with_limit::<HEARTBEAT_BYTES_MAX>();

/// A sign of life, and what the sender knows of itself and the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The sender's monotonic clock, milliseconds; meaningful to the sender only.
    pub sent_ms: u64,
    /// Incarnation of the sender's arbiter.
    pub epoch: u32,
    /// Peers the sender has a link to, itself included.
    pub connected: NodeSet,
    /// The latest generation the sender knows.
    pub generation: GenerationNum,
    /// The latest generation the sender was online in.
    pub online_generation: GenerationNum,
    /// End of the sender's own flushed WAL.
    pub flushed: Lsn,
    /// For each other node, up to where the sender holds that node's stream durably.
    pub received: Vec<(NodeId, Lsn)>,
    /// What later versions add: a tag and its bytes. Unknown tags are skipped.
    pub extras: Vec<(u16, Vec<u8>)>,
}

/// Tag of the [`Presence`] among a heartbeat's extras.
const PRESENCE_TAG: u16 = 3;

impl Heartbeat {
    /// Adds what the membership says.
    pub fn set_presence(&mut self, presence: &Presence) -> Result<(), FrameError> {
        let bytes = bincode::serde::encode_to_vec(presence, HEARTBEAT)
            .map_err(|error| FrameError::Encode(error.to_string()))?;
        self.extras.retain(|(tag, _)| *tag != PRESENCE_TAG);
        self.extras.push((PRESENCE_TAG, bytes));
        Ok(())
    }

    /// What the sender's membership says, if it says something that can be read.
    pub fn presence(&self) -> Option<Presence> {
        let (_, bytes) = self.extras.iter().find(|(tag, _)| *tag == PRESENCE_TAG)?;
        let (presence, length) = bincode::serde::decode_from_slice(bytes, HEARTBEAT).ok()?;
        (length == bytes.len()).then_some(presence)
    }
}

/// Content that cannot be right, or does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    #[error("wire version {0} is not spoken here")]
    Version(u16),
    #[error("a frame without content")]
    Empty,
    #[error("frames of kind {0} are unknown")]
    Kind(u8),
    #[error("a frame holds more than {FRAME_MESSAGES_MAX} messages")]
    TooManyMessages,
    #[error("{0} bytes follow the end of a frame's content")]
    TrailingBytes(usize),
    #[error("a heartbeat of {0} bytes is longer than {HEARTBEAT_BYTES_MAX}")]
    HeartbeatLength(usize),
    #[error("a heartbeat tells of {0} nodes, more than {MAX_NODES}")]
    TooManyNodes(usize),
    #[error("a message of {0} bytes is longer than {MESSAGE_BYTES_MAX}")]
    MessageLength(usize),
    #[error("the content of a frame does not decode: {0}")]
    Decode(String),
    #[error("a message does not encode: {0}")]
    Encode(String),
}

/// What [`decode`] found besides messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Messages, appended to the caller's list.
    Messages,
    Heartbeat(Heartbeat),
}

/// Encoded messages on their way out, already cut into frames. Its memory is reused.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    /// Where each frame ends.
    ends: Vec<usize>,
    /// Messages in the last frame.
    open_messages: usize,
}

impl Batch {
    /// Appends a message, to the last frame if it fits.
    ///
    /// On an error the batch is as it was.
    pub fn push(&mut self, message: &Message) -> Result<(), FrameError> {
        let start = self.bytes.len();
        // A frame's kind goes first. If the message joins the frame before, it is taken away again.
        self.bytes.push(KIND_MESSAGES);
        let encoded = bincode::serde::encode_into_std_write(message, &mut self.bytes, MESSAGE);
        let length = match encoded {
            Ok(length) if length <= MESSAGE_BYTES_MAX => length,
            refused => {
                self.bytes.truncate(start);
                return Err(match refused {
                    Ok(length) => FrameError::MessageLength(length),
                    Err(error) => FrameError::Encode(error.to_string()),
                });
            }
        };
        if self.has_room(length) {
            self.bytes.remove(start);
            self.ends.pop();
            self.open_messages += 1;
        } else {
            self.open_messages = 1;
        }
        self.ends.push(self.bytes.len());
        Ok(())
    }

    /// Whether the last frame takes `length` more bytes.
    fn has_room(&self, length: usize) -> bool {
        let Some(&end) = self.ends.last() else {
            return false;
        };
        let start = self
            .ends
            .len()
            .checked_sub(2)
            .map_or(0, |last| self.ends[last]);
        end - start + length <= FRAME_BYTES_MAX && self.open_messages < FRAME_MESSAGES_MAX
    }

    /// The contents of the frames, in order.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, &end)| &self.bytes[start..end])
    }

    /// Bytes of all contents.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Empties the batch; keeps no more than `keep_bytes` of its memory.
    pub fn clear(&mut self, keep_bytes: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(keep_bytes);
        self.ends.clear();
        self.open_messages = 0;
    }
}

/// Replaces `content` by that of a frame with a heartbeat.
pub fn encode_heartbeat(heartbeat: &Heartbeat, content: &mut Vec<u8>) -> Result<(), FrameError> {
    content.clear();
    content.push(KIND_HEARTBEAT);
    let length = bincode::serde::encode_into_std_write(heartbeat, content, HEARTBEAT)
        .map_err(|error| FrameError::Encode(error.to_string()))?;
    check_heartbeat(length, heartbeat)
}

/// Reads the content of a frame of the link's `version`. Messages are appended to `messages`, all or, on an error, some.
pub fn decode(
    version: u16,
    content: &[u8],
    messages: &mut Vec<Message>,
) -> Result<Content, FrameError> {
    if version != 1 {
        return Err(FrameError::Version(version));
    }
    match content.split_first() {
        None => Err(FrameError::Empty),
        Some((&KIND_MESSAGES, body)) => decode_messages(body, messages),
        Some((&KIND_HEARTBEAT, body)) => decode_heartbeat(body).map(Content::Heartbeat),
        Some((&kind, _)) => Err(FrameError::Kind(kind)),
    }
}

fn decode_messages(mut body: &[u8], messages: &mut Vec<Message>) -> Result<Content, FrameError> {
    let mut count = 0;
    while !body.is_empty() {
        if count == FRAME_MESSAGES_MAX {
            return Err(FrameError::TooManyMessages);
        }
        let (message, length) =
            bincode::serde::decode_from_slice(body, MESSAGE).map_err(decoding)?;
        messages.push(message);
        body = &body[length..];
        count += 1;
    }
    match count {
        0 => Err(FrameError::Empty),
        _ => Ok(Content::Messages),
    }
}

fn decode_heartbeat(body: &[u8]) -> Result<Heartbeat, FrameError> {
    let (heartbeat, length) =
        bincode::serde::decode_from_slice::<Heartbeat, _>(body, HEARTBEAT).map_err(decoding)?;
    if length != body.len() {
        return Err(FrameError::TrailingBytes(body.len() - length));
    }
    check_heartbeat(length, &heartbeat)?;
    Ok(heartbeat)
}

/// Whether the heartbeat may be sent, whatever its time and connections.
pub fn check_heartbeat_fits(heartbeat: &Heartbeat) -> Result<(), FrameError> {
    let widest = Heartbeat {
        sent_ms: u64::MAX,
        epoch: u32::MAX,
        connected: NodeSet::from_bits(u16::MAX),
        ..heartbeat.clone()
    };
    encode_heartbeat(&widest, &mut Vec::new())
}

fn check_heartbeat(length: usize, heartbeat: &Heartbeat) -> Result<(), FrameError> {
    if length > HEARTBEAT_BYTES_MAX {
        return Err(FrameError::HeartbeatLength(length));
    }
    if heartbeat.received.len() > usize::from(MAX_NODES) {
        return Err(FrameError::TooManyNodes(heartbeat.received.len()));
    }
    Ok(())
}

fn decoding(error: bincode::error::DecodeError) -> FrameError {
    FrameError::Decode(error.to_string())
}
