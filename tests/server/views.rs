//! What an administrator sees.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use multimaster_tests::{Rig, SharedCase, cases};
use xtask::cluster::wait_for;

use crate::conflicts::fight;
use crate::in_flight::{STATE_LIMIT, await_quiet};

pub fn cases() -> Vec<SharedCase> {
    cases![
        nodes_state_has_a_row_for_every_node,
        nodes_state_has_the_documented_columns,
        passwords_are_not_shown,
        status_says_online,
        all_nodes_tell_the_same_story,
        processes_have_names,
        processes_name_what_they_wait_for,
        slot_lag_counts_what_the_slot_keeps,
        second_init_is_refused,
        ordinary_users_cannot_change_the_cluster,
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

/// Bytes of WAL that the others have confirmed, and that an older transaction keeps nevertheless.
const KEPT_BYTES: u64 = 1 << 20;

fn slot_lag_counts_what_the_slot_keeps(rig: &Rig) -> Result<()> {
    let mut open = rig.session(1)?;
    open.run("CREATE TABLE t (id int PRIMARY KEY, v text)")?;
    open.run("BEGIN; INSERT INTO t VALUES (1)")?;
    let mut session = rig.session(1)?;
    let begun = session.text("SELECT pg_current_wal_insert_lsn()")?;
    session.run(&format!(
        "INSERT INTO t SELECT 2, string_agg(md5(i::text), '') FROM generate_series(0, {KEPT_BYTES} / 32) i"
    ))?;
    let ended = session.text("SELECT pg_current_wal_insert_lsn()")?;
    let peers = rig.len() - 1;
    wait_for("what the peers confirm", STATE_LIMIT, || {
        let confirmed = session.text(&format!("SELECT count(*) FROM pg_replication_slots WHERE active AND confirmed_flush_lsn >= '{ended}'"))?;
        Ok(confirmed == peers.to_string())
    })?;
    let kept = session.text(&format!("SELECT count(*) FROM mtm.get_nodes_state() WHERE slot_lag >= pg_wal_lsn_diff('{ended}', '{begun}')"))?;
    ensure!(
        kept == peers.to_string(),
        "{kept} slots are shown to keep what the open transaction began before"
    );
    open.run("ROLLBACK")
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
