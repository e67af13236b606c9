//! What an administrator sees.

use std::time::Duration;

use anyhow::{Result, ensure};
use multimaster_tests::{Rig, SharedCase, cases};
use xtask::cluster::wait_for;

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
        "max_workers",
        "wait_peer_commits",
        "min_recovery_lag",
        "max_recovery_lag",
        "conflict_grace",
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
