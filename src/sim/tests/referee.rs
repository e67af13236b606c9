//! Two nodes and a referee, in storms: either node goes on alone, never both, and the other one comes back.

use protocol::Fault;
use protocol::membership::MembershipFault;
use sim::{run_harsh_refereed_seed, run_refereed_seed};

#[test]
fn one_of_two_nodes_goes_on_alone() {
    let (mut committed, mut alone, mut recovered) = (0, 0, 0);
    for seed in 0..400 {
        let report =
            run_refereed_seed(seed, None, None).unwrap_or_else(|failure| panic!("{failure}"));
        committed += report.committed;
        alone += report.alone;
        recovered += report.recovered;
    }
    println!("{committed} committed, {alone} of them alone, {recovered} recovered");
    assert!(
        alone > 0 && committed > alone && recovered > 0,
        "storms in which nobody is alone prove nothing"
    );
}

/// Splits, one-way links, nodes that stand still or leave, clocks of different speed, slow disks.
#[test]
fn one_of_two_nodes_goes_on_alone_in_harsh_storms() {
    let (mut committed, mut alone) = (0, 0);
    for seed in 0..300 {
        let report = run_harsh_refereed_seed(seed).unwrap_or_else(|failure| panic!("{failure}"));
        committed += report.committed;
        alone += report.alone;
    }
    println!("{committed} committed, {alone} of them alone");
    assert!(
        alone > 0 && committed > alone,
        "storms in which nobody is alone prove nothing"
    );
}

#[test]
fn a_seed_repeats_its_run() {
    let run = || run_refereed_seed(5, None, None);
    assert_eq!(run(), run());
}

#[test]
fn rules_broken_on_purpose_are_found() {
    for fault in [
        MembershipFault::AnyGrant,
        MembershipFault::EverybodyDonor,
        MembershipFault::PromiseIgnored,
    ] {
        let found = (0..2_000).find_map(|seed| run_refereed_seed(seed, Some(fault), None).err());
        let found = found.unwrap_or_else(|| panic!("{fault:?} was not found"));
        println!("{fault:?}: {found}");
    }
}

/// The rule of a referee that knows no decision on the votes: it splits.
#[test]
fn aborting_alone_what_was_voted_on_is_found() {
    let broken = Some(Fault::AloneAborts);
    let found = (0..2_000).find_map(|seed| run_refereed_seed(seed, None, broken).err());
    println!("{}", found.expect("the split was not found"));
}
