//! Whole clusters under load, and servers that cannot become one. Each case has servers of its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;

mod absence;
mod bad_copies;
mod bulk;
mod clients;
mod clone;
mod crash;
mod cut_off;
mod failover;
mod generations;
mod growth;
mod hanging_disk;
mod hosts;
mod intruder;
mod kill;
mod large;
mod ledger;
mod life;
mod line;
mod lists;
mod load;
mod minority;
mod nemesis;
mod old_copies;
mod open_sessions;
mod operations;
mod preload;
mod recovery;
mod referee;
mod refusals;
mod shifted_clock;
mod split;
mod stale_reads;
mod standby;
mod stuck;
mod users_prepared;

fn main() -> ExitCode {
    let cases = [
        refusals::cases(),
        intruder::cases(),
        load::cases(),
        life::cases(),
        bulk::cases(),
        large::cases(),
        failover::cases(),
        clone::cases(),
        old_copies::cases(),
        bad_copies::cases(),
        operations::cases(),
        recovery::cases(),
        minority::cases(),
        cut_off::cases(),
        clients::cases(),
        open_sessions::cases(),
        absence::cases(),
        stale_reads::cases(),
        split::cases(),
        referee::cases(),
        stuck::cases(),
        hanging_disk::cases(),
        shifted_clock::cases(),
        generations::cases(),
        users_prepared::cases(),
        nemesis::cases(),
        crash::cases(),
        kill::cases(),
        growth::cases(),
        standby::cases(),
    ]
    .concat();
    multimaster_tests::run_own(cases)
}
