//! The handshake without sockets: who gets in, who does not, and what both sides are told.

use protocol::{NodeId, NodeSet};
use wire::handshake::{ClusterSecret, HandshakeError, Identity, Session, answer, dial};
use wire::hello::{RECORD_BYTES, Record, RefusalCode, Versions};

fn node(id: u8) -> NodeId {
    NodeId::new(id).unwrap()
}

fn identity(id: u8) -> Identity {
    Identity {
        node: node(id),
        epoch: u32::from(id) * 10,
        cluster_id: 0x1234_5678_9abc_def0,
        secret: ClusterSecret::new([7; 32]),
        versions: Versions::OURS,
    }
}

fn peers() -> NodeSet {
    [node(1), node(2), node(3)].into_iter().collect()
}

/// All records of a handshake, and how it ended on both sides.
struct Meeting {
    records: Vec<Record>,
    dialer: Result<Session, HandshakeError>,
    acceptor: Result<Session, HandshakeError>,
}

/// Runs a handshake; `tamper` may change each record on its way. A refusal is carried to the other side.
fn meet(
    dialer: &Identity,
    wanted: NodeId,
    acceptor: &Identity,
    mut tamper: impl FnMut(usize, &mut Record),
) -> Meeting {
    let mut records = Vec::new();
    let mut carry = |mut record: Record| {
        tamper(records.len(), &mut record);
        records.push(record);
        record
    };
    let told = |error: &HandshakeError, by: &Identity| error.refusal(by.versions);

    let (sent, hello) = dial(dialer, wanted).unwrap();
    let outcome = 'steps: {
        let (answered, record) = match answer(acceptor, peers(), &carry(hello)) {
            Ok(step) => step,
            Err(error) => {
                let heard =
                    told(&error, acceptor).map(|record| sent.on_hello(&record).err().unwrap());
                break 'steps (Err(heard.unwrap_or(HandshakeError::OutOfTurn)), Err(error));
            }
        };
        let (key_sent, record) = match sent.on_hello(&carry(record)) {
            Ok(step) => step,
            Err(error) => {
                let heard =
                    told(&error, dialer).map(|record| answered.on_key(&record).err().unwrap());
                break 'steps (Err(error), Err(heard.unwrap_or(HandshakeError::OutOfTurn)));
            }
        };
        let (confirmed, record) = match answered.on_key(&carry(record)) {
            Ok(step) => step,
            Err(error) => {
                let heard =
                    told(&error, acceptor).map(|record| key_sent.on_key(&record).err().unwrap());
                break 'steps (Err(heard.unwrap_or(HandshakeError::OutOfTurn)), Err(error));
            }
        };
        let (session, record) = match key_sent.on_key(&carry(record)) {
            Ok(step) => step,
            Err(error) => {
                let heard =
                    told(&error, dialer).map(|record| confirmed.on_confirm(&record).err().unwrap());
                break 'steps (Err(error), Err(heard.unwrap_or(HandshakeError::OutOfTurn)));
            }
        };
        (Ok(session), confirmed.on_confirm(&carry(record)))
    };
    Meeting {
        records,
        dialer: outcome.0,
        acceptor: outcome.1,
    }
}

fn refused(code: RefusalCode) -> HandshakeError {
    HandshakeError::RefusedByPeer {
        code,
        versions: Versions::OURS,
    }
}

#[test]
fn members_of_a_cluster_meet_and_talk() {
    let meeting = meet(&identity(3), node(1), &identity(1), |_, _| ());
    let (mut dialer, mut acceptor) = (meeting.dialer.unwrap(), meeting.acceptor.unwrap());
    assert_eq!(
        (dialer.peer, dialer.epoch, dialer.version),
        (node(1), 10, 1)
    );
    assert_eq!(
        (acceptor.peer, acceptor.epoch, acceptor.version),
        (node(3), 30, 1)
    );

    for text in [&b"first"[..], b"", b"third"] {
        let (mut sealed, mut opened) = (Vec::new(), Vec::new());
        dialer.sealer.seal(text, &mut sealed).unwrap();
        acceptor.opener.open(&sealed[2..], &mut opened).unwrap();
        assert_eq!(opened, text);
        sealed.clear();
        acceptor.sealer.seal(text, &mut sealed).unwrap();
        dialer.opener.open(&sealed[2..], &mut opened).unwrap();
        assert_eq!(opened, text);
    }
}

#[test]
fn frames_out_of_place_do_not_open() {
    let meeting = meet(&identity(3), node(1), &identity(1), |_, _| ());
    let (mut dialer, mut acceptor) = (meeting.dialer.unwrap(), meeting.acceptor.unwrap());
    let (mut first, mut second, mut opened) = (Vec::new(), Vec::new(), Vec::new());
    dialer.sealer.seal(b"first", &mut first).unwrap();
    dialer.sealer.seal(b"second", &mut second).unwrap();
    acceptor.opener.open(&first[2..], &mut opened).unwrap();
    assert!(
        acceptor.opener.open(&first[2..], &mut opened).is_err(),
        "repeated"
    );
    // A link ends with its first bad frame, so what follows does not matter.
    assert!(
        dialer.opener.open(&second[2..], &mut opened).is_err(),
        "reflected"
    );
}

#[test]
fn other_secret_is_refused_on_both_sides() {
    let mut stranger = identity(3);
    stranger.secret = ClusterSecret::new([8; 32]);
    let meeting = meet(&stranger, node(1), &identity(1), |_, _| ());
    assert_eq!(meeting.acceptor.err(), Some(HandshakeError::Secret));
    assert_eq!(meeting.dialer.err(), Some(refused(RefusalCode::Secret)));
}

#[test]
fn other_cluster_is_refused_on_both_sides() {
    let mut stranger = identity(3);
    stranger.cluster_id += 1;
    let meeting = meet(&stranger, node(1), &identity(1), |_, _| ());
    assert_eq!(
        meeting.acceptor.err(),
        Some(HandshakeError::Cluster { from: node(3) })
    );
    assert_eq!(meeting.dialer.err(), Some(refused(RefusalCode::Cluster)));
}

#[test]
fn wrong_node_ids_are_refused_on_both_sides() {
    let unknown = meet(&identity(5), node(1), &identity(1), |_, _| ());
    assert_eq!(
        unknown.acceptor.err(),
        Some(HandshakeError::UnknownNode { from: node(5) })
    );
    assert_eq!(
        unknown.dialer.err(),
        Some(refused(RefusalCode::UnknownNode))
    );

    let misled = meet(&identity(3), node(2), &identity(1), |_, _| ());
    let (from, wanted) = (node(3), node(2));
    assert_eq!(
        misled.acceptor.err(),
        Some(HandshakeError::WrongNodeWanted { from, wanted })
    );
    assert_eq!(misled.dialer.err(), Some(refused(RefusalCode::WrongNode)));

    let upwards = meet(&identity(1), node(3), &identity(3), |_, _| ());
    assert_eq!(
        upwards.acceptor.err(),
        Some(HandshakeError::Direction { from: node(1) })
    );
    assert_eq!(upwards.dialer.err(), Some(refused(RefusalCode::Direction)));
}

#[test]
fn versions_without_a_common_one_are_refused_by_name() {
    let mut newer = identity(3);
    newer.versions = Versions::new(7, 9).unwrap();
    let meeting = meet(&newer, node(1), &identity(1), |_, _| ());
    let error = meeting.acceptor.err().unwrap();
    assert_eq!(
        error.to_string(),
        "the peer speaks wire version 7 to 9, this node 1"
    );
    let heard = meeting.dialer.err().unwrap();
    assert_eq!(
        heard.to_string(),
        "the peer (wire version 1) refused this node: no common wire version"
    );
}

#[test]
fn highest_common_version_is_spoken() {
    let (mut newer, mut newest) = (identity(3), identity(1));
    newer.versions = Versions::new(1, 4).unwrap();
    newest.versions = Versions::new(2, 6).unwrap();
    let meeting = meet(&newer, node(1), &newest, |_, _| ());
    assert_eq!(meeting.dialer.unwrap().version, 4);
    assert_eq!(meeting.acceptor.unwrap().version, 4);
}

#[test]
fn every_byte_of_the_handshake_is_bound() {
    for step in 0..5 {
        for byte in 0..RECORD_BYTES {
            let meeting = meet(&identity(3), node(1), &identity(1), |at, record| {
                if at == step {
                    record[byte] ^= 1;
                }
            });
            // The dialer has nothing to wait for after its confirmation; the acceptor must not take it.
            assert!(meeting.acceptor.is_err(), "record {step}, byte {byte}");
            assert!(
                step == 4 || meeting.dialer.is_err(),
                "record {step}, byte {byte}"
            );
        }
    }
}

#[test]
fn recorded_handshake_is_refused_at_its_first_key() {
    let recorded = meet(&identity(3), node(1), &identity(1), |_, _| ()).records;
    let acceptor = identity(1);
    let (answered, _) = answer(&acceptor, peers(), &recorded[0]).unwrap();
    assert_eq!(
        answered.on_key(&recorded[2]).err(),
        Some(HandshakeError::Secret)
    );
}

#[test]
fn records_out_of_turn_are_refused() {
    let recorded = meet(&identity(3), node(1), &identity(1), |_, _| ()).records;
    let acceptor = identity(1);
    for record in &recorded[2..] {
        let early = answer(&acceptor, peers(), record).err();
        assert_eq!(early, Some(HandshakeError::OutOfTurn));
    }
}

#[test]
fn secret_is_not_printed() {
    let printed = format!("{:?}", identity(1));
    assert!(printed.contains("ClusterSecret(..)") && !printed.contains("7, 7"));
}
