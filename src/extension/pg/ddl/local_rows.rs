//! Rows that a replicated statement writes by itself on every node.
//!
//! The script of an extension may fill tables. The statement is shipped and runs the script everywhere, so the rows must not travel too. While
//! it runs, its WAL is tagged with the origin that the output plugin filters, as an apply worker's is. The tag is a variable of the process that no
//! transaction restores, and a tag that stayed would lose rows: it is taken back at the end of the command, of the subtransaction in which
//! it was set, and of the transaction.

use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::c_void;

/// `DoNotReplicateId` of replication/origin.h.
const DO_NOT_REPLICATE: pg_sys::RepOriginId = 0xffff;

#[derive(Clone, Copy)]
struct Tagged {
    former: pg_sys::RepOriginId,
    nest_level: i32,
}

thread_local! {
    static TAGGED: Cell<Option<Tagged>> = const { Cell::new(None) };
}

pub fn install() {
    // SAFETY: called in the postmaster, before any child exists.
    unsafe { pg_sys::RegisterSubXactCallback(Some(subtransaction_event), std::ptr::null_mut()) }
}

/// From here on the rows this process writes stay on this node.
pub fn begin() {
    if TAGGED.get().is_some() {
        return;
    }
    // SAFETY: plain variables of this process.
    unsafe {
        let former = pg_sys::replorigin_session_origin;
        TAGGED.set(Some(Tagged {
            former,
            nest_level: pg_sys::GetCurrentTransactionNestLevel(),
        }));
        pg_sys::replorigin_session_origin = DO_NOT_REPLICATE;
    }
}

/// Rows replicate again. Never raises.
pub fn end() {
    if let Some(tagged) = TAGGED.take() {
        // SAFETY: a plain variable of this process.
        unsafe { pg_sys::replorigin_session_origin = tagged.former }
    }
}

unsafe extern "C-unwind" fn subtransaction_event(
    event: pg_sys::SubXactEvent::Type,
    _subtransaction: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _argument: *mut c_void,
) {
    let Some(tagged) = TAGGED.get() else { return };
    // SAFETY: reads the transaction state; cannot raise.
    let level = unsafe { pg_sys::GetCurrentTransactionNestLevel() };
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB && tagged.nest_level >= level {
        end();
    }
}
