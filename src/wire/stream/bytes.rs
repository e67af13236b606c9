//! Reading and writing the primitives of the stream.

use protocol::{GenerationNum, Gid, Lsn, NodeId, NodeSet};
use std::fmt;

/// A message that no output plugin of this version can have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed replication stream: {0}")]
pub struct Malformed(pub &'static str);

/// A name in the encoding of the database; displayed lossily.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Text<'a>(pub &'a [u8]);

impl<'a> Text<'a> {
    pub fn as_bytes(self) -> &'a [u8] {
        self.0
    }
}

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Text(text.as_bytes())
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.0))
    }
}

impl fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.0))
    }
}

/// A cursor over bytes that somebody else wrote.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn finish(&self) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Malformed("bytes after the end of a frame"))
        }
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(Malformed("a frame ends early"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(Malformed("a frame ends early"))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("a flag is neither 0 nor 1")),
        }
    }

    pub(super) fn lsn(&mut self) -> Result<Lsn, Malformed> {
        self.u64().map(Lsn)
    }

    pub(super) fn node(&mut self) -> Result<NodeId, Malformed> {
        NodeId::new(self.u8()?).ok_or(Malformed("a node id is out of range"))
    }

    /// A name of at most 65535 bytes; a zero byte could not be handed to PostgreSQL.
    pub(super) fn text(&mut self) -> Result<Text<'a>, Malformed> {
        let length = self.u16()?;
        let bytes = self.take(usize::from(length))?;
        if bytes.contains(&0) {
            Err(Malformed("a name contains a zero byte"))
        } else {
            Ok(Text(bytes))
        }
    }

    pub(super) fn gid(&mut self) -> Result<Gid, Malformed> {
        Ok(Gid {
            coordinator: self.node()?,
            xid: self.u64()?,
            generation: GenerationNum(self.u32()?),
            members: NodeSet::from_bits(self.u16()?),
            started_at: self.u64()?.cast_signed(),
        })
    }
}

/// Writing, onto the end of a buffer that is used again and again.
pub(super) trait Put {
    fn put(&mut self, bytes: &[u8]);
    fn put_text(&mut self, text: Text<'_>);
    fn put_gid(&mut self, gid: &Gid);
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    /// Names are PostgreSQL identifiers (63 bytes) or transaction names (199 bytes): they always fit.
    fn put_text(&mut self, text: Text<'_>) {
        let bytes = &text.0[..text.0.len().min(usize::from(u16::MAX))];
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.put(&length.to_le_bytes());
        self.put(bytes);
    }

    fn put_gid(&mut self, gid: &Gid) {
        self.push(gid.coordinator.get());
        self.put(&gid.xid.to_le_bytes());
        self.put(&gid.generation.0.to_le_bytes());
        self.put(&gid.members.bits().to_le_bytes());
        self.put(&gid.started_at.to_le_bytes());
    }
}

/// Writes a length later known in front of what `body` appends.
pub(super) fn with_length(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.put(&[0; 4]);
    body(out);
    let length = u32::try_from(out.len() - at - 4).expect("PostgreSQL bounds a message to 1 GB");
    out[at..at + 4].copy_from_slice(&length.to_le_bytes());
}
