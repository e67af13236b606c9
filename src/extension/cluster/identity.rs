//! Who this node is: what `mtm.init_cluster` wrote, as the arbiter and the receivers read it.

use pgrx::prelude::*;
use pgrx::spi::SpiError;
use protocol::{ClusterTag, NodeId};

/// Whether the cluster exists or is still being formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// `mtm.init_cluster` is at work, or died here: the server is to behave as if there were no cluster.
    Forming,
    Active,
}

/// One configured node.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeAddress {
    pub id: NodeId,
    pub name: String,
    /// May hold a password: never to be logged.
    pub conninfo: String,
    pub arbiter_host: String,
    pub arbiter_port: u16,
}

/// The cluster that this database belongs to, and this node's place in it.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub cluster_id: u128,
    pub tag: ClusterTag,
    pub node_id: NodeId,
    pub state: ClusterState,
    /// Never to be logged.
    pub secret: [u8; 32],
    /// All configured nodes including this one, in the order of their ids.
    pub nodes: Vec<NodeAddress>,
}

/// Why an identity could not be read.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("could not read mtm.cluster: {0}")]
    Catalog(#[from] SpiError),
    #[error("mtm.{table}.{column} holds no valid value")]
    Invalid {
        table: &'static str,
        column: &'static str,
    },
}

const INSTALLED_SQL: &str = "SELECT pg_catalog.to_regclass('mtm.cluster') IS NOT NULL";

const CLUSTER_SQL: &str =
    "SELECT pg_catalog.uuid_send(cluster_id), tag, node_id, state, secret FROM mtm.cluster";

const NODES_SQL: &str = "SELECT node_id, name, conninfo, arbiter_host, arbiter_port FROM mtm.cluster_nodes ORDER BY node_id";

/// OID of the database whose cluster this server carries, from the replication origin that marks it; can be asked in any database.
const MARKER_SQL: &str = "SELECT pg_catalog.substr(o.roname, 5)::pg_catalog.int8 FROM pg_catalog.pg_replication_origin o \
     JOIN pg_catalog.pg_database d ON o.roname = 'mtm_' || d.oid";

/// OID of the database that belongs to a cluster, whichever database the caller is connected to.
///
/// Needs a transaction.
pub fn cluster_database() -> Result<Option<u32>, IdentityError> {
    let oid = first_row(MARKER_SQL, |row| row.get::<i64>(1))?;
    Ok(oid.flatten().and_then(|oid| u32::try_from(oid).ok()))
}

impl Identity {
    /// Reads the identity of this database's node; `None` when there is no cluster, or no extension.
    ///
    /// Needs a transaction.
    pub fn load() -> Result<Option<Identity>, IdentityError> {
        let installed = first_row(INSTALLED_SQL, |row| row.get::<bool>(1))?;
        if installed.flatten() != Some(true) {
            return Ok(None);
        }
        let row = first_row(CLUSTER_SQL, |row| {
            let row = (
                row.get::<Vec<u8>>(1)?,
                row.get(2)?,
                row.get(3)?,
                row.get(4)?,
                row.get(5)?,
            );
            Ok::<ClusterRow, SpiError>(row)
        })?;
        row.map(identity).transpose()
    }

    /// The entry of this node itself.
    pub fn own(&self) -> Option<&NodeAddress> {
        self.nodes.iter().find(|node| node.id == self.node_id)
    }

    /// The other configured nodes.
    pub fn peers(&self) -> impl Iterator<Item = &NodeAddress> {
        self.nodes.iter().filter(|node| node.id != self.node_id)
    }
}

/// Cluster id, tag, node id, state, secret.
type ClusterRow = (
    Option<Vec<u8>>,
    Option<String>,
    Option<i32>,
    Option<String>,
    Option<Vec<u8>>,
);

fn identity(row: ClusterRow) -> Result<Identity, IdentityError> {
    let (cluster_id, tag, node_id, state, secret) = row;
    let invalid = |column| IdentityError::Invalid {
        table: "cluster",
        column,
    };
    let cluster_id: Option<[u8; 16]> = cluster_id.and_then(|bytes| bytes.try_into().ok());
    let tag = tag.and_then(|tag| u32::from_str_radix(&tag, 16).ok());
    let secret: Option<[u8; 32]> = secret.and_then(|bytes| bytes.try_into().ok());
    Ok(Identity {
        cluster_id: cluster_id
            .map(u128::from_be_bytes)
            .ok_or_else(|| invalid("cluster_id"))?,
        tag: tag.map(ClusterTag).ok_or_else(|| invalid("tag"))?,
        node_id: node_id
            .and_then(valid_id)
            .ok_or_else(|| invalid("node_id"))?,
        state: match state.as_deref() {
            Some("forming") => ClusterState::Forming,
            Some("active") => ClusterState::Active,
            _ => return Err(invalid("state")),
        },
        secret: secret.ok_or_else(|| invalid("secret"))?,
        nodes: nodes()?,
    })
}

fn valid_id(id: i32) -> Option<NodeId> {
    NodeId::new(u8::try_from(id).ok()?)
}

fn nodes() -> Result<Vec<NodeAddress>, IdentityError> {
    let invalid = |column| IdentityError::Invalid {
        table: "cluster_nodes",
        column,
    };
    Spi::connect(|client| {
        let mut nodes = Vec::new();
        for row in client.select(NODES_SQL, None, &[])? {
            let port = row.get::<i32>(5)?.and_then(|port| u16::try_from(port).ok());
            nodes.push(NodeAddress {
                id: row
                    .get(1)?
                    .and_then(valid_id)
                    .ok_or_else(|| invalid("node_id"))?,
                name: row.get(2)?.ok_or_else(|| invalid("name"))?,
                conninfo: row.get(3)?.ok_or_else(|| invalid("conninfo"))?,
                arbiter_host: row.get(4)?.ok_or_else(|| invalid("arbiter_host"))?,
                arbiter_port: port.ok_or_else(|| invalid("arbiter_port"))?,
            });
        }
        Ok(nodes)
    })
}

/// Reads the first row of a query; `None` when there is none.
///
/// In contrast to `Spi::get_one` it gives the transaction no id, for which a slot that is being made would wait.
pub fn first_row<T>(
    sql: &str,
    read: impl FnOnce(&pgrx::spi::SpiHeapTupleData<'_>) -> Result<T, SpiError>,
) -> Result<Option<T>, IdentityError> {
    Spi::connect(|client| {
        let row = client.select(sql, Some(1), &[])?.next();
        Ok(row.as_ref().map(read).transpose()?)
    })
}
