//! DDL on its way between nodes: the payloads of the logical messages `mtm-ddl` and `mtm-seq`.
//!
//! A DDL statement travels as its text with everything that gives the text its meaning: who runs it, where names are looked up, the
//! settings that change how it is read, and the transaction's clock. A position set with `setval()` travels as the position. Both are
//! written to WAL inside the transaction, so they arrive in order with the rows around them.
//!
//! The first byte is the version; the rest is bincode. Decoding refuses unknown versions, oversized and trailing bytes, and never panics.
//!
//! [`sequence_plan`] holds the rule by which nodes share the values of a sequence, [`password`] keeps clear passwords out of the text.

pub mod password;
pub mod sequence_plan;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Prefix of the logical message that carries a [`Ddl`].
pub const DDL_PREFIX: &str = "mtm-ddl";

/// Prefix of the logical message that carries a [`SequencePosition`].
pub const SEQUENCE_PREFIX: &str = "mtm-seq";

/// Version of both payloads.
pub const VERSION: u8 = 1;

/// Most bytes of one payload.
pub const PAYLOAD_BYTES_MAX: usize = 16 * 1024 * 1024;

/// One DDL statement and what gives it its meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ddl {
    /// Exactly one statement, in the encoding of the database.
    pub statement: String,
    /// Name of the database on the node that ran the statement; a statement that names it means the cluster's database.
    pub database: String,
    /// The current user: owner of what is created, subject of permission checks.
    pub role: String,
    /// The session user, which `SESSION_USER` in the statement means.
    pub session_role: String,
    /// Settings that change what the statement means, `search_path` among them: (name, value).
    pub settings: Vec<(String, String)>,
    /// Start of the transaction, which `now()` means: microseconds since 2000-01-01.
    pub transaction_time: i64,
    /// Start of the client's statement, which `statement_timestamp()` means: microseconds since 2000-01-01.
    pub statement_time: i64,
}

/// The position that `setval()` gave to a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequencePosition {
    pub schema: String,
    pub name: String,
    pub last_value: i64,
    /// Whether `last_value` has been handed out already.
    pub is_called: bool,
    /// Whether a node that is already beyond must go back: the position was certainly set, not reached by `nextval()`.
    pub follow: bool,
}

/// A payload that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("payload of {bytes} bytes is larger than {PAYLOAD_BYTES_MAX} bytes")]
    TooLarge { bytes: usize },
    #[error("payload is empty")]
    Empty,
    #[error("payload has version {0}, but only version {VERSION} is known")]
    UnknownVersion(u8),
    #[error("payload has {0} bytes after its end")]
    TrailingBytes(usize),
    #[error("malformed payload: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    #[error("payload cannot be encoded: {0}")]
    Unencodable(#[from] bincode::error::EncodeError),
}

impl Ddl {
    pub fn encode(&self) -> Result<Vec<u8>, PayloadError> {
        encode(self)
    }

    pub fn decode(payload: &[u8]) -> Result<Self, PayloadError> {
        decode(payload)
    }
}

impl SequencePosition {
    pub fn encode(&self) -> Result<Vec<u8>, PayloadError> {
        encode(self)
    }

    pub fn decode(payload: &[u8]) -> Result<Self, PayloadError> {
        decode(payload)
    }
}

const fn configuration() -> Configuration<LittleEndian, Fixint, Limit<PAYLOAD_BYTES_MAX>> {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<PAYLOAD_BYTES_MAX>()
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, PayloadError> {
    let mut payload = vec![VERSION];
    bincode::serde::encode_into_std_write(value, &mut payload, configuration())?;
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(PayloadError::TooLarge {
            bytes: payload.len(),
        });
    }
    Ok(payload)
}

fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, PayloadError> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(PayloadError::TooLarge {
            bytes: payload.len(),
        });
    }
    let (&version, body) = payload.split_first().ok_or(PayloadError::Empty)?;
    if version != VERSION {
        return Err(PayloadError::UnknownVersion(version));
    }
    let (value, used) = bincode::serde::decode_from_slice(body, configuration())?;
    match body.len() - used {
        0 => Ok(value),
        trailing => Err(PayloadError::TrailingBytes(trailing)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Ddl {
        Ddl {
            statement: "CREATE TABLE t (id int)".into(),
            database: "app".into(),
            role: "alice".into(),
            session_role: "bob".into(),
            settings: vec![("search_path".into(), "\"$user\", public".into())],
            transaction_time: 5,
            statement_time: -6,
        }
    }

    #[test]
    fn ddl_comes_back_as_it_was() {
        let ddl = sample();
        assert_eq!(Ddl::decode(&ddl.encode().unwrap()).unwrap(), ddl);
    }

    #[test]
    fn position_has_its_golden_bytes() {
        let position = SequencePosition {
            schema: "s".into(),
            name: "q".into(),
            last_value: 42,
            is_called: true,
            follow: false,
        };
        let golden = [
            1, 1, 0, 0, 0, 0, 0, 0, 0, b's', 1, 0, 0, 0, 0, 0, 0, 0, b'q', 42, 0, 0, 0, 0, 0, 0, 0,
            1, 0,
        ];
        assert_eq!(position.encode().unwrap(), golden);
        assert_eq!(SequencePosition::decode(&golden).unwrap(), position);
    }

    #[test]
    fn every_truncation_is_refused() {
        let payload = sample().encode().unwrap();
        for length in 0..payload.len() {
            assert!(
                Ddl::decode(&payload[..length]).is_err(),
                "{length} bytes of {}",
                payload.len()
            );
        }
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut payload = sample().encode().unwrap();
        payload.push(0);
        assert!(matches!(
            Ddl::decode(&payload),
            Err(PayloadError::TrailingBytes(1))
        ));
    }

    #[test]
    fn unknown_version_is_refused() {
        let mut payload = sample().encode().unwrap();
        payload[0] = 9;
        assert!(matches!(
            Ddl::decode(&payload),
            Err(PayloadError::UnknownVersion(9))
        ));
    }

    #[test]
    fn claimed_length_beyond_the_bound_is_refused() {
        let mut payload = vec![VERSION];
        payload.extend_from_slice(&u64::MAX.to_le_bytes());
        payload.extend_from_slice(&[b'x'; 64]);
        assert!(Ddl::decode(&payload).is_err());
    }

    #[test]
    fn oversized_statement_is_refused() {
        let ddl = Ddl {
            statement: "x".repeat(PAYLOAD_BYTES_MAX),
            ..sample()
        };
        assert!(matches!(ddl.encode(), Err(PayloadError::TooLarge { .. })));
    }

    #[test]
    fn flipped_bytes_never_panic() {
        let payload = sample().encode().unwrap();
        for position in 1..payload.len() {
            for value in [0u8, 1, 0x7f, 0xff] {
                let mut broken = payload.clone();
                broken[position] = value;
                let _ = Ddl::decode(&broken);
            }
        }
    }
}
