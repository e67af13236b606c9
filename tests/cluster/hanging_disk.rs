//! A disk that does not answer: its node is left out although its arbiter is heard, shows nothing stale, and comes back by itself.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::Cluster;
use xtask::host;
use xtask::installation::Installation;
use xtask::server::Server;

use crate::failover::LOST;
use crate::line::{Load, await_online, check_rows, create, longest_gap};
use crate::preload::start_with;
use crate::stuck::{SLOW_MS, await_members, set_everywhere};

pub fn cases() -> Vec<OwnCase> {
    cases![a_disk_that_hangs_stops_its_node_only]
}

/// What hangs (`hanging_disk.c`): flushes of WAL; everything, the server's log included.
const KINDS: [&str; 2] = ["flush", "all"];

/// The disk of one server.
struct Disk(PathBuf);

impl Disk {
    /// Starts the server again on a disk that can hang.
    fn replace(server: &mut Server) -> Result<Disk> {
        let switch = host::work_dir()?.join(format!("hanging-disk-{}", std::process::id()));
        host::create_dir(&switch)?;
        let disk = Disk(switch);
        let data = fs::canonicalize(server.data_dir())?;
        let log = fs::canonicalize(server.log_file())?;
        server.set_variable("HANGING_DISK_SWITCH", &disk.0);
        server.set_variable("HANGING_DISK_DATA", data);
        server.set_variable("HANGING_DISK_LOG", log);
        start_with(server, "hanging_disk.c")?;
        Ok(disk)
    }

    fn hang(&self, kind: &str) -> Result<()> {
        File::create(self.0.join(kind))
            .map(drop)
            .context("cannot make the disk hang")
    }

    fn answer(&self) -> Result<()> {
        for kind in KINDS {
            let switch = self.0.join(kind);
            if switch.exists() {
                fs::remove_file(switch)?;
            }
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Without it nothing hangs, so that the server can be stopped.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One client counts up on the first node; another one reads on the node whose disk hangs, in a session of before.
struct Probe {
    stop: Arc<AtomicBool>,
    writer: JoinHandle<Result<()>>,
    reader: JoinHandle<Result<u64>>,
}

impl Probe {
    fn start(cluster: &Cluster) -> Result<Probe> {
        let mut writer = Session::new(cluster.connect(0)?);
        let mut reader = Session::new(cluster.connect(LOST)?);
        reader.text("SELECT n FROM probe")?;
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let writer = {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let next = answered.load(Ordering::Acquire) + 1;
                    if writer.run(&format!("UPDATE probe SET n = {next}")).is_ok() {
                        answered.store(next, Ordering::Release);
                    }
                }
                Ok(())
            })
        };
        let reader = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut refused = 0;
                while !stop.load(Ordering::Relaxed) {
                    let expected = answered.load(Ordering::Acquire);
                    match reader.text("SELECT n FROM probe") {
                        Ok(seen) => ensure!(
                            seen.parse::<u64>()? >= expected,
                            "read {seen} after {expected} was committed"
                        ),
                        Err(_) => refused += 1,
                    }
                }
                Ok(refused)
            })
        };
        Ok(Probe {
            stop,
            writer,
            reader,
        })
    }

    /// How many reads were refused.
    fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let (Ok(written), Ok(read)) = (self.writer.join(), self.reader.join()) else {
            bail!("a client of the probe panicked")
        };
        written.and(read)
    }
}

fn a_disk_that_hangs_stops_its_node_only(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        let disk = Disk::replace(&mut cluster.nodes[LOST])?;
        await_online(cluster, LOST)?;
        set_everywhere(cluster, "multimaster.slow_node_timeout", SLOW_MS)?;
        create(cluster)?;
        Session::new(cluster.connect(0)?)
            .run("CREATE TABLE probe (n int); INSERT INTO probe VALUES (0)")?;
        for kind in KINDS {
            hang_once(cluster, &disk, kind).with_context(|| format!("while {kind} hung"))?;
        }
        Ok(())
    })
}

fn hang_once(cluster: &mut Cluster, disk: &Disk, kind: &str) -> Result<()> {
    Session::new(cluster.connect(0)?).run("TRUNCATE line; UPDATE probe SET n = 0")?;
    let load = Load::start(cluster, &[0, 1, LOST]);
    let probe = Probe::start(cluster)?;
    load.await_commits()?;
    let hung = Instant::now();
    disk.hang(kind)?;
    let excluded = await_members(cluster, "{1,2}");
    // The third client waits for the disk.
    let went_on = load.await_commits_of_first(LOST);
    let answering = Instant::now();
    disk.answer()?;
    excluded?;
    went_on?;
    let online = await_online(cluster, LOST);
    let took = answering.elapsed();
    let all_went_on = load.await_commits();
    let refused = probe.stop();
    let commits = load.stop()?;
    online?;
    all_went_on?;
    println!(
        "  {kind} hangs: node 3 online again after {} ms, {} of its reads refused",
        took.as_millis(),
        refused?
    );
    for (client, commits) in commits[..LOST].iter().enumerate() {
        println!(
            "  node {}: longest gap {} ms with a timeout of {SLOW_MS} ms",
            client + 1,
            longest_gap(commits, hung).as_millis()
        );
        let meanwhile = commits
            .iter()
            .filter(|at| (hung..answering).contains(*at))
            .count();
        ensure!(meanwhile > 0, "node {} has committed nothing", client + 1);
    }
    says_who_hung(cluster, hung)?;
    check_rows(cluster, &commits)
}

/// The others tell which node was stuck, and it tells so itself.
fn says_who_hung(cluster: &Cluster, hung: Instant) -> Result<()> {
    let since = hung.elapsed().as_millis();
    for node in [0, 1, LOST] {
        let told = Session::new(cluster.connect(node)?).text(&format!(
            "SELECT count(*) > 0 FROM mtm.events WHERE event = 'stuck' AND node_id = 3 \
                AND happened_at > now() - interval '{since} ms'"
        ))?;
        ensure!(told == "t", "no event of node {} tells it", node + 1);
    }
    Ok(())
}
