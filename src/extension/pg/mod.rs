//! The only module that may be unsafe: PostgreSQL's C interface behind safe functions.
#![allow(unsafe_code)]

pub mod ddl;
pub mod raw;
pub mod sequences;
