//! The other nodes: are they in a state in which one can be replaced, and what they have to do for it.

use anyhow::{Context, Result, bail, ensure};
use postgres::{Client, NoTls};

/// Bytes of the fixed row in which a node keeps its membership.
pub const RECORD_BYTES: usize = 64;

/// A working node.
pub struct Node {
    pub id: i32,
    client: Client,
}

/// The nodes that stay.
pub struct Nodes {
    /// In the order of their numbers.
    pub all: Vec<Node>,
    /// Number of the node that is copied from.
    pub donor: i32,
    /// Short name of the cluster, in names of slots.
    pub tag: String,
    lost: i32,
}

/// What the copy begins with.
pub struct Position {
    pub generation: i64,
    /// The membership record of a node that was online in no generation yet.
    pub record: Vec<u8>,
    /// How far into the lost node's WAL some other node has seen.
    pub mark: i64,
}

impl Nodes {
    /// Connects to the donor, and from what it says to all nodes but the lost one.
    pub fn connect(from: &str, lost: i32) -> Result<Nodes> {
        let mut donor = connect(from)?;
        let row = donor
            .query_opt("SELECT node_id, tag FROM mtm.cluster", &[])
            .map_err(explain)
            .context("the server to copy from is no node")?
            .context("the server to copy from belongs to no cluster")?;
        let (donor_id, tag): (i32, String) = (row.get(0), row.get(1));
        let rows = donor
            .query(
                "SELECT node_id, conninfo FROM mtm.cluster_nodes ORDER BY node_id",
                &[],
            )
            .map_err(explain)?;
        let known: Vec<(i32, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        ensure!(
            known.iter().any(|(id, _)| *id == lost),
            "the cluster has no node {lost}"
        );
        ensure!(donor_id != lost, "node {lost} cannot be copied from itself");
        drop(donor);
        let mut all = Vec::new();
        for (id, conninfo) in known.into_iter().filter(|(id, _)| *id != lost) {
            let conninfo = if id == donor_id { from } else { &conninfo };
            let client = connect(conninfo).with_context(|| format!("node {id}"))?;
            all.push(Node { id, client });
        }
        Ok(Nodes {
            all,
            donor: donor_id,
            tag,
            lost,
        })
    }

    /// Name of the slot from which the lost node reads what a node does.
    pub fn slot(&self) -> String {
        format!("mtm_{}_n{}", self.tag, self.lost)
    }

    pub fn donor(&mut self) -> Result<&mut Client> {
        let donor = self.donor;
        let node = self.all.iter_mut().find(|node| node.id == donor);
        Ok(&mut node
            .context("the node to copy from is not connected")?
            .client)
    }

    /// Keeps a second copy from being made at the same time, for as long as this program is connected.
    pub fn lock(&mut self) -> Result<()> {
        let lost = self.lost;
        for node in &mut self.all {
            let row = node
                .client
                .query_one(
                    "SELECT pg_try_advisory_lock(hashtext('multimaster clone'), $1)",
                    &[&lost],
                )
                .map_err(explain)?;
            ensure!(
                row.get::<_, bool>(0),
                "another mtm clone of node {lost} is at work"
            );
        }
        Ok(())
    }

    /// What every node says; all must agree that the lost node can be replaced.
    pub fn position(&mut self) -> Result<Position> {
        let (lost, donor) = (self.lost, self.donor);
        let mut obstacles = Vec::new();
        let mut found: Option<Position> = None;
        for node in &mut self.all {
            let row = node
                .client
                .query_one("SELECT * FROM mtm.copy_state($1)", &[&lost])
                .map_err(explain)
                .with_context(|| format!("node {}", node.id))?;
            if let Some(obstacle) = row.get::<_, Option<String>>("obstacle") {
                obstacles.push(format!("node {}: {obstacle}", node.id));
                continue;
            }
            let generation = row.get("generation");
            let (record, mark): (Vec<u8>, i64) = (row.get("record"), row.get("mark"));
            ensure!(record.len() == RECORD_BYTES, "a record of unknown layout");
            match &mut found {
                None => {
                    found = Some(Position {
                        generation,
                        record,
                        mark,
                    });
                }
                Some(position) => {
                    if position.generation != generation {
                        obstacles.push(format!("node {}: it is in another generation", node.id));
                    }
                    position.mark = position.mark.max(mark);
                    if node.id == donor {
                        position.record = record;
                    }
                }
            }
        }
        match found {
            Some(position) if obstacles.is_empty() => Ok(position),
            _ => bail!(
                "node {lost} cannot be replaced now\n  {}",
                obstacles.join("\n  ")
            ),
        }
    }

    /// Notes the copy on every node; returns its number.
    pub fn begin(&mut self) -> Result<i64> {
        let lost = self.lost;
        let mut number = 0;
        for node in &mut self.all {
            let row = node
                .client
                .query_one("SELECT mtm.begin_copy($1)", &[&lost])
                .map_err(explain)
                .with_context(|| format!("node {}", node.id))?;
            number = number.max(row.get(0));
        }
        Ok(number)
    }

    /// Makes the lost node's slot on every node, from now on; returns where each begins.
    pub fn make_slots(&mut self) -> Result<Vec<(i32, i64)>> {
        let slot = self.slot();
        let mut begins = Vec::new();
        for node in &mut self.all {
            let made = node.make_slot(&slot);
            begins.push((node.id, made.with_context(|| format!("node {}", node.id))?));
        }
        Ok(begins)
    }
}

impl Node {
    fn make_slot(&mut self, slot: &str) -> Result<i64> {
        self.client
            .execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1",
                &[&slot],
            )
            .map_err(explain)?;
        let row = self
            .client
            .query_one(
                "SELECT (lsn - '0/0')::bigint FROM pg_create_logical_replication_slot($1, 'multimaster', false, true)",
                &[&slot],
            )
            .map_err(explain)?;
        Ok(row.get(0))
    }
}

fn connect(conninfo: &str) -> Result<Client> {
    let mut config: postgres::Config = conninfo.parse().context("a connection string")?;
    config.application_name("mtm clone");
    config.connect(NoTls).map_err(explain)
}

/// What the server said, without the client's words around it.
pub fn explain(error: postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(said) => anyhow::anyhow!("{}", said.message()),
        None => error.into(),
    }
}
