//! How a transaction of this node ended, from pg_xact.

use pgrx::pg_sys;
use protocol::Decision;

/// The outcome of this node's own transaction; none while it is prepared or running, or when it is too old for pg_xact to know.
///
/// Runs in a transaction.
pub fn of_own_transaction(full_xid: u64) -> Option<Decision> {
    let xid = pg_sys::TransactionId::from(full_xid as u32);
    // SAFETY: reads of the procarray and pg_xact; the bounds make sure that pg_xact still has the page.
    unsafe {
        let next = pg_sys::ReadNextFullTransactionId().value;
        let oldest = pg_sys::ShmemVariableCache.as_ref()?.oldestClogXid;
        if full_xid >= next
            || next - full_xid > u64::from(u32::MAX / 2)
            || pg_sys::TransactionIdPrecedes(xid, oldest)
        {
            return None;
        }
        // In this order: a transaction leaves the procarray after its fate is in pg_xact.
        if pg_sys::TransactionIdIsInProgress(xid) {
            return None;
        }
        Some(if pg_sys::TransactionIdDidCommit(xid) {
            Decision::Commit
        } else {
            Decision::Abort
        })
    }
}

/// The xid that the next transaction will get.
pub fn next_xid() -> u64 {
    // SAFETY: reads shared memory under its lock.
    unsafe { pg_sys::ReadNextFullTransactionId().value }
}

/// Whether a transaction of this node is running or prepared at this moment.
pub fn is_running(full_xid: u64) -> bool {
    // SAFETY: reads of the procarray.
    unsafe {
        full_xid < pg_sys::ReadNextFullTransactionId().value
            && pg_sys::TransactionIdIsInProgress(pg_sys::TransactionId::from(full_xid as u32))
    }
}

/// The same without the lock, callable from any thread: not below the xid of a transaction whose end the caller knows of.
pub fn next_xid_unlocked() -> u64 {
    // SAFETY: shared memory that exists as long as the process; an aligned word is read in one piece.
    unsafe { (&raw const (*pg_sys::ShmemVariableCache).nextXid.value).read_volatile() }
}
