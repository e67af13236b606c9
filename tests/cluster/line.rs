//! The load of tests about lost nodes: clients that count rows up, and keep when each commit was answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use multimaster_tests::Session;
use postgres::{Client, NoTls};
use xtask::cluster::{Cluster, wait_for};

/// How long anything may take that is awaited.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Commits of each client before and after a loss: some tenths of a second of load.
const ENOUGH: usize = 200;

/// Clients that count rows up, each on its node.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<RunningClient>,
}

struct RunningClient {
    answered: Arc<AtomicUsize>,
    thread: JoinHandle<Vec<Instant>>,
}

impl Load {
    pub fn start(cluster: &Cluster, nodes: &[usize]) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = nodes
            .iter()
            .enumerate()
            .map(|(client, &node)| {
                let conninfo = format!("{} connect_timeout=5", cluster.nodes[node].conninfo());
                let stop = Arc::clone(&stop);
                let answered = Arc::new(AtomicUsize::new(0));
                let count = Arc::clone(&answered);
                let thread = std::thread::spawn(move || count_up(client, &conninfo, &count, &stop));
                RunningClient { answered, thread }
            })
            .collect();
        Load { stop, clients }
    }

    /// Waits until every client has committed a good deal more than until now.
    ///
    /// # Errors
    /// When one does not within [`PATIENCE`].
    pub fn await_commits(&self) -> Result<()> {
        self.await_commits_of_first(self.clients.len())
    }

    /// The same of the first clients only: the others cannot.
    ///
    /// # Errors
    /// As above.
    pub fn await_commits_of_first(&self, clients: usize) -> Result<()> {
        let awaited: Vec<(&RunningClient, usize)> = self.clients[..clients]
            .iter()
            .map(|client| (client, client.answered.load(Ordering::Relaxed) + ENOUGH))
            .collect();
        wait_for("commits of the load", PATIENCE, || {
            Ok(awaited
                .iter()
                .all(|(client, enough)| client.answered.load(Ordering::Relaxed) >= *enough))
        })
    }

    /// When each client's commits were answered.
    pub fn stop(mut self) -> Result<Vec<Vec<Instant>>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for client in self.clients.drain(..) {
            match client.thread.join() {
                Ok(commits) => all.push(commits),
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(all)
    }
}

impl Drop for Load {
    /// A case that has failed leaves no clients behind.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Inserts one row after the other; whatever is refused is tried again.
fn count_up(
    client: usize,
    conninfo: &str,
    answered: &AtomicUsize,
    stop: &AtomicBool,
) -> Vec<Instant> {
    let mut commits = Vec::new();
    let mut session: Option<Client> = None;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = session.as_mut().filter(|session| !session.is_closed()) else {
            session = Client::connect(conninfo, NoTls).ok();
            continue;
        };
        let sql = format!("INSERT INTO line VALUES ({client}, {})", commits.len());
        if open.batch_execute(&sql).is_ok() {
            commits.push(Instant::now());
            answered.store(commits.len(), Ordering::Relaxed);
        }
    }
    commits
}

/// The longest time without a commit of a client, from `since` on.
pub fn longest_gap(commits: &[Instant], since: Instant) -> Duration {
    let last_before = commits.iter().rev().find(|at| **at <= since).copied();
    let after = commits.iter().copied().filter(|at| *at > since);
    let moments: Vec<Instant> = last_before.into_iter().chain(after).collect();
    let gaps = moments.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().unwrap_or_default()
}

pub fn create(cluster: &Cluster) -> Result<()> {
    Session::new(cluster.connect(0)?).run("CREATE TABLE line (client int, n int)")
}

/// Every commit that was answered is there, on every node.
pub fn check_rows(cluster: &Cluster, commits: &[Vec<Instant>]) -> Result<()> {
    xtask::checks::whole(cluster, PATIENCE)?;
    for (client, commits) in commits.iter().enumerate() {
        let found = Session::new(cluster.connect(0)?).text(&format!(
            "SELECT count(DISTINCT n) FROM line WHERE client = {client} AND n < {}",
            commits.len()
        ))?;
        ensure!(
            found == commits.len().to_string(),
            "client {client} was answered {} commits, {found} are there",
            commits.len()
        );
    }
    Ok(())
}

pub fn await_online(cluster: &Cluster, node: usize) -> Result<()> {
    wait_for(&format!("node {} to be online", node + 1), PATIENCE, || {
        let status = cluster
            .connect(node)
            .and_then(|client| Session::new(client).text("SELECT status FROM mtm.status()"));
        Ok(status.is_ok_and(|status| status == "online"))
    })
}

/// Runs a statement on a node (from 0) as soon as that takes it: the others go on without somebody.
///
/// # Errors
/// When it does not within [`PATIENCE`].
pub fn await_commit(cluster: &Cluster, node: usize, sql: &str) -> Result<()> {
    wait_for("a commit without the lost node", PATIENCE, || {
        let written = cluster
            .connect(node)
            .and_then(|client| Session::new(client).run(sql));
        Ok(written.is_ok())
    })
}
