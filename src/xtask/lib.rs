//! What `cargo xtask` is made of: set-up of the machine, build of the extension, private PostgreSQL servers, and the
//! commands that use them. The tests under `tests/` use the same [`cluster`] and [`server`].

#![forbid(unsafe_code)]

pub mod assert_build;
pub mod bench;
pub mod checks;
pub mod cluster;
pub mod command;
pub mod demo;
pub mod extension;
pub mod host;
pub mod installation;
pub mod network;
pub mod pgbench;
pub mod profile;
pub mod screen;
pub mod server;
pub mod setup;
pub mod simulate;
pub mod suite;
pub mod tally;
pub mod trace;
