//! A user's own prepared transactions, and a node that goes and returns.

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::server::settings;

use crate::crash::arm;
use crate::failover::{LOST, PATIENCE, await_online, create};
use crate::stuck::await_members;

pub fn cases() -> Vec<OwnCase> {
    cases![a_receiver_that_starts_anew_after_a_recovery_takes_nothing_twice]
}

/// The mark behind what was read is about to be stored.
const MARK: &str = "mark-before-store";

/// What was prepared and committed while the node was away came through a donor. A receiver that starts at a mark from before must know that: only
/// markers that lie before the mark tell the generation of what it reads.
fn a_receiver_that_starts_anew_after_a_recovery_takes_nothing_twice(
    installation: &Installation,
) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        for node in [0, 1] {
            await_online(cluster, node)?;
            let mut session = Session::new(cluster.connect(node)?);
            session.run(&format!(
                "BEGIN; INSERT INTO line VALUES ({node}, 0); PREPARE TRANSACTION 'kept on {node}'"
            ))?;
            session.run(&format!(
                "BEGIN; INSERT INTO line VALUES ({node}, 1); PREPARE TRANSACTION 'done on {node}'"
            ))?;
            session.run(&format!("COMMIT PREPARED 'done on {node}'"))?;
        }
        cluster.nodes[LOST].configure(&settings(&[(
            "multimaster.failpoint",
            "mark-before-store=hold",
        )]))?;
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        wait_for("receivers to store their marks", PATIENCE, || {
            Ok(log_counts(cluster, &format!("failpoint {MARK}: held")) == 2)
        })?;
        // Whichever it is.
        arm(&cluster.nodes[LOST], &format!("{MARK}=error"))?;
        wait_for("a receiver to start anew", PATIENCE, || {
            Ok(log_counts(cluster, "failpoint MarkBeforeStore") > 0)
        })?;
        for node in [0, 1] {
            let sql = format!("COMMIT PREPARED 'kept on {node}'");
            Session::new(cluster.connect(LOST)?).run(&sql)?;
        }
        Session::new(cluster.connect(0)?).run("INSERT INTO line VALUES (2, 2)")?;
        xtask::checks::whole(cluster, PATIENCE)?;
        let rows = Session::new(cluster.connect(LOST)?)
            .text("SELECT client, n FROM line ORDER BY client, n")?;
        ensure!(rows == "0|0\n0|1\n1|0\n1|1\n2|2", "{rows}");
        recovered_at_once(cluster)
    })
}

/// How often something is in the log of the node that was lost.
fn log_counts(cluster: &Cluster, what: &str) -> usize {
    cluster.nodes[LOST].log_text().matches(what).count()
}

/// Nothing of it had to be tried again, and PostgreSQL was surprised by nothing.
fn recovered_at_once(cluster: &Cluster) -> Result<()> {
    for what in [
        "unexpected state",
        "could not apply a transaction",
        "there is no transaction in progress",
    ] {
        ensure!(log_counts(cluster, what) == 0, "the log says {what:?}");
    }
    Ok(())
}
