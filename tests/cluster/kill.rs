//! Processes of every kind are killed at random moments, under load.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::cluster::{Cluster, wait_for};
use xtask::command;
use xtask::installation::Installation;
use xtask::server::Server;
use xtask::suite::Size;

use crate::crash::{
    arm, chosen, deaths, dice, died_there, failpoints, with_quick_cluster, with_quick_nodes,
};
use crate::ledger::{Dice, Ledger};

pub fn cases() -> Vec<OwnCase> {
    cases![
        any_process_may_be_killed_at_any_moment,
        two_of_five_nodes_die_at_any_moment,
        a_storm_of_ended_workers_does_no_harm,
        users_own_prepared_transactions_are_applied_once,
    ]
}

/// What is killed in a round.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// A process of this kind, as `pg_stat_activity.backend_type` begins.
    Process(&'static str),
    /// A background worker of this kind is asked to end.
    Terminated(&'static str),
    Postmaster,
    Node,
    AllNodes,
}

const VICTIMS: [Victim; 16] = [
    Victim::Process("client backend"),
    Victim::Process("walsender"),
    Victim::Process("multimaster receiver"),
    Victim::Process("multimaster apply worker"),
    Victim::Process("multimaster arbiter"),
    Victim::Process("multimaster finisher"),
    Victim::Process("multimaster monitor"),
    Victim::Process("checkpointer"),
    Victim::Terminated("multimaster receiver"),
    Victim::Terminated("multimaster apply worker"),
    Victim::Terminated("multimaster finisher"),
    Victim::Terminated("multimaster arbiter"),
    Victim::Terminated("client backend"),
    Victim::Postmaster,
    Victim::Node,
    Victim::AllNodes,
];

/// How long what follows a death may take.
const LIMIT: Duration = Duration::from_secs(30);

fn rounds() -> u64 {
    match Size::chosen() {
        Size::Ci => 1,
        Size::Full => 3,
        Size::Long => 30,
    }
}

fn any_process_may_be_killed_at_any_moment(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut dice = dice();
        let mut ledger = Ledger::open(cluster)?;
        let started = Instant::now();
        for round in 1..=rounds() {
            for victim in VICTIMS {
                kill_one(cluster, &mut ledger, &mut dice, victim)
                    .with_context(|| format!("round {round}: {victim:?}"))?;
            }
        }
        let seen = ledger.conclude(cluster)?;
        println!("  {} s: {seen}", started.elapsed().as_secs());
        Ok(())
    })
}

/// Nodes of the larger cluster: votes go to all members there, and each precommits by itself.
const FIVE: [usize; 5] = [0, 1, 2, 3, 4];
/// How long a node has to pass a point. Some are on the way of other commits only; then it is killed wherever it is.
const POINT_LIMIT: Duration = Duration::from_secs(3);

/// How many points of the commit a node of five dies at.
fn points_of_five() -> usize {
    match Size::chosen() {
        Size::Ci => 1,
        Size::Full => 10,
        Size::Long => usize::MAX,
    }
}

fn two_of_five_nodes_die_at_any_moment(installation: &Installation) -> Result<()> {
    with_quick_nodes(installation, FIVE.len(), |cluster| {
        let mut dice = dice();
        let mut ledger = Ledger::open_among_failpoints(cluster)?;
        Session::new(cluster.connect(0)?).run("CREATE TABLE proof (node int)")?;
        let points = failpoints(cluster)?
            .into_iter()
            .filter(|(_, role)| ["coordinator", "participant", "both"].contains(&role.as_str()))
            .map(|(name, _)| name)
            .collect();
        let points = chosen(points, &mut dice, points_of_five());
        let (mut visited, mut there) = (0, 0);
        for name in points.iter().take(points_of_five()) {
            there += lose_two(cluster, &mut ledger, &mut dice, name)
                .with_context(|| format!("at {name}"))?;
            visited += 1;
        }
        let seen = ledger.conclude(cluster)?;
        println!(
            "  two nodes died {visited} times, {there} times one of them at its point: {seen}"
        );
        ensure!(visited > 0, "there are no failpoints");
        ensure!(there > 0 || visited < FIVE.len(), "no point was passed");
        Ok(())
    })
}

/// One node dies at a point and another one soon after; the three others go on. Returns 1 if the first was at its point.
fn lose_two(
    cluster: &mut Cluster,
    ledger: &mut Ledger,
    dice: &mut Dice,
    name: &str,
) -> Result<u32> {
    let first = dice.below(5) as usize;
    let second = (first + 1 + dice.below(4) as usize) % FIVE.len();
    let load = ledger.load(cluster, &FIVE, dice);
    std::thread::sleep(Duration::from_millis(150 + dice.below(400)));
    let before = deaths(&cluster.nodes[first], name);
    // It may be gone before it can say that it is armed.
    let _ = arm(
        &cluster.nodes[first],
        &format!("{name}=crash@{}", 1 + dice.below(3)),
    );
    let died = wait_for("the failpoint", POINT_LIMIT, || {
        Ok(!cluster.nodes[first].is_running())
    });
    if died.is_err() {
        cluster.nodes[first].kill()?;
    }
    std::thread::sleep(Duration::from_millis(dice.below(300)));
    cluster.nodes[second].kill()?;
    let mut others = FIVE.iter().filter(|node| ![first, second].contains(node));
    let outcome = others
        .try_for_each(|node| commits(cluster, *node))
        .and_then(|()| cluster.nodes[first].start())
        .and_then(|()| cluster.nodes[second].start());
    ledger.close(cluster, load)?;
    outcome?;
    ledger.audit_round(cluster)?;
    Ok(u32::from(
        died_there(&cluster.nodes[first], name, before).is_ok(),
    ))
}

/// The node takes a commit.
fn commits(cluster: &Cluster, node: usize) -> Result<()> {
    wait_for(&format!("a commit on node {}", node + 1), LIMIT, || {
        let client = cluster.connect(node)?;
        let insert = format!("INSERT INTO proof VALUES ({node})");
        Ok(Session::new(client).run(&insert).is_ok())
    })
}

/// What is ended again and again in a storm: backends live on beside arbiters that come and go.
const STORM: [&str; 5] = [
    "multimaster arbiter",
    "multimaster finisher",
    "multimaster apply worker",
    "multimaster receiver",
    "walsender",
];

fn a_storm_of_ended_workers_does_no_harm(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut dice = dice();
        let mut ledger = Ledger::open(cluster)?;
        for _ in 0..rounds() {
            let load = ledger.load(cluster, &[0, 0, 1, 1, 2, 2], &mut dice);
            let outcome = (0..STORM.len() * 4).try_for_each(|_| {
                std::thread::sleep(Duration::from_millis(dice.below(600)));
                let kind = STORM[dice.below(STORM.len() as u64) as usize];
                end_all(cluster, dice.below(3) as usize, kind)
            });
            ledger.close(cluster, load)?;
            outcome?;
            ledger.audit_round(cluster)?;
        }
        println!("  {}", ledger.conclude(cluster)?);
        Ok(())
    })
}

/// Asks all processes of a kind to end, if there are any at this moment.
fn end_all(cluster: &Cluster, node: usize, kind: &str) -> Result<()> {
    Session::new(cluster.connect(node)?)
        .text(&format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE '{kind}%'"
        ))
        .map(drop)
}

fn kill_one(
    cluster: &mut Cluster,
    ledger: &mut Ledger,
    dice: &mut Dice,
    victim: Victim,
) -> Result<()> {
    let load = ledger.load(cluster, &[0, 0, 1, 1, 2, 2], dice);
    std::thread::sleep(Duration::from_millis(150 + dice.below(400)));
    let node = dice.below(3) as usize;
    let outcome = match victim {
        Victim::Process(kind) => kill_process(cluster, node, kind),
        Victim::Terminated(kind) => terminate(cluster, node, kind),
        Victim::Postmaster => kill_postmaster(cluster, node),
        Victim::Node => cluster.nodes[node]
            .kill()
            .and_then(|()| cluster.nodes[node].start()),
        Victim::AllNodes => kill_all(cluster),
    };
    std::thread::sleep(Duration::from_millis(100 + dice.below(200)));
    ledger.close(cluster, load)?;
    outcome?;
    ledger.audit_round(cluster)
}

/// Process ids of a kind on a node.
fn processes(cluster: &Cluster, node: usize, kind: &str) -> Result<Vec<String>> {
    let mut session = Session::new(cluster.connect(node)?);
    let mut found = String::new();
    wait_for(&format!("a {kind}"), Duration::from_secs(10), || {
        found = session.text(&format!(
            "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE '{kind}%' AND pid <> pg_backend_pid() ORDER BY random()"
        ))?;
        Ok(!found.is_empty())
    })?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// SIGKILL: the postmaster then ends all other processes of the server and starts it again.
pub fn kill_process(cluster: &Cluster, node: usize, kind: &str) -> Result<()> {
    let victims = processes(cluster, node, kind)?;
    signal_kill(&victims[0])
}

/// Some process of a kind on a node.
pub fn process(cluster: &Cluster, node: usize, kind: &str) -> Result<i32> {
    Ok(processes(cluster, node, kind)?[0].parse()?)
}

pub fn signal_kill(pid: &str) -> Result<()> {
    command::capture(Command::new("kill").args(["-KILL", pid])).map(drop)
}

fn terminate(cluster: &Cluster, node: usize, kind: &str) -> Result<()> {
    let victims = processes(cluster, node, kind)?;
    Session::new(cluster.connect(node)?)
        .run(&format!("SELECT pg_terminate_backend({})", victims[0]))
}

/// Its children notice, one after the other.
pub fn kill_postmaster(cluster: &mut Cluster, node: usize) -> Result<()> {
    let pid = cluster.nodes[node]
        .postmaster()
        .context("the server does not run")?;
    signal_kill(&pid.to_string())?;
    wait_for("the postmaster's end", LIMIT, || {
        Ok(!cluster.nodes[node].is_running())
    })?;
    cluster.nodes[node].start()
}

pub fn kill_all(cluster: &mut Cluster) -> Result<()> {
    for node in &mut cluster.nodes {
        node.kill()?;
    }
    cluster.nodes.iter_mut().try_for_each(Server::start)
}

/// Node that dies in the test of users' own prepared transactions.
const OTHER: usize = 1;

/// Such transactions have no record: a node that died right after their end must not apply them again, nor twice while they are prepared.
fn users_own_prepared_transactions_are_applied_once(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        Session::new(cluster.connect(0)?).run("CREATE TABLE once (n int)")?;
        let points: Vec<String> = failpoints(cluster)?
            .into_iter()
            .filter(|(_, role)| role == "user")
            .map(|(name, _)| name)
            .collect();
        ensure!(!points.is_empty(), "there are no failpoints");
        let mut done = 0;
        for _ in 0..rounds() {
            kill_behind_finish(cluster, done)?;
            kill_while_prepared(cluster, done + 1)?;
            done += 2;
            for name in &points {
                die_at_finish(cluster, done, name).with_context(|| format!("at {name}"))?;
                done += 1;
            }
        }
        xtask::checks::whole(cluster, LIMIT)?;
        let mut session = Session::new(cluster.connect(OTHER)?);
        let doubles =
            session.text("SELECT n, count(*) FROM once GROUP BY n HAVING count(*) > 1")?;
        ensure!(doubles.is_empty(), "applied more than once:\n{doubles}");
        let rows = session.text("SELECT count(*) FROM once")?;
        ensure!(rows == done.to_string(), "{rows} rows instead of {done}");
        Ok(())
    })
}

fn prepare(cluster: &Cluster, n: u64) -> Result<Session> {
    let mut session = Session::new(cluster.connect(0)?);
    session.run(&format!(
        "BEGIN; INSERT INTO once VALUES ({n}); PREPARE TRANSACTION 'user {n}'"
    ))?;
    Ok(session)
}

fn restart(cluster: &mut Cluster) -> Result<()> {
    cluster.nodes[OTHER].start()?;
    await_online(cluster)
}

fn kill_behind_finish(cluster: &mut Cluster, n: u64) -> Result<()> {
    prepare(cluster, n)?.run(&format!("COMMIT PREPARED 'user {n}'"))?;
    await_finish(cluster, n)?;
    cluster.nodes[OTHER].kill()?;
    restart(cluster)
}

fn kill_while_prepared(cluster: &mut Cluster, n: u64) -> Result<()> {
    let mut session = prepare(cluster, n)?;
    cluster.nodes[OTHER].kill()?;
    restart(cluster)?;
    session.run(&format!("COMMIT PREPARED 'user {n}'"))
}

fn die_at_finish(cluster: &mut Cluster, n: u64, name: &str) -> Result<()> {
    let mut session = prepare(cluster, n)?;
    let before = deaths(&cluster.nodes[OTHER], name);
    arm(&cluster.nodes[OTHER], &format!("{name}=crash"))?;
    session.run(&format!("COMMIT PREPARED 'user {n}'"))?;
    wait_for("the failpoint to be passed", LIMIT, || {
        Ok(!cluster.nodes[OTHER].is_running())
    })?;
    died_there(&cluster.nodes[OTHER], name, before)?;
    restart(cluster)
}

/// Waits until the second node has finished a user's prepared transaction, and no longer.
fn await_finish(cluster: &Cluster, n: u64) -> Result<()> {
    let mut session = Session::new(cluster.connect(OTHER)?);
    wait_for("the end of the transaction", LIMIT, || {
        let left = session.text(&format!(
            "SELECT gid FROM pg_prepared_xacts WHERE gid = 'user {n}'"
        ))?;
        Ok(left.is_empty())
    })
}

/// Every node, by its own word: a node that starts refuses even reads for a while.
fn await_online(cluster: &Cluster) -> Result<()> {
    for node in 0..cluster.nodes.len() {
        let mut session = Session::new(cluster.connect(node)?);
        wait_for("the cluster to be online", LIMIT, || {
            Ok(session.text("SELECT status FROM mtm.status()")? == "online")
        })?;
    }
    Ok(())
}
