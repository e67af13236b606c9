//! Processes of the server that can be woken.

use super::super::raw;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicU32, Ordering};

/// A process that can be woken: its index in `ProcGlobal->allProcs` plus one; 0 is nobody.
#[repr(transparent)]
pub struct ProcCell(AtomicU32);

impl ProcCell {
    /// Remembers the calling process.
    pub fn set_self(&self) {
        self.0.store(my_proc_number() as u32 + 1, Ordering::Release);
    }

    pub fn clear(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Takes an empty cell for the calling process; false when another process is in it.
    pub fn claim(&self) -> bool {
        self.0
            .compare_exchange(
                0,
                my_proc_number() as u32 + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// Empties the cell, if the calling process is in it; says whether it was.
    pub fn release(&self) -> bool {
        self.0
            .compare_exchange(
                my_proc_number() as u32 + 1,
                0,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// Sets the process's latch, if there is a process. Callable from any thread.
    pub fn wake(&self) {
        let number = self.0.load(Ordering::Acquire);
        if number != 0 {
            wake_proc(number as usize - 1);
        }
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Whether it is the calling process.
    pub fn is_self(&self) -> bool {
        self.0.load(Ordering::Acquire) == my_proc_number() as u32 + 1
    }

    /// Whether the process waits for a lock of the lock manager, which rows and transactions have too. Callable from any thread.
    pub fn waits_for_lock(&self) -> bool {
        match self.0.load(Ordering::Acquire) {
            0 => false,
            // SAFETY: as in pid(); a plain word that the process and whoever grants the lock write.
            number => unsafe {
                let process = (*pg_sys::ProcGlobal).allProcs.add(number as usize - 1);
                std::ptr::read_volatile(&raw const (*process).waitStatus)
                    == pg_sys::ProcWaitStatus::PROC_WAIT_STATUS_WAITING
            },
        }
    }

    pub fn pid(&self) -> i32 {
        match self.0.load(Ordering::Acquire) {
            0 => 0,
            // SAFETY: allProcs lives as long as shared memory and the index came from a process's own pgprocno.
            number => unsafe { (*(*pg_sys::ProcGlobal).allProcs.add(number as usize - 1)).pid },
        }
    }
}

pub(super) fn my_proc_number() -> usize {
    // SAFETY: MyProc is set in every process that attached to shared memory.
    unsafe { (*pg_sys::MyProc).pgprocno as usize }
}

/// Index of the calling process among `backends()`.
pub fn my_backend_index() -> u32 {
    my_proc_number() as u32
}

/// Sets the latch of a process by its number in `allProcs`. Callable from any thread.
pub fn wake_proc(number: usize) {
    // SAFETY: allProcs lives as long as shared memory; SetLatch touches shared memory and kill(2) only.
    unsafe { raw::SetLatch(&raw mut (*(*pg_sys::ProcGlobal).allProcs.add(number)).procLatch) }
}
