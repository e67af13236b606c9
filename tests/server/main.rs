//! What a client may rely on, proved on one shared cluster.

#![forbid(unsafe_code)]

use std::process::ExitCode;

mod commit;
mod stream;
mod traps;

fn main() -> ExitCode {
    multimaster_tests::run_shared(
        3,
        [commit::cases(), traps::cases(), stream::cases()]
            .into_iter()
            .flatten()
            .collect(),
    )
}
