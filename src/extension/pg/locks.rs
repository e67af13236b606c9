//! Who waits for whom in this server's lock manager, and how to stop somebody.

use super::process;
use super::shared::{self, BackendSlot};
use pgrx::{Spi, pg_sys};
use protocol::Refusal;
use std::collections::BTreeMap;

/// A holder of a lock, or somebody ahead in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// 0: a prepared transaction.
    pub pid: i32,
    backend: i32,
    local_xid: u32,
}

/// The lock table at one moment.
pub struct LockSnapshot {
    locks: Vec<pg_sys::LockInstanceData>,
}

fn same_tag(left: &pg_sys::LOCKTAG, right: &pg_sys::LOCKTAG) -> bool {
    left.locktag_field1 == right.locktag_field1
        && left.locktag_field2 == right.locktag_field2
        && left.locktag_field3 == right.locktag_field3
        && left.locktag_field4 == right.locktag_field4
        && left.locktag_type == right.locktag_type
        && left.locktag_lockmethodid == right.locktag_lockmethodid
}

fn holder_of(lock: &pg_sys::LockInstanceData) -> Holder {
    Holder {
        pid: lock.pid,
        backend: lock.backend,
        local_xid: lock.lxid,
    }
}

impl LockSnapshot {
    /// Copies the lock table; takes all its partition locks for a moment.
    pub fn take() -> LockSnapshot {
        // SAFETY: the function returns one palloc'd struct with one palloc'd array, both freed here.
        unsafe {
            let data = pg_sys::GetLockStatusData();
            let count = (*data).nelements as usize;
            let locks = if count == 0 {
                Vec::new()
            } else {
                std::slice::from_raw_parts((*data).locks, count).to_vec()
            };
            if !(*data).locks.is_null() {
                pg_sys::pfree((*data).locks.cast());
            }
            pg_sys::pfree(data.cast());
            LockSnapshot { locks }
        }
    }

    /// Those in the way of the process: holders of conflicting locks, and conflicting waiters that came earlier.
    pub fn blockers_of(&self, pid: i32) -> Vec<Holder> {
        let Some(wait) = self
            .locks
            .iter()
            .find(|lock| lock.pid == pid && lock.waitLockMode != 0)
        else {
            return Vec::new();
        };
        // SAFETY: the method table is static data of the lock manager.
        let conflicts = unsafe {
            let method = pg_sys::GetLockTagsMethodTable(&wait.locktag);
            *(*method).conflictTab.add(wait.waitLockMode as usize)
        };
        let mut blockers: Vec<Holder> = self
            .locks
            .iter()
            .filter(|lock| {
                same_tag(&lock.locktag, &wait.locktag) && holder_of(lock) != holder_of(wait)
            })
            .filter(|lock| {
                let holds = lock.holdMask & conflicts != 0;
                let ahead = lock.waitLockMode != 0
                    && (1 << lock.waitLockMode) & conflicts != 0
                    && lock.waitStart < wait.waitStart;
                holds || ahead
            })
            .map(holder_of)
            .collect();
        blockers.sort();
        blockers.dedup();
        blockers
    }

    /// Whether somebody waits for the process.
    pub fn is_waited_for(&self, pid: i32) -> bool {
        self.locks
            .iter()
            .filter(|lock| lock.waitLockMode != 0 && lock.pid != pid)
            .any(|waiter| {
                self.blockers_of(waiter.pid)
                    .iter()
                    .any(|holder| holder.pid == pid)
            })
    }

    /// The transaction ids (top and sub) that a holder's transaction owns.
    pub fn xids_of(&self, holder: Holder) -> impl Iterator<Item = u32> + '_ {
        self.locks
            .iter()
            .filter(move |lock| {
                holder_of(lock) == holder
                    && lock.locktag.locktag_type == pg_sys::LockTagType::LOCKTAG_TRANSACTION as u8
                    && lock.holdMask != 0
            })
            .map(|lock| lock.locktag.locktag_field1)
    }
}

/// The database this process is attached to.
pub fn my_database() -> Option<u32> {
    // SAFETY: a plain variable of this process.
    Some(unsafe { pg_sys::MyDatabaseId.to_u32() }).filter(|oid| *oid != 0)
}

/// Whether the process waits for a heavyweight lock at this moment.
pub fn waits_for_lock(pid: i32) -> bool {
    // SAFETY: allProcs lives as long as shared memory; a stale answer is harmless.
    unsafe {
        let proc_ = pg_sys::BackendPidGetProc(pid);
        !proc_.is_null() && !std::ptr::read_volatile(&raw const (*proc_).waitLock).is_null()
    }
}

/// The slot of a process, if it is one of this database server's backends.
pub fn backend_of(pid: i32) -> Option<&'static BackendSlot> {
    // SAFETY: as above.
    unsafe {
        let proc_ = pg_sys::BackendPidGetProc(pid);
        if proc_.is_null() {
            None
        } else {
            shared::backends().get((*proc_).pgprocno as usize)
        }
    }
}

/// Whether somebody waits for a lock of this process.
pub fn somebody_waits_for_me() -> bool {
    // SAFETY: a plain variable of this process.
    LockSnapshot::take().is_waited_for(unsafe { pg_sys::MyProcPid })
}

/// How long this process waits for a lock before it gives up with 55P03; for ever when nothing is given.
pub fn limit_waits(limit: Option<std::time::Duration>) {
    let millis = limit.map_or(0, |limit| limit.as_millis().min(i32::MAX as u128) as i32);
    // SAFETY: the variable of `lock_timeout`, looked at when a wait begins; apply workers set it themselves and have core's handler for it.
    unsafe { pg_sys::LockTimeout = millis };
}

/// Names of prepared transactions by their local xid.
pub fn prepared_names() -> BTreeMap<u32, String> {
    process::in_transaction(|| {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT transaction::text::bigint, gid FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()",
                None,
                &[],
            )?;
            let mut names = BTreeMap::new();
            for row in rows {
                if let (Some(xid), Some(name)) = (row.get::<i64>(1)?, row.get::<String>(2)?) {
                    names.insert(xid as u32, name);
                }
            }
            Ok::<_, pgrx::spi::Error>(names)
        })
        // Taken for none, what is prepared here would be prepared again.
        .unwrap_or_else(|error| pgrx::error!("multimaster cannot read pg_prepared_xacts: {error}"))
    })
}

/// Makes the running transaction of a holder a victim: it can only end with SQLSTATE 40001. A statement that runs is cancelled; a session
/// between two statements learns at the next one. False when it has begun to commit, or is over, or is a victim already.
pub fn cancel_running(holder: Holder, refusal: &Refusal) -> bool {
    // SAFETY: allProcs as above; the handler of SIGINT only sets a flag, which a session between two statements ignores.
    unsafe {
        let proc_ = pg_sys::BackendPidGetProc(holder.pid);
        if proc_.is_null() {
            return false;
        }
        let interrupt = || libc::kill(holder.pid, libc::SIGINT) == 0;
        if (*proc_).statusFlags & pg_sys::PROC_IS_AUTOVACUUM as u8 != 0 {
            return interrupt();
        }
        // Session locks have no transaction.
        let still_running = || {
            holder.local_xid == 0
                || std::ptr::read_volatile(&raw const (*proc_).lxid) == holder.local_xid
        };
        shared::backends()
            .get((*proc_).pgprocno as usize)
            .is_some_and(|slot| slot.make_victim(refusal, still_running, interrupt))
    }
}

/// Ends the session of a victim that does not come back to learn of it.
pub fn end_session(pid: i32) -> bool {
    // SAFETY: allProcs as above; sending a procsignal to a process that is gone does nothing.
    unsafe {
        let proc_ = pg_sys::BackendPidGetProc(pid);
        if proc_.is_null() {
            return false;
        }
        // Core's own signal for "must give way, nothing happened, retry": FATAL with 40001 for an idle session.
        pg_sys::SendProcSignal(
            pid,
            pg_sys::ProcSignalReason::PROCSIG_RECOVERY_CONFLICT_LOCK,
            (*proc_).backendId,
        ) == 0
    }
}

/// Interrupts an apply worker. Callable from any thread.
pub fn interrupt_process(pid: i32) {
    if pid > 0 {
        // SAFETY: kill(2) with a pid of one of our own workers; its handler only sets a flag.
        unsafe { libc::kill(pid, libc::SIGINT) };
    }
}
