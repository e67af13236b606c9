//! What starts a resolver, how it decides, and what it leaves alone.

mod common;

use common::{Bench, gid, n, resolver_ballot, words};
use protocol::{Accept, Ballot, Decision, Effect, Input, Message, Recovered, Verdict, Vote};

fn promised(
    gid: protocol::Gid,
    ballot: Ballot,
    accepted: Option<Verdict>,
    voted_yes: bool,
) -> Message {
    let accepted = accepted.map(|verdict| Accept {
        ballot: Ballot::COORDINATOR,
        verdict,
    });
    Message::Promised {
        gid,
        ballot,
        accepted,
        voted_yes,
    }
}

#[test]
fn an_interrupt_resolves_and_never_aborts_alone() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    let effects = bench.give(Input::Interrupted { gid });
    assert_eq!(
        words(&effects),
        [
            "persist promise 2.1",
            "2 <- status 2.1",
            "3 <- status 2.1",
            "1 <- promised 2.1, nothing, yes"
        ]
    );
}

#[test]
fn a_link_lost_while_votes_are_awaited_resolves() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    bench.hear(
        2,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    assert!(
        bench.give(Input::LinkDown { peer: n(2) }).is_empty(),
        "its vote is here already"
    );
    assert_eq!(
        words(&bench.give(Input::LinkDown { peer: n(3) }))[0],
        "persist promise 2.1"
    );
}

#[test]
fn a_restart_with_an_own_prepared_transaction_resolves() {
    let (_, effects) = Bench::recovered(
        1,
        vec![Recovered {
            gid: gid(1, 7),
            record: None,
            prepared: true,
        }],
    );
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Persist { record, .. } if record.promised == resolver_ballot(2, 1))));
}

#[test]
fn proven_votes_of_all_members_commit() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(2);
    bench.vote(gid, Vote::Yes, 50);
    bench.give(Input::LinkDown { peer: n(1) });
    assert!(
        bench.later(1_000).is_empty(),
        "node 2 waits one step longer than node 1 would"
    );
    assert_eq!(words(&bench.later(100))[0], "persist promise 2.2");
    let ballot = resolver_ballot(2, 2);
    bench.hear(2, promised(gid, ballot, None, true));
    let effects = bench.hear(3, promised(gid, ballot, None, true));
    assert_eq!(
        words(&effects),
        [
            "1 <- Precommit 2.2",
            "3 <- Precommit 2.2",
            "persist Precommit 2.2",
            "2 <- accepted 2.2"
        ]
    );
    bench.hear(2, Message::Accepted { gid, ballot });
    let effects = bench.hear(3, Message::Accepted { gid, ballot });
    assert_eq!(
        words(&effects),
        [
            "1 <- decided Commit 1.1",
            "3 <- decided Commit 1.1",
            "write Commit",
            "finish Commit"
        ]
    );
}

#[test]
fn a_precommit_of_the_coordinator_proves_every_vote() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    bench.give(Input::Interrupted { gid });
    let ballot = resolver_ballot(2, 1);
    bench.hear(1, promised(gid, ballot, None, true));
    let effects = bench.hear(2, promised(gid, ballot, Some(Verdict::Precommit), true));
    assert_eq!(words(&effects)[0], "2 <- Precommit 2.1");
}

#[test]
fn without_all_votes_it_waits_for_whom_it_can_reach_and_then_aborts() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    bench.give(Input::Interrupted { gid });
    let ballot = resolver_ballot(2, 1);
    bench.hear(1, promised(gid, ballot, None, true));
    assert!(
        bench.hear(2, promised(gid, ballot, None, true)).is_empty(),
        "node 3 may prove its vote yet"
    );
    assert_eq!(words(&bench.later(200))[0], "2 <- Preabort 2.1");
}

#[test]
fn a_member_bars_what_it_has_never_heard_of() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(3);
    let effects = bench.hear(
        2,
        Message::Status {
            gid,
            ballot: resolver_ballot(2, 2),
        },
    );
    assert_eq!(
        words(&effects),
        [
            "persist Abort",
            "3 <- finished Abort",
            "1 <- finished Abort",
            "2 <- finished Abort"
        ]
    );
    assert_eq!(
        words(&bench.vote(gid, Vote::Yes, 50)),
        ["finish Abort"],
        "no late yes"
    );
}

#[test]
fn a_lower_ballot_is_refused_and_a_higher_one_stops_the_own_resolver() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(2);
    bench.vote(gid, Vote::Yes, 50);
    bench.hear(
        3,
        Message::Status {
            gid,
            ballot: resolver_ballot(3, 3),
        },
    );
    let precommit = Message::Propose {
        gid,
        ballot: Ballot::COORDINATOR,
        verdict: Verdict::Precommit,
    };
    assert_eq!(
        words(&bench.hear(1, precommit)),
        ["1 <- refused, promised 3.3"]
    );
    let late = Message::Status {
        gid,
        ballot: resolver_ballot(2, 1),
    };
    assert_eq!(words(&bench.hear(1, late)), ["1 <- refused, promised 3.3"]);
}

#[test]
fn old_precommits_of_a_majority_still_decide_after_a_promise() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: false,
        fast: false,
    });
    bench.hear(
        2,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    bench.hear(
        3,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    bench.hear(
        3,
        Message::Status {
            gid,
            ballot: resolver_ballot(2, 3),
        },
    );
    bench.hear(
        1,
        Message::Accepted {
            gid,
            ballot: Ballot::COORDINATOR,
        },
    );
    bench.hear(
        2,
        Message::Accepted {
            gid,
            ballot: Ballot::COORDINATOR,
        },
    );
    assert_eq!(bench.core.decision(gid), Some(Decision::Commit));
}

/// It waited for a disk while the coordinator was started anew.
#[test]
fn a_precommit_of_an_earlier_life_is_no_fault() {
    let gid = gid(1, 7);
    let found = vec![Recovered {
        gid,
        record: None,
        prepared: true,
    }];
    let (mut bench, _) = Bench::recovered(1, found);
    let ballot = Ballot::COORDINATOR;
    assert_eq!(bench.hear(2, Message::Accepted { gid, ballot }), []);
    assert_eq!(bench.core.decision(gid), None);
}

#[test]
fn without_a_quorum_the_client_hears_that_it_is_unknown() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    bench.give(Input::LinkDown { peer: n(2) });
    bench.give(Input::LinkDown { peer: n(3) });
    assert!(!words(&bench.later(2_999)).contains(&"reply unknown".into()));
    assert!(words(&bench.later(1)).contains(&"reply unknown".into()));
    assert!(
        bench.core.transactions(bench.now).any(|txn| txn.resolving),
        "the core goes on without the client"
    );
}

#[test]
fn a_ballot_of_another_node_is_rejected() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(2);
    bench.vote(gid, Vote::Yes, 50);
    let effects = bench.hear(
        3,
        Message::Status {
            gid,
            ballot: resolver_ballot(2, 1),
        },
    );
    assert!(
        matches!(effects.as_slice(), [Effect::Event(_)]),
        "{effects:?}"
    );
}
