//! `cargo xtask demo`: a cluster of three nodes, shown at work in half a minute.

mod loss;

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use postgres::error::{DbError, SqlState};
use postgres::{Client, SimpleQueryMessage};

use crate::cluster::{Cluster, explain, stop_servers_on_signal};
use crate::installation::{MAJOR, Source};
use crate::{checks, extension, screen, setup};

/// Sets everything up and shows a cluster at work.
///
/// # Errors
/// When something does not go as the text says.
pub fn run() -> Result<()> {
    stop_servers_on_signal()?;
    screen::heading("Getting ready");
    setup::run(MAJOR)?;
    let installation = screen::step("building the extension (minutes the first time)", || {
        extension::build(&Source::packaged()?)
    })?;
    let mut cluster = screen::step("starting three PostgreSQL servers", || {
        Cluster::start(&installation, 3)
    })?;
    let outcome = show(&mut cluster);
    if outcome.is_err() {
        cluster.keep_logs();
        eprintln!("{}", cluster.log_tails(20));
    }
    outcome
}

fn show(cluster: &mut Cluster) -> Result<()> {
    screen::heading("Three servers become one cluster");
    for node in &cluster.nodes {
        screen::say(format!(
            "{} is a stock PostgreSQL server at {}:{}",
            node.name, node.address, node.port
        ));
    }
    screen::statement(
        "node1",
        "CREATE EXTENSION multimaster; SELECT mtm.init_cluster(node1, {node2, node3})",
    );
    screen::step("all nodes are online", || cluster.init_cluster())?;
    let mut clients = cluster.connect_all()?;
    every_node_reads_what_any_node_wrote(&mut clients)?;
    two_clients_want_one_row(&mut clients)?;
    nodes_of_the_cluster(&mut clients[0])?;
    drop(clients);
    loss::show(cluster)?;
    all_copies_are_equal(cluster)
}

fn every_node_reads_what_any_node_wrote(clients: &mut [Client]) -> Result<()> {
    screen::heading("Write anywhere, read everywhere");
    screen::say(
        "When COMMIT returns, the change is on every node: no node can be asked too early.",
    );
    run_on(
        clients,
        0,
        "CREATE TABLE account (id int PRIMARY KEY, owner text, balance int)",
    )?;
    for (node, owner) in ["Ada", "Grace", "Edsger"].into_iter().enumerate() {
        let id = node + 1;
        run_on(
            clients,
            node,
            &format!("INSERT INTO account VALUES ({id}, '{owner}', 100)"),
        )?;
    }
    run_on(
        clients,
        1,
        "BEGIN; UPDATE account SET balance = balance - 30 WHERE id = 1; UPDATE account SET balance = balance + 30 WHERE id = 3; COMMIT",
    )?;
    let mut answers = Vec::new();
    for (node, client) in clients.iter_mut().enumerate() {
        let sql = "SELECT * FROM account ORDER BY id";
        screen::statement(&name(node), sql);
        let text = query(client, sql)?;
        screen::answer(&text);
        answers.push(text);
    }
    ensure!(
        answers.iter().all(|answer| *answer == answers[0]),
        "the nodes do not agree"
    );
    screen::good("all three nodes agree");
    Ok(())
}

fn two_clients_want_one_row(clients: &mut [Client]) -> Result<()> {
    screen::heading("Two clients fight for one row");
    screen::say(
        "One is on node1, one on node3; both change the same account and send COMMIT at the same moment.",
    );
    let sql = "UPDATE account SET balance = balance + 10 WHERE id = 2";
    let [first, _, third] = clients else {
        bail!("the demonstration needs three nodes")
    };
    for (node, client) in [(0, &mut *first), (2, &mut *third)] {
        screen::statement(&name(node), &format!("BEGIN; {sql}"));
        client
            .batch_execute(&format!("BEGIN; {sql}"))
            .map_err(explain)?;
    }
    let start = Barrier::new(2);
    let began = Instant::now();
    let results = thread::scope(|scope| {
        let other = scope.spawn(|| commit(third, &start));
        [
            commit(first, &start),
            other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        ]
    });
    let took = began.elapsed();
    let [one, three] = results;
    let mut losers = 0;
    for (node, outcome) in [(0, one?), (2, three?)] {
        screen::statement(&name(node), "COMMIT");
        losers += usize::from(outcome.is_some());
        report(outcome);
    }
    ensure!(losers == 1, "{losers} of two were refused");
    screen::good(format!(
        "one won, one was told to try again, within {} ms",
        took.as_millis()
    ));
    Ok(())
}

/// Commits together with somebody else; the error of a loser.
fn commit(client: &mut Client, start: &Barrier) -> Result<Option<DbError>> {
    start.wait();
    match client.batch_execute("COMMIT") {
        Ok(()) => Ok(None),
        Err(error) => match error.as_db_error() {
            Some(db) if *db.code() == SqlState::T_R_SERIALIZATION_FAILURE => Ok(Some(db.clone())),
            _ => Err(explain(error)),
        },
    }
}

fn report(outcome: Option<DbError>) {
    let Some(error) = outcome else {
        return screen::answer("COMMIT");
    };
    screen::answer(format!(
        "ERROR {}: {}",
        error.code().code(),
        error.message()
    ));
    for (label, text) in [("DETAIL", error.detail()), ("HINT", error.hint())] {
        if let Some(text) = text {
            screen::answer(format!("{label}: {text}"));
        }
    }
}

fn nodes_of_the_cluster(client: &mut Client) -> Result<()> {
    screen::heading("What an administrator sees");
    for sql in [
        "SELECT my_node_id, name, status, gen_num, gen_members_online FROM mtm.status()",
        "SELECT id, name, enabled, connected, slot_active, slot_lag, n_heartbeats FROM mtm.get_nodes_state()",
    ] {
        screen::statement("node1", sql);
        let messages = client.simple_query(sql).map_err(explain)?;
        let header: Vec<String> = messages
            .iter()
            .find_map(|message| match message {
                SimpleQueryMessage::RowDescription(columns) => Some(
                    columns
                        .iter()
                        .map(|column| column.name().to_owned())
                        .collect(),
                ),
                _ => None,
            })
            .context("the answer has no columns")?;
        let names: Vec<&str> = header.iter().map(String::as_str).collect();
        screen::table(&names, rows(&messages));
    }
    Ok(())
}

fn all_copies_are_equal(cluster: &Cluster) -> Result<()> {
    screen::heading("Checks");
    checks::whole(cluster, Duration::from_secs(10))?;
    screen::good(
        "every table has the same checksum on all nodes, and no transaction is left prepared",
    );
    screen::say("The servers are stopped now, and their data is removed.");
    Ok(())
}

fn name(node: usize) -> String {
    format!("node{}", node + 1)
}

fn run_on(clients: &mut [Client], node: usize, sql: &str) -> Result<()> {
    screen::statement(&name(node), sql);
    clients[node].batch_execute(sql).map_err(explain)
}

fn rows(messages: &[SimpleQueryMessage]) -> Vec<Vec<String>> {
    let cells = |row: &postgres::SimpleQueryRow| {
        (0..row.len())
            .map(|column| row.get(column).unwrap_or("").to_owned())
            .collect()
    };
    messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(cells(row)),
            _ => None,
        })
        .collect()
}

fn query(client: &mut Client, sql: &str) -> Result<String> {
    let messages = client.simple_query(sql).map_err(explain)?;
    Ok(rows(&messages)
        .iter()
        .map(|row| row.join(" | "))
        .collect::<Vec<_>>()
        .join("\n"))
}
