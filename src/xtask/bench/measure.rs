//! One measurement: a workload on a system.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Options;
use super::figures::{Figures, percentiles};
use super::system::{Bench, System};
use super::usage::{FlushCounter, Usage};
use super::workload::{HOT_ROW, INSERT, Kind, LOGGED_READS, Workload};
use crate::cluster::Cluster;
use crate::command;
use crate::pgbench::Report;
use crate::server::Server;

/// A transaction is given up after so many attempts; then the measurement has failed.
const TRIES: &str = "--max-tries=1000";

/// Files of a run: pgbench's scripts and logs. Gone when dropped.
pub struct Scripts {
    dir: PathBuf,
}

impl Scripts {
    /// Writes the scripts.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn write() -> Result<Scripts> {
        let dir = std::env::temp_dir().join(format!("multimaster-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let scripts = Scripts { dir };
        for script in [INSERT, HOT_ROW] {
            let file = scripts.file(script);
            fs::write(&file, script).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(scripts)
    }

    fn file(&self, script: &str) -> PathBuf {
        let name = if script == INSERT {
            "insert"
        } else {
            "hot-row"
        };
        self.dir.join(format!("{name}.pgbench"))
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// What the clients did.
struct Done {
    tps: f64,
    transactions: u64,
    retries: u64,
    latencies_ms: Vec<f64>,
}

/// Measures a workload on a system.
///
/// # Errors
/// When pgbench fails or gives up a transaction.
pub fn once(
    bench: &Bench,
    system: System,
    workload: &Workload,
    options: &Options,
    scripts: &Scripts,
) -> Result<Figures> {
    let cluster = bench.cluster(system)?;
    let flushes = FlushCounter::start(cluster);
    let before = Usage::of(cluster)?;
    let mut done = match workload.kind {
        Kind::Bulk(rows) => bulk(cluster, rows)?,
        Kind::Idle => idle(options.seconds),
        Kind::Pgbench(_) | Kind::Script(_) => clients(cluster, workload, options, scripts)?,
    };
    let used = Usage::of(cluster)?.since(before);
    let flushes = flushes.stop();
    if let Kind::Bulk(_) = workload.kind {
        cluster
            .connect(0)?
            .batch_execute("TRUNCATE bench_bulk; CHECKPOINT")?;
    }
    let thousands = done.transactions as f64 / 1000.0;
    Ok(Figures {
        tps: done.tps,
        latency_ms: percentiles(&mut done.latencies_ms),
        cpu_s: used.cpu_s / thousands,
        switches: used.switches as f64 / thousands,
        flushes: flushes.map(|count| count as f64 / thousands),
        retries: done.retries as f64 / thousands,
    })
}

/// pgbench on each node that has clients.
fn clients(
    cluster: &Cluster,
    workload: &Workload,
    options: &Options,
    scripts: &Scripts,
) -> Result<Done> {
    let nodes = if workload.spread {
        cluster.nodes.len()
    } else {
        1
    };
    let parts = thread::scope(|scope| {
        let runs: Vec<_> = cluster.nodes[..nodes]
            .iter()
            .enumerate()
            .map(|(place, node)| {
                let clients = workload.clients_of(place, nodes);
                scope.spawn(move || pgbench(node, workload, clients, options.seconds, scripts))
            })
            .collect();
        runs.into_iter()
            .map(|run| {
                run.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    parts
        .into_iter()
        .reduce(|mut all, part| {
            all.tps += part.tps;
            all.transactions += part.transactions;
            all.retries += part.retries;
            all.latencies_ms.extend(part.latencies_ms);
            all
        })
        .context("no node has clients")
}

fn pgbench(
    node: &Server,
    workload: &Workload,
    clients: usize,
    seconds: u32,
    scripts: &Scripts,
) -> Result<Done> {
    let log = scripts.dir.join(&node.name);
    let mut pgbench = node.client_program("pgbench");
    pgbench
        .args(["--no-vacuum", "--protocol=prepared", TRIES, "--log"])
        .arg(format!("--log-prefix={}", log.display()))
        .arg(format!("--client={clients}"))
        // Two would disturb each other where the nodes have as many pgbenches already.
        .arg(format!(
            "--jobs={}",
            if workload.spread { 1 } else { clients.min(2) }
        ))
        .arg(format!("--time={seconds}"));
    if workload.reads_only() {
        pgbench.arg(format!("--sampling-rate={}", 1.0 / f64::from(LOGGED_READS)));
    }
    match workload.kind {
        Kind::Pgbench(arguments) => pgbench.args(arguments),
        Kind::Script(script) => pgbench.arg("--file").arg(scripts.file(script)),
        Kind::Bulk(_) | Kind::Idle => bail!("{} is not for pgbench", workload.name),
    };
    let text = command::capture(&mut pgbench)?;
    let Some(report) = Report::read(&text).filter(|report| report.failed == 0) else {
        bail!("{} on {}: {text}", workload.name, node.name)
    };
    Ok(Done {
        tps: report.tps,
        transactions: report.transactions,
        retries: report.retries,
        latencies_ms: take_log(&scripts.dir, &node.name)?,
    })
}

/// Reads and removes pgbench's log: one file per thread, a line per transaction, its third field the latency in microseconds.
fn take_log(dir: &Path, prefix: &str) -> Result<Vec<f64>> {
    let mut latencies = Vec::new();
    let start = format!("{prefix}.");
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        let ours = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(&start));
        if ours {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            latencies.extend(latencies_in(&text));
            let _ = fs::remove_file(&path);
        }
    }
    Ok(latencies)
}

/// Milliseconds of each line.
fn latencies_in(log: &str) -> impl Iterator<Item = f64> {
    log.lines()
        .filter_map(|line| line.split(' ').nth(2)?.parse::<f64>().ok())
        .map(|microseconds| microseconds / 1000.0)
}

/// One transaction of many rows; the emptying is not measured.
fn bulk(cluster: &Cluster, rows: u32) -> Result<Done> {
    let mut client = cluster.connect(0)?;
    let started = Instant::now();
    client.batch_execute(&format!(
        "INSERT INTO bench_bulk SELECT g, g % 1000, 'row ' || g FROM generate_series(1, {rows}) g"
    ))?;
    let took = started.elapsed().as_secs_f64();
    Ok(Done {
        tps: 1.0 / took,
        // What is used is then used by this one.
        transactions: 1000,
        retries: 0,
        latencies_ms: vec![took * 1000.0],
    })
}

/// Nothing; counted as 1000 transactions a second, so that what is used is used per second.
fn idle(seconds: u32) -> Done {
    thread::sleep(Duration::from_secs(seconds.into()));
    Done {
        tps: f64::NAN,
        transactions: u64::from(seconds) * 1000,
        retries: 0,
        latencies_ms: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::latencies_in;

    #[test]
    fn latencies_are_the_third_field_of_the_log() {
        let log = "0 1 1778 0 1700000000 12 0\n1 1 980 0 1700000000 400 2\nrubbish\n";
        assert_eq!(latencies_in(log).collect::<Vec<_>>(), [1.778, 0.98]);
    }
}
