//! What a client may rely on, proved on one shared cluster.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use multimaster_tests::{plain, run_shared};

mod commit;
mod conflicts;
mod constraints;
mod ddl;
mod documents;
mod held;
mod in_flight;
mod rows;
mod steps;
mod stream;
mod strict;
mod traps;
mod views;
mod workers;

/// Nodes of the shared cluster: the smallest number with a majority that survives a failure.
const NODES: usize = 3;

fn main() -> ExitCode {
    let mut cases = [
        commit::cases(),
        traps::cases(),
        stream::cases(),
        constraints::cases(),
        ddl::cases(),
        rows::cases(),
        workers::cases(),
    ]
    .concat();
    if !plain() {
        let of_clusters = [
            conflicts::cases(),
            strict::cases(),
            views::cases(),
            in_flight::cases(),
            documents::cases(),
            steps::cases(),
        ];
        cases.extend(of_clusters.into_iter().flatten());
    }
    run_shared(NODES, cases)
}
