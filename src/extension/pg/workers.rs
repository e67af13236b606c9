//! Entry points of our background workers, and the registration of the one that starts with the server.

use crate::{apply, arbiter, conflict};
use pgrx::bgworkers::{BackgroundWorkerBuilder, BgWorkerStartTime};
use pgrx::prelude::*;
use protocol::NodeId;
use std::time::Duration;

/// Registers the arbiter. Called from `_PG_init` in the postmaster.
pub fn register() {
    BackgroundWorkerBuilder::new("multimaster arbiter")
        .set_type("multimaster arbiter")
        .set_library("multimaster")
        .set_function("multimaster_arbiter_main")
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_arbiter_main(_argument: pg_sys::Datum) {
    arbiter::main();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_finder_main(argument: pg_sys::Datum) {
    arbiter::find(argument.value() as u32);
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_slot_maker_main(_argument: pg_sys::Datum) {
    arbiter::slots::main();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_monitor_main(_argument: pg_sys::Datum) {
    conflict::main();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_finisher_main(_argument: pg_sys::Datum) {
    apply::finish::main();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_receiver_main(argument: pg_sys::Datum) {
    if let Some(peer) = NodeId::new(argument.value() as u8) {
        apply::receiver::main(peer);
    }
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_worker_main(argument: pg_sys::Datum) {
    apply::worker::main(argument.value());
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_referee_main(_argument: pg_sys::Datum) {
    arbiter::referee::main();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn multimaster_recovery_main(argument: pg_sys::Datum) {
    if let Some(donor) = NodeId::new(argument.value() as u8) {
        apply::recovery::main(donor);
    }
}
