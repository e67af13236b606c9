//! What does not belong to the cluster ends at the handshake, and nobody else notices.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{
    Running, answer_by_hand, config, dial_by_hand, identity, node, number_of, numbered,
    read_record, three, until_closed,
};
use mesh::{ClusterSecret, DownReason, MeetError, MeshEvent};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use wire::handshake::{HandshakeError, Identity};
use wire::hello::{Hello, Versions};

/// Dials node 1 as `stranger`; what both sides say.
async fn both_reasons(stranger: Identity, wanted: u8) -> (String, String) {
    let mut one = Running::start(config(1, &[]));
    let told = dial_by_hand(one.addr(), &stranger, node(wanted)).await;
    let told = told.err().expect("the stranger got in");
    (one.wait_refused().await.to_string(), told.to_string())
}

#[tokio::test]
async fn other_secret_is_refused_with_the_reason_on_both_sides() {
    let mut stranger = identity(3);
    stranger.secret = ClusterSecret::new([8; 32]);
    let (here, there) = both_reasons(stranger, 1).await;
    assert_eq!(here, "the peer does not hold the secret of this cluster");
    assert_eq!(
        there,
        "the peer (wire version 1) refused this node: the cluster secrets differ"
    );
}

#[tokio::test]
async fn other_cluster_is_refused_with_the_reason_on_both_sides() {
    let mut stranger = identity(3);
    stranger.cluster_id = 43;
    let (here, there) = both_reasons(stranger, 1).await;
    assert_eq!(here, "node 3 belongs to another cluster");
    assert!(there.ends_with("it belongs to another cluster"), "{there}");
}

#[tokio::test]
async fn wrong_nodes_are_refused_with_the_reason_on_both_sides() {
    let (here, there) = both_reasons(identity(9), 1).await;
    assert_eq!(here, "node 9 is not one of this node's peers");
    assert!(there.ends_with("it does not know this node"), "{there}");

    let (here, there) = both_reasons(identity(3), 2).await;
    assert_eq!(here, "node 3 wanted to reach node 2, not this node");
    assert!(
        there.ends_with("it is not the node that was asked for"),
        "{there}"
    );
}

#[tokio::test]
async fn unknown_version_is_refused_by_name_on_both_sides() {
    let mut stranger = identity(3);
    stranger.versions = Versions::new(7, 9).unwrap();
    let (here, there) = both_reasons(stranger, 1).await;
    assert_eq!(here, "the peer speaks wire version 7 to 9, this node 1");
    assert!(there.ends_with("no common wire version"), "{there}");
}

/// Has node 2 dial an acceptor that is `stranger`; what both sides say.
async fn both_reasons_when_dialling(stranger: Identity) -> (String, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut two = Running::start(config(2, &[listener.local_addr().unwrap()]));
    let (mut stream, _) = listener.accept().await.unwrap();
    let there = answer_by_hand(&mut stream, &stranger).await.err();
    let here = two.wait_refused().await;
    (
        here.to_string(),
        there.expect("the stranger got in").to_string(),
    )
}

#[tokio::test]
async fn dialling_node_says_why_it_was_refused() {
    let mut stranger = identity(1);
    stranger.secret = ClusterSecret::new([8; 32]);
    let (here, there) = both_reasons_when_dialling(stranger).await;
    assert!(here.ends_with("the cluster secrets differ"), "{here}");
    assert_eq!(there, "the peer does not hold the secret of this cluster");

    let (here, there) = both_reasons_when_dialling(identity(3)).await;
    assert!(
        here.ends_with("it is not the node that was asked for"),
        "{here}"
    );
    assert_eq!(there, "node 2 wanted to reach node 1, not this node");
}

#[tokio::test]
async fn dialling_node_refuses_whom_it_did_not_ask_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut two = Running::start(config(2, &[listener.local_addr().unwrap()]));
    let (mut stream, _) = listener.accept().await.unwrap();
    read_record(&mut stream).await.unwrap();
    let mut impostor = Hello {
        versions: Versions::OURS,
        from: node(3),
        to: node(2),
        epoch: 1,
        cluster_id: common::CLUSTER_ID,
        nonce: [0; 16],
    };
    stream.write_all(&impostor.encode()).await.unwrap();
    let (from, wanted) = (node(3), node(1));
    let reason = HandshakeError::ReachedWrongNode { from, wanted };
    assert_eq!(two.wait_refused().await, MeetError::Handshake(reason));
    let refusal = read_record(&mut stream).await.expect("it does not say why");
    assert_eq!(refusal[..8], *b"MTM-ARBR");

    // One that has no secret to prove may say who it likes.
    impostor.from = node(1);
    let (mut stream, _) = listener.accept().await.unwrap();
    read_record(&mut stream).await.unwrap();
    stream.write_all(&impostor.encode()).await.unwrap();
    let mut key = read_record(&mut stream).await.unwrap();
    key[7] = b'A';
    stream.write_all(&key).await.unwrap();
    assert_eq!(
        two.wait_refused().await,
        MeetError::Handshake(HandshakeError::Secret)
    );
}

/// Keeps numbered messages going from node 3 to node 1 while `disturb` runs; fails when one is missing or a link goes down.
async fn undisturbed(disturb: impl AsyncFnOnce(SocketAddr)) {
    let [mut one, _two, three] = three().await;
    let addr = one.addr();
    let mut heard = 0;
    let load = async {
        for number in 0.. {
            three.handle.send(node(1), &numbered(number)).unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let watch = async {
        while let Some(event) = one.events.recv().await {
            match event {
                MeshEvent::Messages { batch, .. } => {
                    for message in &batch {
                        assert_eq!(number_of(message), heard);
                        heard += 1;
                    }
                }
                MeshEvent::Down { peer, reason } => panic!("node {peer} is down: {reason}"),
                _ => {}
            }
        }
    };
    let disturb = async {
        disturb(addr).await;
        // Some load runs beside even the shortest disturbance.
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    tokio::select! {
        () = disturb => {}
        () = load => unreachable!("the load has no end"),
        () = watch => panic!("the mesh has ended"),
    }
    assert!(heard > 0, "nothing arrived meanwhile");
    three.handle.send(node(1), &numbered(u64::MAX)).unwrap();
    while one.wait_numbers(3, 1).await.last() != Some(&u64::MAX) {}
}

#[tokio::test]
async fn garbage_disturbs_nobody() {
    undisturbed(async |addr| {
        for seed in 0..200u8 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            // Not a magic byte among them, and more than the node will ever read.
            let garbage = vec![seed | 0x80; 10_000];
            let _ = stream.write_all(&garbage).await;
            until_closed(&mut stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn truncated_handshakes_disturb_nobody() {
    undisturbed(async |addr| {
        let hello = Hello {
            versions: Versions::OURS,
            from: node(3),
            to: node(1),
            epoch: 9,
            cluster_id: common::CLUSTER_ID,
            nonce: [0; 16],
        };
        for length in 0..64 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(&hello.encode()[..length]).await.unwrap();
            stream.shutdown().await.unwrap();
            until_closed(&mut stream).await;
        }
        // The whole hello of a peer that is connected, and nothing after it.
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(&hello.encode()).await.unwrap();
        read_record(&mut stream).await.unwrap();
        drop(stream);
    })
    .await;
}

#[tokio::test]
async fn replayed_handshake_is_refused_and_disturbs_nobody() {
    let mut recorded = None;
    {
        let one = Running::start(config(1, &[]));
        let met = dial_by_hand(one.addr(), &identity(3), node(1)).await;
        recorded.replace(met.ok().unwrap().2);
    }
    let [hello, key, confirm] = recorded.unwrap();
    undisturbed(async |addr| {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream
            .write_all(&[hello, key, confirm].concat())
            .await
            .unwrap();
        let answered = read_record(&mut stream).await.unwrap();
        assert_eq!(answered[..8], *b"MTM-ARBH");
        if let Some(refusal) = read_record(&mut stream).await {
            assert_eq!(refusal[..8], *b"MTM-ARBR");
        }
        until_closed(&mut stream).await;
    })
    .await;
}

#[tokio::test]
async fn crowd_of_slow_strangers_disturbs_nobody() {
    undisturbed(async |addr| {
        let mut crowd = Vec::new();
        for _ in 0..200 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(b"MTM").await.unwrap();
            crowd.push(stream);
        }
        // Others are heard all the same; that it comes from an old epoch spares the link of node 2.
        let mut old = identity(2);
        old.epoch = 0;
        let told = dial_by_hand(addr, &old, node(1)).await.err().unwrap();
        assert!(told.to_string().contains("a later incarnation"), "{told}");
        for stream in &mut crowd {
            until_closed(stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn slow_strangers_are_dropped() {
    let mut config = config(1, &[]);
    config.connect_timeout_ms = 200;
    let mut one = Running::start(config);
    let mut stream = TcpStream::connect(one.addr()).await.unwrap();
    // One byte at a time stays within every limit but that of the whole handshake.
    let drip = async {
        while stream.write_all(b"M").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        reason = one.wait_refused() => assert_eq!(reason, MeetError::Timeout(200)),
        () = drip => panic!("the connection was closed without a report"),
    }
    until_closed(&mut stream).await;
}

#[tokio::test]
async fn damaged_frames_end_their_link_and_no_other() {
    let mut one = Running::start(config(1, &[]));
    let mut two = Running::start(config(2, &[one.addr()]));
    one.wait_up(&[2]).await;
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 5] = [
        ("too long", |frame| {
            frame[..2].copy_from_slice(&u16::MAX.to_le_bytes())
        }),
        ("too short", |frame| {
            frame[..2].copy_from_slice(&1u16.to_le_bytes())
        }),
        ("changed", |frame| frame[5] ^= 1),
        ("repeated", |frame| frame.extend(frame.clone())),
        ("garbage", |frame| *frame = vec![0x55; 0x5555 + 2]),
    ];
    for (name, damage) in damages {
        let (mut stream, mut session, _) = dial_by_hand(one.addr(), &identity(3), node(1))
            .await
            .ok()
            .unwrap();
        let mut batch = wire::frame::Batch::default();
        batch.push(&numbered(1)).unwrap();
        let mut sealed = Vec::new();
        session
            .sealer
            .seal(batch.frames().next().unwrap(), &mut sealed)
            .unwrap();
        damage(&mut sealed);
        stream.write_all(&sealed).await.unwrap();
        let reason = one.wait_down(3).await;
        assert!(matches!(reason, DownReason::Channel(_)), "{name}: {reason}");
        until_closed(&mut stream).await;
    }
    // Sealed by a member, and still not what a frame can hold.
    let (mut stream, mut session, _) = dial_by_hand(one.addr(), &identity(3), node(1))
        .await
        .ok()
        .unwrap();
    let mut sealed = Vec::new();
    session
        .sealer
        .seal(&[1, 250, 250, 250], &mut sealed)
        .unwrap();
    stream.write_all(&sealed).await.unwrap();
    let reason = one.wait_down(3).await;
    assert!(matches!(reason, DownReason::Frame(_)), "{reason}");

    two.handle.send(node(1), &numbered(8)).unwrap();
    assert_eq!(one.wait_numbers(2, 1).await, [8]);
    one.handle.send(node(2), &numbered(9)).unwrap();
    assert_eq!(two.wait_numbers(1, 1).await, [9]);
}

#[tokio::test]
async fn truncated_frame_is_a_closed_connection() {
    let mut one = Running::start(config(1, &[]));
    let (mut stream, _session, _) = dial_by_hand(one.addr(), &identity(3), node(1))
        .await
        .ok()
        .unwrap();
    stream.write_all(&[200, 0, 1, 2, 3]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(one.wait_down(3).await, DownReason::Closed);
}
