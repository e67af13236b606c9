//! multimaster: synchronous multi-master clusters on unpatched PostgreSQL.
//!
//! `docs/architecture.md` shows the processes and the rules between them. `pg` holds everything unsafe; the other modules
//! are plain Rust on top of it.

pub mod apply;
pub mod arbiter;
pub mod cluster;
pub mod conflict;
pub mod decode;
pub mod failpoint;
mod fate;
pub mod guc;
mod latency;
pub mod pg;
mod state;
pub mod views;

::pgrx::pg_module_magic!();

use pgrx::prelude::*;

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    cluster::preflight::check_preloading();
    // guc::register() reserves the prefix of the settings at its end.
    #[cfg(feature = "failpoints")]
    pg::failpoint::register();
    guc::register();
    cluster::preflight::check_server();
    pg::register(guc::max_workers());
    cluster::set_arbiter_waker(state::wake_arbiter);
    decode::set_environment(state::decode_environment());
    views::set_source(&state::SOURCE);
}
