//! `multimaster.strict_reads`: what was answered before a statement was sent is seen by it, on every node.

use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{Rig, Session, SharedCase, cases};
use xtask::cluster::wait_for;

use crate::held::Held;

pub fn cases() -> Vec<SharedCase> {
    cases![
        strict_read_waits_for_what_was_answered,
        every_statement_that_reads_waits,
        timeouts_and_cancels_end_the_wait,
        repeatable_read_waits_at_its_first_statement,
        imported_snapshot_is_left_alone,
        serializable_waits_at_begin,
        prepared_transactions_of_users_stop_no_reader,
        views_of_the_cluster_answer_at_once,
        refused_commit_stops_no_reader,
        readers_never_fall_behind_a_writer,
    ]
}

/// The node that has prepared what was committed, and does not commit it.
const LATE: usize = 3;
const LIMIT: Duration = Duration::from_secs(20);

fn table(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int)")?;
    // Nothing of this is in flight any more when the case begins.
    wait_for("the end of all transactions", LIMIT, || {
        Ok(rig
            .session(LATE)?
            .text("SELECT count(*) FROM mtm.transactions")?
            == "0")
    })
}

/// A session of node 1 whose COMMIT is answered before the others have committed.
fn writer(rig: &Rig) -> Result<Session> {
    let mut session = rig.session(1)?;
    session.run("SET multimaster.wait_peer_commits = off")?;
    Ok(session)
}

fn strict(rig: &Rig) -> Result<Session> {
    let mut session = rig.session(LATE)?;
    session.run("SET multimaster.strict_reads = on")?;
    Ok(session)
}

/// Commits the row `id` and holds it prepared on the late node.
fn commit_late<'r>(rig: &'r Rig, id: usize) -> Result<Held<'r>> {
    let mut held = Held::new(rig);
    held.hold(LATE, "finish-before-record")?;
    writer(rig)?.run(&format!("INSERT INTO t VALUES ({id}, {id})"))?;
    Ok(held)
}

/// Runs `read` in a strict session while the row `id` is held prepared there, and lets it go when the session waits.
fn read_late(
    rig: &Rig,
    session: &mut Session,
    id: usize,
    read: impl FnOnce(&mut Session) -> Result<String> + Send,
) -> Result<String> {
    let pid = session.text("SELECT pg_backend_pid()")?;
    let mut held = commit_late(rig, id)?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(session));
        let waits = await_waiting(rig, &pid, || reader.is_finished());
        held.release(LATE)?;
        let answer = reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        waits.with_context(|| format!("the answer was {answer:?}"))?;
        answer
    })
}

/// Until the session waits; one that has its answer did not.
fn await_waiting(rig: &Rig, pid: &str, is_over: impl Fn() -> bool) -> Result<()> {
    let mut watcher = rig.session(LATE)?;
    let sql = format!(
        "SELECT coalesce(wait_event_type, '') = 'Extension' AND state = 'active' FROM pg_stat_activity WHERE pid = {pid}"
    );
    wait_for("the reader to wait", LIMIT, || {
        ensure!(!is_over(), "it did not wait");
        Ok(watcher.text(&sql)? == "t")
    })
}

const COUNT: &str = "SELECT count(*) FROM t";

fn strict_read_waits_for_what_was_answered(rig: &Rig) -> Result<()> {
    table(rig)?;
    let held = commit_late(rig, 1)?;
    let stale = rig.session(LATE)?.text(COUNT)?;
    ensure!(stale == "0", "the commit was held, and {stale} rows seen");
    drop(held);
    let mut session = strict(rig)?;
    let answer = read_late(rig, &mut session, 2, |session| session.text(COUNT))?;
    ensure!(answer == "2", "{answer} rows");
    Ok(())
}

fn every_statement_that_reads_waits(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?.run(
        "CREATE TABLE u (n bigint PRIMARY KEY);
         CREATE FUNCTION count_stable() RETURNS bigint LANGUAGE plpgsql STABLE AS 'BEGIN RETURN (SELECT count(*) FROM t); END';
         CREATE FUNCTION count_loop() RETURNS bigint LANGUAGE plpgsql AS
           'DECLARE r record; n bigint := 0; BEGIN FOR r IN SELECT * FROM t LOOP n := n + 1; END LOOP; RETURN n; END'",
    )?;
    let mut session = strict(rig)?;
    session.run("PREPARE p AS SELECT count(*) FROM t; SET plan_cache_mode = force_generic_plan")?;
    let statement = session.prepare("SELECT count(*) FROM t WHERE id > $1")?;
    let simple = [
        COUNT,
        "SELECT count_stable()",
        "EXECUTE p",
        "SELECT count_loop()",
        "BEGIN; DECLARE c CURSOR FOR SELECT count(*) FROM t; FETCH c; COMMIT",
        "SELECT 0 LIMIT 0; SELECT count(*) FROM t",
        "INSERT INTO u SELECT count(*) FROM t RETURNING n",
        "WITH added AS (INSERT INTO u SELECT count(*) FROM t RETURNING n) SELECT n FROM added",
        "CREATE TEMP TABLE copy AS SELECT count(*) AS n FROM t; SELECT n FROM copy",
        "DO $$ BEGIN PERFORM set_config('my.count', (SELECT count(*) FROM t)::text, false); END $$; SHOW my.count",
    ];
    let mut rows = 0;
    for sql in simple {
        rows += 1;
        let answer = read_late(rig, &mut session, rows, |session| session.text(sql))?;
        ensure!(answer == rows.to_string(), "{sql}: {answer}, not {rows}");
    }
    let extended = |session: &mut Session| -> Result<String> {
        let count: i64 = session.query_one(&statement, &[&0])?.get(0);
        Ok(count.to_string())
    };
    let copy = |session: &mut Session| -> Result<String> {
        let mut lines = String::new();
        std::io::Read::read_to_string(&mut session.copy_out("COPY t TO STDOUT")?, &mut lines)?;
        Ok(lines.lines().count().to_string())
    };
    rows += 1;
    let answer = read_late(rig, &mut session, rows, extended)?;
    ensure!(answer == rows.to_string(), "extended protocol: {answer}");
    rows += 1;
    let answer = read_late(rig, &mut session, rows, copy)?;
    ensure!(answer == rows.to_string(), "COPY: {answer}");
    Ok(())
}

fn timeouts_and_cancels_end_the_wait(rig: &Rig) -> Result<()> {
    table(rig)?;
    let _held = commit_late(rig, 1)?;
    let mut session = strict(rig)?;
    session.run("SET statement_timeout = '200ms'")?;
    session.refused_with("57014", COUNT)?;
    session.run("SET statement_timeout = 0; SET lock_timeout = '200ms'")?;
    session.refused_with("55P03", COUNT)?;
    session.run("SET lock_timeout = 0")?;
    let pid = session.text("SELECT pg_backend_pid() FROM mtm.transactions LIMIT 1")?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| session.refused_with("57014", COUNT).map(drop));
        await_waiting(rig, &pid, || reader.is_finished())?;
        rig.session(LATE)?
            .run(&format!("SELECT pg_cancel_backend({pid})"))?;
        reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    // The session is as good as before.
    session.run("SET multimaster.strict_reads = off")?;
    ensure!(session.text(COUNT)? == "0", "the commit is held");
    Ok(())
}

fn repeatable_read_waits_at_its_first_statement(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?.run(
        "CREATE FUNCTION count_twice() RETURNS text LANGUAGE plpgsql AS
           'BEGIN RETURN (SELECT count(*) FROM t)::text || (SELECT count(*) FROM t); END'",
    )?;
    let mut session = strict(rig)?;
    // What comes between BEGIN and the first statement is seen.
    let first = read_late(rig, &mut session, 1, |session| {
        session.run("BEGIN ISOLATION LEVEL REPEATABLE READ")?;
        session.text(COUNT)
    })?;
    ensure!(first == "1", "{first} rows");
    // What comes now is not seen, however it is read, and nobody waits for it.
    let held = commit_late(rig, 2)?;
    for sql in [COUNT, "SELECT count(*) FROM t WHERE id > 0"] {
        ensure!(session.text(sql)? == "1", "{sql} sees what came later");
    }
    ensure!(session.text("SELECT count_twice()")? == "11");
    drop(held);
    writer(rig)?.run("INSERT INTO t VALUES (3, 3)")?;
    ensure!(session.text(COUNT)? == "1", "sees what came later");
    session.run("COMMIT")?;
    // Without BEGIN, too.
    session.run("SET default_transaction_isolation = 'repeatable read'")?;
    let alone = read_late(rig, &mut session, 4, |session| {
        session.text("SELECT count_twice()")
    })?;
    ensure!(alone == "44", "{alone}");
    Ok(())
}

fn imported_snapshot_is_left_alone(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut exporter = rig.session(LATE)?;
    exporter.run("BEGIN ISOLATION LEVEL REPEATABLE READ")?;
    let name = exporter.text("SELECT pg_export_snapshot()")?;
    rig.session(1)?.run("INSERT INTO t VALUES (1, 1)")?;
    let mut session = strict(rig)?;
    session.run(&format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{name}'"
    ))?;
    let seen = session.text(COUNT)?;
    ensure!(seen == "0", "{seen} rows in a snapshot of before");
    session.run("COMMIT")
}

fn serializable_waits_at_begin(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = strict(rig)?;
    let ways = [
        "BEGIN ISOLATION LEVEL SERIALIZABLE",
        "BEGIN; SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ];
    for (id, begin) in (1..).zip(ways) {
        let seen = read_late(rig, &mut session, id, |session| {
            session.run(begin)?;
            session.text(COUNT)
        })?;
        ensure!(seen == id.to_string(), "{begin}: {seen} rows");
        session.run("COMMIT")?;
    }
    session.run("SET default_transaction_isolation = 'serializable'")?;
    session.refused_with("0A000", COUNT)?;
    session.run("SET multimaster.strict_reads = off")?;
    session.run(COUNT)
}

fn prepared_transactions_of_users_stop_no_reader(rig: &Rig) -> Result<()> {
    table(rig)?;
    let gid = rig.schema();
    rig.session(1)?.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 1); PREPARE TRANSACTION '{gid}'"
    ))?;
    let mut session = strict(rig)?;
    session.run("SET statement_timeout = '20s'")?;
    ensure!(session.text(COUNT)? == "0");
    rig.session(2)?.run(&format!("COMMIT PREPARED '{gid}'"))?;
    ensure!(session.text(COUNT)? == "1");
    Ok(())
}

fn views_of_the_cluster_answer_at_once(rig: &Rig) -> Result<()> {
    table(rig)?;
    let _held = commit_late(rig, 1)?;
    let mut session = strict(rig)?;
    session.run("SET statement_timeout = '20s'")?;
    let shown = session.text("SELECT role, state FROM mtm.transactions")?;
    ensure!(shown.starts_with("participant|"), "{shown}");
    session.run("SELECT * FROM mtm.conflicts; SELECT * FROM mtm.events")?;
    session.run("SHOW work_mem; SET work_mem = '1MB'; BEGIN; COMMIT")
}

fn refused_commit_stops_no_reader(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, v int);
         CREATE TABLE child (t int REFERENCES t DEFERRABLE INITIALLY DEFERRED)",
    )?;
    let mut session = strict(rig)?;
    session.run("SET statement_timeout = '20s'")?;
    session.refused_with("23503", "INSERT INTO child VALUES (1)")?;
    // PREPARE itself fails, after the transaction was entered as one that is being prepared.
    session.refused_with(
        "0A000",
        "BEGIN; INSERT INTO t VALUES (1, 1); SELECT pg_export_snapshot(); COMMIT",
    )?;
    session.run("ROLLBACK")?;
    ensure!(session.text(COUNT)? == "0");
    Ok(())
}

/// Rounds of the writer.
const ROUNDS: i64 = 300;

fn readers_never_fall_behind_a_writer(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v bigint); INSERT INTO t VALUES (1, 0)")?;
    let answered = AtomicI64::new(0);
    let read = |node: usize, level: &str| -> Result<()> {
        let mut session = rig.session(node)?;
        session.run(&format!(
            "SET multimaster.strict_reads = on; SET default_transaction_isolation = '{level}'"
        ))?;
        let statement = session.prepare("SELECT v FROM t WHERE id = $1")?;
        loop {
            let before = answered.load(Ordering::SeqCst);
            let seen: i64 = session.query_one(&statement, &[&1])?.get(0);
            ensure!(seen >= before, "node {node}: {seen} after {before}");
            if before == ROUNDS {
                return Ok(());
            }
        }
    };
    thread::scope(|scope| {
        let readers = [
            (1, "read committed"),
            (2, "read committed"),
            (LATE, "read committed"),
            (LATE, "repeatable read"),
        ]
        .map(|(node, level)| scope.spawn(move || read(node, level)));
        let mut session = writer(rig)?;
        let written = (1..=ROUNDS).try_for_each(|round| -> Result<()> {
            let mode = if round % 2 == 0 { "fast" } else { "e3pc" };
            session.run(&format!("SET multimaster.commit_mode = {mode}"))?;
            session.run("UPDATE t SET v = v + 1")?;
            answered.store(round, Ordering::SeqCst);
            Ok(())
        });
        answered.store(ROUNDS, Ordering::SeqCst);
        written?;
        readers.into_iter().try_for_each(|reader| {
            reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}
