//! What `mtm.init_cluster` writes on each node, and how it is taken back.
//!
//! Nothing here is visible to the arbiter before the state is `active`. A slot waits for all transactions that run on its server to end, so no
//! session of `mtm.init_cluster` may hold a transaction id while slots are made, on any node.

use pgrx::spi::quote_literal;
use protocol::{ClusterTag, NodeId};

use super::error::Problem;
use super::member::{Member, node_name};
use super::preflight::LIBRARY;

/// Name of the replication origin that tells the arbiter which database the cluster is in.
const MARKER: &str = "(SELECT 'mtm_' || oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

/// What all nodes of the new cluster have in common.
pub struct Plan {
    /// 16 bytes in hexadecimal.
    pub cluster_id: String,
    pub tag: ClusterTag,
    /// 32 bytes in hexadecimal.
    pub secret: String,
    pub nodes: Vec<PlannedNode>,
}

/// One row of `mtm.cluster_nodes`.
pub struct PlannedNode {
    pub id: NodeId,
    pub conninfo: String,
    pub arbiter_host: String,
    pub arbiter_port: u16,
}

/// Name of the slot on which `peer` reads what a node of the cluster does.
pub fn slot_name(tag: ClusterTag, peer: NodeId) -> String {
    format!("mtm_{tag}_n{peer}")
}

/// What [`create_extension`] had to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    Extension,
    /// The schema was missing too. PostgreSQL makes it with the extension, but does not drop it with the extension.
    ExtensionAndSchema,
}

/// Makes the extension where it is missing.
pub fn create_extension(member: &Member) -> Result<Option<Made>, Problem> {
    let installed = "SELECT extname FROM pg_catalog.pg_extension WHERE extname = 'multimaster'";
    if member.value(installed)?.is_some() {
        return Ok(None);
    }
    let schema = member.value("SELECT pg_catalog.to_regnamespace('mtm')")?;
    member.run("CREATE EXTENSION multimaster")?;
    Ok(Some(match schema {
        Some(_) => Made::Extension,
        None => Made::ExtensionAndSchema,
    }))
}

/// Removes what [`create_extension`] has made.
pub fn drop_extension(member: &Member, made: Made) -> Result<(), Problem> {
    member.run("DROP EXTENSION IF EXISTS multimaster")?;
    match made {
        Made::Extension => Ok(()),
        Made::ExtensionAndSchema => member.run("DROP SCHEMA IF EXISTS mtm"),
    }
}

/// Writes who the nodes are, in one transaction. Slots come later, see the module's comment.
pub fn write_identity(member: &Member, plan: &Plan) -> Result<(), Problem> {
    member.run("BEGIN")?;
    member.run(&cluster_row(member.id, plan))?;
    for node in &plan.nodes {
        member.run(&node_row(node))?;
    }
    member.query(
        &format!("SELECT pg_catalog.pg_replication_origin_create({MARKER})"),
        1,
    )?;
    member.run("COMMIT")
}

fn cluster_row(own: NodeId, plan: &Plan) -> String {
    format!(
        "INSERT INTO mtm.cluster (cluster_id, tag, node_id, state, secret) \
         VALUES ({}, {}, {own}, 'forming', pg_catalog.decode({}, 'hex'))",
        quote_literal(&plan.cluster_id),
        quote_literal(plan.tag.to_string()),
        quote_literal(&plan.secret),
    )
}

fn node_row(node: &PlannedNode) -> String {
    format!(
        "INSERT INTO mtm.cluster_nodes (node_id, name, conninfo, arbiter_host, arbiter_port) \
         VALUES ({}, {}, {}, {}, {})",
        node.id,
        quote_literal(node_name(node.id)),
        quote_literal(&node.conninfo),
        quote_literal(&node.arbiter_host),
        node.arbiter_port,
    )
}

/// Makes one slot for each peer of the node, and notes where it begins (see `arbiter::slots`).
pub fn create_slots(member: &Member, plan: &Plan) -> Result<(), Problem> {
    let peers = plan
        .nodes
        .iter()
        .map(|node| node.id)
        .filter(|&id| id != member.id);
    for peer in peers {
        let name = quote_literal(slot_name(plan.tag, peer));
        let sql = format!(
            "INSERT INTO mtm.slots_made SELECT slot_name, lsn FROM pg_catalog.pg_create_logical_replication_slot({name}, '{LIBRARY}', false, true) \
             ON CONFLICT (slot_name) DO UPDATE SET made_at = excluded.made_at RETURNING slot_name"
        );
        member
            .query(&sql, 1)
            .map_err(|problem| explain_wait(member, problem))?;
    }
    Ok(())
}

/// Names the transactions for which a slot has waited in vain.
fn explain_wait(member: &Member, problem: Problem) -> Problem {
    if !problem.cause.starts_with("canceling statement") {
        return problem;
    }
    let oldest = member.value(
        "SELECT pg_catalog.string_agg(pid::text, ', ') FROM pg_catalog.pg_stat_activity \
         WHERE backend_xid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid()",
    );
    match oldest {
        Ok(Some(pids)) => Problem {
            cause: format!(
                "{}\nA slot waits for all writing transactions to end; processes with one: {pids}",
                problem.cause
            ),
            ..problem
        },
        _ => problem,
    }
}

/// Lets the arbiter find the cluster.
pub fn activate(member: &Member) -> Result<(), Problem> {
    member.run("UPDATE mtm.cluster SET state = 'active'")
}

/// Tells the node's arbiter to look.
pub fn wake_arbiter(member: &Member) -> Result<(), Problem> {
    member.query("SELECT mtm.wake_arbiter()", 1).map(drop)
}

/// Removes what this or an earlier run has left on a node that belongs to no cluster. Safe to repeat.
pub fn clear(member: &Member) -> Result<(), Problem> {
    let slots = format!(
        "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots \
         WHERE plugin = '{LIBRARY}' AND database = pg_catalog.current_database() AND slot_name ~ '^mtm_[0-9a-f]{{8}}_n'"
    );
    member.query(&slots, 1)?;
    member.query(
        &format!(
            "SELECT pg_catalog.pg_replication_origin_drop(roname) FROM pg_catalog.pg_replication_origin WHERE roname = {MARKER}"
        ),
        1,
    )?;
    let extension = "SELECT extname FROM pg_catalog.pg_extension WHERE extname = 'multimaster'";
    if member.value(extension)?.is_some() {
        member.run("DELETE FROM mtm.cluster")?;
        member.run("DELETE FROM mtm.cluster_nodes")?;
    }
    Ok(())
}
