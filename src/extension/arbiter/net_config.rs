//! The arbiter's sockets: who listens where, and how the mesh is started.

use super::thread::{HeartbeatTimes, SEND_MS_MAX};
use crate::cluster::Identity;
use crate::guc;
use crate::pg::clock;
use mesh::{Mesh, MeshConfig, MeshEvent, MeshHandle, Peer};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::sync::mpsc;
use wire::handshake::ClusterSecret;

/// Time for name lookup, connection and handshake with a peer.
const CONNECT_TIMEOUT_MS: u64 = 3000;
/// A port that an earlier life of this server still holds becomes free in this time.
const BIND_PATIENCE: Duration = Duration::from_secs(20);
const BIND_PAUSE: Duration = Duration::from_millis(250);

/// What of the settings and the shared memory the sockets need, read on the main thread.
#[derive(Clone)]
pub struct NetSettings {
    pub listen_addresses: String,
    pub port: u16,
    pub send_ms: u64,
    pub recv_ms: u64,
    /// `multimaster.slow_node_timeout`, milliseconds; zero suspects nobody.
    pub slow_ms: u64,
    pub epoch: u32,
    /// Whether there is a referee.
    pub referee: bool,
}

impl NetSettings {
    pub fn read(epoch: u32) -> NetSettings {
        NetSettings {
            listen_addresses: guc::arbiter_listen_addresses(),
            port: guc::arbiter_port(),
            send_ms: millis(guc::heartbeat_send_timeout()).min(SEND_MS_MAX),
            recv_ms: millis(guc::heartbeat_recv_timeout()),
            slow_ms: millis(guc::slow_node_timeout()),
            epoch,
            referee: guc::referee_connstring().is_some(),
        }
    }

    /// The times among them that all nodes should share.
    pub fn times(&self) -> HeartbeatTimes {
        HeartbeatTimes {
            send_ms: self.send_ms,
            recv_ms: self.recv_ms,
            slow_ms: self.slow_ms,
        }
    }
}

/// A duration as whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

/// Listens and begins to connect; waits for a port that is taken.
pub async fn start_mesh(
    identity: &Identity,
    settings: &NetSettings,
) -> Result<(MeshHandle, mpsc::Receiver<MeshEvent>), String> {
    let begun = std::time::Instant::now();
    loop {
        let config = mesh_config(identity, settings).await?;
        match Mesh::start(config) {
            Ok(started) => return Ok(started),
            Err(error) if begun.elapsed() >= BIND_PATIENCE => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(BIND_PAUSE).await,
        }
    }
}

async fn mesh_config(identity: &Identity, settings: &NetSettings) -> Result<MeshConfig, String> {
    Ok(MeshConfig {
        node: identity.node_id,
        epoch: settings.epoch,
        cluster_id: identity.cluster_id,
        secret: ClusterSecret::new(identity.secret),
        listen: listen_addresses(&settings.listen_addresses, settings.port).await?,
        peers: identity
            .peers()
            .map(|peer| Peer {
                id: peer.id,
                host: peer.arbiter_host.clone(),
                port: peer.arbiter_port,
            })
            .collect(),
        heartbeat_send_ms: settings.send_ms,
        heartbeat_recv_ms: settings.recv_ms,
        connect_timeout_ms: CONNECT_TIMEOUT_MS,
        clock_ms: clock::monotonic_ms,
    })
}

async fn listen_addresses(list: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let mut addresses = Vec::new();
    for name in list
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        if name == "*" {
            addresses.push(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port));
            if has_ipv6() {
                addresses.push(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port));
            }
            continue;
        }
        let found = tokio::net::lookup_host((name, port))
            .await
            .map_err(|error| {
                format!("multimaster.arbiter_listen_addresses: \"{name}\": {error}")
            })?;
        addresses.extend(found);
    }
    Ok(addresses)
}

fn has_ipv6() -> bool {
    std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok()
}
