//! Searches with members that change, of a size that an ordinary test run can afford. `cargo xtask model` goes further.

use protocol::membership::MembershipFault;
use sim::model::Findings;
use sim::{ChangeScope, search_changes};

fn searched(scope: ChangeScope) -> Findings {
    let findings = search_changes(scope);
    println!("{scope}: {findings}, reached {:?}", findings.reached);
    findings
}

/// The smaller scopes; `cargo xtask test` searches all of [`ChangeScope::quick`].
#[test]
fn a_node_that_comes_back_misses_nothing() {
    for scope in ChangeScope::quick()
        .into_iter()
        .filter(|scope| scope.excluded)
    {
        let findings = searched(scope);
        assert!(
            findings.complete && findings.broken.is_empty(),
            "{scope}: {findings}"
        );
        for reached in ["commits everywhere", "recovers", "comes back"] {
            assert!(findings.reached.contains(reached), "{scope}: {reached}");
        }
    }
}

#[test]
fn rules_broken_on_purpose_are_found() {
    let returning = ChangeScope::quick()
        .into_iter()
        .find(|scope| scope.excluded)
        .expect("a scope in which a node returns");
    let losing = ChangeScope {
        excluded: false,
        transactions: 1,
        ..returning
    };
    for (fault, scope, invariant) in [
        (MembershipFault::EverybodyDonor, returning, "G1"),
        (
            MembershipFault::VoteForgotten,
            ChangeScope {
                transactions: 0,
                cuts: 1,
                ..losing
            },
            "G7",
        ),
        (
            MembershipFault::MajorityOnly,
            ChangeScope {
                crashes: 1,
                ..losing
            },
            "G6",
        ),
    ] {
        let findings = searched(ChangeScope {
            fault: Some(fault),
            states_max: 1_000_000,
            ..scope
        });
        assert!(
            findings.broken.contains(invariant),
            "{fault:?} was not found: {findings}"
        );
    }
}
