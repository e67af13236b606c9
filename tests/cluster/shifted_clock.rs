//! A system clock that is set, forwards and back: nobody is excluded for it, and no length of time is measured by it.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::host;
use xtask::installation::Installation;
use xtask::server::Server;

use crate::failover::LOST;
use crate::line::{Load, PATIENCE, await_online, check_rows, create};
use crate::preload::start_with;

pub fn cases() -> Vec<OwnCase> {
    cases![a_clock_that_is_set_changes_nothing]
}

const HOUR: i64 = 3600;
/// Longer than a silent node is waited for: that nobody is excluded meanwhile has no other end than time.
const LOOK: Duration = Duration::from_secs(3);

/// The clock of one server (`shifted_clock.c`).
struct Clock(PathBuf);

impl Clock {
    /// Starts the server again with a clock that can be set.
    fn replace(server: &mut Server) -> Result<Clock> {
        let file = host::work_dir()?.join(format!("shifted-clock-{}", std::process::id()));
        let clock = Clock(file);
        clock.set(0)?;
        fs::set_permissions(&clock.0, Permissions::from_mode(0o644))?;
        server.set_variable("SHIFTED_CLOCK", &clock.0);
        start_with(server, "shifted_clock.c")?;
        Ok(clock)
    }

    /// In place: the server has mapped the file.
    fn set(&self, seconds: i64) -> Result<()> {
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&self.0)?;
        file.write_all(&seconds.to_ne_bytes())
            .context("cannot set the clock")
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn a_clock_that_is_set_changes_nothing(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        let clock = Clock::replace(&mut cluster.nodes[LOST])?;
        await_online(cluster, LOST)?;
        create(cluster)?;
        let generation = generation(cluster)?;
        let load = Load::start(cluster, &[0, 1, LOST]);
        let steps = set_and_look(cluster, &clock);
        let commits = load.stop()?;
        for pair in steps?.windows(2) {
            for (node, commits) in commits.iter().enumerate() {
                let meanwhile = commits
                    .iter()
                    .filter(|at| (pair[0]..pair[1]).contains(*at))
                    .count();
                ensure!(meanwhile > 0, "node {} has committed nothing", node + 1);
            }
        }
        ensure!(
            generation == self::generation(cluster)?,
            "somebody was excluded"
        );
        an_absence_has_its_true_length(cluster, &clock)?;
        check_rows(cluster, &commits)
    })
}

fn generation(cluster: &Cluster) -> Result<String> {
    Session::new(cluster.connect(0)?).text("SELECT gen_num FROM mtm.status()")
}

/// When the clock was set.
fn set_and_look(cluster: &Cluster, clock: &Clock) -> Result<Vec<Instant>> {
    let mut session = Session::new(cluster.connect(LOST)?);
    let mut times = Vec::new();
    for shift in [HOUR, -HOUR, 0] {
        times.push(Instant::now());
        clock.set(shift)?;
        let now: i64 = session
            .text("SELECT extract(epoch FROM clock_timestamp())::int8")?
            .parse()?;
        let true_now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let off = now - true_now.as_secs() as i64;
        ensure!(
            (off - shift).abs() < HOUR / 2,
            "the clock is off by {off} s"
        );
        std::thread::sleep(LOOK);
    }
    times.push(Instant::now());
    Ok(times)
}

/// The clock is set while another node is away.
fn an_absence_has_its_true_length(cluster: &mut Cluster, clock: &Clock) -> Result<()> {
    let began = Instant::now();
    cluster.nodes[1].kill()?;
    wait_for("a generation without the node", PATIENCE, || {
        let members =
            Session::new(cluster.connect(LOST)?).text("SELECT gen_members FROM mtm.status()")?;
        Ok(members == "{1,3}")
    })?;
    clock.set(HOUR)?;
    cluster.nodes[1].start()?;
    await_online(cluster, 1)?;
    let lasted: f64 = Session::new(cluster.connect(LOST)?)
        .text("SELECT extract(epoch FROM lasted) FROM mtm.events WHERE event = 'admitted' AND node_id = 2")?
        .parse()
        .context("nobody knows how long the node was away")?;
    ensure!(
        lasted > 0.0 && lasted <= began.elapsed().as_secs_f64(),
        "the absence is said to have lasted for {lasted} s"
    );
    clock.set(0)
}
