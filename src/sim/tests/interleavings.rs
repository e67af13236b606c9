//! Searches of a size that an ordinary test run can afford. `cargo xtask model` goes further.

use protocol::Fault;
use sim::model::{Findings, Scope, search};

fn searched(scope: Scope) -> Findings {
    let findings = search(scope);
    println!("{scope}: {findings}");
    findings
}

/// The smallest scopes; `cargo xtask test` searches all of [`Scope::quick`].
#[test]
fn small_scopes_are_searched_to_the_end() {
    for scope in Scope::quick()
        .into_iter()
        .filter(|scope| scope.crashes + scope.disturbances == 0)
    {
        let findings = searched(scope);
        assert!(
            findings.complete && findings.broken.is_empty(),
            "{scope}: {findings}"
        );
        assert!(findings.reached.contains("commits everywhere"), "{scope}");
        assert!(
            scope.transactions == 1 || findings.reached.contains("aborts"),
            "the younger of two conflicting transactions dies"
        );
    }
}

#[test]
fn seeded_faults_are_found() {
    for (fault, crashes, disturbances) in [
        (Fault::SharedBallots, 0, 2),
        (Fault::UndurableAccept, 1, 0),
        (Fault::LonelyAbort, 0, 2),
        (Fault::MostVotes, 0, 1),
    ] {
        let scope = Scope {
            nodes: 3,
            transactions: 1,
            crashes,
            disturbances,
            resolvers: 2,
            fast: 0,
            votes_to_all: fault == Fault::MostVotes,
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
        votes_to_all: false,
        fault: Some(Fault::FastBeyondFour),
        states_max: 3_000_000,
    };
    let findings = searched(scope);
    assert!(!findings.broken.is_empty(), "{findings}");
}
