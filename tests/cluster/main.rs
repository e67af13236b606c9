//! Whole clusters under load, and servers that cannot become one. Each case has servers of its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;

mod bulk;
mod crash;
mod growth;
mod intruder;
mod kill;
mod ledger;
mod life;
mod load;
mod refusals;
mod standby;

fn main() -> ExitCode {
    let cases = [
        refusals::cases(),
        intruder::cases(),
        load::cases(),
        life::cases(),
        bulk::cases(),
        crash::cases(),
        kill::cases(),
        growth::cases(),
        standby::cases(),
    ]
    .concat();
    multimaster_tests::run_own(cases)
}
