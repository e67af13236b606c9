//! What PREPARE TRANSACTION would refuse, and other places where turning COMMIT into PREPARE could show.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fallible_iterator::FallibleIterator;
use multimaster_tests::{Rig, Session, SharedCase, cases, plain};
use xtask::cluster::wait_for;

pub fn cases() -> Vec<SharedCase> {
    let mut cases: Vec<SharedCase> = cases![
        temporary_tables_mix_with_replicated_writes,
        temporary_table_dropped_on_commit,
        temporary_table_emptied_on_commit,
        temporary_tables_alone_stay_local,
        notify_is_heard_after_the_commit,
        notify_is_not_heard_after_a_rollback,
        listen_in_a_writing_transaction,
        transaction_advisory_lock_ends_with_the_commit,
        session_advisory_lock_outlives_the_commit,
        deferred_unique_violation_keeps_its_constraint_name,
        deferred_foreign_key_violation_keeps_its_constraint_name,
        deferred_trigger_runs_at_commit,
        statement_timeout_spares_deferred_triggers,
        error_in_a_deferred_trigger_undoes_the_whole_block,
        users_prepared_transaction_commits,
        users_commit_is_visible_everywhere_at_once,
        users_commit_waits_for_nobody_when_told_so,
        users_prepared_transaction_rolls_back,
        unlogged_table_rows_stay_local,
    ];
    if !plain() {
        cases.extend::<Vec<SharedCase>>(cases![
            reading_transactions_prepare_nothing,
            writing_transaction_prepares_once,
            users_prepared_transaction_is_prepared_everywhere,
            our_gid_prefix_is_refused_to_users,
            exported_snapshot_is_refused_with_an_explanation,
            lock_held_by_session_and_transaction_is_refused_with_an_explanation,
            refused_commit_leaves_nothing_and_the_session_usable,
            refusal_of_the_first_temporary_schema_leaves_no_orphans,
            refused_commit_and_chain_leaves_no_transaction_open,
            refused_commit_in_a_procedure_ends_it,
        ]);
    }
    cases
}

fn table(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
}

/// A table whose rows with `id < 0` only node 1 accepts: a peer's refusal, at will.
fn picky_table(rig: &Rig) -> Result<()> {
    let port = rig.server(1).port;
    rig.session(1)?.run(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, v text, CONSTRAINT picky CHECK (id >= 0 OR current_setting('port') = '{port}'))"
    ))
}

fn temporary_tables_mix_with_replicated_writes(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; CREATE TEMP TABLE mine (id int); INSERT INTO mine VALUES (1), (2)")?;
    session.run("INSERT INTO t SELECT id, 'from temp' FROM mine; COMMIT")?;
    session.run(
        "BEGIN; UPDATE mine SET id = id + 10; INSERT INTO t SELECT id, 'again' FROM mine; COMMIT",
    )?;
    session.run("INSERT INTO t SELECT id + 10, 'autocommit' FROM mine")?;
    session.run("BEGIN; DROP TABLE mine; INSERT INTO t VALUES (100, 'dropped'); COMMIT")?;
    rig.expect(
        "SELECT string_agg(id::text, ',' ORDER BY id) FROM t",
        "1,2,11,12,21,22,100",
    )
}

fn temporary_table_dropped_on_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(2)?;
    for round in 1..=3 {
        session.run("BEGIN; CREATE TEMP TABLE mine ON COMMIT DROP AS SELECT 7 AS id")?;
        session.run(&format!(
            "INSERT INTO t SELECT {round}, id::text FROM mine; COMMIT"
        ))?;
        let left = session.text("SELECT to_regclass('pg_temp.mine')")?;
        ensure!(left.is_empty(), "{left} is still there");
    }
    rig.expect("SELECT count(*) FROM t", "3")
}

fn temporary_table_emptied_on_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("CREATE TEMP TABLE mine (id int) ON COMMIT DELETE ROWS")?;
    session.run(
        "BEGIN; INSERT INTO mine VALUES (1); INSERT INTO t SELECT id, 'x' FROM mine; COMMIT",
    )?;
    let left = session.text("SELECT count(*) FROM mine")?;
    ensure!(left == "0", "{left} rows left");
    rig.expect("SELECT count(*) FROM t", "1")
}

fn temporary_tables_alone_stay_local(rig: &Rig) -> Result<()> {
    let mut session = rig.session(1)?;
    session.run(
        "CREATE TEMP TABLE mine (id serial PRIMARY KEY, v text); INSERT INTO mine (v) VALUES ('a')",
    )?;
    session.run("BEGIN; UPDATE mine SET v = 'b'; TRUNCATE mine; COMMIT; DROP TABLE mine")
}

fn notify_is_heard_after_the_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    let channel = rig.schema();
    let mut listener = rig.session(1)?;
    listener.run(&format!("LISTEN {channel}"))?;
    let mut session = rig.session(1)?;
    session.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); NOTIFY {channel}, 'block'"
    ))?;
    ensure!(
        heard(&mut listener, Duration::from_millis(200))?.is_none(),
        "heard before the commit"
    );
    session.run("COMMIT")?;
    ensure!(
        heard(&mut listener, Duration::from_secs(10))?.as_deref() == Some("block"),
        "not heard"
    );
    session.run(&format!(
        "WITH x AS (INSERT INTO t VALUES (2, 'b')) SELECT pg_notify('{channel}', 'autocommit')"
    ))?;
    ensure!(
        heard(&mut listener, Duration::from_secs(10))?.as_deref() == Some("autocommit"),
        "not heard"
    );
    rig.expect("SELECT count(*) FROM t", "2")
}

fn notify_is_not_heard_after_a_rollback(rig: &Rig) -> Result<()> {
    table(rig)?;
    let channel = rig.schema();
    let mut listener = rig.session(1)?;
    listener.run(&format!("LISTEN {channel}"))?;
    let mut session = rig.session(1)?;
    session.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); NOTIFY {channel}, 'lost'; ROLLBACK"
    ))?;
    session.run(&format!("NOTIFY {channel}, 'kept'"))?;
    let first = heard(&mut listener, Duration::from_secs(10))?;
    ensure!(first.as_deref() == Some("kept"), "{first:?}");
    Ok(())
}

fn heard(listener: &mut Session, limit: Duration) -> Result<Option<String>> {
    let next = listener.notifications().timeout_iter(limit).next()?;
    Ok(next.map(|notification| notification.payload().to_owned()))
}

fn listen_in_a_writing_transaction(rig: &Rig) -> Result<()> {
    table(rig)?;
    let channel = rig.schema();
    let mut session = rig.session(1)?;
    session.run(&format!(
        "BEGIN; LISTEN {channel}; INSERT INTO t VALUES (1, 'a'); COMMIT"
    ))?;
    rig.session(1)?.run(&format!("NOTIFY {channel}, 'hello'"))?;
    ensure!(
        heard(&mut session, Duration::from_secs(10))?.as_deref() == Some("hello"),
        "not heard"
    );
    session.run(&format!(
        "BEGIN; UNLISTEN {channel}; INSERT INTO t VALUES (2, 'b'); COMMIT"
    ))?;
    rig.expect("SELECT count(*) FROM t", "2")
}

fn advisory_locks(session: &mut Session) -> Result<String> {
    session.text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1 AND granted",
    )
}

fn transaction_advisory_lock_ends_with_the_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session
        .run("BEGIN; SELECT pg_advisory_xact_lock(1, 1); INSERT INTO t VALUES (1, 'a'); COMMIT")?;
    ensure!(
        advisory_locks(&mut session)? == "0",
        "the lock is still held"
    );
    rig.expect("SELECT count(*) FROM t", "1")
}

fn session_advisory_lock_outlives_the_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; SELECT pg_advisory_lock(1, 2); INSERT INTO t VALUES (1, 'a'); COMMIT")?;
    session.run("INSERT INTO t VALUES (2, 'b')")?;
    ensure!(advisory_locks(&mut session)? == "1", "the lock is gone");
    session.run("SELECT pg_advisory_unlock(1, 2)")?;
    ensure!(
        advisory_locks(&mut session)? == "0",
        "the lock is still held"
    );
    rig.expect("SELECT count(*) FROM t", "2")
}

fn deferred_unique_violation_keeps_its_constraint_name(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int CONSTRAINT only_once UNIQUE DEFERRABLE INITIALLY DEFERRED)")?;
    let mut session = rig.session(2)?;
    session.run("BEGIN; INSERT INTO t VALUES (1); INSERT INTO t VALUES (1)")?;
    let block = session.refused_with("23505", "COMMIT")?;
    let autocommit = session.refused_with("23505", "INSERT INTO t VALUES (1), (1)")?;
    for error in [block, autocommit] {
        ensure!(
            error.constraint() == Some("only_once"),
            "constraint: {error:?}"
        );
        ensure!(error.table() == Some("t"), "table: {error:?}");
        ensure!(
            error
                .detail()
                .is_some_and(|detail| detail.contains("(id)=(1)")),
            "detail: {error:?}"
        );
    }
    rig.expect("SELECT count(*) FROM t", "0")
}

fn deferred_foreign_key_violation_keeps_its_constraint_name(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE t (p int CONSTRAINT has_parent REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
    )?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; INSERT INTO t VALUES (1); INSERT INTO parent VALUES (1); COMMIT")?;
    session.run("BEGIN; INSERT INTO t VALUES (2)")?;
    let error = session.refused_with("23503", "COMMIT")?;
    ensure!(error.constraint() == Some("has_parent"), "{error:?}");
    session.run("SELECT 1")?;
    rig.expect("SELECT string_agg(p::text, ',') FROM t", "1")
}

fn slow_deferred_trigger(rig: &Rig, body: &str) -> Result<()> {
    table(rig)?;
    rig.session(1)?.run(&format!(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (new.id < 1000) EXECUTE FUNCTION late()"
    ))
}

fn deferred_trigger_runs_at_commit(rig: &Rig) -> Result<()> {
    slow_deferred_trigger(rig, "INSERT INTO t VALUES (new.id + 1000, 'late');")?;
    rig.session(1)?
        .run("BEGIN; INSERT INTO t VALUES (1, 'a'); COMMIT")?;
    rig.session(2)?.run("INSERT INTO t VALUES (2, 'b')")?;
    rig.expect(
        "SELECT string_agg(id::text, ',' ORDER BY id) FROM t",
        "1,2,1001,1002",
    )
}

fn statement_timeout_spares_deferred_triggers(rig: &Rig) -> Result<()> {
    slow_deferred_trigger(rig, "PERFORM pg_sleep(0.4);")?;
    let mut session = rig.session(1)?;
    session.run("SET statement_timeout = '200ms'; BEGIN")?;
    session.run("INSERT INTO t VALUES (1, 'a')")?;
    session.run("COMMIT")?;
    rig.expect("SELECT count(*) FROM t", "1")
}

fn error_in_a_deferred_trigger_undoes_the_whole_block(rig: &Rig) -> Result<()> {
    slow_deferred_trigger(rig, "RAISE EXCEPTION 'not today' USING ERRCODE = 'MM001';")?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; SAVEPOINT a; INSERT INTO t VALUES (1, 'a'); SAVEPOINT b")?;
    session.refused_with("MM001", "COMMIT")?;
    // The session is idle, not in a failed block.
    session.run("INSERT INTO t VALUES (2000, 'fine')")?;
    rig.expect("SELECT id FROM t", "2000")
}

fn users_prepared_transaction_commits(rig: &Rig) -> Result<()> {
    table(rig)?;
    let gid = rig.schema();
    rig.session(1)?.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); PREPARE TRANSACTION '{gid}'"
    ))?;
    rig.expect("SELECT count(*) FROM t", "0")?;
    rig.session(1)?.run(&format!("COMMIT PREPARED '{gid}'"))?;
    rig.expect("SELECT count(*) FROM t", "1")
}

/// Many times, and on every node in turn: one that did not wait would be found out.
fn users_commit_is_visible_everywhere_at_once(rig: &Rig) -> Result<()> {
    table(rig)?;
    let gid = rig.schema();
    for round in 1..=30 {
        rig.session(round % 3 + 1)?.run(&format!(
            "BEGIN; INSERT INTO t VALUES ({round}, 'a'); PREPARE TRANSACTION '{gid}'"
        ))?;
        rig.session(round % 2 + 1)?
            .run(&format!("COMMIT PREPARED '{gid}'"))?;
        rig.expect("SELECT count(*) FROM t", &round.to_string())?;
    }
    Ok(())
}

fn users_commit_waits_for_nobody_when_told_so(rig: &Rig) -> Result<()> {
    table(rig)?;
    let gid = rig.schema();
    let mut session = rig.session(1)?;
    session.run("SET multimaster.wait_peer_commits = off")?;
    session.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); PREPARE TRANSACTION '{gid}'"
    ))?;
    session.run(&format!("COMMIT PREPARED '{gid}'"))?;
    ensure!(
        session.text("SELECT count(*) FROM t")? == "1",
        "the row is there"
    );
    Ok(())
}

fn users_prepared_transaction_rolls_back(rig: &Rig) -> Result<()> {
    table(rig)?;
    let gid = rig.schema();
    let mut session = rig.session(2)?;
    session.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); PREPARE TRANSACTION '{gid}'"
    ))?;
    session.run(&format!("ROLLBACK PREPARED '{gid}'"))?;
    rig.expect("SELECT count(*) FROM t", "0")?;
    rig.session(3)?
        .run("INSERT INTO t VALUES (1, 'free again')")
}

fn users_prepared_transaction_is_prepared_everywhere(rig: &Rig) -> Result<()> {
    table(rig)?;
    let gid = rig.schema();
    rig.session(1)?.run(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); PREPARE TRANSACTION '{gid}'"
    ))?;
    rig.expect(
        &format!("SELECT count(*) FROM pg_prepared_xacts WHERE gid = '{gid}'"),
        "1",
    )?;
    rig.session(1)?.run(&format!("COMMIT PREPARED '{gid}'"))
}

fn unlogged_table_rows_stay_local(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE UNLOGGED TABLE t (id int)")?;
    let mut session = rig.session(1)?;
    session.run("INSERT INTO t VALUES (1)")?;
    ensure!(session.text("SELECT * FROM t")? == "1", "the row is there");
    Ok(())
}

/// Counts the PREPARE records that `work` makes node 1 write.
fn prepares_during(rig: &Rig, work: impl FnOnce(&mut Session) -> Result<()>) -> Result<usize> {
    let mut session = rig.session(1)?;
    let from = session.text("SELECT pg_current_wal_insert_lsn()")?;
    work(&mut session)?;
    // Something to read, even when the work wrote nothing; it does not come through a transaction.
    session.text("SELECT pg_logical_emit_message(false, 'test', 'end')")?;
    session.run("SELECT pg_switch_wal()")?;
    let to = session.text("SELECT pg_current_wal_flush_lsn()")?;
    let mut waldump = xtask::host::server_command(rig.server(1).program("pg_waldump"))?;
    waldump.args([
        "--rmgr",
        "Transaction",
        "--start",
        &from,
        "--end",
        &to,
        "--path",
    ]);
    waldump.arg(rig.server(1).data_dir().join("pg_wal"));
    let text = xtask::command::capture(&mut waldump)?;
    Ok(text
        .lines()
        .filter(|line| line.contains("desc: PREPARE"))
        .count())
}

fn reading_transactions_prepare_nothing(rig: &Rig) -> Result<()> {
    table(rig)?;
    let prepares = prepares_during(rig, |session| {
        session.run("BEGIN; SELECT * FROM t; COMMIT")?;
        session.run("SELECT count(*) FROM t")?;
        session.run("UPDATE t SET v = 'x' WHERE id = -1")?;
        session
            .run("CREATE TEMP TABLE mine (id int); INSERT INTO mine VALUES (1); DROP TABLE mine")?;
        let xid = session
            .text("BEGIN; SELECT * FROM t; SELECT pg_current_xact_id_if_assigned(); COMMIT")?;
        ensure!(
            xid.is_empty(),
            "a reader was given the transaction id {xid}"
        );
        Ok(())
    })?;
    ensure!(prepares == 0, "{prepares} PREPAREs");
    Ok(())
}

fn writing_transaction_prepares_once(rig: &Rig) -> Result<()> {
    table(rig)?;
    let prepares = prepares_during(rig, |session| {
        session.run("BEGIN; INSERT INTO t VALUES (1, 'a'); SAVEPOINT a; INSERT INTO t VALUES (2, 'b'); COMMIT")?;
        session.run("INSERT INTO t VALUES (3, 'c')")
    })?;
    ensure!(prepares == 2, "{prepares} PREPAREs for two transactions");
    Ok(())
}

fn our_gid_prefix_is_refused_to_users(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; INSERT INTO t VALUES (1, 'a')")?;
    let error = session.refused("PREPARE TRANSACTION 'mtm-mine'")?;
    ensure!(error.message().contains("mtm-"), "{error:?}");
    session.run("ROLLBACK")?;
    rig.expect("SELECT count(*) FROM t", "0")
}

fn exported_snapshot_is_refused_with_an_explanation(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; INSERT INTO t VALUES (1, 'a'); SELECT pg_export_snapshot()")?;
    let error = session.refused_with("0A000", "COMMIT")?;
    ensure!(error.message().contains("snapshot"), "{error:?}");
    session.run("INSERT INTO t VALUES (2, 'b')")?;
    // Exporting alone, as pg_dump does, is nobody's business.
    session.run("BEGIN; SELECT pg_export_snapshot(); COMMIT")?;
    rig.expect("SELECT id FROM t", "2")
}

fn lock_held_by_session_and_transaction_is_refused_with_an_explanation(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("SELECT pg_advisory_lock(1, 3)")?;
    session.run("BEGIN; SELECT pg_advisory_xact_lock(1, 3); INSERT INTO t VALUES (1, 'a')")?;
    let error = session.refused_with("0A000", "COMMIT")?;
    ensure!(error.message().contains("lock"), "{error:?}");
    session.run("INSERT INTO t VALUES (2, 'b')")?;
    session.run("SELECT pg_advisory_unlock(1, 3)")?;
    rig.expect("SELECT id FROM t", "2")
}

fn refused_commit_leaves_nothing_and_the_session_usable(rig: &Rig) -> Result<()> {
    picky_table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; SAVEPOINT a; INSERT INTO t VALUES (-1, 'no'); INSERT INTO t VALUES (1, 'no'); SAVEPOINT b")?;
    session.refused("COMMIT")?;
    session.refused("INSERT INTO t VALUES (-2, 'no')")?;
    session.refused("INSERT INTO t VALUES (-3, 'no'); INSERT INTO t VALUES (3, 'no')")?;
    ensure!(
        session
            .execute("INSERT INTO t VALUES ($1, 'no')", &[&-4])
            .is_err(),
        "the extended protocol hides the refusal"
    );
    session.run("INSERT INTO t VALUES (5, 'yes')")?;
    rig.expect("SELECT id FROM t", "5")
}

fn refusal_of_the_first_temporary_schema_leaves_no_orphans(rig: &Rig) -> Result<()> {
    picky_table(rig)?;
    // Each of these sessions may be the first to use its temporary schema.
    let mut sessions = (0..3).map(|_| rig.session(1)).collect::<Result<Vec<_>>>()?;
    for session in &mut sessions {
        session.run("BEGIN; CREATE TEMP TABLE mine (id int); INSERT INTO t VALUES (-1, 'no')")?;
        // A session that ends leaves nothing to look after; its client may see the end before it has read the reason.
        match session.refused("COMMIT") {
            Ok(error) if error.severity() != "FATAL" => {}
            _ => continue,
        }
        session.run("CREATE TEMP TABLE mine (id int); INSERT INTO mine VALUES (1); INSERT INTO t SELECT count(*) FROM t")?;
    }
    drop(sessions);
    rig.expect("SELECT count(*) FROM t WHERE id = -1", "0")?;
    let orphans =
        "SELECT count(*) FROM pg_class WHERE relnamespace NOT IN (SELECT oid FROM pg_namespace)";
    rig.expect(orphans, "0")
}

fn refused_commit_and_chain_leaves_no_transaction_open(rig: &Rig) -> Result<()> {
    picky_table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; INSERT INTO t VALUES (-1, 'no'); SAVEPOINT a")?;
    session.refused("COMMIT AND CHAIN")?;
    session.run("INSERT INTO t VALUES (1, 'own transaction')")?;
    rig.expect("SELECT id FROM t", "1")
}

fn refused_commit_in_a_procedure_ends_it(rig: &Rig) -> Result<()> {
    picky_table(rig)?;
    let mut session = rig.session(1)?;
    session.refused("DO $$ BEGIN INSERT INTO t VALUES (1, 'yes'); COMMIT; INSERT INTO t VALUES (-1, 'no'); COMMIT; INSERT INTO t VALUES (2, 'never'); END $$")?;
    wait_for("an idle session", Duration::from_secs(5), || {
        Ok(session
            .text("SELECT 1")
            .context("the session is unusable")?
            == "1")
    })?;
    rig.expect("SELECT id FROM t", "1")
}
