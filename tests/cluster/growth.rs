//! What a node keeps takes the same room however many transactions there were: on disk, in memory, in tables.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::cluster::{Cluster, member_settings, specs, wait_for};
use xtask::installation::Installation;
use xtask::server::{Server, settings};
use xtask::suite::Size;

use crate::load::{initialise, pgbench_everywhere};

pub fn cases() -> Vec<OwnCase> {
    cases![nothing_grows_with_the_number_of_commits]
}

/// How long finished transactions may stay on record.
const FORGET_LIMIT: Duration = Duration::from_secs(30);

/// Commits between two measurements; what was there after the first of them must be enough for all that follow.
const STAGES: u64 = 5;

const NODES: u64 = 3;
const CLIENTS_PER_NODE: u64 = 8;

/// Rows of the table written to.
const ROWS: u32 = 100_000;

/// Each client writes any row; now and then all of them the same one, so that some transactions conflict.
const SPREAD: &str = "\\set row random(2, 100000)\n\
    UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = :row;\n";
const HOT: &str = "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = 1;\n";
const SPREAD_WEIGHT: u32 = 49;
const HOT_WEIGHT: u32 = 1;

/// WAL that a server keeps between checkpoints.
const WAL_BYTES_MAX: u64 = 256 << 20;

/// Private memory that a process of one kind may take more at the end. A leak of three bytes for each of 800,000 commits is found.
const MEMORY_SLACK: u64 = 2 << 20;

/// The same for files of PostgreSQL whose size goes up and down.
const FILES_SLACK: u64 = 1 << 20;

/// Directories of the server in which commits leave traces.
const DIRECTORIES: [&str; 4] = ["pg_logical", "pg_replslot", "pg_twophase", "pg_wal"];

/// The processes of interest and their kinds; apply workers are one kind, whatever their numbers.
const PROCESSES: &str =
    "SELECT pid, regexp_replace(backend_type, ' [0-9]+$', '') FROM pg_stat_activity
    WHERE backend_type LIKE 'multimaster%' OR backend_type = 'walsender'";

/// Sizes and row numbers of what is kept durably, and how much is in use.
const TABLES: &str = "SELECT c.relname, pg_total_relation_size(c.oid) FROM pg_class c
    WHERE c.relnamespace = 'mtm'::regnamespace AND c.relkind = 'r' ORDER BY 1";
const COUNTS: &str = "SELECT (SELECT count(*) FROM mtm.records), (SELECT count(*) FROM mtm.marks),
    (SELECT count(*) FROM mtm.records WHERE (b0, b1) <> (0, 0)), (SELECT count(*) FROM mtm.transactions),
    (SELECT count(*) FROM pg_prepared_xacts), (SELECT count(*) FROM pg_replication_slots)";
const SHARED_MEMORY: &str = "SELECT coalesce(sum(allocated_size), 0) FROM pg_shmem_allocations WHERE name ILIKE '%multimaster%'";

/// Nothing of a transaction that has ended is left.
const FORGOTTEN: &str = "SELECT (SELECT count(*) FROM mtm.transactions)
    + (SELECT count(*) FROM mtm.records WHERE (b0, b1) <> (0, 0)) + (SELECT count(*) FROM pg_prepared_xacts)";

/// What one node takes, in bytes unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gauge {
    /// The tables of schema mtm.
    tables: Vec<(String, u64)>,
    /// Rows of records and of marks; records, transactions, prepared transactions in use; slots.
    counts: String,
    shared_memory: String,
    directories: BTreeMap<&'static str, u64>,
    /// Private memory of the largest process of each kind.
    memory: BTreeMap<String, u64>,
}

/// Commits in all.
fn commits() -> u64 {
    match Size::chosen() {
        Size::Ci => 10_000,
        Size::Full => 100_000,
        Size::Long => 1_000_000,
    }
}

fn nothing_grows_with_the_number_of_commits(installation: &Installation) -> Result<()> {
    let mut specs = specs(NODES as usize);
    for spec in &mut specs {
        spec.settings.extend(member_settings(NODES as usize));
        // Checkpoints come often enough to be a part of every stage.
        let wal = format!("{}MB", WAL_BYTES_MAX >> 20);
        spec.settings
            .extend(settings(&[("max_wal_size", &wal), ("min_wal_size", &wal)]));
    }
    let cluster = Cluster::start_servers(installation, &specs)?;
    let outcome = cluster.init_cluster().and_then(|()| grow(&cluster));
    outcome.map_err(|error| {
        cluster.keep_logs();
        anyhow::anyhow!("{error:#}\n{}", cluster.log_tails(15))
    })
}

fn grow(cluster: &Cluster) -> Result<()> {
    initialise(cluster, ROWS / 100_000)?;
    let scripts = Scripts::write()?;
    let share = commits() / STAGES / NODES / CLIENTS_PER_NODE;
    let mut done = 0;
    let mut warm: Option<Vec<Gauge>> = None;
    let mut complaints = Vec::new();
    for _ in 0..STAGES {
        let started = Instant::now();
        let (committed, retries) = run_stage(cluster, &scripts, share)?;
        done += committed;
        let tps = committed as f64 / started.elapsed().as_secs_f64();
        let gauges = measure(cluster)?;
        println!("  {done} commits, {tps:.0} a second, {retries} retries");
        for (node, gauge) in gauges.iter().enumerate() {
            println!("    node {}: {}", node + 1, gauge.shown());
        }
        match &warm {
            None => warm = Some(gauges),
            Some(before) => complaints = complaints_of(before, &gauges),
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    let counted =
        Session::new(cluster.connect(1)?).text("SELECT sum(abalance) FROM pgbench_accounts")?;
    ensure!(
        counted == done.to_string(),
        "{done} commits, but the rows were changed {counted} times"
    );
    xtask::checks::whole(cluster, FORGET_LIMIT)
}

/// What has grown since the first measurement, node by node.
fn complaints_of(before: &[Gauge], now: &[Gauge]) -> Vec<String> {
    let pairs = before.iter().zip(now).enumerate();
    pairs
        .filter_map(|(node, (before, now))| {
            let error = now.check_against(before).err()?;
            Some(format!("node {}: {error:#}", node + 1))
        })
        .collect()
}

/// pgbench's scripts, in files that go with this value.
struct Scripts {
    spread: PathBuf,
    hot: PathBuf,
}

impl Scripts {
    fn write() -> Result<Scripts> {
        let file = |name: &str| {
            std::env::temp_dir().join(format!("multimaster-{}-{name}.sql", std::process::id()))
        };
        let scripts = Scripts {
            spread: file("spread"),
            hot: file("hot"),
        };
        fs::write(&scripts.spread, SPREAD)?;
        fs::write(&scripts.hot, HOT)?;
        Ok(scripts)
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.spread);
        let _ = fs::remove_file(&self.hot);
    }
}

/// Runs `share` transactions in every client; how many committed, and how often one was run again.
fn run_stage(cluster: &Cluster, scripts: &Scripts, share: u64) -> Result<(u64, u64)> {
    let reports = pgbench_everywhere(
        cluster,
        &[
            &format!("--client={CLIENTS_PER_NODE}"),
            &format!("--transactions={share}"),
            "--protocol=prepared",
            &format!("--file={}@{SPREAD_WEIGHT}", scripts.spread.display()),
            &format!("--file={}@{HOT_WEIGHT}", scripts.hot.display()),
        ],
    )?;
    ensure!(
        reports.iter().all(|report| report.failed == 0),
        "failed transactions: {reports:?}"
    );
    Ok((
        reports.iter().map(|report| report.transactions).sum(),
        reports.iter().map(|report| report.retries).sum(),
    ))
}

/// Measures all nodes when nothing is in flight any more.
fn measure(cluster: &Cluster) -> Result<Vec<Gauge>> {
    for node in &cluster.nodes {
        let mut session = Session::new(node.connect()?);
        wait_for(
            "finished transactions to be forgotten",
            FORGET_LIMIT,
            || Ok(session.text(FORGOTTEN)? == "0"),
        )?;
        session.run("CHECKPOINT")?;
    }
    cluster.nodes.iter().map(Gauge::of).collect()
}

impl Gauge {
    fn of(node: &Server) -> Result<Gauge> {
        let mut session = Session::new(node.connect()?);
        let tables = pairs(&session.text(TABLES)?)
            .map(|(name, bytes)| Ok((name.to_owned(), bytes.parse()?)))
            .collect::<Result<_>>()?;
        let mut memory = BTreeMap::new();
        for (pid, kind) in pairs(&session.text(PROCESSES)?) {
            // It may have ended since.
            if let Some(bytes) = private_memory(pid) {
                let largest = memory.entry(kind.to_owned()).or_insert(0);
                *largest = bytes.max(*largest);
            }
        }
        Ok(Gauge {
            tables,
            counts: session.text(COUNTS)?,
            shared_memory: session.text(SHARED_MEMORY)?,
            directories: DIRECTORIES
                .into_iter()
                .map(|name| (name, bytes_below(&node.data_dir().join(name))))
                .collect(),
            memory,
        })
    }

    /// Whether this is no more than an earlier measurement allows.
    fn check_against(&self, before: &Gauge) -> Result<()> {
        ensure!(
            (&self.tables, &self.counts, &self.shared_memory)
                == (&before.tables, &before.counts, &before.shared_memory),
            "tables or shared memory changed; before: {before:#?}"
        );
        for (name, bytes) in &self.directories {
            let limit = match *name {
                "pg_wal" => before.directories[name].max(WAL_BYTES_MAX + WAL_BYTES_MAX / 4),
                "pg_twophase" => before.directories[name],
                _ => before.directories[name] + FILES_SLACK,
            };
            ensure!(*bytes <= limit, "{name}: {bytes} bytes, more than {limit}");
        }
        for (kind, bytes) in &self.memory {
            let Some(earlier) = before.memory.get(kind) else {
                continue;
            };
            ensure!(
                *bytes <= earlier + MEMORY_SLACK,
                "{kind}: {bytes} bytes of memory, {earlier} before"
            );
        }
        Ok(())
    }

    fn shown(&self) -> String {
        let mut text = String::new();
        let tables: u64 = self.tables.iter().map(|(_, bytes)| bytes).sum();
        let _ = write!(
            text,
            "kB: tables of mtm {}, shared memory {}",
            tables >> 10,
            self.shared_memory.parse().unwrap_or(0u64) >> 10
        );
        let directories = self.directories.iter().map(|(name, bytes)| (*name, bytes));
        let memory = self
            .memory
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes));
        for (name, bytes) in directories.chain(memory) {
            let _ = write!(text, ", {name} {}", bytes >> 10);
        }
        text
    }
}

/// Lines of two columns.
fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once('|'))
}

/// Memory that the process shares with nobody, bytes.
fn private_memory(pid: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Bytes of all files below a directory.
fn bytes_below(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let meta = entry.metadata().ok()?;
            Some(if meta.is_dir() {
                bytes_below(&entry.path())
            } else {
                meta.len()
            })
        })
        .sum()
}
