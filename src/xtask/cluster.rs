//! A cluster of servers on this machine.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use postgres::Client;

use crate::host;
use crate::installation::Installation;
use crate::server::{Server, Spec, end_abandoned, kill_all, settings};

/// Room that the data of one server may take.
const BYTES_PER_SERVER: u64 = 1536 * 1024 * 1024;

/// Adds settings to every server of a cluster; see `docs/development.md`.
const SETTINGS_VARIABLE: &str = "MULTIMASTER_TEST_SETTINGS";

/// Logs of failed runs are removed after this.
const LOGS_KEPT: Duration = Duration::from_secs(24 * 3600);

/// How long `mtm.init_cluster` may take until all nodes are online.
const INIT_LIMIT: Duration = Duration::from_secs(60);

/// Servers, and the directories that they live in. Dropping it stops them and removes everything; after a failure
/// the logs stay.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Server>,
    dirs: RunDirs,
    keep_logs: AtomicBool,
}

/// Where one run keeps its data and its logs.
#[derive(Debug)]
struct RunDirs {
    data: PathBuf,
    logs: PathBuf,
}

impl Cluster {
    /// Creates and starts `count` servers with the extension loaded, each on an address of its own choice of ports.
    ///
    /// # Errors
    /// When a server cannot be created or started; its log is in the message.
    pub fn start(installation: &Installation, count: usize) -> Result<Cluster> {
        let mut specs = specs(count);
        for spec in &mut specs {
            spec.settings.extend(member_settings(count));
        }
        Cluster::start_servers(installation, &specs)
    }

    /// Creates and starts servers as described.
    ///
    /// # Errors
    /// When a server cannot be created or started.
    pub fn start_servers(installation: &Installation, specs: &[Spec]) -> Result<Cluster> {
        let mut cluster = Cluster::create(installation, specs)?;
        // Cleared when all of them run: the log of one that does not start is worth keeping.
        cluster.keep_logs();
        std::thread::scope(|scope| {
            let starts: Vec<_> = cluster
                .nodes
                .iter_mut()
                .map(|node| scope.spawn(|| node.start()))
                .collect();
            starts.into_iter().try_for_each(join)
        })?;
        cluster.keep_logs.store(false, Ordering::Relaxed);
        Ok(cluster)
    }

    /// Creates servers without starting them.
    ///
    /// # Errors
    /// When initdb fails.
    pub fn create(installation: &Installation, specs: &[Spec]) -> Result<Cluster> {
        let dirs = RunDirs::new(specs.len())?;
        let created: Vec<Result<Server>> = std::thread::scope(|scope| {
            let jobs: Vec<_> = specs
                .iter()
                .map(|spec| {
                    let (dirs, installation) = (&dirs, installation);
                    scope.spawn(move || {
                        let server = Server::create(installation, spec, &dirs.data, &dirs.logs)?;
                        let port = server.arbiter_port.to_string();
                        if preloads(spec) {
                            server.configure(&settings(&[("multimaster.arbiter_port", &port)]))?;
                        }
                        server.adjust_to_release()?;
                        Ok(server)
                    })
                })
                .collect();
            jobs.into_iter().map(join).collect()
        });
        let nodes = created.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Cluster {
            nodes,
            dirs,
            keep_logs: AtomicBool::new(false),
        })
    }

    /// Makes one cluster of all the servers, from the first, and waits until sessions can write on all of them.
    ///
    /// # Errors
    /// What `CREATE EXTENSION` or `mtm.init_cluster` says; a node that stays read-only.
    pub fn init_cluster(&self) -> Result<()> {
        let mut first = self.connect(0)?;
        let limit = (INIT_LIMIT * patience()).as_millis();
        first.batch_execute(&format!(
            "SET statement_timeout = {limit}; CREATE EXTENSION multimaster"
        ))?;
        let peers: Vec<String> = self.nodes[1..].iter().map(Server::conninfo).collect();
        first
            .execute(
                "SELECT mtm.init_cluster($1, $2)",
                &[&self.nodes[0].conninfo(), &peers],
            )
            .map_err(explain)
            .context("mtm.init_cluster failed")?;
        (0..self.nodes.len()).try_for_each(|node| self.wait_until_writable(node))
    }

    /// A session that begins while its node changes generations stays read-only: on a busy machine that can be right after the cluster was formed.
    fn wait_until_writable(&self, node: usize) -> Result<()> {
        let what = format!("node {} to take writes", node + 1);
        wait_for(&what, INIT_LIMIT * patience(), || {
            let row = self
                .connect(node)?
                .query_one("SHOW default_transaction_read_only", &[])?;
            Ok(row.get::<_, String>(0) == "off")
        })
    }

    /// Adds and starts a physical standby of the first server.
    ///
    /// # Errors
    /// When the base backup fails or the standby does not start.
    pub fn add_standby(&mut self, installation: &Installation, spec: &Spec) -> Result<()> {
        let mut standby = Server::create_standby(
            installation,
            spec,
            &self.nodes[0],
            &self.dirs.data,
            &self.dirs.logs,
        )?;
        standby.start()?;
        self.nodes.push(standby);
        Ok(())
    }

    /// A new session on the node with this index (from 0).
    ///
    /// # Errors
    /// When the node refuses it.
    pub fn connect(&self, node: usize) -> Result<Client> {
        self.nodes[node].connect()
    }

    /// A new session on every node.
    ///
    /// # Errors
    /// When a node refuses it.
    pub fn connect_all(&self) -> Result<Vec<Client>> {
        self.nodes.iter().map(Server::connect).collect()
    }

    /// Keeps the logs when this cluster is dropped, and says where they are.
    pub fn keep_logs(&self) {
        self.keep_logs.store(true, Ordering::Relaxed);
    }

    /// The last lines of every node's log.
    pub fn log_tails(&self, lines: usize) -> String {
        self.nodes
            .iter()
            .map(|node| node.log_tail(lines))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.clear();
        let _ = fs::remove_dir_all(&self.dirs.data);
        if self.keep_logs.load(Ordering::Relaxed) || std::thread::panicking() {
            eprintln!("  logs: {}", self.dirs.logs.display());
        } else {
            let _ = fs::remove_dir_all(&self.dirs.logs);
        }
    }
}

impl RunDirs {
    /// Fresh directories, named for this process so that runs may overlap.
    fn new(servers: usize) -> Result<RunDirs> {
        let room = BYTES_PER_SERVER * servers as u64;
        let (data_root, log_root) = (host::data_dir(room)?, host::work_dir()?.join("logs"));
        host::create_dir(&log_root)?;
        remove_leftovers(&data_root);
        remove_old_logs(&log_root);
        for number in 1.. {
            let name = format!("{}-{number}", std::process::id());
            let dirs = RunDirs {
                data: data_root.join(&name),
                logs: log_root.join(&name),
            };
            if dirs.data.exists() || dirs.logs.exists() {
                continue;
            }
            host::create_dir(&dirs.data)?;
            host::create_dir(&dirs.logs)?;
            return Ok(dirs);
        }
        bail!("no free directory below {}", data_root.display())
    }
}

/// Ends and removes what a program left that was killed before it could clean up.
fn remove_leftovers(data_root: &Path) {
    let Ok(entries) = fs::read_dir(data_root) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .split('-')
            .next()
            .and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let servers = fs::read_dir(entry.path()).into_iter().flatten().flatten();
            servers.for_each(|server| end_abandoned(&server.path()));
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Logs of failed runs are worth keeping, but not for ever.
fn remove_old_logs(log_root: &Path) {
    let Ok(entries) = fs::read_dir(log_root) else {
        return;
    };
    for entry in entries.flatten() {
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > LOGS_KEPT) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn preloads(spec: &Spec) -> bool {
    spec.settings
        .iter()
        .any(|(name, value)| name == "shared_preload_libraries" && value.contains("multimaster"))
}

/// Plain servers `node1`, `node2`, ... on the loopback address.
pub fn specs(count: usize) -> Vec<Spec> {
    (1..=count)
        .map(|number| Spec {
            name: format!("node{number}"),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            namespace: None,
            disk_bytes: None,
            settings: Vec::new(),
        })
        .collect()
}

/// What a member of a cluster of `nodes` must set, and what the environment adds.
pub fn member_settings(nodes: usize) -> Vec<(String, String)> {
    let peers = nodes.saturating_sub(1).max(1);
    let mut all = settings(&[
        ("shared_preload_libraries", "multimaster"),
        ("wal_level", "logical"),
        ("max_connections", "150"),
        // Every connection of every node may have one prepared here.
        (
            "max_prepared_transactions",
            &(150 * nodes.max(2)).to_string(),
        ),
        ("max_replication_slots", &(peers + 6).to_string()),
        ("max_wal_senders", &(peers + 6).to_string()),
        ("max_worker_processes", "64"),
        ("wal_sender_timeout", "10s"),
        ("max_wal_size", "2GB"),
    ]);
    all.extend(extra_settings());
    all
}

/// By how much limits of time are to be multiplied: added settings may make a server slow.
pub fn patience() -> u32 {
    if extra_settings().is_empty() { 1 } else { 20 }
}

/// Settings of whoever runs the tests, as `NAME=VALUE` with `;` between them.
fn extra_settings() -> Vec<(String, String)> {
    let text = std::env::var(SETTINGS_VARIABLE).unwrap_or_default();
    text.split(';')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

/// Stops all servers and exits when somebody presses Ctrl-C or ends us politely.
///
/// # Errors
/// When the handler cannot be installed.
pub fn stop_servers_on_signal() -> Result<()> {
    ctrlc::set_handler(|| {
        kill_all();
        eprintln!("\ninterrupted: servers stopped");
        std::process::exit(130);
    })
    .context("cannot install a signal handler")
}

/// Asks again and again until `condition` holds.
///
/// # Errors
/// Those of `condition`; and when `limit` has passed, naming `what` was awaited.
pub fn wait_for(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition().with_context(|| format!("while waiting for {what}"))? {
        if Instant::now() > deadline {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A server's error with its SQLSTATE, message, detail and hint, instead of "db error".
pub fn explain(error: postgres::Error) -> anyhow::Error {
    let Some(db) = error.as_db_error() else {
        return error.into();
    };
    let mut text = format!("{}: {} ({})", db.severity(), db.message(), db.code().code());
    for (label, part) in [
        ("DETAIL", db.detail()),
        ("HINT", db.hint()),
        ("CONTEXT", db.where_()),
    ] {
        if let Some(part) = part {
            text.push_str(&format!("\n{label}: {part}"));
        }
    }
    anyhow::anyhow!(text)
}

fn join<T>(job: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    job.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
