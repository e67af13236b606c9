//! multimaster: synchronous multi-master clusters on unpatched PostgreSQL.
//!
//! `docs/architecture.md` shows the processes and the rules between them. `pg` holds everything unsafe; the other modules
//! are plain Rust on top of it.

pub mod apply;
pub mod decode;
pub mod pg;

::pgrx::pg_module_magic!();
