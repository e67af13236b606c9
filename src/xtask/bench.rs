//! `cargo xtask bench`: the cluster beside a plain PostgreSQL with two synchronous standbys, in one run.
//!
//! Both give the same promise after COMMIT: the change is applied on three servers. Workloads alternate between the two,
//! so that a noisy machine is noisy for both; medians and the ratio of medians are what counts.

use std::collections::BTreeMap;
use std::fmt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::{Cluster, member_settings, specs, stop_servers_on_signal, wait_for};
use crate::installation::{Installation, MAJOR, Source};
use crate::pgbench::Report;
use crate::server::{Server, settings};
use crate::{command, extension, screen, setup};

/// What is measured, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Length of one measurement, in seconds.
    pub seconds: u32,
    /// Measurements of each workload on each system.
    pub repetitions: u32,
    /// Scale factor of pgbench.
    pub scale: u32,
}

/// A pgbench script and its clients.
struct Workload {
    name: &'static str,
    arguments: &'static [&'static str],
    clients: u32,
    /// On all nodes at once instead of the first; only a cluster can do that.
    spread: bool,
}

const INSERT: &str = "\\set a random(1, 1000000)\nINSERT INTO bench_insert (a, b) VALUES (:a, 'abcdefghijklmnopqrstuvwxyz');\n";

const WORKLOADS: [Workload; 9] = [
    Workload {
        name: "simple update",
        arguments: &["--skip-some-updates"],
        clients: 1,
        spread: false,
    },
    Workload {
        name: "simple update",
        arguments: &["--skip-some-updates"],
        clients: 8,
        spread: false,
    },
    Workload {
        name: "simple update",
        arguments: &["--skip-some-updates"],
        clients: 9,
        spread: true,
    },
    Workload {
        name: "TPC-B",
        arguments: &[],
        clients: 1,
        spread: false,
    },
    Workload {
        name: "TPC-B",
        arguments: &[],
        clients: 8,
        spread: false,
    },
    Workload {
        name: "TPC-B",
        arguments: &[],
        clients: 9,
        spread: true,
    },
    Workload {
        name: "insert",
        arguments: &["--file=INSERT"],
        clients: 1,
        spread: false,
    },
    Workload {
        name: "insert",
        arguments: &["--file=INSERT"],
        clients: 8,
        spread: false,
    },
    Workload {
        name: "select",
        arguments: &["--select-only"],
        clients: 8,
        spread: false,
    },
];

/// The two that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum System {
    Multimaster,
    Streaming,
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            System::Multimaster => "multimaster",
            System::Streaming => "streaming",
        })
    }
}

/// Transactions per second of each repetition, by workload and system.
type Results = BTreeMap<(usize, System), Vec<f64>>;

/// Measures and prints a table.
///
/// # Errors
/// When a server or pgbench fails.
pub fn run(options: Options) -> Result<()> {
    stop_servers_on_signal()?;
    screen::heading("Getting ready");
    setup::run(MAJOR)?;
    let installation = screen::step("building the extension", || {
        extension::build(&Source::packaged()?)
    })?;
    let insert = InsertScript::write()?;
    let mut results = Results::new();
    for repetition in 1..=options.repetitions {
        screen::heading(&format!(
            "Repetition {repetition} of {}",
            options.repetitions
        ));
        // One system at a time: an idle cluster's heartbeats would cost the other one a little.
        for system in [System::Multimaster, System::Streaming] {
            let cluster = screen::step(&format!("starting {system}"), || {
                start(system, &installation, options.scale)
            })?;
            for (number, workload) in WORKLOADS.iter().enumerate() {
                if workload.spread && system == System::Streaming {
                    continue;
                }
                let tps = measure(&cluster, workload, options.seconds, &insert)?;
                screen::say(format!(
                    "{system}: {} = {tps:.0} a second",
                    workload.title()
                ));
                results.entry((number, system)).or_default().push(tps);
            }
        }
    }
    print(&results, options);
    Ok(())
}

/// The script of the insert workload, in a file while this lives.
struct InsertScript(std::path::PathBuf);

impl InsertScript {
    fn write() -> Result<InsertScript> {
        let file =
            std::env::temp_dir().join(format!("multimaster-bench-{}.pgbench", std::process::id()));
        std::fs::write(&file, INSERT)
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(InsertScript(file))
    }
}

impl Drop for InsertScript {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Workload {
    fn title(&self) -> String {
        let place = if self.spread {
            "on all nodes"
        } else {
            "on one node"
        };
        format!("{}, {} clients {place}", self.name, self.clients)
    }
}

fn start(system: System, installation: &Installation, scale: u32) -> Result<Cluster> {
    let cluster = match system {
        System::Multimaster => {
            let cluster = Cluster::start(installation, 3)?;
            cluster.init_cluster()?;
            cluster
        }
        System::Streaming => streaming(installation)?,
    };
    let mut pgbench = cluster.nodes[0].client_program("pgbench");
    command::capture(pgbench.args(["--initialize", "--quiet", "--scale", &scale.to_string()]))?;
    cluster.connect(0)?.batch_execute(
        "CREATE TABLE bench_insert (id bigserial PRIMARY KEY, a int, b text); CHECKPOINT",
    )?;
    Ok(cluster)
}

/// A primary and two standbys that have applied each transaction before COMMIT returns.
fn streaming(installation: &Installation) -> Result<Cluster> {
    let mut primary = specs(1).remove(0);
    primary.settings = stock_settings();
    let mut cluster = Cluster::start_servers(installation, &[primary])?;
    for number in [1, 2] {
        let mut spec = specs(1).remove(0);
        spec.name = format!("standby{number}");
        spec.settings = stock_settings();
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

/// A cluster member's settings, without the extension.
fn stock_settings() -> Vec<(String, String)> {
    let mut stock = member_settings(3);
    stock.retain(|(name, _)| name != "shared_preload_libraries");
    stock.extend(settings(&[("wal_level", "replica")]));
    stock
}

fn measure(
    cluster: &Cluster,
    workload: &Workload,
    seconds: u32,
    insert: &InsertScript,
) -> Result<f64> {
    let nodes: &[Server] = if workload.spread {
        &cluster.nodes
    } else {
        &cluster.nodes[..1]
    };
    let each = workload.clients as usize / nodes.len();
    let reports = thread::scope(|scope| {
        let runs: Vec<_> = nodes
            .iter()
            .map(|node| scope.spawn(move || pgbench(node, workload, each, seconds, insert)))
            .collect();
        runs.into_iter()
            .map(|run| {
                run.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    Ok(reports.iter().map(|report| report.tps).sum())
}

fn pgbench(
    node: &Server,
    workload: &Workload,
    clients: usize,
    seconds: u32,
    insert: &InsertScript,
) -> Result<Report> {
    let mut pgbench = node.client_program("pgbench");
    pgbench.args(["--no-vacuum", "--protocol=prepared", "--max-tries=1000"]);
    pgbench
        .arg(format!("--client={clients}"))
        .arg(format!("--time={seconds}"));
    for argument in workload.arguments {
        match *argument {
            "--file=INSERT" => pgbench.arg("--file").arg(&insert.0),
            other => pgbench.arg(other),
        };
    }
    let text = command::capture(&mut pgbench)?;
    match Report::read(&text) {
        Some(report) if report.failed == 0 => Ok(report),
        _ => bail!("{}: {text}", workload.title()),
    }
}

fn print(results: &Results, options: Options) {
    screen::heading("Transactions per second, medians");
    screen::say(format!(
        "scale {}, {} repetitions of {} s; streaming = a primary and two standbys with synchronous_commit = remote_apply",
        options.scale, options.repetitions, options.seconds
    ));
    let rows = WORKLOADS.iter().enumerate().map(|(number, workload)| {
        let median_of = |system| results.get(&(number, system)).map(|values| median(values));
        let (ours, theirs) = (median_of(System::Multimaster), median_of(System::Streaming));
        let ratio = ours.zip(theirs).map_or("-".to_owned(), |(ours, theirs)| {
            format!("{:.2}", ours / theirs)
        });
        let figure =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
        vec![workload.title(), figure(ours), figure(theirs), ratio]
    });
    screen::table(&["workload", "multimaster", "streaming", "ratio"], rows);
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_of_even_and_odd_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
