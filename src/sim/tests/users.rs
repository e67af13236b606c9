//! Users' own prepared transactions on a node that goes and comes back.

use sim::{UsersFault, run_users_seed};

#[test]
fn none_is_lost_and_none_comes_twice() {
    for seed in 0..20_000 {
        run_users_seed(seed, None).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

#[test]
fn rules_broken_on_purpose_are_found() {
    for fault in [
        UsersFault::GenerationOfOnline,
        UsersFault::OneMark,
        UsersFault::FinishAtOnce,
    ] {
        let found = (0..20_000).find_map(|seed| run_users_seed(seed, Some(fault)).err());
        println!("{fault:?}: {}", found.expect("it was not found"));
    }
}
