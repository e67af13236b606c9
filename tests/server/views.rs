//! What an administrator sees.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{Rig, Session, SharedCase, cases};
use xtask::cluster::wait_for;

use crate::conflicts::fight;
use crate::held::Held;

pub fn cases() -> Vec<SharedCase> {
    cases![
        nodes_state_has_a_row_for_every_node,
        nodes_state_has_the_documented_columns,
        passwords_are_not_shown,
        status_says_online,
        all_nodes_tell_the_same_story,
        processes_have_names,
        processes_name_what_they_wait_for,
        settings_are_documented_in_the_server,
        second_init_is_refused,
        ordinary_users_cannot_change_the_cluster,
        voting_transaction_names_whom_it_waits_for,
        precommitted_and_resolved_transactions_name_whom_they_wait_for,
        fast_commit_is_shown_while_its_backend_commits,
        finishing_transaction_names_whom_it_waits_for,
        who_waits_for_no_other_node_is_warned,
        aborting_transaction_names_whom_it_waits_for,
        endings_are_counted_by_outcome_and_reason,
        conflict_with_a_running_transaction_is_shown,
        conflict_of_committing_transactions_is_shown,
        commit_latency_counts_phases_and_peers,
        commit_latency_starts_again_when_told,
    ]
}

/// The columns of the original's view, which tools know.
const NODES_STATE: [&str; 18] = [
    "id",
    "name",
    "enabled",
    "connected",
    "slot_active",
    "stopped",
    "catch_up",
    "slot_lag",
    "avg_trans_delay",
    "last_status_change",
    "oldest_snapshot",
    "sender_pid",
    "sender_start_time",
    "receiver_pid",
    "receiver_start_time",
    "conn_str",
    "connectivity_mask",
    "n_heartbeats",
];

fn nodes_state_has_a_row_for_every_node(rig: &Rig) -> Result<()> {
    rig.expect(
        "SELECT count(*), count(DISTINCT id), bool_and(enabled) FROM mtm.get_nodes_state()",
        &format!("{0}|{0}|t", rig.len()),
    )
}

fn nodes_state_has_the_documented_columns(rig: &Rig) -> Result<()> {
    let mut session = rig.session(2)?;
    for column in NODES_STATE {
        session.run(&format!("SELECT {column} FROM mtm.get_nodes_state()"))?;
    }
    let peers = session.text("SELECT count(*) FROM mtm.get_nodes_state() WHERE connected AND slot_active AND sender_pid > 0 AND receiver_pid > 0")?;
    ensure!(
        peers == (rig.len() - 1).to_string(),
        "{peers} peers are fully connected"
    );
    Ok(())
}

fn passwords_are_not_shown(rig: &Rig) -> Result<()> {
    rig.expect(
        "SELECT count(*) FROM mtm.get_nodes_state() WHERE conn_str ~* 'password'",
        "0",
    )
}

fn status_says_online(rig: &Rig) -> Result<()> {
    rig.expect("SELECT status FROM mtm.status()", "online")
}

fn all_nodes_tell_the_same_story(rig: &Rig) -> Result<()> {
    let members = "SELECT count(*) FROM mtm.nodes()";
    rig.expect(members, &rig.len().to_string())?;
    let generation = rig.session(1)?.text("SELECT gen_num FROM mtm.status()");
    if let Ok(generation) = generation {
        rig.expect("SELECT gen_num FROM mtm.status()", &generation)?;
    }
    let mut ids = Vec::new();
    for node in 1..=rig.len() {
        ids.push(
            rig.session(node)?
                .text("SELECT my_node_id FROM mtm.status()")?,
        );
    }
    ids.sort();
    ids.dedup();
    ensure!(ids.len() == rig.len(), "node ids are not distinct: {ids:?}");
    Ok(())
}

fn processes_have_names(rig: &Rig) -> Result<()> {
    rig.expect(
        "SELECT count(*) >= 4 FROM pg_stat_activity WHERE backend_type ~ '^multimaster'",
        "t",
    )?;
    rig.expect(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ '^multimaster receiver'",
        &(rig.len() - 1).to_string(),
    )
}

fn processes_name_what_they_wait_for(rig: &Rig) -> Result<()> {
    let mut session = rig.session(1)?;
    wait_for(
        "a wait event of the arbiter",
        Duration::from_secs(5),
        || {
            Ok(session.text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'multimaster arbiter' AND wait_event IS NOT NULL")? == "1")
        },
    )
}

fn settings_are_documented_in_the_server(rig: &Rig) -> Result<()> {
    let names = [
        "arbiter_port",
        "heartbeat_send_timeout",
        "heartbeat_recv_timeout",
        "slow_node_timeout",
        "max_workers",
        "wait_peer_commits",
        "min_recovery_lag",
        "max_recovery_lag",
        "conflict_grace",
        "stream_in_progress",
    ];
    let list: Vec<String> = names
        .iter()
        .map(|name| format!("('multimaster.{name}')"))
        .collect();
    rig.expect(
        &format!("SELECT coalesce(string_agg(n, ','), '') FROM (VALUES {}) v (n) WHERE n NOT IN (SELECT name FROM pg_settings WHERE short_desc <> '')", list.join(",")),
        "",
    )?;
    rig.expect(
        "SELECT setting || unit FROM pg_settings WHERE name = 'multimaster.heartbeat_recv_timeout'",
        "2000ms",
    )
}

fn second_init_is_refused(rig: &Rig) -> Result<()> {
    let mine = rig.server(1).conninfo();
    let peers: Vec<String> = (2..=rig.len())
        .map(|node| format!("'{}'", rig.server(node).conninfo()))
        .collect();
    let error = rig.session(1)?.refused(&format!(
        "SELECT mtm.init_cluster('{mine}', ARRAY[{}])",
        peers.join(", ")
    ))?;
    ensure!(error.message().contains("cluster"), "{error:?}");
    Ok(())
}

fn ordinary_users_cannot_change_the_cluster(rig: &Rig) -> Result<()> {
    let role = format!("{}_nobody", rig.schema());
    let mut session = rig.session(1)?;
    session.run(&format!("CREATE ROLE {role}"))?;
    session.run(&format!("SET ROLE {role}"))?;
    session.refused_with(
        "42501",
        "SELECT mtm.init_cluster('host=127.0.0.1', ARRAY['host=127.0.0.1'])",
    )?;
    session.run(&format!("RESET ROLE; DROP ROLE {role}"))
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
fn await_quiet(rig: &Rig) -> Result<()> {
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

/// How many transactions of a node ended like this.
fn counted(rig: &Rig, node: usize, outcome: &str, reason: &str) -> Result<i64> {
    let text = rig.session(node)?.text(&format!(
        "SELECT coalesce(sum(transactions), 0) FROM mtm.stat_commits WHERE outcome = '{outcome}' AND reason LIKE '{reason}'"
    ))?;
    Ok(text.parse()?)
}

fn endings_are_counted_by_outcome_and_reason(rig: &Rig) -> Result<()> {
    const CENTRAL: &str = "a majority has precommitted";
    const FAST: &str = "all members have voted yes";
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0)")?;
    await_quiet(rig)?;
    let committed = counted(rig, 1, "committed", CENTRAL)?;
    let fast = counted(rig, 1, "committed", FAST)?;
    let foreign = counted(rig, 2, "committed for another node", "another node said so")?;
    let applied = counted(rig, 2, "applied", "%")?;
    for mode in ["e3pc", "fast", "e3pc"] {
        rig.session(1)?.run(&format!(
            "SET multimaster.commit_mode = '{mode}'; UPDATE t SET v = v + 1"
        ))?;
    }
    await_quiet(rig)?;
    let after = [
        counted(rig, 1, "committed", CENTRAL)? - committed,
        counted(rig, 1, "committed", FAST)? - fast,
        counted(rig, 2, "committed for another node", "another node said so")? - foreign,
        counted(rig, 2, "applied", "%")? - applied,
    ];
    ensure!(
        after == [2, 1, 3, 3],
        "two commits in two round trips and one in one are counted as {after:?}"
    );
    let aborted = counted(rig, 1, "aborted", "a node voted no")?;
    let told = counted(rig, 1, "refused", "the client was told 22012")?;
    refuse_once(rig)?;
    let after = [
        counted(rig, 1, "aborted", "a node voted no")? - aborted,
        counted(rig, 1, "refused", "the client was told 22012")? - told,
    ];
    ensure!(
        after == [1; 2],
        "one refused commit is counted as {after:?}"
    );
    Ok(())
}

/// Has node 1 commit what the others refuse to apply.
fn refuse_once(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'not here' USING ERRCODE = '22012'; END $$;
        CREATE TRIGGER refuse BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION refuse();
        ALTER TABLE t ENABLE REPLICA TRIGGER refuse",
    )?;
    rig.session(1)?.refused_with("22012", "DELETE FROM t")?;
    Ok(())
}

/// The conflicts about this case's table that a node shows: kind, node, key, loser and winner as the numbers of their coordinators.
fn conflicts(rig: &Rig, node: usize) -> Result<String> {
    rig.session(node)?.text(&format!(
        "SELECT kind, node_id, key, split_part(loser, '-', 3), split_part(winner, '-', 3)
           FROM mtm.conflicts WHERE relation = '{}.t' AND happened_at BETWEEN now() - interval '1 hour' AND clock_timestamp()",
        rig.schema()
    ))
}

fn conflict_with_a_running_transaction_is_shown(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0)")?;
    let mut runner = rig.session(2)?;
    runner.run("BEGIN; UPDATE t SET v = -1")?;
    thread::scope(|scope| {
        let wait = scope.spawn(move || runner.refused_with("40001", "SELECT pg_sleep(60)"));
        let committed = rig.session(1)?.run("UPDATE t SET v = 5");
        let error = wait.join().expect("no panic")?;
        let detail = error.detail().unwrap_or_default();
        ensure!(
            detail.contains("On node 2") && detail.contains("(id)=(1)"),
            "the victim is not told where: {error:?}"
        );
        committed
    })?;
    let shown = conflicts(rig, 2)?;
    ensure!(shown == "running|2|(id)=(1)||1", "{shown}");
    Ok(())
}

fn conflict_of_committing_transactions_is_shown(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (7, 0)")?;
    let update = "UPDATE t SET v = v + 1";
    // The two meet while they commit unless one is slow to begin with it.
    for _ in 0..50 {
        fight(rig, [(1, update), (3, update)])?;
        for node in [1, 3] {
            let shown = conflicts(rig, node)?;
            let line = shown.lines().find(|line| line.starts_with("committing"));
            // The loser came from the other node, and met the winner at home.
            let (loser, winner) = (4 - node, node);
            if let Some(line) = line {
                let expected = format!("committing|{node}|(id)=(7)|{loser}|{winner}");
                ensure!(line == expected, "{line}, not {expected}");
                return Ok(());
            }
        }
    }
    bail!("fifty fights, and no conflict of committing transactions")
}

/// How often each phase was counted, as `phase peer count`.
const LATENCY_COUNTS: &str = "SELECT string_agg(concat_ws(' ', phase, peer, count), ', ' ORDER BY phase, peer NULLS FIRST) FROM mtm.commit_latency";

fn commit_latency_counts_phases_and_peers(rig: &Rig) -> Result<()> {
    let mut session = rig.session(1)?;
    session.run("CREATE TABLE timed (id int PRIMARY KEY)")?;
    session.run("SELECT mtm.reset_commit_latency()")?;
    for id in 1..=3 {
        session.run(&format!("INSERT INTO timed VALUES ({id})"))?;
    }
    session.run("BEGIN; INSERT INTO timed VALUES (4); ROLLBACK; SELECT FROM timed")?;
    for phase in ["prepare", "vote", "commit", "total"] {
        let count = session.text(&format!(
            "SELECT count FROM mtm.commit_latency WHERE phase = '{phase}' AND peer IS NULL"
        ))?;
        ensure!(count == "3", "{phase} was counted {count} times");
    }
    let peers = session
        .text("SELECT count(*) FROM mtm.commit_latency WHERE phase = 'vote' AND peer <> (SELECT my_node_id FROM mtm.status()) AND count = 3")?;
    ensure!(
        peers == (rig.len() - 1).to_string(),
        "{peers} peers' votes were counted"
    );
    let odd = session.text("SELECT count(*) FROM mtm.commit_latency WHERE count > 0 AND NOT (0 <= p50 AND p50 <= p95 AND p95 <= p99 AND p99 <= max)")?;
    ensure!(odd == "0", "{odd} phases have percentiles out of order");
    let whole = session.text("SELECT t.max >= p.max AND t.max >= c.max FROM mtm.commit_latency t, mtm.commit_latency p, mtm.commit_latency c WHERE t.phase = 'total' AND p.phase = 'prepare' AND c.phase = 'commit'")?;
    ensure!(whole == "t", "a part took longer than the whole");
    Ok(())
}

fn commit_latency_starts_again_when_told(rig: &Rig) -> Result<()> {
    let mut session = rig.session(2)?;
    session.run("CREATE TABLE timed_again (id int PRIMARY KEY)")?;
    session.run("SELECT mtm.reset_commit_latency()")?;
    let empty = session.text(
        "SELECT bool_and(count = 0 AND p50 IS NULL AND max IS NULL) FROM mtm.commit_latency",
    )?;
    ensure!(
        empty == "t",
        "after a reset: {}",
        session.text(LATENCY_COUNTS)?
    );
    let role = format!("{}_curious", rig.schema());
    session.run(&format!(
        "CREATE ROLE {role}; GRANT mtm_monitor TO {role}; SET ROLE {role}"
    ))?;
    session.refused_with("42501", "SELECT mtm.reset_commit_latency()")?;
    session.run(&format!(
        "SELECT FROM mtm.commit_latency; RESET ROLE; DROP ROLE {role}"
    ))
}
