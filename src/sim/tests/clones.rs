//! Disks that are lost for good while everything else goes wrong, copies in their place, and old disks that are started once more.

use sim::{CloneFault, run_cloning_seed};

fn storms_hold(nodes: u8, seeds: u64) {
    let (mut committed, mut copies, mut old_disks) = (0, 0, 0);
    for seed in 0..seeds {
        let report =
            run_cloning_seed(seed, nodes, None).unwrap_or_else(|failure| panic!("{failure}"));
        committed += report.committed;
        copies += report.copies;
        old_disks += report.old_disks;
    }
    println!(
        "{nodes} nodes, {seeds} seeds: {committed} committed, {copies} copies, {old_disks} times an old disk"
    );
    let lost = copies >= seeds / 2 && old_disks > 0 && committed > 0;
    assert!(lost, "storms in which no node is replaced prove nothing");
}

#[test]
fn one_of_two_nodes_is_replaced() {
    storms_hold(2, 200);
}

#[test]
fn one_of_three_nodes_is_replaced() {
    storms_hold(3, 200);
}

#[test]
fn one_of_four_nodes_is_replaced() {
    storms_hold(4, 100);
}

#[test]
fn one_of_five_nodes_is_replaced() {
    storms_hold(5, 60);
}

#[test]
fn a_seed_repeats_its_run() {
    let run = || run_cloning_seed(5, 3, None);
    assert_eq!(run(), run());
}

#[test]
fn rules_broken_on_purpose_are_found() {
    for fault in [
        CloneFault::SlotAfterCopy,
        CloneFault::SlotAtOnce,
        CloneFault::MarksMove,
        CloneFault::AnswersForLost,
        CloneFault::OldIsHeard,
        CloneFault::DonorsRecord,
        CloneFault::AnyDonor,
        CloneFault::AnyTime,
        CloneFault::KeepsPrepared,
    ] {
        let found = (0..2_000).find_map(|seed| run_cloning_seed(seed, 3, Some(fault)).err());
        let found = found.unwrap_or_else(|| panic!("{fault:?} was not found"));
        println!("{fault:?}: {found}");
    }
}

/// Seeds that once broke an invariant, each for a reason of its own.
#[test]
fn old_failures_stay_away() {
    for (nodes, seed) in [
        // The mark of a fresh copy moved over what it lacked.
        (3, 8),
        // An acceptor without a vote kept its record for ever.
        (4, 4),
        // Alone, a node waited for the other one's word on what it had begun alone, or had accepted itself.
        (2, 1),
        (2, 618),
    ] {
        run_cloning_seed(seed, nodes, None).unwrap_or_else(|failure| panic!("{failure}"));
    }
}
