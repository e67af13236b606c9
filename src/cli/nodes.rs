//! The other nodes: are they in a state in which one can be replaced, and what they have to do for it.

use anyhow::{Context, Result, bail, ensure};

use crate::server::Programs;
use crate::session::{Session, column};

/// Bytes of the fixed row in which a node keeps its membership.
pub const RECORD_BYTES: usize = 64;

/// A working node.
pub struct Node {
    pub id: i32,
    session: Session,
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
    pub fn connect(programs: &Programs, from: &str, lost: i32) -> Result<Nodes> {
        let mut donor = Session::connect(programs, from).context("the node to copy from")?;
        let (donor_id, tag) = identify(&mut donor).context("the server to copy from")?;
        let rows =
            donor.query("SELECT node_id, conninfo FROM mtm.cluster_nodes ORDER BY node_id")?;
        let known: Vec<(i32, String)> = rows
            .iter()
            .map(|row| Ok((column(row, 0)?, column(row, 1)?)))
            .collect::<Result<_>>()?;
        ensure!(
            known.iter().any(|(id, _)| *id == lost),
            "the cluster has no node {lost}"
        );
        ensure!(donor_id != lost, "node {lost} cannot be copied from itself");
        drop(donor);
        let mut all = Vec::new();
        for (id, conninfo) in known.into_iter().filter(|(id, _)| *id != lost) {
            let conninfo = if id == donor_id { from } else { &conninfo };
            let mut session = Session::connect(programs, conninfo).with_context(|| {
                format!("node {id} (all nodes but the lost one have to be there)")
            })?;
            // Several hosts, a proxy or an address that was given to somebody else: each node has to speak for itself.
            let found = identify(&mut session).with_context(|| format!("node {id}"))?;
            ensure!(
                found == (id, tag.clone()),
                "the connection string of node {id} leads to node {} of cluster {}; it has to lead to node {id} of cluster {tag} alone, and always",
                found.0,
                found.1
            );
            all.push(Node { id, session });
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

    pub fn donor(&mut self) -> Result<&mut Session> {
        let donor = self.donor;
        let node = self.all.iter_mut().find(|node| node.id == donor);
        Ok(&mut node
            .context("the node to copy from is not connected")?
            .session)
    }

    /// Keeps a second copy from being made at the same time, for as long as this program is connected.
    pub fn lock(&mut self) -> Result<()> {
        let lost = self.lost;
        for node in &mut self.all {
            let row = node.session.row(&format!(
                "SELECT pg_try_advisory_lock(hashtext('multimaster clone'), {lost})"
            ))?;
            ensure!(row == ["t"], "another mtm clone of node {lost} is at work");
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
                .session
                .row(&format!(
                    "SELECT obstacle, generation, mark, encode(record, 'hex') FROM mtm.copy_state({lost})"
                ))
                .with_context(|| format!("node {}", node.id))?;
            let obstacle: String = column(&row, 0)?;
            if !obstacle.is_empty() {
                obstacles.push(format!("node {}: {obstacle}", node.id));
                continue;
            }
            let (generation, mark): (i64, i64) = (column(&row, 1)?, column(&row, 2)?);
            let record = bytes(&column::<String>(&row, 3)?)?;
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
                .session
                .row(&format!("SELECT mtm.begin_copy({lost})"))
                .with_context(|| format!("node {}", node.id))?;
            number = number.max(column(&row, 0)?);
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
        self.session.query(&format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}'"
        ))?;
        let row = self.session.row(&format!(
            "SELECT (lsn - '0/0')::bigint FROM pg_create_logical_replication_slot('{slot}', 'multimaster', false, true)"
        ))?;
        column(&row, 0)
    }
}

/// Number and cluster of the node at the other end.
fn identify(session: &mut Session) -> Result<(i32, String)> {
    let rows = session
        .query("SELECT node_id, tag FROM mtm.cluster")
        .context(
            "it does not say which node it is (a superuser of the cluster's database is needed)",
        )?;
    let row = rows.first().context("it belongs to no cluster")?;
    Ok((column(row, 0)?, column(row, 1)?))
}

/// Bytes from hexadecimal digits.
fn bytes(digits: &str) -> Result<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    let bytes = pairs.map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?));
    bytes.collect()
}
