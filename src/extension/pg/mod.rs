//! The only module that may be unsafe: PostgreSQL's C interface behind safe functions.
#![allow(unsafe_code)]

pub mod age;
pub mod apply_error;
pub mod barrier;
pub mod board;
pub mod catalog_scan;
pub mod clock;
pub mod commit;
mod commit_wait;
pub mod ddl;
pub mod ddl_bridge;
pub mod decode;
#[cfg(feature = "failpoints")]
pub mod failpoint;
mod fixed_text;
mod gate;
mod handed_record;
pub mod hooks;
pub mod in_flight;
pub mod invalidation;
pub mod locks;
pub mod memory;
pub mod names;
pub mod outcome;
pub mod process;
mod queue;
mod raw;
pub mod records;
pub mod recovered;
mod refusal;
pub mod remote;
pub mod report;
pub mod rows;
pub mod senders;
pub mod sequences;
mod session_work;
pub mod settings;
pub mod shared;
mod snapshot;
pub mod standby;
mod stretch;
mod strict;
pub mod thread;
pub mod twophase;
mod user_2pc;
pub mod victim;
pub mod walreceiver;
mod workers;

/// Registers shared memory, hooks and the arbiter. Called once, from `_PG_init` in the postmaster.
pub fn register(workers_max: usize) {
    // pgrx would add a backtrace to the DETAIL of every error it catches and raises again, which clients and peers read.
    // SAFETY: the postmaster has one thread.
    unsafe { std::env::remove_var("RUST_BACKTRACE") };
    shared::register(workers_max);
    hooks::register();
    ddl_bridge::register();
    victim::register();
    workers::register();
}
