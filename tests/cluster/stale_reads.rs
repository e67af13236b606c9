//! Statements whose snapshot was taken before their node came back: what others have committed meanwhile was answered before they were sent.

use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::wait_for;
use xtask::installation::Installation;

use crate::crash::arm;
use crate::hosts::{Hosts, PATIENCE, with_hosts};
use crate::line::await_online;

pub fn cases() -> Vec<OwnCase> {
    cases![
        a_statement_that_stops_before_its_check_shows_nothing_stale,
        what_was_open_on_a_node_that_returns_shows_nothing_stale,
        transactions_outlive_a_lease_that_lapses,
    ]
}

/// The transaction is to be run again.
const SERIALIZATION_FAILURE: &str = "40001";
/// The node (from 0) that is cut off.
const CUT_OFF: usize = 2;
/// It has all votes, and nobody has heard of the outcome.
const DECIDED: &str = "backend-before-commit";
/// It has its snapshot, and has not looked whether its node serves.
const UNCHECKED: &str = "statement-before-check";
/// Longer than a promise lasts (a quarter of the silence after which a node is missed), and shorter than that silence.
const LAPSE: Duration = Duration::from_millis(900);
const ROUNDS: u32 = 10;

type Asked = JoinHandle<Result<String>>;

fn ask(mut session: Session, sql: &'static str) -> Asked {
    std::thread::spawn(move || session.text(sql))
}

fn answer(asked: Asked) -> Result<String> {
    asked
        .join()
        .map_err(|_| anyhow::anyhow!("a reader panicked"))?
}

fn held(hosts: &Hosts, node: usize, point: &str) -> usize {
    let line = format!("failpoint {point}: held");
    hosts.cluster.nodes[node].log_text().matches(&line).count()
}

/// Does `work` and waits until as many more processes of the node are held at the point.
fn hold<T>(
    hosts: &Hosts,
    node: usize,
    point: &str,
    count: usize,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let before = held(hosts, node, point);
    arm(&hosts.cluster.nodes[node], &format!("{point}=hold"))?;
    let done = work()?;
    wait_for("the failpoint to be passed", PATIENCE, || {
        Ok(held(hosts, node, point) >= before + count)
    })?;
    Ok(done)
}

/// Cuts the node off so that it has prepared an update of `t` to this value, and does not know that it was committed and answered elsewhere.
fn commit_unheard(hosts: &mut Hosts, value: u32) -> Result<()> {
    let mut writer = hosts.session(0)?;
    writer.run("SET multimaster.wait_peer_commits = off")?;
    let answered = hold(hosts, 0, DECIDED, 1, || {
        Ok(std::thread::spawn(move || {
            writer.run(&format!("UPDATE t SET n = {value}"))
        }))
    })?;
    hosts.network.isolate(CUT_OFF)?;
    arm(&hosts.cluster.nodes[0], "")?;
    answered
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    wait_for("a generation without the node", PATIENCE, || {
        let members = hosts
            .session(0)?
            .text("SELECT gen_members FROM mtm.status()")?;
        Ok(members == "{1,2}")
    })
}

/// The outcome of what was prepared there comes without any recovery: nothing else was committed meanwhile.
fn a_statement_that_stops_before_its_check_shows_nothing_stale(
    installation: &Installation,
) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts
            .session(0)?
            .run("CREATE TABLE t (n int); INSERT INTO t VALUES (0)")?;
        let begin = |level: &str| {
            let mut session = hosts.session(CUT_OFF)?;
            session.run("PREPARE plan AS SELECT n FROM t; EXECUTE plan")?;
            session.run(&format!("SET default_transaction_isolation = '{level}'"))?;
            anyhow::Ok(session)
        };
        let committed = begin("read committed")?;
        let planned = begin("read committed")?;
        let repeatable = begin("repeatable read")?;
        let serializable = begin("serializable")?;
        let copying = begin("read committed")?;
        commit_unheard(hosts, 1)?;
        let asked = hold(hosts, CUT_OFF, UNCHECKED, 5, || {
            Ok([
                ask(committed, "SELECT n FROM t"),
                ask(planned, "EXECUTE plan"),
                ask(repeatable, "SELECT n FROM t"),
                ask(serializable, "SELECT n FROM t"),
                ask(copying, "COPY t TO '/dev/null'; SELECT 'copied'"),
            ])
        })?;
        hosts.network.heal()?;
        hosts.await_status(CUT_OFF, "online")?;
        arm(&hosts.cluster.nodes[CUT_OFF], "")?;
        let [committed, planned, repeatable, serializable, copying] = asked.map(answer);
        for (name, found) in [("committed", committed), ("repeatable", repeatable)] {
            let found = found.context(name)?;
            ensure!(found == "1", "read {name}: {found}");
        }
        // Their snapshots have other users, or cannot be replaced: if not new by chance, they are refused.
        for found in [planned, serializable] {
            refused_or(found, "1")?;
        }
        refused_or(copying, "copied")?;
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

fn refused_or(found: Result<String>, right: &str) -> Result<()> {
    match found {
        Ok(found) => ensure!(found == right, "found {found}"),
        Err(error) => ensure!(
            format!("{error:#}").contains(SERIALIZATION_FAILURE),
            "{error:#}"
        ),
    }
    Ok(())
}

/// Snapshots of before and of the time when the node was away, in transactions that go on after it has come back.
fn what_was_open_on_a_node_that_returns_shows_nothing_stale(
    installation: &Installation,
) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts.session(CUT_OFF)?.run(
            "CREATE TABLE t (n int); INSERT INTO t VALUES (0);
             CREATE FUNCTION stable_t() RETURNS int LANGUAGE plpgsql STABLE AS
                 'BEGIN RETURN (SELECT n FROM t); END'",
        )?;
        let mut before = begun(
            hosts,
            &[
                "BEGIN; SELECT * FROM t",
                "BEGIN ISOLATION LEVEL REPEATABLE READ",
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM t",
                "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT * FROM t",
            ],
        )?;
        commit_unheard(hosts, 1)?;
        wait_for("reads to be refused", PATIENCE, || {
            let mut session = hosts.session(CUT_OFF)?;
            Ok(session.refused("SELECT * FROM t").is_ok())
        })?;
        let mut meanwhile = begun(
            hosts,
            &[
                "BEGIN; SELECT 1 FROM pg_class LIMIT 1",
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1",
                "BEGIN; DECLARE c CURSOR FOR SELECT stable_t()",
            ],
        )?;
        let mut exporter = hosts.session(CUT_OFF)?;
        exporter.run("BEGIN ISOLATION LEVEL REPEATABLE READ")?;
        let exported = exporter.text("SELECT pg_export_snapshot()")?;
        hosts.network.heal()?;
        hosts.await_status(CUT_OFF, "online")?;
        let reads = |session: &mut Session| {
            let found = session.text("SELECT n FROM t")?;
            ensure!(found == "1", "read {found}");
            anyhow::Ok(())
        };
        reads(&mut before[0])?;
        reads(&mut before[1])?;
        before[2].refused_with(SERIALIZATION_FAILURE, "SELECT n FROM t")?;
        before[3].refused_with(SERIALIZATION_FAILURE, "SELECT n FROM t")?;
        reads(&mut meanwhile[0])?;
        meanwhile[1].refused_with(SERIALIZATION_FAILURE, "SELECT n FROM t")?;
        reads(&mut meanwhile[2])?;
        meanwhile[2].refused_with(SERIALIZATION_FAILURE, "FETCH c")?;
        let mut importer = hosts.session(CUT_OFF)?;
        importer.run(&format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{exported}'"
        ))?;
        importer.refused_with(SERIALIZATION_FAILURE, "SELECT n FROM t")?;
        for session in before.iter_mut().chain(&mut meanwhile) {
            session.run("ROLLBACK")?;
            reads(session)?;
        }
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

fn begun(hosts: &Hosts, starts: &[&str]) -> Result<Vec<Session>> {
    let begin = |sql: &&str| {
        let mut session = hosts.session(CUT_OFF)?;
        session.run(sql)?;
        Ok(session)
    };
    starts.iter().map(begin).collect()
}

/// A node that is slow for a moment keeps its transactions, whatever their snapshots: nobody has gone on without it.
fn transactions_outlive_a_lease_that_lapses(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        let mut other = Session::new(cluster.connect(0)?);
        other.run("CREATE TABLE t (n int); INSERT INTO t VALUES (0)")?;
        let generation = "SELECT gen_num FROM mtm.status()";
        let open = |sql: &str| {
            let mut session = Session::new(cluster.connect(CUT_OFF)?);
            session.run(sql)?;
            anyhow::Ok(session)
        };
        // On a machine that is busy the node may be missed all the same: then it says nothing.
        for round in 1..=ROUNDS {
            let read = "SELECT n FROM t";
            let before = other.text(generation)?;
            let mut committed = open("BEGIN; SELECT n FROM t")?;
            let mut repeatable = open("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT n FROM t")?;
            let mut serializable = open("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT n FROM t")?;
            let seen = committed.text(read)?;
            other.run("UPDATE t SET n = n + 1")?;
            cluster.nodes[CUT_OFF].freeze()?;
            std::thread::sleep(LAPSE);
            cluster.nodes[CUT_OFF].thaw()?;
            let found = [&mut committed, &mut repeatable, &mut serializable]
                .map(|session| session.text(read));
            if other.text(generation)? != before {
                println!("  round {round}: the node was excluded");
                await_online(cluster, CUT_OFF)?;
                continue;
            }
            let found: Vec<String> = found.into_iter().collect::<Result<_>>()?;
            ensure!(found[0] != seen, "read committed reads {found:?} again");
            ensure!(found[1..] == [seen.clone(), seen], "{found:?}");
            return Ok(());
        }
        anyhow::bail!("the node was excluded each time")
    })
}
