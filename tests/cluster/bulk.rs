//! One very large transaction.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::checks;
use xtask::cluster::Cluster;
use xtask::installation::Installation;
use xtask::server::descendants_of;

pub fn cases() -> Vec<OwnCase> {
    cases![million_rows_commit_in_bounded_memory]
}

/// What one process may add to its own memory for a transaction of any size: logical decoding's 64 MB, the same again for
/// applying, and some room.
const PRIVATE_MEMORY_MAX: u64 = 300 * 1024 * 1024;

fn million_rows_commit_in_bounded_memory(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        let mut session = Session::new(cluster.connect(0)?);
        session.run("CREATE TABLE bulk (id int PRIMARY KEY, a int, b text)")?;
        let (took, peak) = while_watching(cluster, || {
            session.run("INSERT INTO bulk SELECT g, g % 1000, 'row ' || g FROM generate_series(1, 1000000) g")
        })?;
        println!(
            "  a million rows on three nodes: {:.1} s, largest process {} MB",
            took.as_secs_f64(),
            peak.bytes >> 20
        );
        ensure!(
            peak.bytes < PRIVATE_MEMORY_MAX,
            "{} took {} MB",
            peak.process,
            peak.bytes >> 20
        );
        for node in 0..cluster.nodes.len() {
            let found =
                Session::new(cluster.connect(node)?).text("SELECT count(*), sum(a) FROM bulk")?;
            ensure!(found == "1000000|499500000", "node {}: {found}", node + 1);
        }
        checks::whole(cluster, Duration::from_secs(30))
    })
}

/// The largest private memory seen.
#[derive(Default)]
struct Peak {
    process: String,
    bytes: u64,
}

/// Does `work` while looking at the memory of all processes of all servers.
fn while_watching(
    cluster: &Cluster,
    work: impl FnOnce() -> Result<()>,
) -> Result<(Duration, Peak)> {
    let postmasters: Vec<u32> = cluster
        .nodes
        .iter()
        .filter_map(xtask::server::Server::postmaster)
        .collect();
    let done = AtomicBool::new(false);
    let started = Instant::now();
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak = Peak::default();
            while !done.load(Ordering::Relaxed) {
                for pid in postmasters
                    .iter()
                    .flat_map(|&postmaster| descendants_of(postmaster))
                {
                    peak.note(pid.as_raw());
                }
                thread::sleep(Duration::from_millis(50));
            }
            peak
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        let peak = watcher
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result.map(|()| (started.elapsed(), peak))
    })
}

impl Peak {
    /// Looks at one process; shared buffers do not count.
    fn note(&mut self, pid: i32) {
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
            return;
        };
        let anonymous = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|kilobytes| kilobytes.parse::<u64>().ok())
            .unwrap_or(0)
            * 1024;
        if anonymous > self.bytes {
            let title = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            *self = Peak {
                process: title.replace('\0', " ").trim().to_owned(),
                bytes: anonymous,
            };
        }
    }
}
