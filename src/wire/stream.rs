//! The replication stream: what the output plugin writes and apply reads.
