//! Storms in which members change: who is lost is left out, who comes back recovers and is taken in.

use protocol::membership::MembershipFault;
use sim::{Report, SeedFailure, run_beside_seed, run_changing_seed, run_harsh_seed};

type Storm = fn(u64, u8, Option<MembershipFault>) -> Result<Report, SeedFailure>;

fn storms_hold(storm: Storm, nodes: u8, seeds: u64) {
    let (mut generations, mut committed, mut recovered) = (0, 0, 0);
    for seed in 0..seeds {
        let report = storm(seed, nodes, None).unwrap_or_else(|failure| panic!("{failure}"));
        generations += report.generations;
        committed += report.committed;
        recovered += report.recovered;
    }
    println!(
        "{nodes} nodes, {seeds} seeds: {committed} committed in {generations} generations, {recovered} recovered"
    );
    let changed = generations > seeds && recovered > 0 && committed > 0;
    assert!(changed, "storms in which no member changes prove nothing");
}

#[test]
fn three_nodes_change_members() {
    storms_hold(run_changing_seed, 3, 60);
    storms_hold(run_harsh_seed, 3, 300);
}

#[test]
fn four_nodes_change_members() {
    storms_hold(run_changing_seed, 4, 30);
    storms_hold(run_harsh_seed, 4, 100);
}

#[test]
fn five_nodes_change_members() {
    storms_hold(run_changing_seed, 5, 20);
    storms_hold(run_harsh_seed, 5, 100);
}

#[test]
fn seven_nodes_change_members() {
    storms_hold(run_changing_seed, 7, 6);
    storms_hold(run_harsh_seed, 7, 30);
}

/// An arbiter starts again beside living sessions, workers and receivers.
#[test]
fn arbiters_start_again_beside_sessions() {
    for (nodes, seeds) in [(2, 150), (3, 150), (5, 50)] {
        storms_hold(|seed, nodes, _| run_beside_seed(seed, nodes), nodes, seeds);
    }
}

/// Seeds that once broke an invariant, each for a reason of its own.
#[test]
fn old_failures_stay_away() {
    for (nodes, seed) in [
        (3, 0),
        (3, 13),
        (3, 251),
        (5, 48),
        (3, 293),
        (3, 271),
        (3, 338),
        (4, 141),
        (3, 597),
        (5, 309),
        (3, 684),
        (3, 1007),
    ] {
        run_changing_seed(seed, nodes, None).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

/// The same, of storms with all that can go wrong.
#[test]
fn old_failures_of_harsh_storms_stay_away() {
    for (nodes, seed) in [(3, 4002), (5, 985)] {
        run_harsh_seed(seed, nodes, None).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn a_seed_repeats_its_run() {
    for storm in [run_changing_seed as Storm, run_harsh_seed] {
        assert_eq!(storm(5, 3, None), storm(5, 3, None));
    }
}

#[test]
fn rules_broken_on_purpose_are_found() {
    for fault in [
        MembershipFault::EverybodyDonor,
        MembershipFault::VoteForgotten,
        MembershipFault::MajorityOnly,
        MembershipFault::PromiseIgnored,
    ] {
        let found = (0..1_000).find_map(|seed| run_changing_seed(seed, 3, Some(fault)).err());
        let found = found.unwrap_or_else(|| panic!("{fault:?} was not found"));
        println!("{fault:?}: {found}");
    }
}
