//! A node is lost for good, and its synchronous standby takes its place under the same address.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use postgres::{Client, NoTls};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::server::{Server, Spec, settings};

use crate::crash::{dice, with_quick_cluster};
use crate::ledger::Ledger;

pub fn cases() -> Vec<OwnCase> {
    cases![
        a_promoted_standby_takes_its_nodes_place,
        peers_know_nothing_that_a_synchronous_standby_lacks,
    ]
}

/// The node (from 0) that has a standby and is lost.
const LOST: usize = 0;
/// How long what follows may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Time in which peers would have prepared what the standby does not have: that nothing comes has no other end.
const PEERS_TIME: Duration = Duration::from_secs(2);

/// The ledger's clients commit in both modes, turn by turn.
fn a_promoted_standby_takes_its_nodes_place(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut dice = dice();
        let mut standby = add_standby(cluster, installation)?;
        let mut ledger = Ledger::open(cluster)?;
        let load = ledger.load(cluster, &[0, 0, 1, 1, 2, 2], &mut dice);
        std::thread::sleep(Duration::from_millis(500 + dice.below(500)));
        let outcome = cluster.nodes[LOST].kill().and_then(|()| {
            // A real one would go on; here it also has to move to another port.
            standby.stop()?;
            take_place(cluster, standby)
        });
        std::thread::sleep(Duration::from_millis(500));
        ledger.close(cluster, load)?;
        outcome?;
        ledger.audit_round(cluster)?;
        let load = ledger.load(cluster, &[0, 1, 2], &mut dice);
        std::thread::sleep(Duration::from_millis(500));
        ledger.close(cluster, load)?;
        println!("  {}", ledger.conclude(cluster)?);
        Ok(())
    })
}

/// The standby is away while clients commit, also one that does not want to wait for it.
fn peers_know_nothing_that_a_synchronous_standby_lacks(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut standby = add_standby(cluster, installation)?;
        Session::new(cluster.connect(LOST)?)
            .run("CREATE TABLE written (n int PRIMARY KEY); INSERT INTO written VALUES (0)")?;
        standby.stop()?;
        let conninfo = cluster.nodes[LOST].conninfo();
        let clients: Vec<JoinHandle<bool>> = ["on", "local", "off"]
            .into_iter()
            .zip(1..)
            .flat_map(|(level, n)| [("fast", level, n), ("e3pc", level, n + 10)])
            .map(|(mode, level, n)| {
                let conninfo = conninfo.clone();
                std::thread::spawn(move || is_committed(&conninfo, mode, level, n))
            })
            .collect();
        std::thread::sleep(PEERS_TIME);
        cluster.nodes[LOST].kill()?;
        for client in clients {
            let committed = client.join().ok().context("a client panicked")?;
            ensure!(!committed, "a client was told COMMIT");
        }
        take_place(cluster, standby)?;
        await_online(cluster)?;
        xtask::checks::whole(cluster, LIMIT)?;
        let rows = Session::new(cluster.connect(LOST)?).text("SELECT n FROM written")?;
        ensure!(
            rows == "0",
            "of what the standby has never seen there is:\n{rows}"
        );
        Session::new(cluster.connect(LOST)?).run("INSERT INTO written VALUES (99)")?;
        xtask::checks::whole(cluster, LIMIT)
    })
}

/// Whether one commit succeeds.
fn is_committed(conninfo: &str, mode: &str, level: &str, n: i32) -> bool {
    let sql = format!(
        "SET multimaster.commit_mode = '{mode}'; SET synchronous_commit = '{level}'; \
         BEGIN; INSERT INTO written VALUES ({n}); COMMIT"
    );
    Client::connect(conninfo, NoTls).is_ok_and(|mut client| client.batch_execute(&sql).is_ok())
}

/// A synchronous standby of the node that will be lost.
fn add_standby(cluster: &mut Cluster, installation: &Installation) -> Result<Server> {
    let spec = Spec {
        name: "standby".to_owned(),
        address: cluster.nodes[LOST].address,
        settings: Vec::new(),
        namespace: None,
        disk_bytes: None,
    };
    cluster.add_standby(installation, &spec)?;
    let standby = cluster.nodes.pop().context("the standby is the last one")?;
    cluster.nodes[LOST].configure(&settings(&[("synchronous_standby_names", "standby")]))?;
    let mut session = Session::new(cluster.connect(LOST)?);
    session.run("SELECT pg_reload_conf()")?;
    wait_for("a synchronous standby", LIMIT, || {
        let state = session.text(
            "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'standby'",
        )?;
        Ok(state == "sync")
    })?;
    Ok(standby)
}

/// The standby, which is stopped, becomes the node.
fn take_place(cluster: &mut Cluster, mut standby: Server) -> Result<()> {
    standby.port = cluster.nodes[LOST].port;
    standby.arbiter_port = cluster.nodes[LOST].arbiter_port;
    standby.configure(&settings(&[
        ("port", &standby.port.to_string()),
        (
            "multimaster.arbiter_port",
            &standby.arbiter_port.to_string(),
        ),
    ]))?;
    standby.start()?;
    let promoted = Session::new(standby.connect()?).run("SELECT pg_promote()");
    cluster.nodes[LOST] = standby;
    promoted
}

/// Every node, by its own word.
fn await_online(cluster: &Cluster) -> Result<()> {
    let begun = Instant::now();
    for node in &cluster.nodes {
        wait_for(&format!("{} to be online", node.name), LIMIT, || {
            let status = node
                .connect()
                .and_then(|client| Session::new(client).text("SELECT status FROM mtm.status()"));
            Ok(status.is_ok_and(|status| status == "online"))
        })?;
    }
    println!("  online again after {} ms", begun.elapsed().as_millis());
    Ok(())
}
