//! What a backend waits for after its PREPARE: the outcome, and then that the other members show it.

use super::gate;
use super::process::{self, Wait};
use super::shared::{self, outcome};
use crate::arbiter::event::{LocalEvent, submit};
use pgrx::pg_sys;
use protocol::Gid;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often a waiting backend looks around although nobody woke it.
const LOOK_AROUND: Duration = Duration::from_millis(500);

/// What is known of the other members at the end of a commit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Peers {
    /// Each member that serves shows it.
    Show,
    /// Nobody can tell any more.
    Unknown,
    /// The user did not want to wait.
    NotAwaited,
}

/// Waits until the arbiter knows the outcome. A cancel, a timeout or a terminate does not end the wait: it starts the resolver, and the client
/// hears what a majority says.
pub(super) fn await_outcome(gid: Gid) -> u32 {
    let slot = shared::my_backend();
    let mut reported = false;
    let result = loop {
        match slot.outcome(gid.xid) {
            outcome::WAITING => {}
            known => break known,
        }
        if !reported && process::interrupt_pending() {
            reported = true;
            submit(&LocalEvent::Interrupted { gid });
        }
        if !shared::shared().arbiter.is_set() && process::terminate_pending() {
            // The server is going down and nobody is left to tell: the resolver decides after the restart.
            break outcome::UNKNOWN;
        }
        process::wait_latch(LOOK_AROUND, Wait::Votes);
    };
    if result != outcome::COMMIT {
        slot.gid.set(None);
    }
    result
}

/// Waits until every member has finished the transaction too. An interrupt ends this wait: the commit is done either way.
///
/// A member that was just lost may serve reads until it is excluded, and not have heard the outcome. So it is waited for until this node goes on without it. If it is this node that is excluded
/// or cut off, or if its arbiter ends, which alone knows who waits (`life`), nobody can tell.
pub(super) fn await_peers(gid: Gid, life: u32) -> Peers {
    let (slot, shared) = (shared::my_backend(), shared::shared());
    while !slot.have_peers_finished(gid.xid) {
        if process::interrupt_pending() {
            return Peers::NotAwaited;
        }
        let standing = shared.standing.get();
        let was_away = !standing.current.members.contains(gid.coordinator)
            || standing.recovered_to > gid.generation;
        if was_away || !gate::may_serve() || shared.epoch.load(Ordering::Acquire) != life {
            return Peers::Unknown;
        }
        process::wait_latch(LOOK_AROUND, Wait::PeerCommits);
    }
    Peers::Show
}

/// A cancel that came while votes were awaited was meant for this command, which has succeeded: it must not hit what core does to end it.
///
/// A procedure goes on after its COMMIT: there the cancel stays, and ends the procedure.
///
/// # Safety
/// In a backend.
pub unsafe fn forget_late_cancel() {
    // SAFETY: plain variables of this process; a portal's fields are valid while it is active.
    unsafe {
        let portal = pg_sys::ActivePortal;
        if portal.is_null()
            || (*portal).commandTag != pg_sys::CommandTag::CMDTAG_CALL
                && (*portal).commandTag != pg_sys::CommandTag::CMDTAG_DO
        {
            pg_sys::QueryCancelPending = 0;
        }
    }
}
