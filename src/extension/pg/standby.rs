//! Synchronous standbys: what this node has told its peers must be on the standby that may take its place.
//!
//! PostgreSQL waits for such a standby before it answers a client, but it streams to logical receivers what is flushed here. A peer would prepare and
//! prove the vote of a transaction that the standby has never seen, and would commit it without the promoted standby. And a session that lowers
//! `synchronous_commit` would do so with its own commits. A transaction here is not the session's alone, so neither happens.

use super::process::{self, Wait};
use super::raw;
use pgrx::pg_sys;
use std::ffi::CStr;
use std::time::{Duration, Instant};

const SETTING: &CStr = c"synchronous_commit";
/// Waits for the flush on the standby. More (`remote_apply`) may be asked for, less may not.
const LEAST: &CStr = c"on";
/// How often a walsender looks whether the standby has caught up. Nobody wakes it.
const PAUSE: Duration = Duration::from_millis(1);
/// After this a walsender ends instead, so that a server that shuts down without its standby does not wait for it. The peer connects again.
const PATIENCE: Duration = Duration::from_secs(5);
/// Place of the flushed position in `WalSndCtl->lsn` (`SYNC_REP_WAIT_FLUSH` of replication/syncrep.h).
const FLUSHED: usize = 1;

/// Whether the server has synchronous standbys, and this process would not wait for their flush by its present setting.
fn is_lowered() -> bool {
    // SAFETY: a plain setting of this process.
    has_synchronous()
        && unsafe { pg_sys::synchronous_commit }
            < pg_sys::SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_FLUSH as i32
}

/// Whether the server has synchronous standbys.
pub fn has_synchronous() -> bool {
    // SAFETY: a setting of this process: null or a zero-terminated text.
    unsafe { !pg_sys::SyncRepStandbyNames.is_null() && pg_sys::SyncRepStandbyNames.read() != 0 }
}

/// Lets the running transaction wait for synchronous standbys, whatever the session has set; ends with it.
///
/// # Safety
/// In a transaction; the caller's frames own nothing with a destructor.
pub unsafe fn wait_in_transaction() {
    if is_lowered() {
        // SAFETY: zero-terminated literals that the setting takes.
        unsafe {
            raw::set_config_option(
                SETTING.as_ptr(),
                LEAST.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_LOCAL,
                true,
                0,
                false,
            );
        }
    }
}

/// Lets a background worker wait for synchronous standbys, whatever the server's default is.
pub fn wait_always() {
    // SAFETY: as above, outside of any transaction; guarded.
    unsafe {
        if pg_sys::synchronous_commit
            < pg_sys::SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_FLUSH as i32
        {
            pg_sys::SetConfigOption(
                SETTING.as_ptr(),
                LEAST.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

/// Waits, in a walsender, until the synchronous standbys have flushed WAL up to `lsn`. Returns at once where there are none, and where the receiver is
/// one of them itself. Raises (unwinding) after [`PATIENCE`].
pub fn await_flush(lsn: protocol::Lsn) {
    if !has_synchronous() || receiver_is_candidate() {
        return;
    }
    let begun = Instant::now();
    while flushed_there() < lsn {
        pgrx::check_for_interrupts!();
        if begun.elapsed() > PATIENCE {
            pgrx::error!(
                "multimaster waits for a synchronous standby, which has not received WAL up to {lsn}"
            );
        }
        process::wait_latch(PAUSE, Wait::Work);
    }
}

/// Whether whom this walsender serves is named as a synchronous standby: waiting for it would be waiting for ourselves.
fn receiver_is_candidate() -> bool {
    // SAFETY: null, or this process's slot in shared memory.
    unsafe { pg_sys::MyWalSnd.as_ref() }.is_some_and(|sender| sender.sync_standby_priority > 0)
}

fn flushed_there() -> protocol::Lsn {
    // SAFETY: shared memory that every process is attached to; a position is one aligned word that only grows.
    protocol::Lsn(unsafe { std::ptr::read_volatile(&raw const (*pg_sys::WalSndCtl).lsn[FLUSHED]) })
}
