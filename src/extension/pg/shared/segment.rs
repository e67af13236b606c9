//! The segment itself: asked for and made by the postmaster, found by every process.

use super::Shared;
use super::apply::{WorkerRing, WorkerSlot};
use super::backend::BackendSlot;
use super::process::my_proc_number;
use crate::pg::in_flight;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
static BACKENDS: AtomicPtr<BackendSlot> = AtomicPtr::new(std::ptr::null_mut());
static WORKERS: AtomicPtr<WorkerSlot> = AtomicPtr::new(std::ptr::null_mut());
static RINGS: AtomicPtr<WorkerRing> = AtomicPtr::new(std::ptr::null_mut());
static WAKE_FD: AtomicI32 = AtomicI32::new(-1);

static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// `AddinShmemInitLock` of storage/lwlocknames.h in PostgreSQL 15.
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// The shared segment.
///
/// # Panics
/// Before the postmaster has made it, which only our own start-up code could see.
pub fn shared() -> &'static Shared {
    // SAFETY: the segment is made before any process that calls this is started, and never moves in the life of a process.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
        .expect("shared memory is made at server start")
}

/// True in a server that has our shared memory (false in `postgres --single` and during `initdb`).
pub fn exists() -> bool {
    !SHARED.load(Ordering::Acquire).is_null()
}

pub fn backend_count() -> usize {
    // SAFETY: set once by the postmaster before shared memory is sized. Auxiliary processes have numbers above MaxBackends.
    unsafe { pg_sys::MaxBackends as usize + pg_sys::NUM_AUXILIARY_PROCS as usize }
}

/// The slot of each process.
pub fn backends() -> &'static [BackendSlot] {
    // SAFETY: made together with `Shared`, for `backend_count()` entries.
    unsafe { std::slice::from_raw_parts(BACKENDS.load(Ordering::Acquire), backend_count()) }
}

/// The calling process's slot.
pub fn my_backend() -> &'static BackendSlot {
    &backends()[my_proc_number()]
}

/// The slots of the apply workers, `multimaster.max_workers` of them.
pub fn workers() -> &'static [WorkerSlot] {
    let count = shared().workers_max.load(Ordering::Relaxed) as usize;
    // SAFETY: made together with `Shared` for that many entries.
    unsafe { std::slice::from_raw_parts(WORKERS.load(Ordering::Acquire), count) }
}

/// The ring of an apply worker.
pub fn ring(worker: usize) -> &'static WorkerRing {
    assert!(worker < workers().len());
    // SAFETY: as many rings as workers.
    unsafe { &*RINGS.load(Ordering::Acquire).add(worker) }
}

/// Descriptor of the eventfd that wakes the tokio thread.
pub fn wake_fd() -> i32 {
    WAKE_FD.load(Ordering::Relaxed)
}

/// Registers the requests for shared memory and makes the eventfd. Called from `_PG_init` in the postmaster.
pub fn register(workers_max: usize) {
    // SAFETY: runs in the postmaster before any child exists; hook variables are plain function pointers.
    unsafe {
        WORKERS_REQUESTED.store(workers_max as u32, Ordering::Relaxed);
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
        WAKE_FD.store(
            libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC),
            Ordering::Relaxed,
        );
    }
}

static WORKERS_REQUESTED: AtomicU32 = AtomicU32::new(0);

fn workers_requested() -> usize {
    WORKERS_REQUESTED.load(Ordering::Relaxed) as usize
}

unsafe extern "C-unwind" fn request() {
    // SAFETY: called by the postmaster in its shared memory request phase.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(
            size_of::<Shared>()
                + backend_count() * size_of::<BackendSlot>()
                + workers_requested() * (size_of::<WorkerSlot>() + size_of::<WorkerRing>())
                + in_flight::shared_bytes()
                + 4096,
        );
    }
}

/// Attaches to or makes one zeroed area; returns it and whether it was there already.
pub unsafe fn area<T>(name: &std::ffi::CStr, count: usize) -> (*mut T, bool) {
    let mut found = false;
    // SAFETY: the caller holds AddinShmemInitLock; the space was requested.
    unsafe {
        let start =
            pg_sys::ShmemInitStruct(name.as_ptr(), count * size_of::<T>(), &mut found).cast::<T>();
        if !found {
            std::ptr::write_bytes(start, 0, count);
        }
        (start, found)
    }
}

unsafe extern "C-unwind" fn startup() {
    // SAFETY: called by the postmaster (also after a crash restart) when shared memory is being set up. All-zero bytes are valid for every
    // area: atomics, plain arrays and enums stored as numbers.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
        pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let (shared, found) = area::<Shared>(c"multimaster", 1);
        BACKENDS.store(
            area(c"multimaster backends", backend_count()).0,
            Ordering::Release,
        );
        WORKERS.store(
            area(c"multimaster workers", workers_requested()).0,
            Ordering::Release,
        );
        RINGS.store(
            area(c"multimaster rings", workers_requested()).0,
            Ordering::Release,
        );
        if !found {
            (*shared).events.init();
            (*shared).finishes.init();
            (*shared)
                .workers_max
                .store(workers_requested() as u32, Ordering::Relaxed);
        }
        in_flight::attach();
        SHARED.store(shared, Ordering::Release);
        pg_sys::LWLockRelease(lock);
    }
}
