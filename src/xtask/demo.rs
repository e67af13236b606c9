//! `cargo xtask demo`.

use anyhow::Result;

use crate::cluster::{Cluster, stop_servers_on_signal};
use crate::installation::{MAJOR, Source};
use crate::{checks, extension, screen, setup};

/// Sets everything up and shows a cluster at work.
///
/// # Errors
/// When something does not go as the text says.
pub fn run() -> Result<()> {
    stop_servers_on_signal()?;
    screen::heading("Getting ready");
    setup::run(MAJOR)?;
    let installation = screen::step("building the extension (minutes the first time)", || {
        extension::build(&Source::packaged()?)
    })?;
    let cluster = screen::step("starting three PostgreSQL servers", || {
        Cluster::start(&installation, 3)
    })?;
    let outcome = show(&cluster);
    if outcome.is_err() {
        cluster.keep_logs();
        eprintln!("{}", cluster.log_tails(20));
    }
    outcome
}

fn show(cluster: &Cluster) -> Result<()> {
    screen::step("making one cluster of them", || cluster.init_cluster())?;
    checks::whole(cluster, std::time::Duration::from_secs(10))
}
