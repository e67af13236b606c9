//! The systems that are compared.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result};

use super::workload::Workload;
use crate::cluster::{Cluster, member_settings, specs, wait_for};
use crate::installation::Installation;
use crate::server::{Spec, settings};
use crate::{command, screen};

/// Tables of the workloads that are not pgbench's own.
const TABLES: &str = "CREATE TABLE bench_insert (id bigserial PRIMARY KEY, a int, b text);
    CREATE TABLE bench_hot (id int PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50);
    CREATE TABLE bench_bulk (id int PRIMARY KEY, a int, b text);
    INSERT INTO bench_hot VALUES (1, 0);";

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// Three nodes with the extension.
    Multimaster,
    /// A primary and two standbys, `synchronous_commit = remote_apply`.
    Streaming,
    /// One server.
    Plain,
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            System::Multimaster => "multimaster",
            System::Streaming => "streaming",
            System::Plain => "plain",
        })
    }
}

/// The running servers of all systems that the workloads want.
pub struct Bench {
    clusters: Vec<(System, Cluster)>,
}

impl Bench {
    /// Starts and fills what the workloads need.
    ///
    /// # Errors
    /// When a server cannot be started or filled.
    pub fn start(
        installation: &Installation,
        scale: u32,
        workloads: &[&Workload],
    ) -> Result<Bench> {
        let mut clusters = Vec::new();
        for system in [System::Multimaster, System::Streaming, System::Plain] {
            if workloads
                .iter()
                .any(|workload| workload.systems().contains(&system))
            {
                let cluster = screen::step(&format!("starting {system}"), || {
                    filled(start(system, installation)?, scale)
                })?;
                clusters.push((system, cluster));
            }
        }
        Ok(Bench { clusters })
    }

    /// The servers of a system; the first takes the clients of workloads that are not spread.
    ///
    /// # Errors
    /// When it was not started.
    pub fn cluster(&self, system: System) -> Result<&Cluster> {
        self.clusters
            .iter()
            .find(|(known, _)| *known == system)
            .map(|(_, cluster)| cluster)
            .with_context(|| format!("{system} does not run"))
    }
}

fn start(system: System, installation: &Installation) -> Result<Cluster> {
    match system {
        System::Multimaster => {
            let mut nodes = specs(3);
            for node in &mut nodes {
                node.settings.extend(member_settings(3));
                node.settings.extend(common_settings());
            }
            let cluster = Cluster::start_servers(installation, &nodes)?;
            cluster.init_cluster()?;
            Ok(cluster)
        }
        System::Streaming => streaming(installation),
        System::Plain => {
            let mut server = specs(1).remove(0);
            server.settings = stock_settings();
            Cluster::start_servers(installation, &[server])
        }
    }
}

fn filled(cluster: Cluster, scale: u32) -> Result<Cluster> {
    let mut pgbench = cluster.nodes[0].client_program("pgbench");
    command::capture(pgbench.args(["--initialize", "--quiet", "--scale", &scale.to_string()]))?;
    let mut client = cluster.connect(0)?;
    client.batch_execute(TABLES)?;
    for node in &cluster.nodes {
        node.connect()?.batch_execute("CHECKPOINT")?;
    }
    Ok(cluster)
}

/// A primary and two standbys that have applied each transaction before COMMIT returns.
fn streaming(installation: &Installation) -> Result<Cluster> {
    let mut primary = specs(1).remove(0);
    primary.settings = stock_settings();
    let mut cluster = Cluster::start_servers(installation, &[primary])?;
    for number in [1, 2] {
        let spec = Spec {
            name: format!("standby{number}"),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            settings: stock_settings(),
        };
        cluster.add_standby(installation, &spec)?;
    }
    let mut primary = cluster.connect(0)?;
    wait_for("two standbys", Duration::from_secs(30), || {
        let row = primary.query_one(
            "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'",
            &[],
        )?;
        Ok(row.get::<_, i64>(0) == 2)
    })?;
    primary.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'FIRST 2 (*)'")?;
    primary.batch_execute("ALTER SYSTEM SET synchronous_commit = 'remote_apply'")?;
    primary.batch_execute("SELECT pg_reload_conf()")?;
    Ok(cluster)
}

/// What all servers have in common, beside what a member needs.
fn common_settings() -> Vec<(String, String)> {
    settings(&[
        ("shared_buffers", "256MB"),
        ("max_wal_size", "4GB"),
        ("checkpoint_timeout", "15min"),
    ])
}

/// A cluster member's settings, without the extension.
fn stock_settings() -> Vec<(String, String)> {
    let mut stock = member_settings(3);
    stock.retain(|(name, _)| name != "shared_preload_libraries");
    stock.extend(settings(&[("wal_level", "replica")]));
    stock.extend(common_settings());
    stock
}
