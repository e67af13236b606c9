//! Questions about a whole cluster: are all copies equal, is anything left behind?

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use postgres::Client;

use crate::cluster::{Cluster, wait_for};
use crate::command;
use crate::server::Server;

/// Ordinary, permanent, replicated tables of users.
const USER_TABLES: &str = "
    SELECT c.oid::regclass::text
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relpersistence = 'p'
      AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'mtm') AND n.nspname !~ '^pg_(toast|temp)'
    ORDER BY 1";

/// Number of rows and a hash of them all that does not depend on their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    pub rows: i64,
    pub hash: String,
}

/// One node's tables and their checksums.
pub type Checksums = BTreeMap<String, Checksum>;

/// Reads every user table of one node, in one snapshot.
///
/// # Errors
/// When the node refuses.
pub fn checksums(client: &mut Client) -> Result<Checksums> {
    let mut snapshot = client
        .build_transaction()
        .isolation_level(postgres::IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()?;
    snapshot.batch_execute("SET LOCAL search_path = ''; SET LOCAL timezone = 'UTC'")?;
    let mut sums = Checksums::new();
    for row in snapshot.query(USER_TABLES, &[])? {
        let table: String = row.get(0);
        let sql = format!(
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM ONLY {table} t"
        );
        let found = snapshot
            .query_one(&sql, &[])
            .with_context(|| format!("cannot read {table}"))?;
        sums.insert(
            table,
            Checksum {
                rows: found.get(0),
                hash: found.get(1),
            },
        );
    }
    Ok(sums)
}

/// What differs between two nodes, one line per table; empty when they are equal.
pub fn differences(one: &Checksums, other: &Checksums) -> Vec<String> {
    let describe = |sum: Option<&Checksum>| {
        sum.map_or("absent".to_owned(), |sum| {
            format!("{} rows ({})", sum.rows, sum.hash)
        })
    };
    let mut tables: Vec<&String> = one.keys().chain(other.keys()).collect();
    tables.sort();
    tables.dedup();
    tables
        .into_iter()
        .filter(|table| one.get(*table) != other.get(*table))
        .map(|table| {
            format!(
                "{table}: {} / {}",
                describe(one.get(table)),
                describe(other.get(table))
            )
        })
        .collect()
}

/// Prepared transactions that exist on a node, by gid.
///
/// # Errors
/// When the node refuses.
pub fn prepared_left(client: &mut Client) -> Result<Vec<String>> {
    let rows = client.query("SELECT gid FROM pg_prepared_xacts ORDER BY 1", &[])?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Waits until all nodes hold the same rows and no prepared transaction is left anywhere.
///
/// # Errors
/// What is still different or left when `limit` has passed.
pub fn whole(cluster: &Cluster, limit: Duration) -> Result<()> {
    let mut clients = cluster.connect_all()?;
    let mut complaint = String::new();
    let outcome = wait_for("equal nodes with nothing prepared", limit, || {
        complaint = complaints(cluster, &mut clients)?.join("\n");
        Ok(complaint.is_empty())
    });
    match outcome {
        Err(error) if !complaint.is_empty() => bail!("{error:#}\n{complaint}"),
        other => other,
    }
}

fn complaints(cluster: &Cluster, clients: &mut [Client]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut first: Option<Checksums> = None;
    for (node, client) in cluster.nodes.iter().zip(clients) {
        let left = prepared_left(client)?;
        if !left.is_empty() {
            found.push(format!("{}: still prepared: {}", node.name, left.join(" ")));
        }
        let sums = checksums(client)?;
        match &first {
            None => first = Some(sums),
            Some(reference) => {
                let differs = differences(reference, &sums);
                found.extend(
                    differs
                        .into_iter()
                        .map(|line| format!("node1 / {}: {line}", node.name)),
                );
            }
        }
    }
    Ok(found)
}

/// All definitions of a node's database, as pg_dump writes them, but for what is each node's own.
///
/// # Errors
/// When pg_dump fails.
pub fn schema(server: &Server) -> Result<String> {
    let mut pg_dump = server.client_program("pg_dump");
    let text = command::capture(pg_dump.args(["--schema-only", "--exclude-schema=mtm"]))?;
    let lines = text.lines().filter(|line| !is_own(line));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Each dump has a random key, and each node its share of a sequence's numbers.
fn is_own(line: &str) -> bool {
    ["\\restrict", "\\unrestrict", "START WITH"]
        .iter()
        .any(|start| line.trim_start().starts_with(start))
}
