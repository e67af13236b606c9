//! Memory contexts of PostgreSQL with an owner in Rust.

use pgrx::pg_sys;
use std::ffi::CStr;

/// A memory context that lives as long as this value. Its address never changes.
#[derive(Debug)]
pub struct OwnedContext {
    context: pg_sys::MemoryContext,
}

impl OwnedContext {
    /// Creates an empty context that no transaction's end takes away. Raises an error when memory is out.
    pub fn new(name: &'static CStr) -> Self {
        // SAFETY: TopMemoryContext lives as long as the process, and so does the static name.
        let context = unsafe {
            pg_sys::AllocSetContextCreateInternal(
                pg_sys::TopMemoryContext,
                name.as_ptr(),
                pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            )
        };
        OwnedContext { context }
    }

    pub fn as_ptr(&self) -> pg_sys::MemoryContext {
        self.context
    }

    /// Makes this the current context until the returned value goes.
    pub fn enter(&self) -> Entered {
        // SAFETY: the context is alive as long as this value.
        unsafe { enter(self.context) }
    }

    /// Frees all that was allocated in it.
    ///
    /// # Safety
    /// Nothing may point into the context any more.
    pub unsafe fn reset(&self) {
        // SAFETY: the context is alive; the caller vouches for what is in it.
        unsafe { pg_sys::MemoryContextReset(self.context) }
    }
}

impl Drop for OwnedContext {
    fn drop(&mut self) {
        // SAFETY: only this value ever deletes the context, and deleting raises no error.
        unsafe { pg_sys::MemoryContextDelete(self.context) }
    }
}

/// Makes a context of PostgreSQL the current one until the returned value goes.
///
/// # Safety
/// `context` outlives that.
pub unsafe fn enter(context: pg_sys::MemoryContext) -> Entered {
    // SAFETY: as the caller promises; the previous one is entered again before `Entered` ends.
    let previous = unsafe { pg_sys::MemoryContextSwitchTo(context) };
    Entered { previous }
}

/// Restores the previous memory context when dropped, in an unwinding stack as well.
#[derive(Debug)]
pub struct Entered {
    previous: pg_sys::MemoryContext,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: the previous context outlives the scope that entered another one.
        unsafe {
            pg_sys::MemoryContextSwitchTo(self.previous);
        }
    }
}
