//! The arbiter's own thread, beside PostgreSQL's main thread.

use super::shared;
use pgrx::pg_sys;
use std::os::fd::{AsRawFd, RawFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Starts a thread in which every signal is blocked, so that PostgreSQL's handlers only ever run on the main thread.
pub fn spawn_without_signals<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    // SAFETY: plain signal-mask calls with valid pointers; the thread inherits the mask in force when it is made.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let handle = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        handle.expect("the system can start one thread")
    }
}

/// Whether the server log takes messages of level DEBUG1. For the arbiter's own thread, which may not log.
pub fn logs_debug() -> bool {
    // SAFETY: an aligned integer that the main thread stores when settings are read again.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::log_min_messages) <= pg_sys::DEBUG1 as i32 }
}

/// The eventfd as tokio wants it.
pub struct WakeFd;

impl AsRawFd for WakeFd {
    fn as_raw_fd(&self) -> RawFd {
        shared::wake_fd()
    }
}

/// Readiness of the eventfd, for the runtime this is called in.
///
/// It becomes ready again with each write, although nobody reads it: tokio hears of changes (EPOLLET), and the count would overflow after 2^64 writes.
pub fn wake_readiness() -> std::io::Result<AsyncFd<WakeFd>> {
    // SAFETY: the descriptor was made by the postmaster and is never closed in a child.
    unsafe { AsyncFd::register_with_interest(WakeFd, Interest::READABLE) }.map_err(Into::into)
}
