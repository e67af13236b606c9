//! `cargo xtask profile`: a flame graph of each kind of process of a loaded cluster.
//!
//! `perf` samples all processes of the first node, where the clients are, and of the second, where their transactions are applied. One graph for each
//! kind of process comes out of it: `target/profile/node1-backend.svg` and so on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, Cursor};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options as FolderOptions};
use inferno::flamegraph;

use crate::cluster::{Cluster, stop_servers_on_signal};
use crate::extension::{self, Build};
use crate::installation::{MAJOR, Source};
use crate::{command, host, screen, setup};

/// What is sampled.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Clients of pgbench's simple update, all on the first node.
    pub clients: u32,
    /// How long samples are taken.
    pub seconds: u32,
}

/// Samples per second and CPU; odd, so as not to walk in step with timers.
const FREQUENCY: &str = "--freq=997";
/// Debian's PostgreSQL has no frame pointers: perf keeps so many bytes of each stack and unwinds them later.
const STACKS: &str = "--call-graph=dwarf,8192";
/// pgbench runs that much longer than the sampling, at both ends together.
const MARGIN: u32 = 4;
/// The nodes looked at.
const NODES: usize = 2;
const SCALE: &str = "10";

/// Takes samples and draws them.
///
/// # Errors
/// When perf is missing or not allowed, or a server or pgbench fails.
pub fn run(options: Options) -> Result<()> {
    stop_servers_on_signal()?;
    screen::heading("Getting ready");
    setup::run(MAJOR)?;
    check_perf()?;
    let installation = screen::step("building the extension", || {
        extension::build_as(&Source::packaged()?, Build::Release)
    })?;
    let cluster = screen::step("starting three nodes", || {
        let cluster = Cluster::start(&installation, 3)?;
        cluster.init_cluster()?;
        let mut pgbench = cluster.nodes[0].client_program("pgbench");
        command::capture(pgbench.args(["--initialize", "--quiet", "--scale", SCALE]))?;
        Ok(cluster)
    })?;
    let dir = host::checkout().join("target").join("profile");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let data = dir.join("perf.data");
    let processes = screen::step("taking samples", || sample(&cluster, options, &data))?;
    screen::heading("Flame graphs");
    for (name, pids) in &processes {
        match draw(&dir, &data, name, pids)? {
            Some(file) => screen::good(file.display().to_string()),
            None => screen::say(format!("{name}: not on a CPU while samples were taken")),
        }
    }
    Ok(())
}

/// Whether perf can do what is wanted, before minutes have passed.
fn check_perf() -> Result<()> {
    let mut trial = Command::new("perf");
    trial.args(["record", "--quiet", "--output=/dev/null", "true"]);
    match command::run(&mut trial) {
        Err(_) => bail!(
            "perf is not installed; Debian has it in the package linux-perf (apt-get install linux-perf)"
        ),
        Ok(output) if !output.status.success() => bail!(
            "perf may not take samples here: run this as root, or set the kernel's perf_event_paranoid to 1 or less \
             (sysctl kernel.perf_event_paranoid=1)\n{}",
            command::tail(&command::joined(&output), 5)
        ),
        Ok(_) => Ok(()),
    }
}

/// Loads the cluster and samples it; returns the processes by `node-kind`.
fn sample(
    cluster: &Cluster,
    options: Options,
    data: &Path,
) -> Result<BTreeMap<String, BTreeSet<i32>>> {
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut pgbench = cluster.nodes[0].client_program("pgbench");
            pgbench
                .args(["--no-vacuum", "--protocol=prepared", "--skip-some-updates"])
                .arg("--max-tries=1000")
                .arg(format!("--client={}", options.clients))
                .arg(format!("--time={}", options.seconds + MARGIN));
            command::capture(&mut pgbench)
        });
        std::thread::sleep(Duration::from_secs(u64::from(MARGIN) / 2));
        let processes = processes_of(cluster)?;
        let pids: Vec<String> = processes
            .values()
            .flatten()
            .map(ToString::to_string)
            .collect();
        let mut perf = Command::new("perf");
        perf.args(["record", "--quiet", FREQUENCY, STACKS])
            .arg(format!("--output={}", data.display()))
            .arg(format!("--pid={}", pids.join(",")))
            .args(["--", "sleep", &options.seconds.to_string()]);
        command::capture(&mut perf)?;
        load.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(processes)
    })
}

/// The processes of the nodes looked at, by `node-kind`.
fn processes_of(cluster: &Cluster) -> Result<BTreeMap<String, BTreeSet<i32>>> {
    let mut all: BTreeMap<String, BTreeSet<i32>> = BTreeMap::new();
    for (number, node) in (1..).zip(&cluster.nodes).take(NODES) {
        let rows = node.connect()?.query(
            "SELECT backend_type, pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()",
            &[],
        )?;
        for row in rows {
            let kind = kind_of(&row.get::<_, String>(0));
            let name = format!("node{number}-{kind}");
            all.entry(name).or_default().insert(row.get(1));
        }
    }
    Ok(all)
}

/// One word for all processes that do the same.
fn kind_of(backend_type: &str) -> String {
    let name = backend_type
        .trim_start_matches("multimaster ")
        .trim_end_matches(|c: char| c.is_ascii_digit() || c == ' ');
    match name {
        "client backend" => "backend".to_owned(),
        other => other.replace(' ', "-"),
    }
}

/// Draws the samples of these processes; nothing when there are none.
fn draw(dir: &Path, data: &Path, name: &str, pids: &BTreeSet<i32>) -> Result<Option<PathBuf>> {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let mut script = Command::new("perf");
    script
        .args(["script", "--force"])
        .arg(format!("--input={}", data.display()))
        .arg(format!("--pid={}", pids.join(",")));
    let output = command::run(&mut script)?;
    ensure!(
        output.status.success(),
        "perf cannot read its samples\n{}",
        command::tail(&command::joined(&output), 5)
    );
    let mut folded = Vec::new();
    if output.stdout.is_empty() {
        return Ok(None);
    }
    Folder::from(FolderOptions::default())
        .collapse(BufReader::new(Cursor::new(output.stdout)), &mut folded)
        .context("cannot fold the stacks")?;
    let file = dir.join(format!("{name}.svg"));
    let picture =
        File::create(&file).with_context(|| format!("cannot write {}", file.display()))?;
    let mut options = flamegraph::Options::default();
    options.title = name.to_owned();
    flamegraph::from_reader(&mut options, folded.as_slice(), picture)
        .with_context(|| format!("cannot draw {}", file.display()))?;
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::kind_of;

    #[test]
    fn processes_of_a_kind_have_one_name() {
        let kinds = [
            "client backend",
            "multimaster apply worker 12",
            "multimaster receiver 3",
            "multimaster arbiter",
            "walsender",
        ];
        assert_eq!(
            kinds.map(kind_of),
            [
                "backend",
                "apply-worker",
                "receiver",
                "arbiter",
                "walsender"
            ]
        );
    }
}
