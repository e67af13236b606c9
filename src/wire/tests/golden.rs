//! Frames and records of every wire version, as they were written when the version was made.
//!
//! A failure here means that this build no longer understands, or no longer writes, what other builds of that version do: make a new
//! version instead.

use std::fmt::Write;
use std::path::PathBuf;

use protocol::membership::{Elected, Generation, MembershipMessage, Presence};
use protocol::{
    Accept, Ballot, Csn, Decision, GenerationNum, Gid, Lsn, Message, NodeId, NodeSet, Refusal,
    Verdict, Vote,
};
use wire::frame::{Batch, Content, Heartbeat, decode, encode_heartbeat};
use wire::hello::{self, Hello, Kind, Record, RefusalCode, Versions};

fn node(id: u8) -> NodeId {
    NodeId::new(id).unwrap()
}

fn messages() -> Vec<(&'static str, Message)> {
    let gid = Gid {
        coordinator: node(3),
        xid: 4_294_967_999,
        generation: GenerationNum(2),
        members: NodeSet::from_bits(0b111),
        started_at: 817_000_000_123_456,
    };
    let ballot = Ballot::COORDINATOR.above(node(1));
    let verdict = Verdict::Precommit;
    let refusal = Refusal::new(
        *b"40001",
        "could not serialize access",
        "node 2, table t, key (1)",
    );
    vec![
        (
            "vote_yes",
            Message::Vote {
                gid,
                vote: Vote::Yes,
            },
        ),
        (
            "vote_no",
            Message::Vote {
                gid,
                vote: Vote::No(refusal),
            },
        ),
        (
            "propose",
            Message::Propose {
                gid,
                ballot,
                verdict,
            },
        ),
        ("accepted", Message::Accepted { gid, ballot }),
        (
            "refused",
            Message::Refused {
                gid,
                promised: ballot,
            },
        ),
        ("status", Message::Status { gid, ballot }),
        (
            "promised",
            Message::Promised {
                gid,
                ballot,
                accepted: Some(Accept {
                    ballot,
                    verdict: Verdict::Preabort,
                }),
                voted_yes: true,
            },
        ),
        (
            "decided_commit",
            Message::Decided {
                gid,
                decision: Decision::Commit,
                csn: Some(Csn(5 << 40 | 77)),
            },
        ),
        (
            "decided_abort",
            Message::Decided {
                gid,
                decision: Decision::Abort,
                csn: None,
            },
        ),
        (
            "finished",
            Message::Finished {
                gid,
                decision: Decision::Commit,
                csn: Some(Csn(5 << 40 | 77)),
            },
        ),
        ("forget", Message::Forget { gid }),
        ("query", Message::Query { gid }),
        ("ask_horizon", Message::AskHorizon),
        ("horizon", Message::Horizon { csn: Csn(300) }),
        (
            "request_vote",
            Message::Membership(MembershipMessage::RequestVote {
                generation: elected(8).generation,
                current: elected(7),
            }),
        ),
        (
            "granted",
            Message::Membership(MembershipMessage::Granted {
                generation: elected(8).generation,
                online_in: GenerationNum(6),
            }),
        ),
        (
            "denied",
            Message::Membership(MembershipMessage::Denied {
                num: GenerationNum(8),
                last_vote: GenerationNum(300),
                current: elected(7),
            }),
        ),
        (
            "elected",
            Message::Membership(MembershipMessage::Elected(elected(8))),
        ),
    ]
}

fn elected(num: u32) -> Elected {
    Elected {
        generation: Generation {
            num: GenerationNum(num),
            members: NodeSet::from_bits(0b1_0011),
        },
        donors: NodeSet::from_bits(0b11),
    }
}

fn heartbeat() -> Heartbeat {
    Heartbeat {
        sent_ms: 123_456,
        epoch: 5,
        connected: NodeSet::from_bits(0b111),
        generation: GenerationNum(2),
        online_generation: GenerationNum(1),
        flushed: Lsn(0x1_0000_0028),
        received: vec![(node(1), Lsn(0x16B_3740)), (node(2), Lsn(900))],
        extras: vec![(1, vec![0xDE, 0xAD])],
    }
}

fn hello() -> Hello {
    Hello {
        versions: Versions::new(1, 3).unwrap(),
        from: node(3),
        to: node(1),
        epoch: 5,
        cluster_id: 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff,
        nonce: *b"sixteen bytes ok",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.trim().as_bytes();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// The golden bytes of that name; with `WRITE_GOLDEN` set, missing ones are written.
fn golden(name: &str, written_now: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.hex"));
    if std::env::var_os("WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, hex(written_now) + "\n").unwrap();
    }
    let text = std::fs::read_to_string(&path);
    unhex(&text.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

#[test]
fn messages_of_version_1() {
    for (name, message) in messages() {
        let mut batch = Batch::default();
        batch.push(&message).unwrap();
        let written = batch.frames().next().unwrap().to_vec();
        let golden = golden(&format!("v1/{name}"), &written);
        let mut decoded = Vec::new();
        assert_eq!(
            decode(1, &golden, &mut decoded),
            Ok(Content::Messages),
            "{name}"
        );
        assert_eq!(decoded, [message], "{name}");
        assert_eq!(hex(&written), hex(&golden), "{name}");
    }
}

#[test]
fn batch_of_version_1() {
    let all: Vec<_> = messages().into_iter().map(|(_, message)| message).collect();
    let mut batch = Batch::default();
    all.iter().for_each(|message| batch.push(message).unwrap());
    let written: Vec<_> = batch.frames().collect();
    assert_eq!(written.len(), 1);
    let golden = golden("v1/batch", written[0]);
    let mut decoded = Vec::new();
    assert_eq!(decode(1, &golden, &mut decoded), Ok(Content::Messages));
    assert_eq!(decoded, all);
    assert_eq!(hex(written[0]), hex(&golden));
}

#[test]
fn heartbeat_of_version_1() {
    let mut written = Vec::new();
    encode_heartbeat(&heartbeat(), &mut written).unwrap();
    let golden = golden("v1/heartbeat", &written);
    let decoded = decode(1, &golden, &mut Vec::new());
    assert_eq!(decoded, Ok(Content::Heartbeat(heartbeat())));
    assert_eq!(hex(&written), hex(&golden));
}

#[test]
fn presence_of_version_1() {
    let presence = Presence {
        current: elected(8),
        online_in: GenerationNum(7),
        sees: NodeSet::from_bits(0b111),
        willing: true,
        leaving: false,
    };
    let mut said = heartbeat();
    said.set_presence(&Presence::default()).unwrap();
    said.set_presence(&presence).unwrap();
    let mut written = Vec::new();
    encode_heartbeat(&said, &mut written).unwrap();
    let golden = golden("v1/presence", &written);
    let Ok(Content::Heartbeat(decoded)) = decode(1, &golden, &mut Vec::new()) else {
        panic!("the golden heartbeat does not decode");
    };
    assert_eq!(decoded.presence(), Some(presence));
    assert_eq!(heartbeat().presence(), None);
    assert_eq!(hex(&written), hex(&golden));
}

#[test]
fn hello_of_all_versions() {
    let golden: Record = golden("hello", &hello().encode()).try_into().unwrap();
    let (kind, body) = hello::open_record(&golden).unwrap();
    assert_eq!((kind, Hello::decode(body)), (Kind::Hello, Ok(hello())));
    assert_eq!(hello().encode(), golden);
}

#[test]
fn refusal_of_all_versions() {
    let refusal = hello::Refusal {
        code: RefusalCode::Secret,
        versions: Versions::new(1, 3).unwrap(),
    };
    let golden: Record = golden("refusal", &refusal.encode()).try_into().unwrap();
    let (kind, body) = hello::open_record(&golden).unwrap();
    assert_eq!(
        (kind, hello::Refusal::decode(body)),
        (Kind::Refusal, Ok(refusal))
    );
    assert_eq!(refusal.encode(), golden);
}
