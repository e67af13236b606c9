//! What a node remembers of transactions takes the same room however many there were.

use std::time::Duration;

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::suite::Size;

use crate::load::{initialise, pgbench_everywhere};

pub fn cases() -> Vec<OwnCase> {
    cases![durable_state_does_not_grow]
}

/// How long finished transactions may stay on record.
const FORGET_LIMIT: Duration = Duration::from_secs(20);

/// Sizes and row numbers of what is kept durably.
const KEPT: &str = "
    SELECT pg_relation_size('mtm.records'), (SELECT count(*) FROM mtm.records),
        pg_relation_size('mtm.marks'), (SELECT count(*) FROM mtm.marks),
        (SELECT count(*) FROM pg_replication_slots)";

/// Transactions of each of six clients.
fn transactions() -> u32 {
    match Size::chosen() {
        Size::Ci => 500,
        Size::Full => 8_500,
        Size::Long => 170_000,
    }
}

fn kept(cluster: &Cluster) -> Result<Vec<String>> {
    cluster
        .nodes
        .iter()
        .map(|node| Session::new(node.connect()?).text(KEPT))
        .collect()
}

fn durable_state_does_not_grow(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        initialise(cluster, 1)?;
        let before = kept(cluster)?;
        let count = format!("--transactions={}", transactions());
        let reports = pgbench_everywhere(cluster, &["--client=2", "--skip-some-updates", &count])?;
        let done: u64 = reports.iter().map(|report| report.transactions).sum();
        let after = kept(cluster)?;
        println!("  {done} transactions; kept on each node: {}", after[0]);
        ensure!(before == after, "before {before:?}, after {after:?}");
        for node in &cluster.nodes {
            let mut session = Session::new(node.connect()?);
            wait_for(
                "finished transactions to be forgotten",
                FORGET_LIMIT,
                || {
                    let left = session.text(
                    "SELECT (SELECT count(*) FROM mtm.transactions) + (SELECT count(*) FROM mtm.records WHERE (b0, b1) <> (0, 0))",
                )?;
                    Ok(left == "0")
                },
            )?;
        }
        Ok(())
    })
}
