//! Rule D2: the coordinator commits on the votes alone.

mod common;

use common::{Bench, gid, resolver_ballot, words};
use protocol::{Decision, Gid, Input, Message, Recovered, Refusal, State, Vote};

/// All votes are in and the backend has been told to commit.
fn told_to_commit(bench: &mut Bench) -> Gid {
    let gid = gid(1, 7);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: true,
    });
    let vote = Message::Vote {
        gid,
        vote: Vote::Yes,
    };
    assert!(bench.hear(2, vote.clone()).is_empty());
    assert_eq!(
        words(&bench.hear(3, vote)),
        ["write Commit", "reply commit 1.1"]
    );
    gid
}

#[test]
fn nobody_is_told_before_the_commit_is_durable() {
    let mut bench = Bench::new(1);
    let gid = told_to_commit(&mut bench);
    assert_eq!(bench.core.decision(gid), None);
    let states: Vec<State> = bench.core.transactions(0).map(|view| view.state).collect();
    assert_eq!(states, [State::Committing]);
    assert_eq!(
        words(&bench.give(Input::Finished { gid })),
        ["2 <- decided Commit 1.1", "3 <- decided Commit 1.1"]
    );
    assert_eq!(bench.core.decision(gid), Some(Decision::Commit));
}

#[test]
fn who_asks_meanwhile_is_not_answered() {
    let mut bench = Bench::new(1);
    let gid = told_to_commit(&mut bench);
    let ballot = resolver_ballot(2, 3);
    for msg in [
        Message::Status { gid, ballot },
        Message::Propose {
            gid,
            ballot,
            verdict: protocol::Verdict::Preabort,
        },
        Message::Query { gid },
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    ] {
        assert!(bench.hear(3, msg).is_empty());
    }
    assert!(bench.later(10_000).is_empty(), "nor does it ask");
}

#[test]
fn it_is_too_late_for_an_interrupt() {
    let mut bench = Bench::new(1);
    let gid = told_to_commit(&mut bench);
    assert!(bench.give(Input::Interrupted { gid }).is_empty());
    for peer in [2, 3] {
        let lost = Input::LinkDown {
            peer: common::n(peer),
        };
        assert!(bench.give(lost).is_empty());
    }
}

#[test]
fn a_backend_that_dies_then_leaves_a_commit() {
    let mut bench = Bench::new(1);
    let gid = told_to_commit(&mut bench);
    assert_eq!(
        words(&bench.give(Input::Abandoned { gid })),
        ["write Commit", "finish Commit"]
    );
}

#[test]
fn a_promise_given_before_the_last_vote_takes_two_round_trips() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: true,
    });
    let ballot = resolver_ballot(2, 3);
    bench.hear(3, Message::Status { gid, ballot });
    for peer in [2, 3] {
        let vote = Message::Vote {
            gid,
            vote: Vote::Yes,
        };
        assert!(bench.hear(peer, vote).is_empty(), "the resolver decides");
    }
}

#[test]
fn one_no_is_enough() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: true,
    });
    let refused = bench.hear(
        2,
        Message::Vote {
            gid,
            vote: Vote::No(Refusal::retry("conflict", "")),
        },
    );
    assert!(words(&refused).contains(&"reply abort: conflict".to_owned()));
}

/// After a crash the record says as much as the COMMIT PREPARED: nothing was promised between the last vote and the crash.
#[test]
fn the_record_alone_commits_after_a_crash() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: false,
        fast: true,
    });
    let mut record = None;
    for peer in [2, 3] {
        let vote = Message::Vote {
            gid,
            vote: Vote::Yes,
        };
        for effect in bench.hear(peer, vote) {
            if let protocol::Effect::Write {
                record: written, ..
            } = effect
            {
                record = Some(written);
            }
        }
    }
    let found = Recovered {
        gid,
        record,
        prepared: true,
    };
    let (bench, effects) = Bench::recovered(1, vec![found]);
    assert_eq!(bench.core.decision(gid), Some(Decision::Commit));
    assert!(words(&effects).contains(&"finish Commit".to_owned()));
}

/// Without it, the votes are asked for again.
#[test]
fn a_crash_before_the_record_is_durable_is_resolved() {
    let gid = gid(1, 7);
    let found = Recovered {
        gid,
        record: None,
        prepared: true,
    };
    let (bench, _) = Bench::recovered(1, vec![found]);
    assert_eq!(bench.core.decision(gid), None);
    assert!(bench.core.transactions(0).all(|view| view.resolving));
}

/// What is being committed on the votes has a number that nobody has heard of yet: no peer may take it for finished.
#[test]
fn a_horizon_waits_for_the_commit() {
    let mut bench = Bench::new(1);
    let gid = told_to_commit(&mut bench);
    let horizons = |bench: &mut Bench, input: Input| {
        let mut out = protocol::Effects::new();
        bench.core.handle(0, input, &mut out);
        let said = |effect: &protocol::Effect| {
            matches!(
                effect,
                protocol::Effect::Send {
                    msg: Message::Horizon { .. },
                    ..
                }
            )
        };
        out.as_slice().iter().filter(|effect| said(effect)).count()
    };
    let from_2 = |msg| Input::Message {
        from: common::n(2),
        msg,
    };
    assert_eq!(horizons(&mut bench, from_2(Message::AskHorizon)), 0);
    assert_eq!(horizons(&mut bench, Input::Finished { gid }), 0);
    let finished = Message::Finished {
        gid,
        decision: Decision::Commit,
        csn: Some(protocol::Csn(protocol::Csn::start_of(1).0 + 1)),
    };
    assert_eq!(horizons(&mut bench, from_2(finished)), 1);
}
