//! Storms from seeds, in sizes that an ordinary test run can afford. `cargo xtask sim` runs thousands.

use protocol::Fault;
use sim::{run_seed, run_seed_with, run_seeds};

fn storms_hold(nodes: u8, seeds: u64) {
    let summary = run_seeds(0..seeds, nodes).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{nodes} nodes: {summary:?}");
    assert!(
        summary.committed > 0 && summary.aborted > 0,
        "a storm in which nothing happens proves nothing"
    );
}

#[test]
fn three_nodes_survive_storms() {
    storms_hold(3, 400);
}

#[test]
fn four_nodes_survive_storms() {
    storms_hold(4, 300);
}

#[test]
fn five_nodes_survive_storms() {
    storms_hold(5, 200);
}

#[test]
fn seven_nodes_survive_storms() {
    storms_hold(7, 100);
}

/// Seeds that once broke an invariant, each for a reason of its own.
#[test]
fn old_failures_stay_away() {
    for (nodes, seed) in [
        (3, 25),
        (5, 15),
        (5, 141),
        (3, 496),
        (5, 318),
        (7, 328),
        (3, 42),
        (4, 971),
        (5, 2412),
    ] {
        run_seed(seed, nodes).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn a_seed_repeats_its_run() {
    assert_eq!(run_seed(7, 5), run_seed(7, 5));
    let digests =
        [run_seed(7, 3), run_seed(8, 3)].map(|report| report.expect("both seeds hold").digest);
    assert_ne!(digests[0], digests[1], "two seeds are two runs");
}

#[test]
fn storms_find_shared_ballots_and_undurable_verdicts() {
    for fault in [Fault::SharedBallots, Fault::UndurableAccept] {
        let found = (0..2_000).find_map(|seed| run_seed_with(seed, 3, Some(fault)).err());
        let found = found.unwrap_or_else(|| panic!("{fault:?} was not found"));
        println!("{fault:?}: {found}");
    }
}

#[test]
fn storms_find_the_bound_of_rule_d2() {
    let fault = Fault::FastBeyondFour;
    let found = (0..2_000).find_map(|seed| run_seed_with(seed, 5, Some(fault)).err());
    println!(
        "{}",
        found.unwrap_or_else(|| panic!("{fault:?} was not found"))
    );
}
