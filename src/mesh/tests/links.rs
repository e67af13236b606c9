//! Links between proper nodes: they come up, carry messages in order, and go down for good reasons only.

mod common;

use std::time::Duration;

use common::{
    Running, SENT_MS, config, dial_by_hand, identity, node, number_of, numbered, three, until,
    until_closed,
};
use mesh::{DownReason, Heartbeat, Mesh, MeshEvent, OUTBOX_BYTES_MAX, StartError};
use protocol::{GenerationNum, Gid, Lsn, Message, NodeSet, Refusal, Vote};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::yield_now;

#[tokio::test]
async fn three_nodes_connect_and_talk() {
    let mut nodes = three().await;
    for (from, sender) in (0..).zip(&nodes) {
        for to in (0..3).filter(|to| *to != from) {
            let message = numbered(from * 10 + to);
            sender.handle.send(node(to as u8 + 1), &message).unwrap();
        }
    }
    for (to, receiver) in (0..).zip(&mut nodes) {
        let mut numbers = Vec::new();
        while numbers.len() < 2 {
            let batch = receiver
                .wait(|event| match event {
                    MeshEvent::Messages { batch, .. } => Some(batch.clone()),
                    _ => None,
                })
                .await;
            numbers.extend(batch.iter().map(number_of));
        }
        numbers.sort_unstable();
        let wanted: Vec<_> = (0..3)
            .filter(|from| *from != to)
            .map(|from| from * 10 + to)
            .collect();
        assert_eq!(numbers, wanted);
    }
}

#[tokio::test]
async fn messages_arrive_in_order() {
    let [mut one, _two, three] = three().await;
    let count = 200_000;
    let sender = tokio::spawn(async move {
        for number in 0..count {
            three.handle.send(node(1), &numbered(number)).unwrap();
            if number % 1000 == 0 {
                yield_now().await;
            }
        }
        three
    });
    let numbers = one.wait_numbers(3, count as usize).await;
    assert!(numbers.into_iter().eq(0..count));
    drop(sender.await.unwrap());
}

#[tokio::test]
async fn what_is_sent_in_one_turn_arrives_together() {
    let [mut one, _two, three] = three().await;
    for number in 0..100 {
        three.handle.send(node(1), &numbered(number)).unwrap();
    }
    let first = one
        .wait(|event| match event {
            MeshEvent::Messages { batch, .. } => Some(batch.len()),
            _ => None,
        })
        .await;
    assert_eq!(first, 100);
}

#[tokio::test]
async fn heartbeats_tell_what_the_sender_knows() {
    let [one, _two, mut three] = three().await;
    let info = Heartbeat {
        generation: GenerationNum(4),
        online_generation: GenerationNum(3),
        flushed: Lsn(77),
        received: vec![(node(2), Lsn(5))],
        extras: vec![(9, b"later".to_vec())],
        ..Heartbeat::default()
    };
    one.handle.heartbeat_info(info.clone()).unwrap();
    let heard = three
        .wait(|event| match event {
            MeshEvent::Heartbeat { from, heartbeat }
                if *from == node(1) && heartbeat.generation == GenerationNum(4) =>
            {
                Some(heartbeat.clone())
            }
            _ => None,
        })
        .await;
    let connected: NodeSet = (1..=3).map(node).collect();
    assert_eq!(
        heard,
        Heartbeat {
            sent_ms: SENT_MS,
            epoch: 1,
            connected,
            ..info
        }
    );

    let too_long = Heartbeat {
        extras: vec![(9, vec![0; 4096])],
        ..Heartbeat::default()
    };
    assert!(one.handle.heartbeat_info(too_long).is_err());
}

#[tokio::test]
async fn restarted_nodes_come_back() {
    let [mut one, two, mut three] = three().await;
    let (addr_one, addr_two) = (one.addr(), two.addr());

    // The dialling side goes and comes.
    drop(three);
    assert_eq!(one.wait_down(3).await, DownReason::Closed);
    let mut again = config(3, &[addr_one, addr_two]);
    again.epoch = 2;
    three = Running::start(again);
    let epoch = one
        .wait(|event| match event {
            MeshEvent::Up { peer, epoch, .. } if *peer == node(3) => Some(*epoch),
            _ => None,
        })
        .await;
    assert_eq!(epoch, 2);
    three.wait_up(&[1, 2]).await;

    // The accepting side goes and comes.
    drop(one);
    assert_eq!(three.wait_down(1).await, DownReason::Closed);
    let mut again = config(1, &[]);
    again.listen = vec![addr_one];
    let mut one = Running::start(again);
    one.wait_up(&[2, 3]).await;
    three.wait_up(&[1]).await;
    three.handle.send(node(1), &numbered(5)).unwrap();
    assert_eq!(one.wait_numbers(3, 1).await, [5]);
}

#[tokio::test]
async fn newest_connection_of_a_peer_wins() {
    let mut one = Running::start(config(1, &[]));
    let proper = identity(3);
    let (mut old, mut session, _) = dial_by_hand(one.addr(), &proper, node(1))
        .await
        .ok()
        .unwrap();
    one.wait_up(&[3]).await;
    send_by_hand(&mut old, &mut session, &[numbered(1)]).await;
    assert_eq!(one.wait_numbers(3, 1).await, [1]);

    let (mut new, mut new_session, _) = dial_by_hand(one.addr(), &proper, node(1))
        .await
        .ok()
        .unwrap();
    assert_eq!(one.wait_down(3).await, DownReason::Replaced);
    one.wait_up(&[3]).await;
    until_closed(&mut old).await;
    send_by_hand(&mut new, &mut new_session, &[numbered(2)]).await;
    assert_eq!(one.wait_numbers(3, 1).await, [2]);

    let mut stale = identity(3);
    stale.epoch = 0;
    let told = dial_by_hand(one.addr(), &stale, node(1))
        .await
        .err()
        .unwrap();
    assert!(told.to_string().contains("a later incarnation"), "{told}");
    send_by_hand(&mut new, &mut new_session, &[numbered(3)]).await;
    assert_eq!(one.wait_numbers(3, 1).await, [3]);
}

async fn send_by_hand(
    stream: &mut tokio::net::TcpStream,
    session: &mut wire::handshake::Session,
    messages: &[Message],
) {
    let mut batch = wire::frame::Batch::default();
    messages
        .iter()
        .for_each(|message| batch.push(message).unwrap());
    let mut sealed = Vec::new();
    for frame in batch.frames() {
        session.sealer.seal(frame, &mut sealed).unwrap();
    }
    tokio::io::AsyncWriteExt::write_all(stream, &sealed)
        .await
        .unwrap();
}

#[tokio::test]
async fn silent_peer_is_down() {
    let mut one = Running::start(config(1, &[]));
    one.handle.reconfigure(20, 200).unwrap();
    let (mut stream, _session, _) = dial_by_hand(one.addr(), &identity(3), node(1))
        .await
        .ok()
        .unwrap();
    one.wait_up(&[3]).await;
    assert_eq!(one.wait_down(3).await, DownReason::Silent(200));
    until_closed(&mut stream).await;
    assert_eq!(one.handle.connected(), NodeSet::EMPTY);
}

#[tokio::test]
async fn node_that_may_not_speak_looks_dead() {
    let [mut one, _two, three] = three().await;
    one.handle.reconfigure(20, 200).unwrap();
    three.handle.speak_for(Some(Duration::ZERO));
    three.handle.send(node(1), &numbered(1)).unwrap();
    assert_eq!(one.wait_down(3).await, DownReason::Silent(200));
    three.handle.speak_for(None);
    one.wait_up(&[3]).await;
}

#[tokio::test]
async fn node_that_may_not_speak_makes_no_link() {
    let mut one = Running::start(config(1, &[]));
    let mut two = Running::start(config(2, &[one.addr()]));
    two.handle.speak_for(Some(Duration::ZERO));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(one.handle.connected(), NodeSet::EMPTY);
    one.handle.speak_for(Some(Duration::ZERO));
    let mut stranger = TcpStream::connect(one.addr()).await.unwrap();
    until_closed(&mut stranger).await;
    one.handle.speak_for(None);
    two.handle.speak_for(None);
    one.wait_up(&[2]).await;
    two.wait_up(&[1]).await;
}

#[tokio::test]
async fn reconfigured_links_stay_up() {
    let [mut one, mut two, mut three] = three().await;
    for running in [&one, &two, &three] {
        running.handle.reconfigure(10, 500).unwrap();
        assert!(matches!(
            running.handle.reconfigure(500, 500),
            Err(StartError::Timing { .. })
        ));
    }
    for running in [&mut one, &mut two, &mut three] {
        for _ in 0..100 {
            running
                .wait(|event| match event {
                    MeshEvent::Heartbeat { .. } => Some(()),
                    MeshEvent::Down { peer, reason } => panic!("node {peer} is down: {reason}"),
                    _ => None,
                })
                .await;
        }
    }
}

#[tokio::test]
async fn caller_that_does_not_listen_for_long_loses_no_link() {
    let [mut one, _two, three] = three().await;
    one.handle.reconfigure(20, 1000).unwrap();
    // More events than the queue holds, so that the readers of node 1 have to wait.
    for number in 0..600 {
        three.handle.send(node(1), &numbered(number)).unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut numbers = Vec::new();
    while numbers.len() < 600 {
        one.wait(|event| {
            match event {
                MeshEvent::Messages { batch, .. } => numbers.extend(batch.iter().map(number_of)),
                MeshEvent::Down { peer, reason } => panic!("node {peer} is down: {reason}"),
                _ => {}
            }
            Some(())
        })
        .await;
    }
    assert!(numbers.into_iter().eq(0..600));
}

/// A message of about 800 bytes.
fn long_message() -> Message {
    let text = "x".repeat(400);
    let gid = Gid {
        coordinator: node(1),
        xid: 1,
        generation: GenerationNum(1),
        members: NodeSet::from_bits(0b11),
        started_at: 0,
    };
    let vote = Vote::No(Refusal::new(*b"40001", text.clone(), text));
    Message::Vote { gid, vote }
}

#[tokio::test]
async fn peer_that_takes_nothing_loses_its_link() {
    let mut one = Running::start(config(1, &[]));
    // The stranger is silent, too, but that is not what this is about.
    one.handle.reconfigure(50, 600_000).unwrap();
    let (_stream, _session, _) = dial_by_hand(one.addr(), &identity(3), node(1))
        .await
        .ok()
        .unwrap();
    one.wait_up(&[3]).await;
    let message = long_message();
    // The kernel's buffers take some; four times the bound is more than both hold.
    let mut sent = 0;
    while one.handle.connected().contains(node(3)) {
        one.handle.send(node(3), &message).unwrap();
        sent += 800;
        assert!(sent < 8 * OUTBOX_BYTES_MAX, "everything was taken");
        if sent % (800 * 256) == 0 {
            yield_now().await;
        }
    }
    assert_eq!(one.wait_down(3).await, DownReason::TooSlow);
}

#[tokio::test]
async fn peer_that_floods_this_node_still_hears_it() {
    let mut one = Running::start(config(1, &[]));
    one.handle.reconfigure(1, 600_000).unwrap();
    let addr = one.addr();
    let flood = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(flood_and_listen(addr, 10))
    });
    let reason = one.wait_down(3).await;
    assert_eq!(reason, DownReason::Closed);
    // Counted in bytes, since time depends on what else the machine does.
    let flooded = flood.join().unwrap();
    assert!(
        flooded < 64 * 1024 * 1024,
        "10 heartbeats in {flooded} bytes"
    );
}

/// Sends as fast as the node takes, until the node was heard so often; returns how many bytes it took meanwhile.
async fn flood_and_listen(addr: std::net::SocketAddr, wanted: usize) -> usize {
    let (mut stream, mut session, _) = dial_by_hand(addr, &identity(3), node(1))
        .await
        .ok()
        .unwrap();
    let (mut reader, mut writer) = stream.split();
    let mut flooded = 0;
    let flood = async {
        let message = long_message();
        let mut batch = wire::frame::Batch::default();
        (0..10).for_each(|_| batch.push(&message).unwrap());
        let mut sealed = Vec::new();
        loop {
            sealed.clear();
            for _ in 0..8 {
                let frame = batch.frames().next().unwrap();
                session.sealer.seal(frame, &mut sealed).unwrap();
            }
            tokio::io::AsyncWriteExt::write_all(&mut writer, &sealed)
                .await
                .unwrap();
            flooded += sealed.len();
            yield_now().await;
        }
    };
    let listen = async {
        let mut buffer = [0; 4096];
        for _ in 0..wanted {
            let read = tokio::io::AsyncReadExt::read(&mut reader, &mut buffer);
            assert!(read.await.unwrap() > 0);
        }
    };
    tokio::select! {
        biased;
        () = listen => {}
        () = flood => {}
    }
    flooded
}

#[tokio::test]
async fn messages_without_a_link_are_dropped() {
    let mut one = Running::start(config(1, &[]));
    one.handle.send(node(3), &numbered(1)).unwrap();
    let mut three = Running::start(config(3, &[one.addr()]));
    three.wait_up(&[1]).await;
    one.wait_up(&[3]).await;
    one.handle.send(node(3), &numbered(2)).unwrap();
    assert_eq!(three.wait_numbers(1, 1).await, [2]);
}

#[tokio::test]
async fn taken_port_is_a_clear_error() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = taken.local_addr().unwrap();
    let mut config = config(1, &[]);
    config.listen = vec![addr];
    let error = Mesh::start(config.clone()).err().unwrap();
    assert!(matches!(error, StartError::Listen { .. }));
    assert!(
        error
            .to_string()
            .starts_with(&format!("could not listen on {addr}: ")),
        "{error}"
    );
    drop(taken);
    assert!(Mesh::start(config).is_ok());
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused() {
    let refused = |change: fn(&mut mesh::MeshConfig)| {
        let mut config = config(1, &[]);
        change(&mut config);
        Mesh::start(config).err().unwrap()
    };
    let own = refused(|config| config.peers[0].id = node(1));
    assert!(matches!(own, StartError::OwnPeer(_)));
    let twice = refused(|config| config.peers[0].id = node(3));
    assert!(matches!(twice, StartError::DuplicatePeer(_)));
    let timing = refused(|config| config.heartbeat_recv_ms = 10);
    assert!(matches!(timing, StartError::Timing { .. }));
}

#[tokio::test]
async fn dropped_mesh_frees_its_port_and_ends_its_events() {
    let mut one = Running::start(config(1, &[]));
    let addr = one.addr();
    drop(one.handle);
    while one.events.recv().await.is_some() {}
    until("the port stays taken", || {
        std::net::TcpListener::bind(addr).is_ok()
    })
    .await;
}
