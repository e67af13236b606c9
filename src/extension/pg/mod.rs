//! The only module that may be unsafe: PostgreSQL's C interface behind safe functions.
#![allow(unsafe_code)]

pub mod decode;
pub mod invalidation;
pub mod memory;
pub mod names;
pub mod rows;
