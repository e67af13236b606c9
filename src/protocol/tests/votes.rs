//! Votes to all: members that precommit without being asked.

mod common;

use common::{Bench, gid, n, resolver_ballot, words};
use protocol::{Ballot, Config, Core, Effects, Input, Message, NodeSet, Refusal, Verdict, Vote};

/// A node of a cluster in which votes go to all.
fn bench(node: u8) -> Bench {
    let nodes: NodeSet = (1..=3).map(n).collect();
    let config = Config {
        votes_to_all: true,
        ..Config::new(n(node), nodes, 1)
    };
    let mut bench = Bench {
        core: Core::new(config, Vec::new(), 0, &mut Effects::new()),
        now: 0,
    };
    for peer in nodes.without(n(node)).iter() {
        bench.give(Input::LinkUp { peer, epoch: 1 });
    }
    bench
}

fn yes() -> Message {
    Message::Vote {
        gid: gid(1, 7),
        vote: Vote::Yes,
    }
}

fn is_precommitted(bench: &Bench) -> bool {
    bench.core.promised(gid(1, 7)) == Some(Ballot::COORDINATOR)
}

#[test]
fn the_last_vote_lets_a_member_precommit() {
    let mut bench = bench(2);
    let effects = bench.vote(gid(1, 7), Vote::Yes, 10);
    assert_eq!(words(&effects).len(), 2, "told to both: {effects:?}");
    assert!(!is_precommitted(&bench));
    let effects = bench.hear(3, yes());
    assert!(is_precommitted(&bench), "{effects:?}");
    assert!(bench.hear(3, yes()).is_empty(), "once");
}

#[test]
fn a_vote_that_overtakes_the_prepare_counts() {
    let mut bench = bench(2);
    assert!(bench.hear(3, yes()).is_empty());
    bench.vote(gid(1, 7), Vote::Yes, 10);
    assert!(is_precommitted(&bench));
}

#[test]
fn a_vote_whose_prepare_does_not_come_is_dropped() {
    let mut bench = bench(2);
    bench.hear(3, yes());
    bench.later(1_000);
    bench.vote(gid(1, 7), Vote::Yes, 10);
    assert!(!is_precommitted(&bench), "the coordinator will propose");
    let proposal = Message::Propose {
        gid: gid(1, 7),
        ballot: Ballot::COORDINATOR,
        verdict: Verdict::Precommit,
    };
    bench.hear(1, proposal);
    assert!(is_precommitted(&bench));
}

#[test]
fn who_has_promised_more_does_not_precommit() {
    let mut bench = bench(2);
    let gid = gid(1, 7);
    bench.vote(gid, Vote::Yes, 10);
    let ballot = resolver_ballot(2, 3);
    bench.hear(3, Message::Status { gid, ballot });
    bench.hear(3, yes());
    assert_eq!(bench.core.promised(gid), Some(ballot));
}

#[test]
fn who_has_refused_does_not_precommit() {
    let mut bench = bench(2);
    bench.vote(gid(1, 7), Vote::No(Refusal::retry("conflict", "")), 10);
    bench.hear(3, yes());
    assert!(!is_precommitted(&bench));
}

#[test]
fn precommits_that_overtake_the_last_vote_are_counted() {
    let mut bench = bench(1);
    let gid = gid(1, 7);
    bench.give(Input::Committing {
        gid,
        wait_peers: false,
        fast: false,
    });
    bench.hear(2, yes());
    let ballot = Ballot::COORDINATOR;
    bench.hear(2, Message::Accepted { gid, ballot });
    assert_eq!(bench.core.decision(gid), None);
    let effects = bench.hear(3, yes());
    let proposes = effects
        .iter()
        .any(|effect| format!("{effect:?}").contains("Propose"));
    assert!(!proposes, "everybody has the votes: {effects:?}");
    bench.hear(1, Message::Accepted { gid, ballot });
    assert!(bench.core.decision(gid).is_some());
}

#[test]
fn a_no_to_another_node_is_refused() {
    let mut bench = bench(2);
    let vote = Vote::No(Refusal::retry("conflict", ""));
    let effects = bench.hear(
        3,
        Message::Vote {
            gid: gid(1, 7),
            vote,
        },
    );
    assert!(format!("{effects:?}").contains("Rejected"), "{effects:?}");
}
