//! Records: the fixed-size pieces of the handshake, and the clear-text hello among them.
//!
//! All records are [`RECORD_BYTES`] long, whatever the wire version, so that a reader knows how much to wait for before it
//! knows whom it talks to. The layout of hello and refusal never changes: versions that share nothing else can
//! still tell each other so by name.

use protocol::NodeId;
use thiserror::Error;

/// Size of every record of the handshake.
pub const RECORD_BYTES: usize = 64;
/// Size of what follows a record's tag.
pub const BODY_BYTES: usize = RECORD_BYTES - TAG_BYTES;
/// Random bytes in each hello; they make a recorded handshake worthless.
pub const NONCE_BYTES: usize = 16;

const TAG_BYTES: usize = 8;
const MAGIC: [u8; 7] = *b"MTM-ARB";

/// One piece of the handshake, as it is sent.
pub type Record = [u8; RECORD_BYTES];

/// What a record says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hello,
    /// The dialer's ephemeral key and its proof of the secret.
    DialerKey,
    /// The acceptor's ephemeral key and its proof of the secret.
    AcceptorKey,
    /// The dialer's proof that it is there now and holds its ephemeral key.
    Confirm,
    Refusal,
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Self::Hello => b'H',
            Self::DialerKey => b'D',
            Self::AcceptorKey => b'A',
            Self::Confirm => b'C',
            Self::Refusal => b'R',
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            b'H' => Some(Self::Hello),
            b'D' => Some(Self::DialerKey),
            b'A' => Some(Self::AcceptorKey),
            b'C' => Some(Self::Confirm),
            b'R' => Some(Self::Refusal),
            _ => None,
        }
    }
}

/// Bytes that are no record, or not one that can be right.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    #[error("the bytes are not those of a multimaster arbiter")]
    NotAnArbiter,
    #[error("node id {0} is not within 1..={max}", max = protocol::MAX_NODES)]
    NodeId(u8),
    #[error("wire versions {min} to {max} are no range")]
    VersionRange { min: u16, max: u16 },
}

/// Puts tag and body together.
pub fn seal_record(kind: Kind, body: &[u8; BODY_BYTES]) -> Record {
    let mut record = [0; RECORD_BYTES];
    record[..MAGIC.len()].copy_from_slice(&MAGIC);
    record[MAGIC.len()] = kind.code();
    record[TAG_BYTES..].copy_from_slice(body);
    record
}

/// Takes tag and body apart.
pub fn open_record(record: &Record) -> Result<(Kind, &[u8; BODY_BYTES]), RecordError> {
    let (tag, body) = record
        .split_first_chunk::<TAG_BYTES>()
        .ok_or(RecordError::NotAnArbiter)?;
    let kind = Kind::from_code(tag[MAGIC.len()]).ok_or(RecordError::NotAnArbiter)?;
    match <&[u8; BODY_BYTES]>::try_from(body) {
        Ok(body) if tag[..MAGIC.len()] == MAGIC => Ok((kind, body)),
        _ => Err(RecordError::NotAnArbiter),
    }
}

/// The wire versions a node speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    min: u16,
    max: u16,
}

impl Versions {
    /// What this build speaks.
    pub const OURS: Self = Self { min: 1, max: 1 };

    /// `None` when `min` is zero or above `max`.
    pub const fn new(min: u16, max: u16) -> Option<Self> {
        if min >= 1 && min <= max {
            Some(Self { min, max })
        } else {
            None
        }
    }

    /// The highest version both speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// Who speaks, to whom, and in which versions. Clear text, bound into the proofs that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub versions: Versions,
    pub from: NodeId,
    pub to: NodeId,
    /// Incarnation of the sender's arbiter; grows at each of its starts.
    pub epoch: u32,
    /// Random number of the cluster, drawn when it was made.
    pub cluster_id: u128,
    pub nonce: [u8; NONCE_BYTES],
}

impl Hello {
    pub fn encode(&self) -> Record {
        let mut body = [0; BODY_BYTES];
        body[0..2].copy_from_slice(&self.versions.min.to_le_bytes());
        body[2..4].copy_from_slice(&self.versions.max.to_le_bytes());
        body[4] = self.from.get();
        body[5] = self.to.get();
        body[8..12].copy_from_slice(&self.epoch.to_le_bytes());
        body[12..28].copy_from_slice(&self.cluster_id.to_le_bytes());
        body[28..44].copy_from_slice(&self.nonce);
        seal_record(Kind::Hello, &body)
    }

    /// Reads the body of a record of kind [`Kind::Hello`]. Reserved bytes are not looked at: a later version may use them.
    pub fn decode(body: &[u8; BODY_BYTES]) -> Result<Self, RecordError> {
        let node = |id| NodeId::new(id).ok_or(RecordError::NodeId(id));
        Ok(Self {
            versions: decode_versions(body)?,
            from: node(body[4])?,
            to: node(body[5])?,
            epoch: u32::from_le_bytes(array(body, 8)),
            cluster_id: u128::from_le_bytes(array(body, 12)),
            nonce: array(body, 28),
        })
    }
}

/// Why a node does not go on with a handshake, as it tells the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    Version,
    Cluster,
    UnknownNode,
    WrongNode,
    Direction,
    Secret,
    StaleEpoch,
    /// Not one of the handshake's records, or not the one whose turn it was.
    Record,
    /// A reason this build has no name for.
    Other(u8),
}

impl RefusalCode {
    const fn code(self) -> u8 {
        match self {
            Self::Version => 1,
            Self::Cluster => 2,
            Self::UnknownNode => 3,
            Self::WrongNode => 4,
            Self::Direction => 5,
            Self::Secret => 6,
            Self::StaleEpoch => 7,
            Self::Record => 8,
            Self::Other(code) => code,
        }
    }

    const fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::Cluster,
            3 => Self::UnknownNode,
            4 => Self::WrongNode,
            5 => Self::Direction,
            6 => Self::Secret,
            7 => Self::StaleEpoch,
            8 => Self::Record,
            other => Self::Other(other),
        }
    }
}

impl std::fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version => f.write_str("no common wire version"),
            Self::Cluster => f.write_str("it belongs to another cluster"),
            Self::UnknownNode => f.write_str("it does not know this node"),
            Self::WrongNode => f.write_str("it is not the node that was asked for"),
            Self::Direction => f.write_str("the node with the higher id has to connect"),
            Self::Secret => f.write_str("the cluster secrets differ"),
            Self::StaleEpoch => f.write_str("a later incarnation of this node is connected"),
            Self::Record => f.write_str("it did not understand the handshake"),
            Self::Other(code) => write!(f, "reason {code}"),
        }
    }
}

/// A refusal with the versions of the node that refuses. Clear text and not proven: good for a log, not for a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: RefusalCode,
    pub versions: Versions,
}

impl Refusal {
    pub fn encode(&self) -> Record {
        let mut body = [0; BODY_BYTES];
        body[0..2].copy_from_slice(&self.versions.min.to_le_bytes());
        body[2..4].copy_from_slice(&self.versions.max.to_le_bytes());
        body[4] = self.code.code();
        seal_record(Kind::Refusal, &body)
    }

    /// Reads the body of a record of kind [`Kind::Refusal`].
    pub fn decode(body: &[u8; BODY_BYTES]) -> Result<Self, RecordError> {
        Ok(Self {
            code: RefusalCode::from_code(body[4]),
            versions: decode_versions(body)?,
        })
    }
}

fn decode_versions(body: &[u8; BODY_BYTES]) -> Result<Versions, RecordError> {
    let min = u16::from_le_bytes(array(body, 0));
    let max = u16::from_le_bytes(array(body, 2));
    Versions::new(min, max).ok_or(RecordError::VersionRange { min, max })
}

/// The `N` bytes at `at`; all callers name places within a body.
fn array<const N: usize>(body: &[u8; BODY_BYTES], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&body[at..at + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_common_version_wins() {
        let versions = |min, max| Versions::new(min, max).unwrap();
        assert_eq!(versions(1, 3).common(versions(2, 5)), Some(3));
        assert_eq!(versions(2, 5).common(versions(1, 3)), Some(3));
        assert_eq!(versions(1, 1).common(versions(1, 9)), Some(1));
        assert_eq!(versions(1, 2).common(versions(3, 4)), None);
        assert_eq!(Versions::new(0, 1), None);
        assert_eq!(Versions::new(2, 1), None);
    }

    #[test]
    fn every_refusal_code_survives_the_wire() {
        for code in 0..=u8::MAX {
            assert_eq!(RefusalCode::from_code(code).code(), code);
        }
    }
}
