//! The durable state of a node's membership.

use super::generation::{Elected, Generation};
use crate::record::{InvalidRecord, crc32c};
use crate::types::{GenerationNum, NodeSet};

/// Size of an encoded [`MembershipRecord`].
pub const MEMBERSHIP_RECORD_BYTES: usize = 64;

/// What a node must remember about members beyond a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MembershipRecord {
    /// The latest generation this node knows.
    pub current: Elected,
    /// The latest in which it was online.
    pub online_in: GenerationNum,
    /// Its last vote. It never comes online in a lower generation.
    pub last_vote: Generation,
    /// The generation in which it last came online by recovery, not as a donor. Of older ones it cannot tell by name what it holds.
    pub recovered_to: GenerationNum,
}

const LAYOUT_VERSION: u8 = 1;
const CHECKSUM_AT: usize = MEMBERSHIP_RECORD_BYTES - 4;
const USED_BYTES: usize = 23;

impl MembershipRecord {
    /// A new cluster: everybody is online in generation 1.
    pub const fn first(configured: NodeSet) -> Self {
        let generation = Generation {
            num: GenerationNum(1),
            members: configured,
        };
        Self {
            current: Elected {
                generation,
                donors: configured,
            },
            online_in: GenerationNum(1),
            last_vote: generation,
            recovered_to: GenerationNum(0),
        }
    }

    /// Number of the current generation.
    pub const fn num(&self) -> GenerationNum {
        self.current.generation.num
    }

    /// Fixed layout, little-endian, ending in a CRC-32C of all before it. Unused bytes are zero.
    pub fn to_bytes(&self) -> [u8; MEMBERSHIP_RECORD_BYTES] {
        let mut bytes = [0; MEMBERSHIP_RECORD_BYTES];
        bytes[0] = LAYOUT_VERSION;
        bytes[1..5].copy_from_slice(&self.num().0.to_le_bytes());
        bytes[5..7].copy_from_slice(&self.current.generation.members.bits().to_le_bytes());
        bytes[7..9].copy_from_slice(&self.current.donors.bits().to_le_bytes());
        bytes[9..13].copy_from_slice(&self.online_in.0.to_le_bytes());
        bytes[13..17].copy_from_slice(&self.last_vote.num.0.to_le_bytes());
        bytes[17..19].copy_from_slice(&self.last_vote.members.bits().to_le_bytes());
        bytes[19..USED_BYTES].copy_from_slice(&self.recovered_to.0.to_le_bytes());
        let checksum = crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads what [`MembershipRecord::to_bytes`] wrote; anything else is refused.
    pub fn from_bytes(bytes: &[u8; MEMBERSHIP_RECORD_BYTES]) -> Result<Self, InvalidRecord> {
        let found = u32::from_le_bytes(part(bytes, CHECKSUM_AT));
        let expected = crc32c(&bytes[..CHECKSUM_AT]);
        if found != expected {
            return Err(InvalidRecord::Checksum { expected, found });
        }
        if bytes[0] != LAYOUT_VERSION {
            return Err(InvalidRecord::Version(bytes[0]));
        }
        if bytes[USED_BYTES..CHECKSUM_AT].iter().any(|byte| *byte != 0) {
            return Err(InvalidRecord::Field("padding"));
        }
        let num = |at| GenerationNum(u32::from_le_bytes(part(bytes, at)));
        let set = |at| NodeSet::from_bits(u16::from_le_bytes(part(bytes, at)));
        let record = Self {
            current: Elected {
                generation: Generation {
                    num: num(1),
                    members: set(5),
                },
                donors: set(7),
            },
            online_in: num(9),
            last_vote: Generation {
                num: num(13),
                members: set(17),
            },
            recovered_to: num(19),
        };
        record.check()
    }

    /// G4 and G5, as far as one record can break them.
    fn check(self) -> Result<Self, InvalidRecord> {
        let Elected { generation, donors } = self.current;
        if donors.is_empty() || !donors.is_subset(generation.members) {
            return Err(InvalidRecord::Field("donors"));
        }
        if self.last_vote.num < generation.num {
            return Err(InvalidRecord::Field("last vote"));
        }
        if self.online_in > generation.num || self.recovered_to > self.online_in {
            return Err(InvalidRecord::Field("last generation online"));
        }
        Ok(self)
    }
}

fn part<const N: usize>(bytes: &[u8; MEMBERSHIP_RECORD_BYTES], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> MembershipRecord {
        MembershipRecord {
            current: Elected {
                generation: Generation {
                    num: GenerationNum(0x0102_0304),
                    members: NodeSet::from_bits(0b1_0111),
                },
                donors: NodeSet::from_bits(0b101),
            },
            online_in: GenerationNum(0x0102_0303),
            last_vote: Generation {
                num: GenerationNum(0x0102_0305),
                members: NodeSet::from_bits(0b11),
            },
            recovered_to: GenerationNum(7),
        }
    }

    #[test]
    fn a_record_of_version_1_stays_readable() {
        let golden = [
            &[
                1, 4, 3, 2, 1, 0x17, 0, 5, 0, 3, 3, 2, 1, 5, 3, 2, 1, 3, 0, 7, 0, 0, 0,
            ][..],
            &[0; 37],
            &[0x59, 0xFE, 0xA2, 0x57],
        ]
        .concat();
        assert_eq!(record().to_bytes().to_vec(), golden);
        assert_eq!(
            MembershipRecord::from_bytes(&record().to_bytes()),
            Ok(record())
        );
    }

    #[test]
    fn every_damaged_bit_is_noticed() {
        for bit in 0..MEMBERSHIP_RECORD_BYTES * 8 {
            let mut bytes = record().to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(MembershipRecord::from_bytes(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn an_impossible_record_is_refused() {
        let mut ahead = record();
        ahead.online_in = GenerationNum(u32::MAX);
        let refused = MembershipRecord::from_bytes(&ahead.to_bytes());
        assert_eq!(refused, Err(InvalidRecord::Field("last generation online")));
    }
}
