//! Meshes on loopback, and strangers that behave as a test wants.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::time::Duration;

use mesh::{ClusterSecret, Mesh, MeshConfig, MeshEvent, MeshHandle, Peer};
use protocol::{Csn, Message, NodeId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use wire::handshake::{HandshakeError, Identity, Session, answer, dial};
use wire::hello::{RECORD_BYTES, Record, Versions};

/// No test waits longer for anything.
const DEADLINE: Duration = Duration::from_secs(20);
pub const CLUSTER_ID: u128 = 42;
/// What the nodes' clocks show.
pub const SENT_MS: u64 = 4711;

pub fn node(id: u8) -> NodeId {
    NodeId::new(id).unwrap()
}

/// A numbered message.
pub fn numbered(number: u64) -> Message {
    Message::Horizon { csn: Csn(number) }
}

pub fn number_of(message: &Message) -> u64 {
    match message {
        Message::Horizon { csn } => csn.0,
        other => panic!("not a numbered message: {other:?}"),
    }
}

/// Node `id` of nodes 1 to 3; dials the lower ones at `lower`, the address of node 1 first.
pub fn config(id: u8, lower: &[SocketAddr]) -> MeshConfig {
    let peers = (1..=3).filter(|peer| *peer != id).map(|peer| {
        let addr = lower.get(usize::from(peer) - 1);
        Peer {
            id: node(peer),
            host: addr.map_or_else(|| "127.0.0.1".to_owned(), |addr| addr.ip().to_string()),
            port: addr.map_or(1, SocketAddr::port),
        }
    });
    MeshConfig {
        node: node(id),
        epoch: 1,
        cluster_id: CLUSTER_ID,
        secret: ClusterSecret::new([7; 32]),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        peers: peers.collect(),
        heartbeat_send_ms: 50,
        heartbeat_recv_ms: 3000,
        connect_timeout_ms: 2000,
        clock_ms: || SENT_MS,
    }
}

/// A running mesh with its events.
pub struct Running {
    pub handle: MeshHandle,
    pub events: mpsc::Receiver<MeshEvent>,
}

impl Running {
    pub fn start(config: MeshConfig) -> Self {
        let (handle, events) = Mesh::start(config).unwrap();
        Self { handle, events }
    }

    pub fn addr(&self) -> SocketAddr {
        self.handle.local_addrs()[0]
    }

    /// The first event that `wanted` turns into something; earlier ones are thrown away.
    pub async fn wait<T>(&mut self, mut wanted: impl FnMut(&MeshEvent) -> Option<T>) -> T {
        let search = async {
            loop {
                let event = self.events.recv().await.expect("the mesh has ended");
                if let Some(found) = wanted(&event) {
                    return found;
                }
            }
        };
        timeout(DEADLINE, search)
            .await
            .expect("the event did not come")
    }

    /// Waits until the peers have a link.
    pub async fn wait_up(&mut self, peers: &[u8]) {
        let mut missing: Vec<_> = peers.iter().map(|peer| node(*peer)).collect();
        missing.retain(|peer| !self.handle.connected().contains(*peer));
        while !missing.is_empty() {
            let up = self
                .wait(|event| match event {
                    MeshEvent::Up { peer, .. } => Some(*peer),
                    _ => None,
                })
                .await;
            missing.retain(|peer| *peer != up);
        }
    }

    /// Waits until a link to the peer is lost; returns why.
    pub async fn wait_down(&mut self, down: u8) -> mesh::DownReason {
        self.wait(|event| match event {
            MeshEvent::Down { peer, reason } if *peer == node(down) => Some(reason.clone()),
            _ => None,
        })
        .await
    }

    /// Waits until somebody is refused; returns why.
    pub async fn wait_refused(&mut self) -> mesh::MeetError {
        self.wait(|event| match event {
            MeshEvent::Refused { reason, .. } => Some(reason.clone()),
            _ => None,
        })
        .await
    }

    /// The next `count` numbered messages of the peer.
    pub async fn wait_numbers(&mut self, peer: u8, count: usize) -> Vec<u64> {
        let mut numbers = Vec::new();
        while numbers.len() < count {
            let batch = self
                .wait(|event| match event {
                    MeshEvent::Messages { from, batch } if *from == node(peer) => {
                        Some(batch.clone())
                    }
                    _ => None,
                })
                .await;
            numbers.extend(batch.iter().map(number_of));
        }
        numbers
    }
}

/// Three connected nodes.
pub async fn three() -> [Running; 3] {
    let mut one = Running::start(config(1, &[]));
    let mut two = Running::start(config(2, &[one.addr()]));
    let mut three = Running::start(config(3, &[one.addr(), two.addr()]));
    one.wait_up(&[2, 3]).await;
    two.wait_up(&[1, 3]).await;
    three.wait_up(&[1, 2]).await;
    [one, two, three]
}

/// What a stranger says it is; by default a proper node.
pub fn identity(id: u8) -> Identity {
    Identity {
        node: node(id),
        epoch: 1,
        cluster_id: CLUSTER_ID,
        secret: ClusterSecret::new([7; 32]),
        versions: Versions::OURS,
    }
}

pub async fn read_record(stream: &mut TcpStream) -> Option<Record> {
    let mut record = [0; RECORD_BYTES];
    let read = timeout(DEADLINE, stream.read_exact(&mut record)).await;
    read.expect("no record came").ok().map(|_| record)
}

/// Dials a mesh by hand. Returns the connection, the session and the records that were sent.
pub async fn dial_by_hand(
    addr: SocketAddr,
    identity: &Identity,
    peer: NodeId,
) -> Result<(TcpStream, Session, [Record; 3]), HandshakeError> {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let (state, hello) = dial(identity, peer)?;
    stream.write_all(&hello).await.unwrap();
    let (state, key) = state.on_hello(&read_record(&mut stream).await.unwrap())?;
    stream.write_all(&key).await.unwrap();
    let (session, confirm) = state.on_key(&read_record(&mut stream).await.unwrap())?;
    stream.write_all(&confirm).await.unwrap();
    Ok((stream, session, [hello, key, confirm]))
}

/// Accepts a mesh's connection by hand.
pub async fn answer_by_hand(
    stream: &mut TcpStream,
    identity: &Identity,
) -> Result<Session, HandshakeError> {
    let peers = (1..=3).map(node).collect();
    let record = read_record(stream).await.unwrap();
    let step = answer(identity, peers, &record);
    let (state, hello) = told(stream, identity, step).await?;
    stream.write_all(&hello).await.unwrap();
    let step = state.on_key(&read_record(stream).await.unwrap());
    let (state, key) = told(stream, identity, step).await?;
    stream.write_all(&key).await.unwrap();
    state.on_confirm(&read_record(stream).await.unwrap())
}

async fn told<T>(
    stream: &mut TcpStream,
    identity: &Identity,
    step: Result<T, HandshakeError>,
) -> Result<T, HandshakeError> {
    if let Some(record) = step
        .as_ref()
        .err()
        .and_then(|e| e.refusal(identity.versions))
    {
        stream.write_all(&record).await.unwrap();
    }
    step
}

/// Reads until the other side closes; fails when that takes too long.
pub async fn until_closed(stream: &mut TcpStream) {
    let mut buffer = [0; 4096];
    let closed = async { while matches!(stream.read(&mut buffer).await, Ok(read) if read > 0) {} };
    timeout(DEADLINE, closed)
        .await
        .expect("the connection stays open");
}

/// Waits until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
