//! Measures a link on loopback: `cargo run --profile fast -p multimaster-mesh --example loopback`.
//!
//! Two nodes, each with a thread and a runtime of its own, as two arbiters on one machine would have.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use mesh::{ClusterSecret, Mesh, MeshConfig, MeshEvent, MeshHandle, Peer};
use protocol::{GenerationNum, Gid, Message, NodeId, NodeSet, Vote};
use tokio::sync::mpsc::Receiver;

const ROUNDS: usize = 20_000;
const MESSAGES: u64 = 2_000_000;
/// Messages sent between two looks at the socket, as a busy arbiter would.
const TURN: u64 = 16;
/// Messages under way at most: far from what ends a link.
const WINDOW: u64 = 50_000;

type Link = (MeshHandle, Receiver<MeshEvent>);

fn main() {
    let (tell, hear) = std::sync::mpsc::channel();
    let echo = thread::spawn(move || on_runtime(echo(tell)));
    let addr = hear.recv().expect("the echoing node starts");
    on_runtime(measure(addr));
    echo.join().expect("the echoing node ends well");
}

fn on_runtime(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future);
}

fn start(id: u8, peer: u8, port: u16) -> Link {
    Mesh::start(MeshConfig {
        node: node(id),
        epoch: 1,
        cluster_id: 1,
        secret: ClusterSecret::new([1; 32]),
        listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        peers: vec![Peer {
            id: node(peer),
            host: "127.0.0.1".to_owned(),
            port,
        }],
        heartbeat_send_ms: 200,
        heartbeat_recv_ms: 2000,
        connect_timeout_ms: 2000,
        clock_ms: || 0,
    })
    .expect("the mesh starts")
}

fn node(id: u8) -> NodeId {
    NodeId::new(id).expect("a node id")
}

fn vote(xid: u64) -> Message {
    let gid = Gid {
        coordinator: node(1),
        xid,
        generation: GenerationNum(1),
        members: NodeSet::from_bits(0b11),
        started_at: 817_000_000_000_000,
    };
    Message::Vote {
        gid,
        vote: Vote::Yes,
    }
}

/// Answers the rounds one by one, and every [`TURN`]th message after them.
async fn echo(tell: std::sync::mpsc::Sender<SocketAddr>) {
    let (handle, mut events) = start(1, 2, 1);
    tell.send(handle.local_addrs()[0])
        .expect("the other node listens");
    let mut heard = 0;
    while let Some(event) = events.recv().await {
        match event {
            MeshEvent::Messages { batch, .. } => {
                for message in &batch {
                    heard += 1;
                    if heard <= ROUNDS as u64 || heard % TURN == 0 {
                        handle.send(node(2), message).expect("a short message");
                    }
                }
            }
            MeshEvent::Down { .. } => return,
            _ => {}
        }
    }
}

async fn measure(addr: SocketAddr) {
    let (handle, mut events) = start(2, 1, addr.port());
    while !matches!(events.recv().await, Some(MeshEvent::Up { .. })) {}
    latency(&handle, &mut events).await;
    throughput(&handle, &mut events).await;
}

async fn latency(handle: &MeshHandle, events: &mut Receiver<MeshEvent>) {
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS {
        let begun = Instant::now();
        handle
            .send(node(1), &vote(round as u64))
            .expect("a short message");
        answers(events).await;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    let at = |percent: usize| times[(ROUNDS - 1) * percent / 100];
    println!("round trip: median {:?}, 99 % within {:?}", at(50), at(99));
}

async fn throughput(handle: &MeshHandle, events: &mut Receiver<MeshEvent>) {
    let begun = Instant::now();
    let (mut sent, mut confirmed) = (0, 0);
    while confirmed < MESSAGES {
        while sent < MESSAGES && sent - confirmed < WINDOW {
            for _ in 0..TURN {
                handle.send(node(1), &vote(sent)).expect("a short message");
                sent += 1;
            }
            tokio::task::yield_now().await;
            if let Ok(MeshEvent::Messages { batch, .. }) = events.try_recv() {
                confirmed += batch.len() as u64 * TURN;
            }
        }
        if confirmed < sent {
            confirmed += answers(events).await * TURN;
        }
    }
    let seconds = begun.elapsed().max(Duration::from_millis(1)).as_secs_f64();
    println!(
        "one way, {TURN} per turn: {:.0} messages per second",
        MESSAGES as f64 / seconds
    );
}

/// The number of messages in the next batch.
async fn answers(events: &mut Receiver<MeshEvent>) -> u64 {
    loop {
        match events.recv().await {
            Some(MeshEvent::Messages { batch, .. }) => return batch.len() as u64,
            Some(MeshEvent::Down { reason, .. }) => panic!("the link is down: {reason}"),
            Some(_) => {}
            None => panic!("the mesh has ended"),
        }
    }
}
