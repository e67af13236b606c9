//! Where the hooks meet DDL replication.

use super::{ddl, hooks, shared};
use protocol::NodeId;

pub use ddl::{after_utility, before_prepare, before_utility, end_of_transaction};

/// Installs DDL replication in this server. Called once, from `_PG_init` in the postmaster.
pub fn register() {
    ddl::install(ddl::Environment {
        replicating: hooks::in_cluster,
        node: own_node,
        note_write: hooks::note_write,
        note_local: hooks::note_harmless,
    });
}

fn own_node() -> NodeId {
    shared::shared()
        .node_id()
        .expect("a node that replicates has a number")
}
