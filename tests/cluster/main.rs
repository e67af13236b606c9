//! Whole clusters under load, and servers that cannot become one. Each case has servers of its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use xtask::suite::Size;

mod bulk;
mod crash;
mod growth;
mod intruder;
mod kill;
mod ledger;
mod life;
mod load;
mod refusals;

fn main() -> ExitCode {
    let mut cases = [
        refusals::cases(),
        intruder::cases(),
        load::cases(),
        life::cases(),
        bulk::cases(),
        growth::cases(),
    ]
    .concat();
    // Servers die here again and again: minutes of it, and not all of it holds yet (docs/limitations.md, "Crashes").
    if Size::chosen() == Size::Long {
        cases.extend([crash::cases(), kill::cases()].concat());
    }
    multimaster_tests::run_own(cases)
}
