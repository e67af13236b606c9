//! Searches of a size that an ordinary test run can afford. `cargo xtask model` goes further.

use protocol::Fault;
use sim::model::{Findings, Scope, search};

const STEPS: usize = 150_000;

fn searched(scope: Scope) -> Findings {
    let findings = search(scope);
    println!("{scope}: {findings}");
    findings
}

#[test]
fn invariants_hold_in_every_state() {
    for scope in Scope::standard(STEPS) {
        let findings = searched(scope);
        assert!(findings.broken.is_empty(), "{scope}: {findings}");
        let commits = findings.reached.contains("commits everywhere");
        assert!(commits || !findings.complete, "{scope} never commits");
    }
}

#[test]
fn conflicting_transactions_are_searched_to_the_end() {
    let scope = Scope {
        nodes: 3,
        transactions: 2,
        crashes: 0,
        disturbances: 0,
        resolvers: 0,
        fast: 0,
        fault: None,
        states_max: 1_000_000,
    };
    let findings = searched(scope);
    assert!(
        findings.complete && findings.broken.is_empty(),
        "{findings}"
    );
    assert!(
        findings.reached.contains("aborts"),
        "the younger of two conflicting transactions dies"
    );
}

#[test]
fn seeded_faults_are_found() {
    for (fault, crashes, disturbances) in [
        (Fault::SharedBallots, 0, 2),
        (Fault::UndurableAccept, 1, 0),
        (Fault::LonelyAbort, 0, 2),
    ] {
        let scope = Scope {
            nodes: 3,
            transactions: 1,
            crashes,
            disturbances,
            resolvers: 2,
            fast: 0,
            fault: Some(fault),
            states_max: 1_000_000,
        };
        let findings = searched(scope);
        assert!(!findings.broken.is_empty(), "{fault:?} was not found");
    }
}

/// Rule D2 is for four nodes at most. With five a majority that lacks the coordinator and one other member cannot know that all votes were in.
#[test]
fn deciding_on_the_votes_of_five_nodes_splits() {
    let scope = Scope {
        nodes: 5,
        transactions: 1,
        crashes: 0,
        disturbances: 1,
        resolvers: 1,
        fast: 1,
        fault: Some(Fault::FastBeyondFour),
        states_max: 3_000_000,
    };
    let findings = searched(scope);
    assert!(!findings.broken.is_empty(), "{findings}");
}
