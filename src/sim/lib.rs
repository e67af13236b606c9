//! A deterministic simulator of a cluster, and a model checker's view of it. Both drive the protocol core that ships.
//!
//! A seed decides everything: the weather (losses, doubles, delays), when nodes crash and come back, which links break, what clients
//! do. A crash takes away memory and whatever of WAL was not flushed. After a storm all faults are healed, and the cluster must
//! end every transaction everywhere, forget all of them, and commit new ones. [`run_seed`] gives the same report for the same seed.
//!
//! The invariants and their names are in `checker`; what a node does around its core is in `shell`; exhaustive
//! search is in [`model`].
#![forbid(unsafe_code)]

mod apply;
mod arbiter;
mod change_model;
mod changing;
mod checker;
#[cfg(test)]
mod checker_tests;
mod clones;
mod cluster;
mod event;
mod faults;
mod hazards;
mod members;
mod members_checker;
pub mod model;
mod recovery;
mod referee;
mod rng;
mod server;
mod settling;
mod shell;
mod storm;
mod users;
mod world;

pub use change_model::{ChangeScope, search_changes};
pub use checker::Violation;
pub use clones::CloneFault;
pub use storm::{Report, SeedFailure, Summary, run_seed, run_seed_with, run_seeds, trace_seed};
pub use storm::{run_beside_seed, trace_beside_seed};
pub use storm::{run_changing_seed, run_harsh_seed, trace_changing_seed, trace_harsh_seed};
pub use storm::{run_cloning_seed, trace_cloning_seed};
pub use storm::{run_harsh_refereed_seed, run_refereed_seed, trace_refereed_seed};
pub use users::{UsersFault, run_users_seed, trace_users_seed};
