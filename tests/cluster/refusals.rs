//! What stands in the way of a cluster is said clearly, and nothing is left behind.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use postgres::error::DbError;
use xtask::cluster::{Cluster, member_settings, specs};
use xtask::installation::Installation;
use xtask::server::{Spec, settings};

pub fn cases() -> Vec<OwnCase> {
    cases![
        each_wrong_setting_is_named_with_a_value_that_does,
        all_wrong_settings_are_named_at_once,
        library_behind_another_is_refused,
        library_loaded_late_is_refused,
        wrong_conninfo_is_refused,
        unreachable_peer_is_named,
        peer_in_another_cluster_is_refused,
        peer_with_other_extension_files_is_refused,
        peer_with_another_encoding_is_refused,
        peer_without_the_library_is_refused,
        peer_with_tables_of_its_own_is_refused,
        one_server_named_twice_is_refused,
        failed_attempt_leaves_nothing_and_can_be_repeated,
        dropped_settings_of_a_peer_are_named,
    ]
}

/// Settings of a member of a cluster of three, changed by `changes`.
fn member(name: &str, changes: &[(&str, &str)]) -> Spec {
    let mut spec = specs(1).remove(0);
    spec.name = name.to_owned();
    spec.settings = member_settings(3);
    spec.settings.extend(settings(changes));
    spec
}

/// Tries to start a server that must refuse; returns what it logged.
fn refusal_to_start(installation: &Installation, changes: &[(&str, &str)]) -> Result<String> {
    let mut cluster = Cluster::create(installation, &[member("wrong", changes)])?;
    ensure!(
        cluster.nodes[0].start().is_err(),
        "the server started with {changes:?}"
    );
    Ok(cluster.nodes[0].log_text())
}

const WRONG: [(&str, &str); 6] = [
    ("wal_level", "replica"),
    ("max_prepared_transactions", "0"),
    ("max_replication_slots", "0"),
    ("max_wal_senders", "0"),
    ("max_worker_processes", "4"),
    ("multimaster.heartbeat_recv_timeout", "100"),
];

fn each_wrong_setting_is_named_with_a_value_that_does(installation: &Installation) -> Result<()> {
    for (name, value) in WRONG {
        let log = refusal_to_start(installation, &[(name, value)])?;
        let line = log
            .lines()
            .find(|line| line.contains(name) && line.contains("needed"));
        ensure!(line.is_some(), "no line says what {name} needs:\n{log}");
    }
    Ok(())
}

fn all_wrong_settings_are_named_at_once(installation: &Installation) -> Result<()> {
    let log = refusal_to_start(installation, &WRONG)?;
    for (name, _) in WRONG {
        ensure!(log.contains(name), "{name} is not named:\n{log}");
    }
    ensure!(
        log.matches("FATAL").count() == 1,
        "more than one message:\n{log}"
    );
    Ok(())
}

fn library_behind_another_is_refused(installation: &Installation) -> Result<()> {
    let log = refusal_to_start(
        installation,
        &[("shared_preload_libraries", "auto_explain, multimaster")],
    )?;
    ensure!(log.contains("first"), "{log}");
    ensure!(
        log.contains("multimaster, auto_explain"),
        "no line to copy:\n{log}"
    );
    Ok(())
}

fn library_loaded_late_is_refused(installation: &Installation) -> Result<()> {
    let cluster = Cluster::start_servers(installation, &specs(1))?;
    let mut session = Session::new(cluster.connect(0)?);
    for sql in ["LOAD 'multimaster'", "CREATE EXTENSION multimaster"] {
        let error = session.refused(sql)?;
        ensure!(
            error.message().contains("shared_preload_libraries"),
            "{error:?}"
        );
    }
    session.run("SELECT 1")
}

/// What `mtm.init_cluster` on the first server says about these peers.
fn refusal_of(cluster: &Cluster, peers: &[String]) -> Result<DbError> {
    let mut session = Session::new(cluster.connect(0)?);
    session.run("CREATE EXTENSION IF NOT EXISTS multimaster")?;
    let list: Vec<String> = peers
        .iter()
        .map(|peer| format!("'{}'", peer.replace('\'', "''")))
        .collect();
    session.refused(&format!(
        "SELECT mtm.init_cluster('{}', ARRAY[{}]::text[])",
        cluster.nodes[0].conninfo(),
        list.join(", ")
    ))
}

/// The error must contain one of `words`, and must not have left anything on any node.
fn ensure_names(cluster: &Cluster, error: &DbError, words: &[&str]) -> Result<()> {
    let text = format!(
        "{}\n{}\n{}",
        error.message(),
        error.detail().unwrap_or_default(),
        error.hint().unwrap_or_default()
    );
    for word in words {
        ensure!(text.contains(word), "{word:?} is missing in:\n{text}");
    }
    ensure_untouched(cluster)
}

fn ensure_untouched(cluster: &Cluster) -> Result<()> {
    for node in 0..cluster.nodes.len() {
        let mut session = Session::new(cluster.connect(node)?);
        let left = session.text("SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_replication_origin)")?;
        ensure!(
            left == "0|0",
            "node {}: slots and origins left: {left}",
            node + 1
        );
        session.run("CREATE TABLE still_writable (id int); DROP TABLE still_writable")?;
    }
    Ok(())
}

fn three(installation: &Installation) -> Result<Cluster> {
    Cluster::start(installation, 3)
}

fn conninfo(cluster: &Cluster, node: usize) -> String {
    cluster.nodes[node].conninfo()
}

fn wrong_conninfo_is_refused(installation: &Installation) -> Result<()> {
    let cluster = three(installation)?;
    let peer = conninfo(&cluster, 1);
    for wrong in [
        "not a conninfo",
        "",
        "host=127.0.0.1 port=notanumber",
        "nonsense=1 host=127.0.0.1",
        "host='unbalanced",
    ] {
        let error = refusal_of(&cluster, &[peer.clone(), wrong.to_owned()])?;
        ensure_names(&cluster, &error, &[])?;
    }
    let missing = format!("{peer} dbname=no_such_database");
    let error = refusal_of(&cluster, &[missing, conninfo(&cluster, 2)])?;
    ensure_names(&cluster, &error, &["no_such_database"])
}

fn unreachable_peer_is_named(installation: &Installation) -> Result<()> {
    let mut cluster = three(installation)?;
    let peers = [conninfo(&cluster, 1), conninfo(&cluster, 2)];
    let port = cluster.nodes[2].port.to_string();
    cluster.nodes[2].stop()?;
    let error = refusal_of(&cluster, &peers)?;
    let text = format!("{} {}", error.message(), error.detail().unwrap_or_default());
    ensure!(text.contains(&port), "the peer is not named: {text}");
    cluster.nodes[2].start()?;
    ensure_untouched(&cluster)
}

fn peer_in_another_cluster_is_refused(installation: &Installation) -> Result<()> {
    let other = Cluster::start(installation, 2)?;
    other.init_cluster()?;
    let cluster = Cluster::start(installation, 2)?;
    let error = refusal_of(
        &cluster,
        &[conninfo(&cluster, 1), other.nodes[1].conninfo()],
    )?;
    ensure_names(&cluster, &error, &["cluster"])?;
    ensure!(
        error
            .detail()
            .is_some_and(|detail| detail.contains("already")),
        "{error:?}"
    );
    // The cluster that was asked goes on.
    Session::new(other.connect(0)?)
        .run("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")?;
    let found = Session::new(other.connect(1)?).text("SELECT * FROM t")?;
    ensure!(found == "1", "the other cluster suffered: {found:?}");
    Ok(())
}

fn peer_with_other_extension_files_is_refused(installation: &Installation) -> Result<()> {
    let cluster = Cluster::start(installation, 2)?;
    // As if the peer's packages were of another release: its catalog says so.
    let mut peer = Session::new(cluster.connect(1)?);
    peer.run("CREATE EXTENSION multimaster; UPDATE pg_extension SET extversion = '0.0.9' WHERE extname = 'multimaster'")?;
    let error = refusal_of(&cluster, &[conninfo(&cluster, 1)])?;
    ensure_names(&cluster, &error, &["0.0.9"])
}

fn peer_with_another_encoding_is_refused(installation: &Installation) -> Result<()> {
    let cluster = Cluster::start(installation, 2)?;
    Session::new(cluster.connect(1)?)
        .run("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")?;
    let peer = format!("{} dbname=latin", conninfo(&cluster, 1));
    let error = refusal_of(&cluster, &[peer])?;
    ensure_names(&cluster, &error, &["LATIN1"])
}

fn peer_without_the_library_is_refused(installation: &Installation) -> Result<()> {
    let mut plain = member("plain", &[]);
    plain.settings.retain(|(name, _)| {
        !name.starts_with("multimaster.") && name != "shared_preload_libraries"
    });
    let cluster = Cluster::start_servers(installation, &[member("good", &[]), plain])?;
    let error = refusal_of(&cluster, &[conninfo(&cluster, 1)])?;
    ensure_names(&cluster, &error, &["shared_preload_libraries"])
}

fn peer_with_tables_of_its_own_is_refused(installation: &Installation) -> Result<()> {
    let cluster = Cluster::start(installation, 2)?;
    Session::new(cluster.connect(1)?)
        .run("CREATE TABLE theirs (id int PRIMARY KEY); INSERT INTO theirs VALUES (1)")?;
    let error = refusal_of(&cluster, &[conninfo(&cluster, 1)])?;
    ensure_names(&cluster, &error, &["theirs"])
}

fn one_server_named_twice_is_refused(installation: &Installation) -> Result<()> {
    let cluster = Cluster::start(installation, 2)?;
    let peer = conninfo(&cluster, 1);
    for peers in [vec![peer.clone(), peer], vec![conninfo(&cluster, 0)]] {
        let error = refusal_of(&cluster, &peers)?;
        ensure_names(&cluster, &error, &[])?;
    }
    Ok(())
}

fn failed_attempt_leaves_nothing_and_can_be_repeated(installation: &Installation) -> Result<()> {
    let mut cluster = three(installation)?;
    let peers = [conninfo(&cluster, 1), conninfo(&cluster, 2)];
    cluster.nodes[1].stop()?;
    refusal_of(&cluster, &peers)?;
    cluster.nodes[1].start()?;
    ensure_untouched(&cluster)?;
    let mut session = Session::new(cluster.connect(0)?);
    let Err(error) = session.query(
        "SELECT mtm.init_cluster($1, $2)",
        &[&conninfo(&cluster, 0), &peers.to_vec()],
    ) else {
        return xtask::checks::whole(&cluster, Duration::from_secs(10));
    };
    bail!(
        "the second attempt failed: {}",
        xtask::cluster::explain(error)
    )
}

fn dropped_settings_of_a_peer_are_named(installation: &Installation) -> Result<()> {
    // Enough for two nodes, so that the server starts, but not for three.
    let small = member(
        "small",
        &[
            ("max_prepared_transactions", "300"),
            ("max_wal_senders", "3"),
        ],
    );
    let cluster = Cluster::start_servers(
        installation,
        &[member("one", &[]), member("two", &[]), small],
    )?;
    let error = refusal_of(&cluster, &[conninfo(&cluster, 1), conninfo(&cluster, 2)])?;
    ensure_names(
        &cluster,
        &error,
        &["max_prepared_transactions", "max_wal_senders"],
    )
}
