//! What clients of a node see that is not part of a working majority.

use std::time::Duration;

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::cluster::wait_for;
use xtask::installation::Installation;
use xtask::suite::Size;

use crate::hosts::{Hosts, PATIENCE, with_hosts};

pub fn cases() -> Vec<OwnCase> {
    cases![
        minority_refuses_what_touches_data,
        a_stopped_node_shows_nothing_stale,
        strict_read_ends_with_the_majority,
    ]
}

/// Nothing is served there: drivers reconnect on it.
const CANNOT_CONNECT_NOW: &str = "57P03";
/// DETAIL of a node that hears nobody.
const ALONE: &str = "It is connected with no other node.";

fn minority_refuses_what_touches_data(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        let mut open = hosts.session(2)?;
        open.run("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 1)")?;
        open.run(
            "CREATE FUNCTION count_t() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM t'",
        )?;
        hosts.network.isolate(2)?;
        await_refusal(&mut open)?;
        refuses_data(&mut open)?;
        shows_itself(&mut open)?;
        allows_minority_reads(&mut open)?;
        hosts.network.heal()?;
        hosts.await_status(2, "online")?;
        open.run("UPDATE t SET n = n + 1")?;
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

fn await_refusal(session: &mut Session) -> Result<()> {
    wait_for("reads to be refused", PATIENCE, || {
        let error = session.refused("SELECT * FROM t");
        Ok(error.is_ok_and(|error| error.detail() == Some(ALONE)))
    })
}

fn refuses_data(session: &mut Session) -> Result<()> {
    for sql in [
        "SELECT * FROM t",
        "SELECT count_t()",
        "INSERT INTO t VALUES (2, 2)",
        "UPDATE t SET n = 2",
        "DELETE FROM t",
        "SELECT * FROM t FOR UPDATE",
        "COPY t TO STDOUT",
        "TRUNCATE t",
        "CREATE TABLE u (id int)",
        "LOCK TABLE t",
        "BEGIN; DECLARE c CURSOR FOR SELECT * FROM t",
        "DO $$ BEGIN PERFORM * FROM t; END $$",
    ] {
        let error = session.refused_with(CANNOT_CONNECT_NOW, sql)?;
        ensure!(error.message().contains("node 3"), "{error:?}");
        ensure!(error.detail() == Some(ALONE), "{error:?}");
        session.run("ROLLBACK")?;
    }
    Ok(())
}

fn shows_itself(session: &mut Session) -> Result<()> {
    for sql in [
        "SELECT * FROM mtm.status()",
        "SELECT * FROM mtm.nodes()",
        "SELECT * FROM mtm.get_nodes_state()",
        "SELECT * FROM mtm.transactions",
        "SELECT * FROM mtm.stat_commits",
        "SELECT count(*) FROM pg_class",
        "SELECT 1",
        "SHOW work_mem",
    ] {
        session.run(sql)?;
    }
    let status = session.text("SELECT status FROM mtm.status()")?;
    ensure!(status != "online", "an isolated node calls itself {status}");
    Ok(())
}

fn allows_minority_reads(session: &mut Session) -> Result<()> {
    session.run("SET multimaster.minority_reads = on")?;
    ensure!(session.text("SELECT n FROM t")? == "1");
    session.run("COPY t TO PROGRAM 'cat > /dev/null'")?;
    session.refused_with(CANNOT_CONNECT_NOW, "UPDATE t SET n = 2")?;
    session.run("RESET multimaster.minority_reads")
}

/// A node that was stopped in the middle of everything does not know that the others went on: its lease has run out.
fn a_stopped_node_shows_nothing_stale(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts
            .session(0)?
            .run("CREATE TABLE t (n int); INSERT INTO t VALUES (0)")?;
        let rounds = match Size::chosen() {
            Size::Ci => 2,
            Size::Full | Size::Long => 5,
        };
        for round in 1..=rounds {
            let mut reader = hosts.session(2)?;
            reader.run("SELECT * FROM t")?;
            hosts.cluster.nodes[2].freeze()?;
            let written = write(hosts, round);
            // Asked while it cannot answer: it does as soon as it can.
            let asked = std::thread::spawn(move || reader.text("SELECT n FROM t"));
            // For its question to arrive: nothing tells that it has.
            std::thread::sleep(Duration::from_millis(200));
            hosts.cluster.nodes[2].thaw()?;
            written?;
            match asked.join() {
                Ok(Ok(seen)) => ensure!(
                    seen == round.to_string(),
                    "read {seen} after {round} was committed"
                ),
                Ok(Err(_)) => {}
                Err(_) => anyhow::bail!("the reader panicked"),
            }
            hosts.await_status(2, "online")?;
        }
        Ok(())
    })
}

/// Writes on the first node as soon as it goes on without the third.
fn write(hosts: &Hosts, number: u32) -> Result<()> {
    let mut writer = hosts.session(0)?;
    wait_for("a commit without the stopped node", PATIENCE, || {
        Ok(writer.run(&format!("UPDATE t SET n = {number}")).is_ok())
    })
}

/// A strict read that waits for a transaction of which this node will not hear any more.
fn strict_read_ends_with_the_majority(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts
            .session(0)?
            .run("CREATE TABLE t (n int); INSERT INTO t VALUES (0)")?;
        let mut other = hosts.session(2)?;
        let mut reader = hosts.session(2)?;
        reader.run("SET multimaster.strict_reads = on")?;
        let pid = reader.text("SELECT pg_backend_pid()")?;
        other.run("SET multimaster.failpoint = 'finish-before-record=hold'")?;
        hosts
            .session(0)?
            .run("SET multimaster.wait_peer_commits = off; UPDATE t SET n = 1")?;
        let read = std::thread::spawn(move || reader.refused("SELECT n FROM t"));
        let waits = wait_for("the reader to wait", PATIENCE, || {
            let sql = format!(
                "SELECT coalesce(wait_event_type, '') FROM pg_stat_activity WHERE pid = {pid}"
            );
            Ok(other.text(&sql)? == "Extension" || read.is_finished())
        });
        hosts.network.isolate(2)?;
        let error = read
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        other.run("SET multimaster.failpoint = ''")?;
        waits?;
        ensure!(error.code().code() == CANNOT_CONNECT_NOW, "{error:?}");
        hosts.network.heal()?;
        hosts.await_status(2, "online")?;
        let seen = hosts.session(2)?.text("SELECT n FROM t")?;
        ensure!(seen == "1", "{seen}");
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}
