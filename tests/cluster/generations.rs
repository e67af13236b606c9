//! Moments of a change of members: an arbiter that dies between two generations, a node that recovers from one that has just recovered itself, settings that
//! differ or change.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::server::settings;
use xtask::suite::Size;

use crate::crash::arm;
use crate::failover::LOST;
use crate::hosts::{Hosts, with_hosts};
use crate::line::{Load, PATIENCE, await_online, check_rows, create};
use crate::recovery::start_and_hold_recovery;

pub fn cases() -> Vec<OwnCase> {
    cases![
        an_arbiter_dies_between_two_generations,
        a_node_recovers_from_one_that_has_just_recovered,
        changed_heartbeat_settings_hold_and_are_compared
    ]
}

/// What the failpoint says when an arbiter dies of it.
const DIED: &str = "failpoint MarkerBeforeWrite";

fn configure(cluster: &Cluster, node: usize, values: &[(&str, &str)]) -> Result<()> {
    cluster.nodes[node].configure(&settings(values))?;
    Session::new(cluster.connect(node)?).run("SELECT pg_reload_conf()")
}

/// Nobody prepares any more under the old generation, nor does anybody yet under the new one: first on a node that stays, then on one that comes back.
fn an_arbiter_dies_between_two_generations(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        for action in ["error", "crash"] {
            let point = format!("marker-before-write={action}");
            let point = [("multimaster.failpoint", point.as_str())];
            let load = Load::start(cluster, &[0, 1]);
            configure(cluster, 0, &point)?;
            cluster.nodes[LOST].kill()?;
            let stays = die_and_go_on(cluster, 0, action).context("on the node that stays");
            let returns = stays.and_then(|()| {
                cluster.nodes[LOST].configure(&settings(&point))?;
                cluster.nodes[LOST].start()?;
                die_and_go_on(cluster, LOST, action).context("on the node that returns")
            });
            let commits = load.stop()?;
            returns.with_context(|| action.to_owned())?;
            check_rows(cluster, &commits)?;
            Session::new(cluster.connect(0)?).run("TRUNCATE line")?;
        }
        Ok(())
    })
}

/// Waits until the node has met the failpoint, takes that away and waits until the node is online.
fn die_and_go_on(cluster: &mut Cluster, node: usize, action: &str) -> Result<()> {
    let nothing = [("multimaster.failpoint", "")];
    if action == "crash" {
        wait_for("the server to die", PATIENCE, || {
            Ok(!cluster.nodes[node].is_running())
        })?;
        cluster.nodes[node].configure(&settings(&nothing))?;
        cluster.nodes[node].start()?;
    } else {
        wait_for("the arbiter to die", PATIENCE, || {
            Ok(cluster.nodes[node].log_text().contains(DIED))
        })?;
        configure(cluster, node, &nothing)?;
    }
    for online in [node, 1] {
        await_online(cluster, online)?;
    }
    Ok(())
}

/// Nodes (from 0) that are away: one comes back and serves the other one as a donor.
const FIRST_BACK: usize = 0;
const LAST_BACK: usize = 4;

/// The mark of a stream that is idle for its reader is stored every five seconds.
fn until_marks_are_stored() -> Duration {
    Duration::from_secs(match Size::chosen() {
        Size::Ci => 0,
        Size::Full | Size::Long => 6,
    })
}

/// What the donor fetched from others lies behind the mark that the reader has of it, although its own stream does not show it.
fn a_node_recovers_from_one_that_has_just_recovered(installation: &Installation) -> Result<()> {
    with_hosts(installation, 5, |hosts| {
        let cluster = &mut hosts.cluster;
        create(cluster)?;
        let load = Load::start(cluster, &[2, 3]);
        load.await_commits()?;
        cluster.nodes[LAST_BACK].kill()?;
        load.await_commits()?;
        cluster.nodes[FIRST_BACK].kill()?;
        load.await_commits()?;
        let recovery = start_and_stop_recovery(cluster)?;
        cluster.nodes[FIRST_BACK].start()?;
        await_online(cluster, FIRST_BACK)?;
        std::thread::sleep(until_marks_are_stored());
        let commits = load.stop()?;
        leave_one_donor(hosts)?;
        // It may have ended, since it was ordered to read from another node.
        let _ = hosts.cluster.nodes[LAST_BACK].thaw_process(recovery);
        hosts.network.heal()?;
        await_online(&hosts.cluster, LAST_BACK)?;
        check_rows(&hosts.cluster, &commits)
    })
}

/// Starts the last node and stops the process that recovers it, before it has applied anything.
fn start_and_stop_recovery(cluster: &mut Cluster) -> Result<i32> {
    let server = &mut cluster.nodes[LAST_BACK];
    start_and_hold_recovery(server)?;
    let pid = Session::new(server.connect()?)
        .text("SELECT pid FROM pg_stat_activity WHERE backend_type = 'multimaster recovery'")?
        .parse()
        .context("no process id")?;
    server.freeze_process(pid)?;
    arm(server, "")?;
    Ok(pid)
}

/// Cuts the last node off from all others but the first node back, which is then the only donor that it sees.
fn leave_one_donor(hosts: &mut Hosts) -> Result<()> {
    for other in (0..LAST_BACK).filter(|other| *other != FIRST_BACK) {
        hosts.network.cut(LAST_BACK, other)?;
    }
    wait_for("the first node back to be the donor", PATIENCE, || {
        Ok(donor(&hosts.cluster)? == FIRST_BACK)
    })
}

/// The node (from 0) from which the last node recovers.
fn donor(cluster: &Cluster) -> Result<usize> {
    let reason = Session::new(cluster.connect(LAST_BACK)?).text(
        "SELECT reason FROM mtm.events WHERE event = 'recovers' ORDER BY happened_at DESC LIMIT 1",
    )?;
    let node = reason.trim_start_matches("from node ").parse::<usize>();
    Ok(node.with_context(|| format!("recovers {reason:?}"))? - 1)
}

pub const SEND: &str = "multimaster.heartbeat_send_timeout";
const RECV: &str = "multimaster.heartbeat_recv_timeout";

/// Events of a node, as `event|node|reason` a line.
fn events(cluster: &Cluster, node: usize) -> Result<String> {
    Session::new(cluster.connect(node)?)
        .text("SELECT string_agg(concat_ws('|', event, node_id, reason), E'\\n') FROM mtm.events")
}

fn await_event(cluster: &Cluster, node: usize, expected: &str) -> Result<()> {
    wait_for(
        &format!("{expected:?} on node {}", node + 1),
        PATIENCE,
        || Ok(events(cluster, node)?.contains(expected)),
    )
}

fn changed_heartbeat_settings_hold_and_are_compared(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        configure(cluster, 0, &[(SEND, "300"), (RECV, "250")])?;
        await_event(cluster, 0, "settings refused|1|")?;
        for node in [1, 2] {
            let told = events(cluster, node)?;
            ensure!(
                !told.contains("unequal settings"),
                "settings that node 1 has not taken were told: {told}"
            );
        }
        let values = [(SEND, "100"), (RECV, "900")];
        configure(cluster, 0, &values)?;
        for (node, other) in [(0, 2), (0, 3), (1, 1), (2, 1)] {
            await_event(
                cluster,
                node,
                &format!("unequal settings|{other}|node {other} has heartbeat_send_timeout"),
            )?;
        }
        for node in [1, 2] {
            configure(cluster, node, &values)?;
        }
        cluster.nodes[LOST].freeze()?;
        let noticed = await_event(cluster, 0, "lost|3|nothing was heard for 900 ms");
        cluster.nodes[LOST].thaw()?;
        noticed?;
        (0..3).try_for_each(|node| await_online(cluster, node))?;
        slow_heartbeats_are_fewer(cluster)?;
        xtask::checks::whole(cluster, PATIENCE)
    })
}

/// Heartbeats of the slow node that are awaited.
const COUNTED: i64 = 6;

/// One node speaks a seventh as often as the others, but for what it says besides: a third node hears so.
fn slow_heartbeats_are_fewer(cluster: &Cluster) -> Result<()> {
    for (node, send) in [(0, "700"), (1, "100"), (2, "100")] {
        configure(cluster, node, &[(SEND, send), (RECV, "3000")])?;
    }
    for node in [1, 2] {
        await_event(cluster, node, "node 1 has heartbeat_send_timeout 700")?;
    }
    let mut heard = Session::new(cluster.connect(1)?);
    let mut count = || {
        let sql = "SELECT n_heartbeats FROM mtm.get_nodes_state() WHERE id <> 2 ORDER BY id";
        let counts = heard.query(sql, &[])?;
        anyhow::Ok([counts[0].get::<_, i64>(0), counts[1].get(0)])
    };
    let before = count()?;
    let [mut slow, mut quick] = [0, 0];
    wait_for("heartbeats of the slow node", PATIENCE, || {
        let now = count()?;
        [slow, quick] = [now[0] - before[0], now[1] - before[1]];
        Ok(slow >= COUNTED)
    })?;
    println!("  {slow} heartbeats of the slow node, {quick} of the other one");
    ensure!(
        5 * slow < 2 * quick,
        "{slow} heartbeats every 700 ms, {quick} every 100 ms"
    );
    Ok(())
}
