//! The cluster as this node has it on disk: whether the server can be a node, how nodes become a cluster, and who they are.
//!
//! - `preflight`: settings without which the server does not start, or cannot join.
//! - `init`: `mtm.init_cluster`. It works through connections only, one to every node including its own server, in the steps `member`
//!   (connect), `facts` and `checks` (look, without changing anything), `setup` (write; undone everywhere if a node fails).
//! - `copy`: what `mtm clone` asks of the nodes, and what a copy finds about itself.
//! - `rejoin`: `mtm.rejoin`, for a node that has given up.
//! - `identity`: what the arbiter reads when it starts.
//!
//! What happens in shared memory and on the arbiter's sockets is elsewhere.

mod checks;
mod conninfo;
pub mod copy;
mod data;
mod error;
mod facts;
pub mod identity;
mod init;
mod member;
pub mod preflight;
mod rejoin;
mod setup;

use std::sync::OnceLock;

use pgrx::prelude::*;

pub use conninfo::Conninfo;
pub use identity::Identity;
pub use setup::slot_name;

use crate::pg::settings;

static ARBITER_WAKER: OnceLock<fn()> = OnceLock::new();

/// Says how a backend makes the arbiter read `mtm.cluster` again. Call once, in the postmaster.
pub fn set_arbiter_waker(waker: fn()) {
    ARBITER_WAKER.get_or_init(|| waker);
}

/// Makes this server's arbiter notice what became of `mtm.cluster`. Call after the change is committed.
#[pg_extern]
fn wake_arbiter() {
    require_superuser();
    if let Some(waker) = ARBITER_WAKER.get() {
        waker();
    }
}

/// Raises 42501 unless the current user is a superuser.
fn require_superuser() {
    if !settings::superuser() {
        error::InitError::NotSuperuser.raise();
    }
}
