//! Clusters whose servers are hosts of their own, behind a network that can break.

use std::time::Duration;

use anyhow::{Result, bail};
use multimaster_tests::Session;
use xtask::cluster::{Cluster, member_settings, specs, wait_for};
use xtask::installation::Installation;
use xtask::network::Network;
use xtask::server::settings;

/// How long the nodes may take to be what is expected of them.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Says that this run does without what it cannot have, and why. Without it, a machine that has no namespaces fails.
const WITHOUT: &str = "MULTIMASTER_TEST_WITHOUT_NETWORK";

/// A cluster and its network. The servers go first.
pub struct Hosts {
    pub cluster: Cluster,
    pub network: Network,
}

/// Room on each disk of a node that runs full.
pub const DISK_BYTES: u64 = 640 * 1024 * 1024;

/// Makes a cluster of hosts and does `work` with it; keeps the logs when that fails.
///
/// # Errors
/// Where hosts cannot be made, unless the environment says to go without; those of the set-up and of `work`.
pub fn with_hosts(
    installation: &Installation,
    nodes: usize,
    work: impl FnOnce(&mut Hosts) -> Result<()>,
) -> Result<()> {
    make(installation, nodes, None, work)
}

/// The same with a disk of so many bytes for each node.
///
/// # Errors
/// As [`with_hosts`].
pub fn with_hosts_and_disks(
    installation: &Installation,
    nodes: usize,
    disk_bytes: u64,
    work: impl FnOnce(&mut Hosts) -> Result<()>,
) -> Result<()> {
    make(installation, nodes, Some(disk_bytes), work)
}

/// Whether this run goes without hosts, as the environment says.
///
/// # Errors
/// Where hosts cannot be made and the environment does not say so.
pub fn network_is_missing() -> Result<bool> {
    let Some(reason) = Network::unavailable() else {
        return Ok(false);
    };
    if std::env::var_os(WITHOUT).is_none() {
        bail!("this needs network namespaces: {reason} ({WITHOUT}=1 goes without)");
    }
    println!("  NOT RUN: {reason}");
    Ok(true)
}

fn make(
    installation: &Installation,
    nodes: usize,
    disk_bytes: Option<u64>,
    work: impl FnOnce(&mut Hosts) -> Result<()>,
) -> Result<()> {
    if network_is_missing()? {
        return Ok(());
    }
    let network = Network::create(nodes)?;
    let mut specs = specs(nodes);
    for (node, spec) in specs.iter_mut().enumerate() {
        spec.address = network.address(node);
        spec.namespace = Some(network.namespace(node));
        spec.settings.extend(member_settings(nodes));
        spec.disk_bytes = disk_bytes;
        spec.settings.extend(settings(&[("max_wal_size", "256MB")]));
        if disk_bytes.is_some() {
            // Every new segment needs room then, so a full disk is noticed.
            spec.settings.extend(settings(&[("wal_recycle", "off")]));
        }
    }
    let cluster = Cluster::start_servers(installation, &specs)?;
    let mut hosts = Hosts { cluster, network };
    let outcome = hosts.cluster.init_cluster().and_then(|()| work(&mut hosts));
    outcome.map_err(|error| {
        hosts.cluster.keep_logs();
        anyhow::anyhow!("{error:#}\n{}", hosts.cluster.log_tails(25))
    })
}

impl Hosts {
    /// A new session on a node (from 0).
    ///
    /// # Errors
    /// When the node refuses it.
    pub fn session(&self, node: usize) -> Result<Session> {
        Ok(Session::new(self.cluster.connect(node)?))
    }

    /// Waits until the node says that it is in this state.
    ///
    /// # Errors
    /// When it does not.
    pub fn await_status(&self, node: usize, status: &str) -> Result<()> {
        wait_for(
            &format!("node {} to be {status}", node + 1),
            PATIENCE,
            || {
                let found = self
                    .session(node)
                    .and_then(|mut session| session.text("SELECT status FROM mtm.status()"));
                Ok(found.is_ok_and(|found| found == status))
            },
        )
    }
}
