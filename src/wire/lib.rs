//! What travels between nodes, as bytes.
#![forbid(unsafe_code)]

pub mod ddl;
