//! Messages: frames that travel together.

use super::bytes::{Malformed, Put, Reader, with_length};
use super::frame::{OLD_ABSENT, OLD_FULL, OLD_KEY, StreamFrame, tag};
use super::relation::RelationId;
use super::row::RowWriter;

/// Version of the stream's layout; both sides must speak the same.
pub const STREAM_VERSION: u8 = 1;

const BEGINS: u8 = 1;
const ENDS: u8 = 2;
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
        if flags & !(BEGINS | ENDS) != 0 {
            return Err(Malformed("unknown flag in a message"));
        }
        Ok(Message {
            flags,
            frames: from.rest(),
        })
    }

    /// The first frame is `Begin`.
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
#[derive(Debug)]
pub struct MessageWriter {
    bytes: Vec<u8>,
}

impl Default for MessageWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl MessageWriter {
    pub fn new() -> Self {
        let mut writer = MessageWriter {
            bytes: Vec::with_capacity(1024),
        };
        writer.clear();
        writer
    }

    /// Forgets what was written; keeps the buffer, unless one huge row has swollen it beyond `keep_max` bytes.
    pub fn reset(&mut self, keep_max: usize) {
        if self.bytes.capacity() > keep_max {
            self.bytes = Vec::with_capacity(1024);
        }
        self.clear();
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.put(&[STREAM_VERSION, 0]);
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.len() == HEADER_BYTES
    }

    /// Bytes of the message so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn frame(&mut self, frame: &StreamFrame<'_>) {
        match frame {
            StreamFrame::Begin(_) => self.bytes[1] |= BEGINS,
            StreamFrame::Prepare(_) => self.bytes[1] |= ENDS,
            _ => {}
        }
        frame.encode(&mut self.bytes);
    }

    /// `fingerprint` comes from [`Relation::describe`](super::Relation::describe).
    pub fn relation(&mut self, id: RelationId, fingerprint: &[u8]) {
        self.bytes.push(tag::RELATION);
        with_length(&mut self.bytes, |out| {
            out.put(&id.0.to_le_bytes());
            out.put(fingerprint);
        });
    }

    pub fn insert(&mut self, relation: RelationId, new: impl FnOnce(&mut RowWriter<'_>)) {
        self.bytes.push(tag::INSERT);
        with_length(&mut self.bytes, |out| {
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
        self.bytes.push(tag::UPDATE);
        with_length(&mut self.bytes, |out| {
            out.put(&relation.0.to_le_bytes());
            old.write(out);
            RowWriter::write(out, new);
        });
    }

    pub fn delete(&mut self, relation: RelationId, old: OldRowWriter<'_>) {
        self.bytes.push(tag::DELETE);
        with_length(&mut self.bytes, |out| {
            out.put(&relation.0.to_le_bytes());
            old.write(out);
        });
    }

    pub fn truncate(&mut self, restart_identity: bool, relations: &[RelationId]) {
        self.bytes.push(tag::TRUNCATE);
        with_length(&mut self.bytes, |out| {
            out.push(u8::from(restart_identity));
            for relation in relations {
                out.put(&relation.0.to_le_bytes());
            }
        });
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
}
