//! The only module that may be unsafe: PostgreSQL's C interface behind safe functions.
#![allow(unsafe_code)]

pub mod remote;
pub mod report;
pub mod settings;
