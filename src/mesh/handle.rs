//! Starting a mesh, and talking to it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use protocol::{Message, NodeId, NodeSet};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use wire::frame::{FrameError, Heartbeat, check_heartbeat_fits};
use wire::handshake::Identity;
use wire::hello::Versions;

use crate::config::{MeshConfig, StartError, Timing};
use crate::event::MeshEvent;
use crate::listen::{Receptions, accept, listen};
use crate::peer::{RECEPTION_MAX, serve_by_accepting, serve_by_dialling};
use crate::shared::{EVENTS_MAX, Shared};

/// The connections of one node to its peers.
pub struct Mesh;

impl Mesh {
    /// Listens, and begins to connect. Has to be called within a runtime with sockets and timers, which then runs the mesh.
    ///
    /// The mesh ends when the last handle is dropped.
    ///
    /// # Errors
    /// A port that is taken, or settings that cannot work. Nothing has been started then; the caller may try again.
    pub fn start(
        config: MeshConfig,
    ) -> Result<(MeshHandle, mpsc::Receiver<MeshEvent>), StartError> {
        let peers = config.peer_ids()?;
        let timing = config.timing()?;
        let (listeners, addrs) = open_listeners(&config.listen)?;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let identity = Identity {
            node: config.node,
            epoch: config.epoch,
            cluster_id: config.cluster_id,
            secret: config.secret,
            versions: Versions::OURS,
        };
        let connect_timeout = Duration::from_millis(config.connect_timeout_ms);
        let shared = Shared::new(
            identity,
            peers,
            connect_timeout,
            timing,
            events,
            config.clock_ms,
        );
        let shared = Arc::new(shared);

        let mut tasks = JoinSet::new();
        let mut receptions = Receptions::default();
        for peer in config.peers {
            if peer.id < config.node {
                tasks.spawn(serve_by_dialling(Arc::clone(&shared), peer));
            } else {
                let (to, accepted) = mpsc::channel(RECEPTION_MAX);
                receptions[peer.id.index()] = Some(to);
                tasks.spawn(serve_by_accepting(Arc::clone(&shared), peer.id, accepted));
            }
        }
        for listener in listeners {
            tasks.spawn(accept(Arc::clone(&shared), listener, receptions.clone()));
        }
        let inner = Inner {
            shared,
            addrs,
            _tasks: tasks,
        };
        Ok((MeshHandle(Arc::new(inner)), receiver))
    }
}

fn open_listeners(addrs: &[SocketAddr]) -> Result<(Vec<TcpListener>, Vec<SocketAddr>), StartError> {
    let mut listeners = Vec::new();
    let mut bound = Vec::new();
    for &addr in addrs {
        let failed = |source| StartError::Listen { addr, source };
        let listener = listen(addr).map_err(failed)?;
        bound.push(listener.local_addr().map_err(failed)?);
        listeners.push(listener);
    }
    Ok((listeners, bound))
}

/// Speaks to a running mesh. Clones speak to the same one; the mesh ends with the last.
#[derive(Clone)]
pub struct MeshHandle(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    addrs: Vec<SocketAddr>,
    /// Aborted when dropped.
    _tasks: JoinSet<()>,
}

impl MeshHandle {
    /// Queues a message and returns at once. What is sent before the caller gives way to the runtime leaves together.
    ///
    /// Without a link the message is dropped. A peer that lets more than [`crate::OUTBOX_BYTES_MAX`] wait loses its link.
    ///
    /// # Errors
    /// A message longer than the wire allows, which is a bug of the caller; it is not sent.
    pub fn send(&self, to: NodeId, message: &Message) -> Result<(), FrameError> {
        self.0.shared.outbox(to).push(message)
    }

    /// What the next heartbeats say. The mesh fills in their time, epoch and connections.
    ///
    /// # Errors
    /// A heartbeat longer than the wire allows; the one before stays.
    pub fn heartbeat_info(&self, heartbeat: Heartbeat) -> Result<(), FrameError> {
        check_heartbeat_fits(&heartbeat)?;
        self.0.shared.set_heartbeat(heartbeat);
        Ok(())
    }

    /// Sends a heartbeat to the peer soon, besides the regular ones.
    pub fn beat(&self, to: NodeId) {
        self.0.shared.outbox(to).request_heartbeat();
    }

    /// Lets this node speak for so long, or for ever, which is how it starts. Once the time is over it sends nothing, so that a
    /// node whose other parts hang looks dead to its peers; what is queued leaves when the node may speak again.
    pub fn speak_for(&self, time: Option<Duration>) {
        self.0.shared.speak_for(time);
    }

    /// Changes the heartbeat times of all links, at once.
    ///
    /// # Errors
    /// Times that cannot work; the ones before stay.
    pub fn reconfigure(&self, send_ms: u64, recv_ms: u64) -> Result<(), StartError> {
        let timing = Timing::new(send_ms, recv_ms)?;
        self.0.shared.timing.send_replace(timing);
        Ok(())
    }

    /// The peers that have a link now.
    pub fn connected(&self) -> NodeSet {
        self.0.shared.connected()
    }

    /// Where the mesh listens, in the order of the configuration.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.0.addrs
    }
}
