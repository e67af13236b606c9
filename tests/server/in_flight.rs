//! `mtm.transactions`: each state of a transaction, and whom it waits for.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{Rig, Session, SharedCase, cases};
use xtask::cluster::wait_for;

use crate::held::Held;

pub fn cases() -> Vec<SharedCase> {
    cases![
        voting_transaction_names_whom_it_waits_for,
        precommitted_and_resolved_transactions_name_whom_they_wait_for,
        fast_commit_is_shown_while_its_backend_commits,
        finishing_transaction_names_whom_it_waits_for,
        who_waits_for_no_other_node_is_warned,
        aborting_transaction_names_whom_it_waits_for,
    ]
}

/// How long a transaction may take to get into a state.
pub const STATE_LIMIT: Duration = Duration::from_secs(20);

/// Waits until a node shows the only transaction in flight like this: role, state, ballot, missing.
fn await_shown(rig: &Rig, node: usize, expected: &str) -> Result<()> {
    let mut session = rig.session(node)?;
    let mut found = String::new();
    let sql = "SELECT role, state, coalesce(ballot, 'none'), missing FROM mtm.transactions";
    wait_for(expected, STATE_LIMIT, || {
        found = session.text(sql)?;
        Ok(found == expected)
    })
    .with_context(|| format!("node {node} shows {found:?}"))
}

/// Nothing is in flight on any node.
pub fn await_quiet(rig: &Rig) -> Result<()> {
    for node in 1..=rig.len() {
        let mut session = rig.session(node)?;
        wait_for("the end of all transactions", STATE_LIMIT, || {
            Ok(session.text("SELECT count(*) FROM mtm.transactions")? == "0")
        })?;
    }
    Ok(())
}

/// A session of node 1 with a transaction that is ready for its COMMIT; its process id, and the transaction's name.
fn open_transaction(rig: &Rig) -> Result<(Session, String, String)> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int)")?;
    await_quiet(rig)?;
    let mut session = rig.session(1)?;
    // The way that passes all states.
    session
        .run("BEGIN; SET LOCAL multimaster.commit_mode = 'e3pc'; INSERT INTO t VALUES (1, 0)")?;
    let pid = session.text("SELECT pg_backend_pid()")?;
    let gid = session.text("SELECT mtm.current_gid()")?;
    Ok((session, pid, gid))
}

fn voting_transaction_names_whom_it_waits_for(rig: &Rig) -> Result<()> {
    let (mut session, _, gid) = open_transaction(rig)?;
    let mut held = Held::new(rig);
    held.hold(3, "apply-before-prepare")?;
    thread::scope(|scope| {
        let commit = scope.spawn(move || session.run("COMMIT"));
        let look = || -> Result<()> {
            await_shown(rig, 1, "coordinator|voting|none|{3}")?;
            await_shown(rig, 2, "participant|prepared|none|{1}")?;
            let row = "SELECT gid, coordinator, started_at <= clock_timestamp(), age BETWEEN '0' AND '1 hour' FROM mtm.transactions";
            let rows = [rig.session(1)?.text(row)?, rig.session(2)?.text(row)?];
            ensure!(rows[0] == rows[1], "{rows:?}");
            ensure!(
                rows[0].starts_with(&format!("{gid}-")) && rows[0].ends_with("|1|t|t"),
                "{gid}: {rows:?}"
            );
            rig.expect(
                &format!("SELECT mtm.transaction_status('{gid}')"),
                "in progress",
            )
        };
        let looked = look();
        held.release(3)?;
        commit.join().expect("no panic")?;
        looked
    })?;
    await_quiet(rig)?;
    rig.expect(
        &format!("SELECT mtm.transaction_status('{gid}')"),
        "committed",
    )
}

/// A participant whose records are held must not look dead meanwhile.
fn set_heartbeat_limit(rig: &Rig, value: &str) -> Result<()> {
    for node in 1..=rig.len() {
        let mut session = rig.session(node)?;
        session.run(&format!(
            "ALTER SYSTEM SET multimaster.heartbeat_recv_timeout = {value}"
        ))?;
        session.run("SELECT pg_reload_conf()")?;
    }
    Ok(())
}

fn precommitted_and_resolved_transactions_name_whom_they_wait_for(rig: &Rig) -> Result<()> {
    set_heartbeat_limit(rig, "'30s'")?;
    let outcome = hold_precommits(rig);
    set_heartbeat_limit(rig, "DEFAULT")?;
    outcome?;
    await_quiet(rig)
}

fn hold_precommits(rig: &Rig) -> Result<()> {
    let (mut session, pid, _) = open_transaction(rig)?;
    let mut held = Held::new(rig);
    held.hold(2, "records-before-flush")?;
    held.hold(3, "records-before-flush")?;
    thread::scope(|scope| {
        let commit = scope.spawn(move || session.run("COMMIT"));
        let look = || -> Result<()> {
            await_shown(rig, 1, "coordinator|precommitted|1.0|{2,3}")?;
            await_shown(rig, 2, "participant|precommitted|1.0|{1}")?;
            rig.session(1)?
                .run(&format!("SELECT pg_cancel_backend({pid})"))?;
            await_shown(rig, 1, "resolver|precommitted|2.1|{2,3}")
        };
        let looked = look();
        held.release(2)?;
        held.release(3)?;
        // The resolver's question or the precommits: both end in a commit.
        commit.join().expect("no panic")?;
        looked
    })
}

fn fast_commit_is_shown_while_its_backend_commits(rig: &Rig) -> Result<()> {
    let (mut session, _, _) = open_transaction(rig)?;
    session.run("SET LOCAL multimaster.commit_mode = 'fast'")?;
    let mut held = Held::new(rig);
    held.hold(1, "backend-before-commit")?;
    thread::scope(|scope| {
        let commit = scope.spawn(move || session.run("COMMIT"));
        let look = || -> Result<()> {
            await_shown(rig, 1, "coordinator|committing|none|{1}")?;
            await_shown(rig, 2, "participant|prepared|none|{1}")
        };
        let looked = look();
        held.release(1)?;
        commit.join().expect("no panic")?;
        looked
    })?;
    await_quiet(rig)
}

fn finishing_transaction_names_whom_it_waits_for(rig: &Rig) -> Result<()> {
    let (mut session, _, _) = open_transaction(rig)?;
    let mut held = Held::new(rig);
    held.hold(2, "finish-before-record")?;
    thread::scope(|scope| {
        let commit = scope.spawn(move || session.run("COMMIT"));
        let look = || -> Result<()> {
            await_shown(rig, 1, "coordinator|committed|1.0|{2}")?;
            await_shown(rig, 2, "participant|committing|1.0|{2}")?;
            await_shown(rig, 3, "participant|committed|1.0|{1}")
        };
        let looked = look();
        held.release(2)?;
        commit.join().expect("no panic")?;
        looked
    })?;
    await_quiet(rig)
}

/// As core warns when a synchronous standby is not waited for. The log has what the client got.
fn who_waits_for_no_other_node_is_warned(rig: &Rig) -> Result<()> {
    const WARNING: &str = "the wait for the other nodes was cancelled";
    let warnings = || rig.server(1).log_text().matches(WARNING).count();
    let (mut session, pid, _) = open_transaction(rig)?;
    let before = warnings();
    let mut held = Held::new(rig);
    held.hold(2, "finish-before-record")?;
    let answered = thread::scope(|scope| {
        let commit = scope.spawn(move || session.run("COMMIT"));
        let look = || -> Result<()> {
            await_shown(rig, 1, "coordinator|committed|1.0|{2}")?;
            rig.session(1)?
                .run(&format!("SELECT pg_cancel_backend({pid})"))?;
            wait_for("the warning", STATE_LIMIT, || Ok(warnings() == before + 1))
        };
        let looked = look();
        held.release(2)?;
        commit.join().expect("no panic")?;
        looked
    });
    answered?;
    await_quiet(rig)
}

fn aborting_transaction_names_whom_it_waits_for(rig: &Rig) -> Result<()> {
    let (mut session, pid, gid) = open_transaction(rig)?;
    let mut held = Held::new(rig);
    held.hold(3, "apply-before-prepare")?;
    thread::scope(|scope| {
        let commit = scope.spawn(move || session.refused_with("40001", "COMMIT"));
        let mut look = || -> Result<()> {
            await_shown(rig, 2, "participant|prepared|none|{1}")?;
            held.hold(2, "finish-before-record")?;
            rig.session(1)?
                .run(&format!("SELECT pg_cancel_backend({pid})"))?;
            let mut second = rig.session(2)?;
            wait_for("the abort", STATE_LIMIT, || {
                Ok(
                    second.text("SELECT role, state, missing FROM mtm.transactions")?
                        == "participant|aborting|{2}",
                )
            })?;
            let mut first = rig.session(1)?;
            wait_for("the coordinator's end", STATE_LIMIT, || {
                Ok(
                    first.text("SELECT state, 2 = ANY (missing) FROM mtm.transactions")?
                        == "aborted|t",
                )
            })
        };
        let looked = look();
        held.release(2)?;
        held.release(3)?;
        commit.join().expect("no panic")?;
        looked
    })?;
    await_quiet(rig)?;
    rig.expect(
        &format!("SELECT mtm.transaction_status('{gid}')"),
        "aborted",
    )
}
