//! An old copy of a node's disk is started in its place: it does not know what its node has promised since, and must not be asked.

use std::process::Command;

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::{checks, command};

use crate::clone::Kept;
use crate::line::{PATIENCE, await_online, create};
use crate::stuck::await_members;

pub fn cases() -> Vec<OwnCase> {
    cases![
        an_old_disk_has_no_say_after_everything_was_down,
        a_node_that_is_being_replaced_does_not_come_back
    ]
}

/// Node (from 0) whose old disk comes back.
const OLD: usize = 2;
/// Transactions of each other node that the old disk lacks: a few kB of WAL.
const MISSED: usize = 20;
/// What its peers tell of it.
const TOLD: &str = "SELECT string_agg(DISTINCT event, ' ' ORDER BY event) FROM mtm.events WHERE node_id = 3 AND event IN ('connected', 'old copy')";

/// All nodes are stopped, so no memory tells the old copy from its node; it lacks a moment only, and has been started more often.
fn an_old_disk_has_no_say_after_everything_was_down(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let old = take_copy(cluster)?;
        miss(cluster)?;
        for node in [OLD, 1, 0] {
            cluster.nodes[node].stop()?;
        }
        cluster.nodes[OLD].exchange_data(&old.0)?;
        for node in [0, 1, OLD] {
            cluster.nodes[node].start()?;
        }
        for node in [0, 1] {
            await_told(cluster, node)?;
        }
        await_members(cluster, "{1,2}")?;
        await_online(cluster, 0)?;
        await_online(cluster, 1)?;
        Session::new(cluster.connect(1)?).run("INSERT INTO line VALUES (2, 0)")?;
        Session::new(cluster.connect(OLD)?).refused_with("57P03", "SELECT count(*) FROM line")?;
        cluster.nodes[OLD].stop()?;
        cluster.nodes[OLD].start()?;
        cluster.nodes[OLD].stop()?;
        check_told(cluster)?;
        cluster.nodes[OLD].exchange_data(&old.0)?;
        cluster.nodes[OLD].start()?;
        await_online(cluster, OLD)?;
        checks::whole(cluster, PATIENCE)?;
        let rows = Session::new(cluster.connect(OLD)?).text("SELECT count(*) FROM line")?;
        ensure!(
            rows == (2 * MISSED + 1).to_string(),
            "{rows} rows are there"
        );
        Ok(())
    })
}

/// A copy of the node was begun and is not there yet, and nobody has a memory of that but the disks of the others: its own server is started by mistake.
fn a_node_that_is_being_replaced_does_not_come_back(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let mut first = Session::new(cluster.connect(0)?);
        first.refused_with("55000", "SELECT mtm.begin_copy(3)")?;
        for nobody in [0, 1, 4] {
            first.refused_with("22023", &format!("SELECT mtm.begin_copy({nobody})"))?;
        }
        cluster.nodes[OLD].stop()?;
        await_members(cluster, "{1,2}")?;
        for node in [0, 1] {
            await_online(cluster, node)?;
            Session::new(cluster.connect(node)?).run("SELECT mtm.begin_copy(3)")?;
        }
        for node in [0, 1] {
            cluster.nodes[node].stop()?;
        }
        for node in [0, 1, OLD] {
            cluster.nodes[node].start()?;
        }
        for node in [0, 1] {
            await_told(cluster, node)?;
        }
        await_members(cluster, "{1,2}")?;
        check_told(cluster)
    })
}

/// The disk as it is at one moment, as a snapshot of its storage would be.
fn take_copy(cluster: &Cluster) -> Result<Kept> {
    let node = &cluster.nodes[OLD];
    let copy = Kept(node.data_dir().with_extension("old"));
    node.freeze()?;
    let copied = command::capture(
        Command::new("cp")
            .arg("--archive")
            .arg(node.data_dir())
            .arg(&copy.0),
    );
    node.thaw()?;
    copied?;
    await_online(cluster, OLD)?;
    Ok(copy)
}

/// Commits on both other nodes what the old disk lacks, and waits until they have noted that its own node holds some of it.
fn miss(cluster: &Cluster) -> Result<()> {
    let mut sessions = Vec::new();
    for node in [0, 1] {
        let mut session = Session::new(cluster.connect(node)?);
        let began = session.text("SELECT pg_current_wal_lsn()")?;
        for n in 0..MISSED {
            session.run(&format!("INSERT INTO line VALUES ({node}, {n})"))?;
        }
        sessions.push((session, began));
    }
    for (session, began) in &mut sessions {
        let held = format!("SELECT b2 > '{began}'::pg_lsn - '0/0' FROM mtm.marks WHERE id = 3");
        wait_for("node 3 to be known to hold it", PATIENCE, || {
            Ok(session.text(&held)? == "t")
        })?;
    }
    Ok(())
}

fn await_told(cluster: &Cluster, node: usize) -> Result<()> {
    wait_for(
        &format!("node {} to tell of the old copy", node + 1),
        PATIENCE,
        || {
            let told = Session::new(cluster.connect(node)?).text(TOLD);
            Ok(told.is_ok_and(|told| told.contains("old copy")))
        },
    )
}

/// None of the others has ever listened to it.
fn check_told(cluster: &Cluster) -> Result<()> {
    for node in [0, 1] {
        let told = Session::new(cluster.connect(node)?).text(TOLD)?;
        ensure!(told == "old copy", "node {}: {told}", node + 1);
    }
    Ok(())
}
