//! multimaster: synchronous multi-master clusters on unpatched PostgreSQL.
//!
//! `docs/architecture.md` shows the processes and the rules between them. `pg` holds everything unsafe; the other modules
//! are plain Rust on top of it.

pub mod apply;
pub mod decode;
pub mod pg;

#[cfg(feature = "testing")]
mod testing;

::pgrx::pg_module_magic!();

#[cfg(feature = "testing")]
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    testing::set_environment();
}
