//! Encodings round-trip, and nothing else is taken for one.

mod common;

use common::{gid, n};
use proptest::prelude::*;
use protocol::{
    Accept, Ballot, ClusterTag, Csn, Decision, GenerationNum, Gid, InvalidRecord, Lsn, NodeId,
    NodeSet, RECORD_BYTES, REFUSAL_TEXT_BYTES_MAX, Record, Refusal, Verdict,
};

fn any_node() -> impl Strategy<Value = NodeId> {
    (1u8..=16).prop_map(n)
}

prop_compose! {
    fn any_gid()(coordinator in any_node(), xid: u64, generation: u32, members: u16, started_at: i64) -> Gid {
        let (generation, members) = (GenerationNum(generation), NodeSet::from_bits(members));
        Gid { coordinator, xid, generation, members, started_at }
    }
}

prop_compose! {
    fn any_ballot()(term in 1u32.., node in prop::option::of(any_node())) -> Ballot {
        Ballot { term, node }
    }
}

prop_compose! {
    fn any_record()(
        gid in any_gid(),
        promised in any_ballot(),
        accepted in prop::option::of((any_ballot(), prop::sample::select(vec![Verdict::Precommit, Verdict::Preabort]))),
        voted_yes: bool,
        decision in prop::sample::select(vec![None, Some(Decision::Commit), Some(Decision::Abort)]),
        csn: u64,
        lsn: u64,
    ) -> Record {
        let accepted = accepted.map(|(ballot, verdict)| Accept { ballot, verdict });
        Record { gid, promised, accepted, voted_yes, decision, csn: Csn(csn), prepare_lsn: Lsn(lsn) }
    }
}

/// Equality of gids looks at their identity only; an encoding has to keep all of them.
fn all_of(gid: Gid) -> (NodeId, u64, GenerationNum, NodeSet, i64) {
    (
        gid.coordinator,
        gid.xid,
        gid.generation,
        gid.members,
        gid.started_at,
    )
}

proptest! {
    #[test]
    fn a_record_round_trips(record in any_record()) {
        let decoded = Record::from_bytes(&record.to_bytes()).expect("what was encoded can be decoded");
        prop_assert_eq!(decoded, record);
        prop_assert_eq!(all_of(decoded.gid), all_of(record.gid));
    }

    #[test]
    fn a_damaged_record_is_refused(record in any_record(), at in 0..RECORD_BYTES, flip in 1u8..) {
        let mut bytes = record.to_bytes();
        bytes[at] ^= flip;
        let refused = matches!(Record::from_bytes(&bytes), Err(InvalidRecord::Checksum { .. }));
        prop_assert!(refused);
    }

    #[test]
    fn a_gid_round_trips(gid in any_gid(), tag: u32) {
        let text = gid.text(ClusterTag(tag));
        let (found_tag, found) = Gid::parse(&text).expect("what was written can be read");
        prop_assert_eq!((found_tag, all_of(found)), (ClusterTag(tag), all_of(gid)));
        prop_assert!(text.len() < 200, "PostgreSQL takes 199 bytes");
    }

    #[test]
    fn other_texts_are_no_gids(text in "mtm-[0-9a-fA-F+]{0,9}-[0-9+]{0,3}-[0-9]{0,3}-[0-9]{0,3}-[0-9a-f]{0,3}-[0-9-]{0,3}") {
        if let Some((tag, gid)) = Gid::parse(&text) {
            prop_assert_eq!(gid.text(tag), text);
        }
    }

    #[test]
    fn a_refusal_is_cut_between_characters(message in "\\PC{0,300}") {
        let refusal = Refusal::retry(message.clone(), "");
        prop_assert!(refusal.message().len() <= REFUSAL_TEXT_BYTES_MAX);
        prop_assert!(message.starts_with(refusal.message()));
    }

    #[test]
    fn two_majorities_share_a_node(size in 1u8..=16, a: u16, b: u16) {
        let configured: NodeSet = (1..=size).map(n).collect();
        let (a, b) = (NodeSet::from_bits(a), NodeSet::from_bits(b));
        if a.is_quorum_of(configured) && b.is_quorum_of(configured) {
            prop_assert!(!a.intersection(b).intersection(configured).is_empty());
        }
    }
}

#[test]
fn the_layout_of_a_record_is_fixed() {
    let record = Record {
        gid: gid(2, 0x0102),
        promised: Ballot {
            term: 3,
            node: Some(n(1)),
        },
        accepted: Some(Accept {
            ballot: Ballot::COORDINATOR,
            verdict: Verdict::Precommit,
        }),
        voted_yes: true,
        decision: Some(Decision::Commit),
        csn: Csn(0x0A),
        prepare_lsn: Lsn(0x0B),
    };
    let bytes: String = record
        .to_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(bytes, GOLDEN_RECORD);
    let mut newer = record.to_bytes();
    newer[0] = 9;
    assert!(
        Record::from_bytes(&newer).is_err(),
        "a checksum guards the version too"
    );
}

const GOLDEN_RECORD: &str = "020202010000000000000100000007000201000000000000030000000101000000000101010a000000000000000b0000000000000000000000000000695914c0";

#[test]
fn zeroes_are_no_record() {
    assert!(Record::from_bytes(&[0; RECORD_BYTES]).is_err());
}

#[test]
fn the_older_transaction_wins_whatever_its_node() {
    let (older, younger) = (
        Gid {
            started_at: 5,
            ..gid(3, 1)
        },
        Gid {
            started_at: 6,
            ..gid(1, 1)
        },
    );
    assert!(older.age() < younger.age());
    let same_moment = Gid {
        started_at: 5,
        ..gid(1, 9)
    };
    assert!(
        same_moment.age() < older.age(),
        "ties are broken by the node"
    );
}
