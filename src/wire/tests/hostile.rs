//! Encodings survive the way there and back, and bytes that anybody may have written do no harm.

use proptest::collection::vec;
use proptest::prelude::*;
use protocol::{
    Accept, Ballot, Csn, Decision, GenerationNum, Gid, Lsn, Message, NodeId, NodeSet,
    REFUSAL_TEXT_BYTES_MAX, Refusal, Verdict, Vote,
};
use wire::channel::{FRAME_BYTES_MAX, TAG_BYTES, split_frame};
use wire::frame::{
    Batch, Content, FRAME_MESSAGES_MAX, FrameError, Heartbeat, MESSAGE_BYTES_MAX, decode,
    encode_heartbeat,
};
use wire::hello::{self, RECORD_BYTES, Record};

fn nodes() -> impl Strategy<Value = NodeId> {
    (1..=16u8).prop_map(|id| NodeId::new(id).unwrap())
}

fn gids() -> impl Strategy<Value = Gid> {
    (
        nodes(),
        any::<u64>(),
        any::<u32>(),
        any::<u16>(),
        any::<i64>(),
    )
        .prop_map(|(coordinator, xid, generation, members, started_at)| Gid {
            coordinator,
            xid,
            generation: GenerationNum(generation),
            members: NodeSet::from_bits(members),
            started_at,
        })
}

fn ballots() -> impl Strategy<Value = Ballot> {
    (1..u32::MAX, nodes()).prop_map(|(term, node)| Ballot {
        term,
        node: Some(node),
    })
}

fn verdicts() -> impl Strategy<Value = Verdict> {
    prop_oneof![Just(Verdict::Precommit), Just(Verdict::Preabort)]
}

fn votes() -> impl Strategy<Value = Vote> {
    let refusals = (any::<[u8; 5]>(), ".*", ".{0,600}")
        .prop_map(|(sqlstate, message, detail)| Refusal::new(sqlstate, message, detail));
    prop_oneof![Just(Vote::Yes), refusals.prop_map(Vote::No)]
}

fn messages() -> impl Strategy<Value = Message> {
    let accepted = proptest::option::of(
        (ballots(), verdicts()).prop_map(|(ballot, verdict)| Accept { ballot, verdict }),
    );
    let decisions = || prop_oneof![Just(Decision::Commit), Just(Decision::Abort)];
    prop_oneof![
        (gids(), votes()).prop_map(|(gid, vote)| Message::Vote { gid, vote }),
        (gids(), ballots(), verdicts()).prop_map(|(gid, ballot, verdict)| Message::Propose {
            gid,
            ballot,
            verdict
        }),
        (gids(), ballots()).prop_map(|(gid, ballot)| Message::Accepted { gid, ballot }),
        (gids(), ballots(), accepted, any::<bool>()).prop_map(
            |(gid, ballot, accepted, voted_yes)| Message::Promised {
                gid,
                ballot,
                accepted,
                voted_yes
            }
        ),
        (gids(), decisions(), proptest::option::of(any::<u64>())).prop_map(
            |(gid, decision, csn)| {
                Message::Decided {
                    gid,
                    decision,
                    csn: csn.map(Csn),
                }
            }
        ),
        (gids(), decisions(), proptest::option::of(any::<u64>())).prop_map(
            |(gid, decision, csn)| Message::Finished {
                gid,
                decision,
                csn: csn.map(Csn)
            }
        ),
        Just(Message::AskHorizon),
        any::<u64>().prop_map(|csn| Message::Horizon { csn: Csn(csn) }),
    ]
}

fn heartbeats() -> impl Strategy<Value = Heartbeat> {
    (
        any::<(u64, u32, u16, u32, u32, u64)>(),
        vec((nodes(), any::<u64>().prop_map(Lsn)), 0..16),
        vec((any::<u16>(), vec(any::<u8>(), 0..64)), 0..8),
    )
        .prop_map(|(numbers, received, extras)| Heartbeat {
            sent_ms: numbers.0,
            epoch: numbers.1,
            connected: NodeSet::from_bits(numbers.2),
            generation: GenerationNum(numbers.3),
            online_generation: GenerationNum(numbers.4),
            flushed: Lsn(numbers.5),
            received,
            extras,
        })
}

proptest! {
    #[test]
    fn messages_come_back_as_they_were(sent in vec(messages(), 1..200)) {
        let mut batch = Batch::default();
        for message in &sent {
            batch.push(message).unwrap();
        }
        let mut heard = Vec::new();
        for frame in batch.frames() {
            prop_assert!(frame.len() <= FRAME_BYTES_MAX);
            prop_assert_eq!(decode(1, frame, &mut heard), Ok(Content::Messages));
        }
        prop_assert_eq!(heard, sent);
    }

    #[test]
    fn heartbeats_come_back_as_they_were(sent in heartbeats()) {
        let mut content = Vec::new();
        encode_heartbeat(&sent, &mut content).unwrap();
        prop_assert_eq!(decode(1, &content, &mut Vec::new()), Ok(Content::Heartbeat(sent)));
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        bytes in vec(any::<u8>(), 0..4096),
        kind in 0..4u8,
        record: [[u8; 32]; RECORD_BYTES / 32],
    ) {
        let mut messages = Vec::new();
        let _ = decode(1, &bytes, &mut messages);
        let _ = decode(1, &[&[kind], &bytes[..]].concat(), &mut messages);
        let _ = split_frame(&bytes);
        let record: Record = record.concat().try_into().unwrap();
        let _ = hello::open_record(&record);
        let body = record[8..].try_into().unwrap();
        let _ = hello::Hello::decode(&body);
        let _ = hello::Refusal::decode(&body);
    }

    #[test]
    fn damaged_frames_are_decoded_or_refused(
        sent in vec(messages(), 1..8),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        end: prop::sample::Index,
    ) {
        let mut batch = Batch::default();
        for message in &sent {
            batch.push(message).unwrap();
        }
        let mut frame = batch.frames().next().unwrap().to_vec();
        for (at, byte) in damage {
            let at = at.index(frame.len());
            frame[at] = byte;
        }
        frame.truncate(end.index(frame.len() + 1));
        let mut heard = Vec::new();
        let _ = decode(1, &frame, &mut heard);
        prop_assert!(heard.len() <= frame.len());
    }
}

fn longest_vote() -> Message {
    let text = "x".repeat(2 * REFUSAL_TEXT_BYTES_MAX);
    Message::Vote {
        gid: Gid {
            coordinator: NodeId::new(16).unwrap(),
            xid: u64::MAX,
            generation: GenerationNum(u32::MAX),
            members: NodeSet::from_bits(u16::MAX),
            started_at: i64::MIN,
        },
        vote: Vote::No(Refusal::new(*b"40001", text.as_str(), text.as_str())),
    }
}

#[test]
fn longest_message_fits() {
    let mut batch = Batch::default();
    batch.push(&longest_vote()).unwrap();
    assert!(batch.len() <= MESSAGE_BYTES_MAX);
}

#[test]
fn frames_are_cut_at_their_bounds() {
    for (message, count) in [(longest_vote(), 1000), (Message::AskHorizon, 5000)] {
        let mut batch = Batch::default();
        for _ in 0..count {
            batch.push(&message).unwrap();
        }
        let mut heard = Vec::new();
        for frame in batch.frames() {
            assert!(frame.len() <= FRAME_BYTES_MAX);
            let before = heard.len();
            decode(1, frame, &mut heard).unwrap();
            assert!(heard.len() - before <= FRAME_MESSAGES_MAX);
        }
        assert_eq!(heard.len(), count);
    }
}

#[test]
fn too_many_messages_are_refused() {
    let mut batch = Batch::default();
    batch.push(&Message::AskHorizon).unwrap();
    let one = batch.frames().next().unwrap().to_vec();
    let body = one[1..].repeat(FRAME_MESSAGES_MAX + 1);
    let frame = [&one[..1], &body].concat();
    assert_eq!(
        decode(1, &frame, &mut Vec::new()),
        Err(FrameError::TooManyMessages)
    );
}

#[test]
fn other_versions_and_kinds_are_refused_by_name() {
    let refused = |version, content: &[u8]| decode(version, content, &mut Vec::new()).err();
    assert_eq!(refused(2, &[1, 0]), Some(FrameError::Version(2)));
    assert_eq!(refused(1, &[]), Some(FrameError::Empty));
    assert_eq!(refused(1, &[1]), Some(FrameError::Empty));
    assert_eq!(refused(1, &[9, 0]), Some(FrameError::Kind(9)));
}

#[test]
fn length_out_of_bounds_is_refused_before_the_rest_arrives() {
    let announce = |length: usize| u16::try_from(length).unwrap().to_le_bytes();
    assert!(split_frame(&announce(TAG_BYTES - 1)).is_err());
    assert!(split_frame(&announce(FRAME_BYTES_MAX + TAG_BYTES + 1)).is_err());
    assert_eq!(
        split_frame(&announce(FRAME_BYTES_MAX + TAG_BYTES)),
        Ok(None)
    );
    assert_eq!(split_frame(&[16]), Ok(None));
}

#[test]
fn heartbeat_that_promises_more_than_it_holds_is_refused() {
    let mut content = Vec::new();
    encode_heartbeat(&Heartbeat::default(), &mut content).unwrap();
    // The last byte is the number of extras; 253 announces eight more bytes of it.
    content.pop();
    content.push(253);
    content.extend_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        decode(1, &content, &mut Vec::new()),
        Err(FrameError::Decode(_))
    ));
}
