//! Messages: frames that travel together.

use super::bytes::{Malformed, Put, Reader, with_length};
use super::frame::{OLD_ABSENT, OLD_FULL, OLD_KEY, StreamFrame, tag};
use super::relation::RelationId;
use super::row::RowWriter;

/// Version of the stream's layout; both sides must speak the same.
pub const STREAM_VERSION: u8 = 2;

const BEGINS: u8 = 1;
const ENDS: u8 = 2;
const PIECE: u8 = 4;
const HEADER_BYTES: usize = 2;

/// One received message, its header checked.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    flags: u8,
    frames: &'a [u8],
}

impl<'a> Message<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(bytes);
        if from.u8()? != STREAM_VERSION {
            return Err(Malformed("unknown version"));
        }
        let flags = from.u8()?;
        if flags & !(BEGINS | ENDS | PIECE) != 0 {
            return Err(Malformed("unknown flag in a message"));
        }
        Ok(Message {
            flags,
            frames: from.rest(),
        })
    }

    /// The first frame is `Piece`.
    pub fn is_piece(&self) -> bool {
        self.flags & PIECE != 0
    }

    /// The first frame is `Begin` or `Resume`.
    pub fn begins(&self) -> bool {
        self.flags & BEGINS != 0
    }

    /// The last frame is `Prepare`.
    pub fn ends(&self) -> bool {
        self.flags & ENDS != 0
    }

    pub fn frames(&self) -> Frames<'a> {
        Frames {
            from: Reader::new(self.frames),
        }
    }
}

/// Iterates over the frames of a message; after an error it ends.
#[derive(Debug, Clone)]
pub struct Frames<'a> {
    from: Reader<'a>,
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<StreamFrame<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.from.is_empty() {
            return None;
        }
        let frame = StreamFrame::decode(&mut self.from);
        if frame.is_err() {
            self.from = Reader::new(&[]);
        }
        Some(frame)
    }
}

/// Builds messages in one buffer that is used again and again.
///
/// A frame whose writing was broken off by a panic is not part of the message.
#[derive(Debug)]
pub struct MessageWriter {
    bytes: Vec<u8>,
    /// Where the last whole frame ends.
    whole: usize,
}

impl Default for MessageWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl MessageWriter {
    pub fn new() -> Self {
        MessageWriter {
            bytes: vec![STREAM_VERSION, 0],
            whole: HEADER_BYTES,
        }
    }

    /// Forgets what was written; keeps the buffer, unless one huge row has swollen it beyond
    /// `keep_max` bytes.
    pub fn reset(&mut self, keep_max: usize) {
        if self.bytes.capacity() > keep_max {
            *self = Self::new();
        }
        self.bytes.clear();
        self.bytes.put(&[STREAM_VERSION, 0]);
        self.whole = HEADER_BYTES;
    }

    pub fn is_empty(&self) -> bool {
        self.whole == HEADER_BYTES
    }

    /// Bytes of the message so far.
    pub fn len(&self) -> usize {
        self.whole
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.whole]
    }

    pub fn frame(&mut self, frame: &StreamFrame<'_>) {
        match frame {
            StreamFrame::Begin(_) | StreamFrame::Resume(_) => self.bytes[1] |= BEGINS,
            StreamFrame::Piece(_) => self.bytes[1] |= PIECE,
            StreamFrame::Prepare(_) => self.bytes[1] |= ENDS,
            _ => {}
        }
        self.append(frame.tag(), |out| frame.encode_body(out));
    }

    /// `fingerprint` comes from [`Relation::describe`](super::Relation::describe).
    pub fn relation(&mut self, id: RelationId, fingerprint: &[u8]) {
        self.append(tag::RELATION, |out| {
            out.put(&id.0.to_le_bytes());
            out.put(fingerprint);
        });
    }

    pub fn insert(&mut self, relation: RelationId, new: impl FnOnce(&mut RowWriter<'_>)) {
        self.append(tag::INSERT, |out| {
            out.put(&relation.0.to_le_bytes());
            RowWriter::write(out, new);
        });
    }

    pub fn update(
        &mut self,
        relation: RelationId,
        old: OldRowWriter<'_>,
        new: impl FnOnce(&mut RowWriter<'_>),
    ) {
        self.append(tag::UPDATE, |out| {
            out.put(&relation.0.to_le_bytes());
            old.write(out);
            RowWriter::write(out, new);
        });
    }

    pub fn delete(&mut self, relation: RelationId, old: OldRowWriter<'_>) {
        self.append(tag::DELETE, |out| {
            out.put(&relation.0.to_le_bytes());
            old.write(out);
        });
    }

    pub fn truncate(&mut self, restart_identity: bool, relations: &[RelationId]) {
        self.append(tag::TRUNCATE, |out| {
            out.push(u8::from(restart_identity));
            for relation in relations {
                out.put(&relation.0.to_le_bytes());
            }
        });
    }

    fn append(&mut self, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
        self.bytes.truncate(self.whole);
        self.bytes.push(tag);
        with_length(&mut self.bytes, body);
        self.whole = self.bytes.len();
    }
}

/// The old row of an update or delete, written by a closure.
pub enum OldRowWriter<'w> {
    Absent,
    Key(&'w mut dyn FnMut(&mut RowWriter<'_>)),
    Full(&'w mut dyn FnMut(&mut RowWriter<'_>)),
}

impl OldRowWriter<'_> {
    fn write(self, out: &mut Vec<u8>) {
        match self {
            OldRowWriter::Absent => out.push(OLD_ABSENT),
            OldRowWriter::Key(fill) => {
                out.push(OLD_KEY);
                RowWriter::write(out, fill);
            }
            OldRowWriter::Full(fill) => {
                out.push(OLD_FULL);
                RowWriter::write(out, fill);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swollen_buffer_is_given_back() {
        let mut out = MessageWriter::new();
        out.insert(RelationId(1), |row| row.value(&vec![0; 1 << 20]));
        out.reset(1 << 16);
        assert!(out.is_empty() && out.bytes.capacity() <= 1 << 16);
    }

    #[test]
    fn a_frame_broken_off_is_left_out() {
        let mut out = MessageWriter::new();
        out.insert(RelationId(1), |row| row.null());
        let before = out.bytes().to_vec();
        let write = || out.insert(RelationId(2), |_| panic!("out of memory, say"));
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(write)).unwrap_err();
        assert_eq!(out.bytes(), before);
        out.insert(RelationId(3), |row| row.null());
        assert_eq!(Message::parse(out.bytes()).unwrap().frames().count(), 2);
    }
}
