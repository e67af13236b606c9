//! A node is lost under load: the others go on by themselves, and it comes back by itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::suite::Size;

pub use crate::line::{Load, PATIENCE, await_online, check_rows, create};
use crate::line::{await_commit, longest_gap};

pub fn cases() -> Vec<OwnCase> {
    cases![
        survivors_of_a_killed_node_go_on,
        three_of_five_go_on_when_two_are_killed,
        a_node_returns_while_the_load_goes_on,
        two_nodes_of_three_die_and_return,
        a_restarted_node_asks_nothing_of_a_lost_one,
        a_node_stops_while_another_recovers,
        a_node_stops_while_another_hangs
    ]
}

/// Load before and after a copy is made.
pub const LOAD: Duration = Duration::from_secs(2);
/// For how long a node that returns may hold up the others.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Nodes (from 0) that are lost first and second.
pub const LOST: usize = 2;
const LOST_TOO: usize = 1;

/// How long a node is away while the load goes on.
fn absence() -> Duration {
    Duration::from_secs(match Size::chosen() {
        Size::Ci => 3,
        Size::Full => 120,
        Size::Long => 300,
    })
}

fn survivors_of_a_killed_node_go_on(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        load.await_commits()?;
        let killed = Instant::now();
        cluster.nodes[LOST].kill()?;
        load.await_commits()?;
        let members =
            Session::new(cluster.connect(0)?).text("SELECT gen_members FROM mtm.status()")?;
        let commits = load.stop()?;
        for (client, commits) in commits.iter().enumerate() {
            let after = commits.iter().filter(|at| **at > killed).count();
            println!(
                "  node {}: longest gap {} ms, {after} commits after the loss",
                client + 1,
                longest_gap(commits, killed).as_millis()
            );
            ensure!(after > 0, "node {} has committed nothing since", client + 1);
        }
        ensure!(members == "{1,2}", "the members are {members}");
        for node in [0, 1] {
            let cause = why_excluded(cluster, node, LOST)?;
            ensure!(
                !cause.contains("nothing was heard"),
                "node {} has waited although the connection was closed: {cause}",
                node + 1
            );
        }
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        let away = Session::new(cluster.connect(0)?).text(
            "SELECT CASE WHEN lasted > '0' THEN lasted::text END FROM mtm.events WHERE event = 'admitted' AND node_id = 3",
        )?;
        ensure!(!away.is_empty(), "nobody knows how long it was away");
        println!("  node {} was no member for {away}", LOST + 1);
        check_rows(cluster, &commits)
    })
}

/// Why a node says that another one (both from 0) was excluded last.
pub fn why_excluded(cluster: &Cluster, node: usize, lost: usize) -> Result<String> {
    let sql = format!(
        "SELECT reason FROM mtm.events WHERE event = 'excluded' AND node_id = {} ORDER BY happened_at DESC LIMIT 1",
        lost + 1
    );
    Session::new(cluster.connect(node)?).text(&sql)
}

/// Nodes (from 0) of five that stay, each with a client of its number.
const SURVIVORS: [usize; 3] = [0, 1, 2];

/// What was lost, when, and when everybody else had long gone on.
type Loss = (&'static str, Instant, Instant);

fn three_of_five_go_on_when_two_are_killed(installation: &Installation) -> Result<()> {
    with_cluster(installation, 5, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &SURVIVORS);
        load.await_commits()?;
        let losses = lose_two_twice(cluster, &load);
        let commits = load.stop()?;
        for (what, since, until) in losses? {
            let gaps: Vec<u128> = commits
                .iter()
                .map(|commits| &commits[..commits.partition_point(|at| *at < until)])
                .map(|commits| longest_gap(commits, since).as_millis())
                .collect();
            println!("  {what}: longest gaps of the others {gaps:?} ms");
        }
        check_rows(cluster, &commits)
    })
}

/// One after the other, and both at once.
fn lose_two_twice(cluster: &mut Cluster, load: &Load) -> Result<Vec<Loss>> {
    let mut losses = vec![
        lose(cluster, load, "one of five killed", &[4])?,
        lose(cluster, load, "one of the four killed", &[3])?,
    ];
    bring_back(cluster, &[3, 4])?;
    losses.push(lose(cluster, load, "two of five killed", &[3, 4])?);
    bring_back(cluster, &[3, 4])?;
    Ok(losses)
}

/// Kills nodes, and waits until every survivor commits again.
fn lose(cluster: &mut Cluster, load: &Load, what: &'static str, nodes: &[usize]) -> Result<Loss> {
    let begun = Instant::now();
    nodes
        .iter()
        .try_for_each(|node| cluster.nodes[*node].kill())?;
    load.await_commits()?;
    Ok((what, begun, Instant::now()))
}

fn bring_back(cluster: &mut Cluster, nodes: &[usize]) -> Result<()> {
    for node in nodes {
        cluster.nodes[*node].start()?;
    }
    nodes
        .iter()
        .try_for_each(|node| await_online(cluster, *node))
}

fn a_node_returns_while_the_load_goes_on(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        load.await_commits()?;
        cluster.nodes[LOST].kill()?;
        std::thread::sleep(absence());
        let returned = Instant::now();
        cluster.nodes[LOST].start()?;
        let online = await_online(cluster, LOST);
        let took = returned.elapsed();
        let went_on = load.await_commits();
        let commits = load.stop()?;
        online?;
        went_on?;
        let gaps: Vec<u128> = commits
            .iter()
            .map(|commits| longest_gap(commits, returned).as_millis())
            .collect();
        println!(
            "  away for {} s, online again {} ms after its start; longest gaps of the others meanwhile {gaps:?} ms",
            absence().as_secs(),
            took.as_millis()
        );
        if Size::chosen() != Size::Ci {
            let longest = gaps.into_iter().max().unwrap_or_default();
            ensure!(
                longest < 5 * PAUSE_MAX.as_millis(),
                "the others paused for {longest} ms"
            );
        }
        check_rows(cluster, &commits)
    })
}

/// The last node serves nothing; nothing is lost, and all is well when the others are back.
fn two_nodes_of_three_die_and_return(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        load.await_commits()?;
        cluster.nodes[LOST].kill()?;
        load.await_commits()?;
        cluster.nodes[LOST_TOO].kill()?;
        let mut session = Session::new(cluster.connect(0)?);
        wait_for("the last node to refuse reads", PATIENCE, || {
            Ok(session.refused("SELECT count(*) FROM line").is_ok())
        })?;
        session.refused_with("57P03", "SELECT count(*) FROM line")?;
        cluster.nodes[LOST].start()?;
        cluster.nodes[LOST_TOO].start()?;
        for node in 0..3 {
            await_online(cluster, node)?;
        }
        load.await_commits()?;
        let commits = load.stop()?;
        check_rows(cluster, &commits)
    })
}

/// Two nodes are lost, one returns: what it missed comes from the one that stayed, which has seen commits of the lost one, and both go on.
fn a_restarted_node_asks_nothing_of_a_lost_one(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, LOST]);
        load.await_commits()?;
        cluster.nodes[LOST_TOO].kill()?;
        load.await_commits()?;
        cluster.nodes[LOST].kill()?;
        cluster.nodes[LOST_TOO].start()?;
        await_online(cluster, LOST_TOO)?;
        await_online(cluster, 0)?;
        for node in [0, LOST_TOO] {
            let name = format!("commits of node {} without the lost one", node + 1);
            let sql = format!("INSERT INTO line VALUES ({}, 0)", 100 + node);
            wait_for(&name, PATIENCE, || {
                let mut session = cluster.connect(node)?;
                session.batch_execute("SET statement_timeout = '5s'")?;
                Ok(session.batch_execute(&sql).is_ok())
            })?;
        }
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        let commits = load.stop()?;
        check_rows(cluster, &commits)
    })
}

/// Node 3 applies nothing of client 77 before this file is in its data directory, and of client 78 not more than 20 rows a second.
const GO: &str = "go_on";
/// Transactions of client 78: they last for longer than the rate is measured over.
const SLOW: usize = 50;

/// What a recovering node must not confirm yet does not keep another one from stopping.
fn a_node_stops_while_another_recovers(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let mut session = Session::new(cluster.connect(0)?);
        session.run(&format!(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             WHILE (SELECT my_node_id FROM mtm.status()) = 3 AND pg_stat_file('{GO}', true) IS NULL LOOP PERFORM pg_sleep(0.05); END LOOP; \
             RETURN new; END $$; \
             CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF (SELECT my_node_id FROM mtm.status()) = 3 THEN PERFORM pg_sleep(0.05); END IF; RETURN new; END $$; \
             CREATE TRIGGER wait BEFORE INSERT ON line FOR EACH ROW WHEN (new.client = 77) EXECUTE FUNCTION wait(); \
             CREATE TRIGGER pause BEFORE INSERT ON line FOR EACH ROW WHEN (new.client = 78) EXECUTE FUNCTION pause(); \
             ALTER TABLE line ENABLE ALWAYS TRIGGER wait; ALTER TABLE line ENABLE ALWAYS TRIGGER pause"
        ))?;
        cluster.nodes[LOST].kill()?;
        await_commit(cluster, 0, "INSERT INTO line VALUES (79, 0)")?;
        miss(&mut session)?;
        cluster.nodes[LOST].start()?;
        watch_recovery(cluster)?;
        wait_for(
            "the lost node to read what the other one writes",
            PATIENCE,
            || {
                let mut other = Session::new(cluster.connect(LOST_TOO)?);
                let sql = "SELECT slot_active FROM mtm.get_nodes_state() WHERE id = 3";
                Ok(other.text(sql)? == "t")
            },
        )?;
        cluster.nodes[LOST_TOO].stop()?;
        let mut lost = Session::new(cluster.connect(LOST)?);
        let status = lost.text("SELECT status FROM mtm.status()")?;
        ensure!(status != "online", "the lost node did not wait");
        let left: i64 = lost.text("SELECT bytes_left FROM mtm.recovery")?.parse()?;
        ensure!(
            left > 0,
            "{left} bytes are left in front of what is held up"
        );
        std::fs::write(cluster.nodes[LOST].data_dir().join(GO), "")?;
        cluster.nodes[LOST_TOO].start()?;
        for node in 0..3 {
            await_online(cluster, node)?;
        }
        check_told_positions(cluster)?;
        check_rows(cluster, &[])
    })
}

/// An apply worker of the third node stands still with a transaction of the second one, which is stopped.
fn a_node_stops_while_another_hangs(installation: &Installation) -> Result<()> {
    const BUSY: &str = "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'multimaster apply worker%' AND wait_event = 'PgSleep'";
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        Session::new(cluster.connect(0)?).run(
            "CREATE FUNCTION rest() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF (SELECT my_node_id FROM mtm.status()) = 3 THEN PERFORM pg_sleep(600); END IF; RETURN new; END $$; \
             CREATE TRIGGER rest BEFORE INSERT ON line FOR EACH ROW WHEN (new.client = 77) EXECUTE FUNCTION rest(); \
             ALTER TABLE line ENABLE ALWAYS TRIGGER rest",
        )?;
        let mut writer = Session::new(cluster.connect(LOST_TOO)?);
        let writing = std::thread::spawn(move || writer.run("INSERT INTO line VALUES (77, 0)"));
        let mut hanging = Session::new(cluster.connect(LOST)?);
        let mut pid = String::new();
        wait_for("an apply worker that is busy", PATIENCE, || {
            pid = hanging.text(BUSY)?;
            Ok(!pid.is_empty())
        })?;
        let pid: i32 = pid.parse()?;
        cluster.nodes[LOST].freeze_process(pid)?;
        let stopped = cluster.nodes[LOST_TOO].stop();
        cluster.nodes[LOST].thaw_process(pid)?;
        stopped?;
        // Nobody voted for it on the third node.
        let written = writing.join();
        ensure!(
            matches!(written, Ok(Err(_))),
            "the row was committed: {written:?}"
        );
        cluster.nodes[LOST_TOO].start()?;
        (0..3).try_for_each(|node| await_online(cluster, node))?;
        check_rows(cluster, &[])
    })
}

/// What the lost node misses: rows that it applies slowly, one that it waits at, and more behind that.
fn miss(session: &mut Session) -> Result<()> {
    for row in 0..SLOW {
        session.run(&format!("INSERT INTO line VALUES (78, {row})"))?;
    }
    session.run("INSERT INTO line VALUES (77, 0)")?;
    session.run("INSERT INTO line SELECT 79, n FROM generate_series(1, 1000) n")
}

/// The lost node says how far it is, itself and in its heartbeats.
fn watch_recovery(cluster: &Cluster) -> Result<()> {
    let mut other = Session::new(cluster.connect(0)?);
    let mut said = String::new();
    let seen = wait_for("the lost node to say how far it is", PATIENCE, || {
        let mut lost = Session::new(cluster.connect(LOST)?);
        said = lost.text(
            "SELECT status, bytes_left, transactions, rate, estimate, retries FROM mtm.recovery",
        )?;
        let sql = "SELECT count(*) FROM mtm.recovery WHERE bytes_left > 0 AND transactions > 0 AND rate > 0 \
                   AND estimate > interval '0' AND retries = 0 AND error IS NULL";
        Ok(lost.text(sql)? == "1")
    });
    seen.with_context(|| format!("mtm.recovery says {said:?}"))?;
    println!("  status, bytes left, transactions, rate, estimate, retries: {said}");
    wait_for("another node to hear how far it is", PATIENCE, || {
        let sql = "SELECT n.recovery_lag > 0 AND s.catch_up FROM mtm.nodes() n JOIN mtm.get_nodes_state() s USING (id) WHERE id = 3";
        Ok(other.text(sql)? == "t")
    })
}

/// Every node has heard from every other one that it holds its WAL up to here; and nobody recovers.
fn check_told_positions(cluster: &Cluster) -> Result<()> {
    let mut questions = Vec::new();
    for client in cluster.connect_all()? {
        let mut session = Session::new(client);
        let here = session.text("SELECT pg_current_wal_flush_lsn()")?;
        let sql = format!(
            "SELECT string_agg(id::text, ' ') FROM mtm.nodes() WHERE NOT is_self AND (confirmed_lsn IS NULL OR confirmed_lsn < '{here}' OR recovery_lag IS NOT NULL)"
        );
        questions.push((session, sql));
    }
    for (session, sql) in &mut questions {
        wait_for("every node to say how far it is", PATIENCE, || {
            Ok(session.text(sql)?.is_empty())
        })?;
    }
    Ok(())
}
