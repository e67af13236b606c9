//! Nodes that answer heartbeats and do not get on, nodes that leave in good order, nodes that are away for too long.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::extension;
use xtask::installation::Installation;
use xtask::server::settings;

use crate::clone::{Kept, replace_by_a_copy};
use crate::failover::{LOST, why_excluded};
use crate::line::{Load, PATIENCE, await_online, check_rows, create, longest_gap};
use crate::recovery::await_heartbeats;

pub fn cases() -> Vec<OwnCase> {
    cases![
        a_stopped_apply_worker_does_not_stop_the_cluster,
        a_stopped_walsender_does_not_stop_the_cluster,
        a_node_that_leaves_says_so,
        a_node_away_for_too_long_needs_a_copy,
        nothing_is_served_before_the_generation_is_durable,
        users_prepared_transactions_outlive_a_change
    ]
}

/// `multimaster.slow_node_timeout` of these clusters, milliseconds.
pub const SLOW_MS: &str = "2000";

pub fn set_everywhere(cluster: &Cluster, name: &str, value: &str) -> Result<()> {
    (0..cluster.nodes.len()).try_for_each(|node| set_on(cluster, node, name, value))
}

/// Changes a setting of a node (from 0) by reload.
pub fn set_on(cluster: &Cluster, node: usize, name: &str, value: &str) -> Result<()> {
    let mut session = Session::new(cluster.connect(node)?);
    session.run(&format!("ALTER SYSTEM SET {name} = '{value}'"))?;
    session.run("SELECT pg_reload_conf()")
}

/// The members as the first node knows them.
pub fn await_members(cluster: &Cluster, expected: &str) -> Result<()> {
    let mut session = Session::new(cluster.connect(0)?);
    wait_for(&format!("the members {expected}"), PATIENCE, || {
        Ok(session.text("SELECT gen_members FROM mtm.status()")? == expected)
    })
}

/// Stops one process of a node while clients of the first two nodes commit: they go on without node 3, and it returns when the process does.
fn stop_one(cluster: &Cluster, node: usize, which: &str) -> Result<()> {
    set_everywhere(cluster, "multimaster.slow_node_timeout", SLOW_MS)?;
    create(cluster)?;
    let load = Load::start(cluster, &[0, 1]);
    load.await_commits()?;
    let pid = Session::new(cluster.connect(node)?)
        .text(which)?
        .parse()
        .context("no such process")?;
    let stopped = Instant::now();
    cluster.nodes[node].freeze_process(pid)?;
    let excluded = await_members(cluster, "{1,2}");
    let went_on = load.await_commits();
    let said = Session::new(cluster.connect(0)?)
        .text("SELECT count(*) > 0 FROM mtm.events WHERE event = 'stuck' AND node_id = 3");
    let moving = Instant::now();
    cluster.nodes[node].thaw_process(pid)?;
    excluded?;
    went_on?;
    let online = await_online(cluster, LOST);
    let took = moving.elapsed();
    let went_on = load.await_commits();
    let commits = load.stop()?;
    ensure!(said? == "t", "no event tells that node 3 was stuck");
    online?;
    went_on?;
    for (client, commits) in commits.iter().enumerate() {
        println!(
            "  node {}: longest gap {} ms with a timeout of {SLOW_MS} ms; node 3 online again after {} ms",
            client + 1,
            longest_gap(commits, stopped).as_millis(),
            took.as_millis()
        );
        let since = commits.iter().filter(|at| **at > stopped).count();
        ensure!(since > 0, "node {} has committed nothing since", client + 1);
    }
    check_rows(cluster, &commits)
}

fn a_stopped_apply_worker_does_not_stop_the_cluster(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        stop_one(
            cluster,
            LOST,
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'multimaster apply worker 1'",
        )
    })
}

/// The stream that does not move is named by the node that waits for it: that one is left out.
fn a_stopped_walsender_does_not_stop_the_cluster(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        stop_one(
            cluster,
            0,
            "SELECT pid FROM pg_stat_replication WHERE application_name = 'multimaster node 3'",
        )
    })
}

/// Nobody waits for a node that was shut down in good order.
fn a_node_that_leaves_says_so(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        load.await_commits()?;
        let stopped = Instant::now();
        cluster.nodes[LOST].stop()?;
        let took = stopped.elapsed();
        load.await_commits()?;
        let commits = load.stop()?;
        for (client, commits) in commits.iter().enumerate() {
            println!(
                "  node {}: longest gap {} ms; the shutdown took {} ms",
                client + 1,
                longest_gap(commits, stopped).as_millis(),
                took.as_millis()
            );
            let since = commits.iter().filter(|at| **at > stopped).count();
            ensure!(since > 0, "node {} has committed nothing since", client + 1);
        }
        await_members(cluster, "{1,2}")?;
        for node in [0, 1] {
            let cause = why_excluded(cluster, node, LOST)?;
            ensure!(
                cause.contains("it said good-bye"),
                "node {} says of it: {cause}",
                node + 1
            );
        }
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        check_rows(cluster, &commits)
    })
}

/// `multimaster.max_recovery_lag` where it is exceeded, and the part of it that is nearly too much, bytes.
const KEPT_MAX: u64 = 2 * 1024 * 1024;
const NEARLY: u64 = KEPT_MAX / 100 * 86;

/// Writes until the first node keeps nearly as much WAL for the lost one as it may: it says so, and keeps it.
fn come_near_the_limit(cluster: &Cluster) -> Result<()> {
    const KEPT: &str = "SELECT (pg_current_wal_flush_lsn() - restart_lsn)::bigint FROM pg_replication_slots \
                         WHERE slot_name LIKE 'mtm%n3' AND NOT temporary";
    let mut session = Session::new(cluster.connect(0)?);
    let mut rows = 0;
    let mut kept = 0;
    while kept <= NEARLY {
        ensure!(rows < 100_000, "{kept} bytes are kept for {rows} rows");
        session.run("INSERT INTO line SELECT 8, n FROM generate_series(1, 500) n")?;
        rows += 500;
        kept = session.text(KEPT)?.parse()?;
    }
    wait_for("the event that the limit is near", PATIENCE, || {
        let told =
            session.text("SELECT reason FROM mtm.events WHERE event = 'lag' AND node_id = 3")?;
        Ok(told.contains(&KEPT_MAX.to_string()))
    })?;
    let left = session.text(SLOT_OF_LOST)?;
    let noted = session.text("SELECT count(*) FROM mtm.needs_copy")?;
    ensure!(
        (left.as_str(), noted.as_str()) == ("2", "0"),
        "{left} slots and {noted} notes while {kept} bytes of {KEPT_MAX} are kept"
    );
    Ok(())
}

const SLOT_OF_LOST: &str =
    "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'mtm%' AND NOT temporary";

fn await_status(cluster: &Cluster, node: usize, expected: &str) -> Result<()> {
    wait_for(
        &format!("node {} to be {expected}", node + 1),
        PATIENCE,
        || {
            let status = cluster
                .connect(node)
                .and_then(|client| Session::new(client).text("SELECT status FROM mtm.status()"));
            Ok(status.is_ok_and(|status| status == expected))
        },
    )
}

/// The disks of the others do not fill, and the node does not go on with a gap, whatever is started again. A copy takes its place.
fn a_node_away_for_too_long_needs_a_copy(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        let limit = format!("{}kB", KEPT_MAX / 1024);
        set_everywhere(cluster, "multimaster.max_recovery_lag", &limit)?;
        create(cluster)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        come_near_the_limit(cluster)?;
        Session::new(cluster.connect(0)?)
            .run("INSERT INTO line SELECT 9, n FROM generate_series(1, 120000) n")?;
        for node in 0..LOST {
            let mut session = Session::new(cluster.connect(node)?);
            wait_for("the slot to be dropped", PATIENCE, || {
                Ok(session.text(SLOT_OF_LOST)? == "1")
            })?;
            let noted = session.text("SELECT node_id FROM mtm.needs_copy")?;
            ensure!(noted == "3", "{noted:?} is noted");
        }
        for node in 0..LOST {
            cluster.nodes[node].stop()?;
            cluster.nodes[node].start()?;
            await_status(cluster, node, "online")?;
        }
        for _ in 0..2 {
            cluster.nodes[LOST].start()?;
            await_status(cluster, LOST, "needs_copy")?;
            // Long enough for it to be let in, if that were so.
            await_heartbeats(cluster)?;
            await_status(cluster, LOST, "needs_copy")?;
            let refused = Session::new(cluster.connect(LOST)?)
                .refused_with("55000", "SELECT mtm.rejoin()")?;
            let hint = refused.hint().unwrap_or_default();
            ensure!(
                hint.contains("mtm clone --node 3 --from"),
                "it says {hint:?}"
            );
            cluster.nodes[LOST].stop()?;
        }
        let mut first = Session::new(cluster.connect(0)?);
        ensure!(first.text(SLOT_OF_LOST)? == "1", "the slot was made again");
        first.run("INSERT INTO line VALUES (9, 0)")?;
        await_members(cluster, "{1,2}")?;
        become_a_copy(cluster, &mtm)
    })
}

/// What the operator does then, while the others work.
fn become_a_copy(cluster: &mut Cluster, mtm: &Path) -> Result<()> {
    // The load must not leave the copy behind, too.
    for node in 0..LOST {
        set_on(cluster, node, "multimaster.max_recovery_lag", "1GB")?;
    }
    let load = Load::start(cluster, &[0, 1]);
    let keep = Kept::new()?;
    let _old = replace_by_a_copy(cluster, mtm, &keep)?;
    cluster.nodes[LOST].start()?;
    let online = await_online(cluster, LOST);
    let commits = load.stop()?;
    online?;
    for node in 0..3 {
        let mut session = Session::new(cluster.connect(node)?);
        wait_for("nobody to need a copy", PATIENCE, || {
            Ok(session.text("SELECT count(*) FROM mtm.needs_copy")? == "0")
        })?;
    }
    check_rows(cluster, &commits)
}

/// What a node says and does belongs to the generation that it would know after a crash.
fn nothing_is_served_before_the_generation_is_durable(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let mut watcher = Session::new(cluster.connect(0)?);
        cluster.nodes[0].configure(&settings(&[(
            "multimaster.failpoint",
            "members-before-write=sleep:700",
        )]))?;
        watcher.run("SELECT pg_reload_conf()")?;
        cluster.nodes[LOST].kill()?;
        let begun = Instant::now();
        let mut generation = "1".to_owned();
        let mut seen = 0;
        wait_for("the next generation to be online", PATIENCE, || {
            let row = watcher.text(
                "SELECT concat_ws(' ', status, gen_num, \
                    (('x' || lpad(to_hex((b1 >> 8) & 4294967295), 8, '0'))::bit(32)::bigint)) \
                   FROM mtm.status(), mtm.marks WHERE id = 17",
            )?;
            let parts: Vec<&str> = row.split(' ').collect();
            let [status, shown, online_in] = parts[..] else {
                anyhow::bail!("{row:?} was found")
            };
            seen += 1;
            ensure!(
                status != "online" || shown == online_in,
                "online in generation {shown} while the record says {online_in}"
            );
            shown.clone_into(&mut generation);
            Ok(status == "online" && shown != "1")
        })?;
        println!(
            "  looked {seen} times in {} ms, until generation {generation}",
            begun.elapsed().as_millis()
        );
        watcher.run("INSERT INTO line VALUES (0, 0)")
    })
}

/// Prepared before the loss or after it, finished before the return or after it: on all nodes alike.
fn users_prepared_transactions_outlive_a_change(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let mut first = Session::new(cluster.connect(0)?);
        let mut prepare = |name: &str, n: u32| {
            first.run(&format!(
                "BEGIN; INSERT INTO line VALUES (0, {n}); PREPARE TRANSACTION '{name}'"
            ))
        };
        prepare("before, finished while away", 0)?;
        prepare("before, finished later", 1)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        await_online(cluster, 0)?;
        await_online(cluster, 1)?;
        prepare("after, finished while away", 2)?;
        prepare("after, finished later", 3)?;
        let mut second = Session::new(cluster.connect(1)?);
        second.run("COMMIT PREPARED 'before, finished while away'")?;
        second.run("COMMIT PREPARED 'after, finished while away'")?;
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        let mut third = Session::new(cluster.connect(LOST)?);
        third.run("COMMIT PREPARED 'before, finished later'")?;
        third.run("COMMIT PREPARED 'after, finished later'")?;
        for node in 0..cluster.nodes.len() {
            let mut session = Session::new(cluster.connect(node)?);
            wait_for("all rows and no prepared transaction", PATIENCE, || {
                let rows = session.text("SELECT string_agg(n::text, ' ' ORDER BY n) FROM line")?;
                let left = session.text("SELECT count(*) FROM pg_prepared_xacts")?;
                Ok((rows.as_str(), left.as_str()) == ("0 1 2 3", "0"))
            })?;
        }
        xtask::checks::whole(cluster, PATIENCE)
    })
}
