//! What a mesh is told at its start.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use protocol::{NodeId, NodeSet};
use thiserror::Error;
use wire::handshake::ClusterSecret;

/// A node's place in its cluster, and how it talks.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    pub node: NodeId,
    /// Incarnation of this arbiter; has to grow at each start.
    pub epoch: u32,
    /// Random number of the cluster, drawn when it was made.
    pub cluster_id: u128,
    pub secret: ClusterSecret,
    /// Where to listen. Port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    pub peers: Vec<Peer>,
    /// Time between heartbeats to each peer.
    pub heartbeat_send_ms: u64,
    /// A peer silent for so long is taken as lost.
    pub heartbeat_recv_ms: u64,
    /// Time for name lookup, connection and handshake together.
    pub connect_timeout_ms: u64,
    /// The clock that tells when a heartbeat is sent, milliseconds. Whoever counts leases from there takes one that does not stand still
    /// while the machine sleeps.
    pub clock_ms: fn() -> u64,
}

/// Another node of the cluster. Its address matters only where its id is lower.
#[derive(Clone, Debug)]
pub struct Peer {
    pub id: NodeId,
    /// A name or a numeric address.
    pub host: String,
    pub port: u16,
}

/// Why a mesh did not start, or did not take new settings.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("could not listen on {addr}: {source}")]
    Listen { addr: SocketAddr, source: io::Error },
    #[error("node {0} is listed as its own peer")]
    OwnPeer(NodeId),
    #[error("node {0} is listed twice among the peers")]
    DuplicatePeer(NodeId),
    #[error(
        "heartbeats every {send_ms} ms do not reach a peer that gives up after {recv_ms} ms of silence"
    )]
    Timing { send_ms: u64, recv_ms: u64 },
    #[error("a connection cannot be made in 0 ms")]
    NoConnectTime,
}

/// The two heartbeat times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timing {
    pub send: Duration,
    pub recv: Duration,
}

impl Timing {
    pub(crate) fn new(send_ms: u64, recv_ms: u64) -> Result<Self, StartError> {
        if send_ms == 0 || recv_ms <= send_ms {
            return Err(StartError::Timing { send_ms, recv_ms });
        }
        Ok(Self {
            send: Duration::from_millis(send_ms),
            recv: Duration::from_millis(recv_ms),
        })
    }
}

impl MeshConfig {
    pub(crate) fn timing(&self) -> Result<Timing, StartError> {
        Timing::new(self.heartbeat_send_ms, self.heartbeat_recv_ms)
    }

    /// The ids of the peers, if they can be right.
    pub(crate) fn peer_ids(&self) -> Result<NodeSet, StartError> {
        if self.connect_timeout_ms == 0 {
            return Err(StartError::NoConnectTime);
        }
        let mut ids = NodeSet::EMPTY;
        for peer in &self.peers {
            if peer.id == self.node {
                return Err(StartError::OwnPeer(peer.id));
            }
            if !ids.insert(peer.id) {
                return Err(StartError::DuplicatePeer(peer.id));
            }
        }
        Ok(ids)
    }
}
