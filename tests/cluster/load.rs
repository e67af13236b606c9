//! TPC-B on all nodes at once: money is neither made nor lost.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::checks;
use xtask::cluster::Cluster;
use xtask::command;
use xtask::installation::Installation;
use xtask::pgbench::Report;
use xtask::suite::Size;

pub fn cases() -> Vec<OwnCase> {
    cases![
        tpcb_on_all_nodes_keeps_every_sum,
        tpcb_with_few_rows_ends_with_equal_nodes
    ]
}

/// Transactions per second, of three nodes together on two cores, below which something is broken.
const FLOOR_TPS: f64 = 400.0;

fn seconds() -> u32 {
    match Size::chosen() {
        Size::Ci => 9,
        Size::Full => 60,
        Size::Long => 600,
    }
}

/// Runs pgbench on all nodes at once; what it reports, per node.
pub fn pgbench_everywhere(cluster: &Cluster, arguments: &[&str]) -> Result<Vec<Report>> {
    thread::scope(|scope| {
        let runs: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| {
                scope.spawn(move || {
                    let mut pgbench = node.client_program("pgbench");
                    let text = command::capture(
                        pgbench
                            .args(["--no-vacuum", "--max-tries=10000"])
                            .args(arguments),
                    )?;
                    Report::read(&text)
                        .with_context(|| format!("cannot read pgbench's report\n{text}"))
                })
            })
            .collect();
        runs.into_iter()
            .map(|run| {
                run.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

pub fn initialise(cluster: &Cluster, scale: u32) -> Result<()> {
    let mut pgbench = cluster.nodes[0].client_program("pgbench");
    command::capture(pgbench.args(["--initialize", "--quiet", "--scale", &scale.to_string()]))
        .map(drop)
}

/// Every node must have the same sums, and one row of history for each transaction that a client saw committed.
fn check_sums(cluster: &Cluster, transactions: u64) -> Result<()> {
    checks::whole(cluster, Duration::from_secs(30))?;
    for node in 0..cluster.nodes.len() {
        let mut session = Session::new(cluster.connect(node)?);
        let sums = session.text(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history),
                (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history),
                (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)",
        )?;
        ensure!(sums == "t|t|t", "node {}: sums differ: {sums}", node + 1);
        let history = session.text("SELECT count(*) FROM pgbench_history")?;
        ensure!(
            history == transactions.to_string(),
            "node {}: {history} rows for {transactions} transactions",
            node + 1
        );
    }
    Ok(())
}

fn total(reports: &[Report]) -> (u64, u64, f64) {
    let transactions = reports.iter().map(|report| report.transactions).sum();
    let retries = reports.iter().map(|report| report.retries).sum();
    (
        transactions,
        retries,
        reports.iter().map(|report| report.tps).sum(),
    )
}

fn tpcb_on_all_nodes_keeps_every_sum(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        initialise(cluster, 10)?;
        let time = format!("--time={}", seconds());
        let reports = pgbench_everywhere(cluster, &["--client=3", "--protocol=prepared", &time])?;
        let (transactions, retries, tps) = total(&reports);
        println!(
            "  TPC-B, scale 10, three nodes at once: {transactions} transactions, {tps:.0} a second, {retries} retries"
        );
        ensure!(
            reports.iter().all(|report| report.failed == 0),
            "failed transactions: {reports:?}"
        );
        check_sums(cluster, transactions)?;
        ensure!(
            Size::chosen() != Size::Long || tps >= FLOOR_TPS,
            "{tps:.0} transactions a second"
        );
        Ok(())
    })
}

fn tpcb_with_few_rows_ends_with_equal_nodes(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        initialise(cluster, 1)?;
        let time = format!("--time={}", seconds() / 3);
        let reports = pgbench_everywhere(cluster, &["--client=4", &time])?;
        let (transactions, retries, tps) = total(&reports);
        println!(
            "  TPC-B, one branch, three nodes at once: {transactions} transactions, {tps:.0} a second, {retries} retries"
        );
        ensure!(
            reports
                .iter()
                .all(|report| report.failed == 0 && report.transactions > 0),
            "no progress: {reports:?}"
        );
        check_sums(cluster, transactions)
    })
}
