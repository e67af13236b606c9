//! The durable state of one transaction on one node.

use crate::message::Accept;
use crate::types::{Ballot, Csn, Decision, GenerationNum, Gid, Lsn, NodeId, NodeSet, Verdict};

/// Size of an encoded [`Record`].
pub const RECORD_BYTES: usize = 64;

/// What a node must remember of a transaction beyond a crash; everything else follows from its prepared transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub gid: Gid,
    /// Lower ballots are ignored.
    pub promised: Ballot,
    /// The last accepted verdict.
    pub accepted: Option<Accept>,
    /// The vote was yes. A no vote is a decision: no transaction can commit against it.
    pub voted_yes: bool,
    pub decision: Option<Decision>,
    /// The coordinator's number of the commit, [`Csn::ZERO`] when it was not told.
    pub csn: Csn,
    /// End of the PREPARE in the coordinator's stream, [`Lsn::ZERO`] until it came.
    pub prepare_lsn: Lsn,
}

/// Why the bytes of a record cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRecord {
    #[error("record has layout version {0}, this release knows {LAYOUT_VERSION}")]
    Version(u8),
    #[error("record is damaged: its checksum is {found:08x} and should be {expected:08x}")]
    Checksum { expected: u32, found: u32 },
    #[error("record is damaged: its {0} has no meaning")]
    Field(&'static str),
}

const LAYOUT_VERSION: u8 = 2;
const CHECKSUM_AT: usize = RECORD_BYTES - 4;

impl Record {
    /// Fixed layout, little-endian, ending in a CRC-32C of all before it. Unused bytes are zero.
    pub fn to_bytes(&self) -> [u8; RECORD_BYTES] {
        let mut writer = Writer {
            bytes: [0; RECORD_BYTES],
            at: 0,
        };
        writer.put([LAYOUT_VERSION]);
        writer.put([self.gid.coordinator.get()]);
        writer.put(self.gid.xid.to_le_bytes());
        writer.put(self.gid.generation.0.to_le_bytes());
        writer.put(self.gid.members.bits().to_le_bytes());
        writer.put(self.gid.started_at.to_le_bytes());
        writer.put_ballot(self.promised);
        writer.put_ballot(
            self.accepted
                .map_or(Ballot::NONE, |accepted| accepted.ballot),
        );
        writer.put([match self.accepted.map(|accepted| accepted.verdict) {
            None => 0,
            Some(Verdict::Precommit) => 1,
            Some(Verdict::Preabort) => 2,
        }]);
        writer.put([u8::from(self.voted_yes)]);
        writer.put([match self.decision {
            None => 0,
            Some(Decision::Commit) => 1,
            Some(Decision::Abort) => 2,
        }]);
        writer.put(self.csn.0.to_le_bytes());
        writer.put(self.prepare_lsn.0.to_le_bytes());
        let checksum = crc32c(&writer.bytes[..CHECKSUM_AT]);
        writer.bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        writer.bytes
    }

    /// Reads what [`Record::to_bytes`] wrote; anything else is refused.
    pub fn from_bytes(bytes: &[u8; RECORD_BYTES]) -> Result<Self, InvalidRecord> {
        let mut reader = Reader {
            bytes,
            at: CHECKSUM_AT,
        };
        let found = u32::from_le_bytes(reader.take());
        let expected = crc32c(&bytes[..CHECKSUM_AT]);
        if found != expected {
            return Err(InvalidRecord::Checksum { expected, found });
        }
        reader.at = 0;
        let [version] = reader.take();
        if version != LAYOUT_VERSION {
            return Err(InvalidRecord::Version(version));
        }
        let record = Self {
            gid: Gid {
                coordinator: NodeId::new(reader.byte())
                    .ok_or(InvalidRecord::Field("coordinator"))?,
                xid: u64::from_le_bytes(reader.take()),
                generation: GenerationNum(u32::from_le_bytes(reader.take())),
                members: NodeSet::from_bits(u16::from_le_bytes(reader.take())),
                started_at: i64::from_le_bytes(reader.take()),
            },
            promised: reader.ballot()?,
            accepted: reader.accept()?,
            voted_yes: match reader.byte() {
                0 => false,
                1 => true,
                _ => return Err(InvalidRecord::Field("vote")),
            },
            decision: match reader.byte() {
                0 => None,
                1 => Some(Decision::Commit),
                2 => Some(Decision::Abort),
                _ => return Err(InvalidRecord::Field("decision")),
            },
            csn: Csn(u64::from_le_bytes(reader.take())),
            prepare_lsn: Lsn(u64::from_le_bytes(reader.take())),
        };
        if bytes[reader.at..CHECKSUM_AT].iter().any(|byte| *byte != 0) {
            return Err(InvalidRecord::Field("padding"));
        }
        Ok(record)
    }
}

struct Writer {
    bytes: [u8; RECORD_BYTES],
    at: usize,
}

impl Writer {
    fn put<const N: usize>(&mut self, part: [u8; N]) {
        self.bytes[self.at..self.at + N].copy_from_slice(&part);
        self.at += N;
    }

    fn put_ballot(&mut self, ballot: Ballot) {
        self.put(ballot.term.to_le_bytes());
        self.put([ballot.node.map_or(0, NodeId::get)]);
    }
}

struct Reader<'a> {
    bytes: &'a [u8; RECORD_BYTES],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut part = [0; N];
        part.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        part
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    fn ballot(&mut self) -> Result<Ballot, InvalidRecord> {
        let term = u32::from_le_bytes(self.take());
        let node = match self.byte() {
            0 => None,
            node => Some(NodeId::new(node).ok_or(InvalidRecord::Field("ballot"))?),
        };
        Ok(Ballot { term, node })
    }

    fn accept(&mut self) -> Result<Option<Accept>, InvalidRecord> {
        let ballot = self.ballot()?;
        match (self.byte(), ballot) {
            (0, Ballot::NONE) => Ok(None),
            (1, _) => Ok(Some(Accept {
                ballot,
                verdict: Verdict::Precommit,
            })),
            (2, _) => Ok(Some(Accept {
                ballot,
                verdict: Verdict::Preabort,
            })),
            _ => Err(InvalidRecord::Field("accepted verdict")),
        }
    }
}

/// CRC-32C (Castagnoli), bit by bit: 60 bytes are not worth a table.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let step = |crc: u32, _| {
        if crc & 1 == 1 {
            (crc >> 1) ^ POLYNOMIAL
        } else {
            crc >> 1
        }
    };
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), step)
    })
}
