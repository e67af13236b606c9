//! What the output plugin has to know about this node.

use protocol::{Csn, Generation, NodeId};
use std::sync::OnceLock;

/// Answers that live in shared memory, which the plugin itself knows nothing of. Each may be asked in any walsender, at
/// any time between the start of the server and its end; none may raise an error.
#[derive(Debug, Clone, Copy)]
pub struct Environment {
    /// This node, once it belongs to a cluster.
    pub node: fn() -> Option<NodeId>,
    /// The generation a transaction prepared now belongs to.
    pub generation: fn() -> Generation,
    /// Appends, per coordinator, the highest commit that may be visible here.
    pub visible: fn(&mut Vec<(NodeId, Csn)>),
    /// Whether the table (schema, name) was made local and is not replicated.
    pub is_local: fn(&[u8], &[u8]) -> bool,
}

static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();

/// To be called once, when the library is loaded; later calls change nothing.
pub fn set_environment(environment: Environment) {
    let _ = ENVIRONMENT.set(environment);
}

pub fn environment() -> Option<Environment> {
    ENVIRONMENT.get().copied()
}
