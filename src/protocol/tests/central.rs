//! The coordinator and the participants when nothing goes wrong, and when a member votes no.

mod common;

use common::{Bench, gid, n, words};
use protocol::{Ballot, Csn, Decision, Input, Lsn, Message, Recovered, Refusal, Verdict, Vote};

fn commit_to_decision(bench: &mut Bench) {
    let gid = gid(1, 7);
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
    bench.hear(
        3,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    bench.hear(
        1,
        Message::Accepted {
            gid,
            ballot: Ballot::COORDINATOR,
        },
    );
}

#[test]
fn the_last_vote_starts_the_precommit_and_the_own_record_overlaps() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    assert!(
        bench
            .give(Input::Committing {
                gid,
                wait_peers: true,
                fast: false
            })
            .is_empty()
    );
    assert!(
        bench
            .hear(
                2,
                Message::Vote {
                    gid,
                    vote: Vote::Yes
                }
            )
            .is_empty()
    );
    let effects = bench.hear(
        3,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    assert_eq!(
        words(&effects),
        [
            "2 <- Precommit 1.0",
            "3 <- Precommit 1.0",
            "persist Precommit 1.0",
            "1 <- accepted 1.0"
        ]
    );
}

#[test]
fn a_majority_of_precommits_commits() {
    let mut bench = Bench::new(1);
    commit_to_decision(&mut bench);
    let effects = bench.hear(
        3,
        Message::Accepted {
            gid: gid(1, 7),
            ballot: Ballot::COORDINATOR,
        },
    );
    assert_eq!(
        words(&effects),
        [
            "2 <- decided Commit 1.1",
            "3 <- decided Commit 1.1",
            "reply commit 1.1"
        ]
    );
}

#[test]
fn the_record_is_gone_before_anybody_is_told_to_forget() {
    let gid = gid(1, 7);
    let csn = Some(Csn::start_of(1).next());
    let mut bench = Bench::new(1);
    commit_to_decision(&mut bench);
    bench.hear(
        3,
        Message::Accepted {
            gid,
            ballot: Ballot::COORDINATOR,
        },
    );
    assert!(bench.give(Input::Finished { gid }).is_empty());
    assert!(
        bench
            .hear(
                2,
                Message::Finished {
                    gid,
                    decision: Decision::Commit,
                    csn
                }
            )
            .is_empty()
    );
    let effects = bench.hear(
        3,
        Message::Finished {
            gid,
            decision: Decision::Commit,
            csn,
        },
    );
    assert_eq!(
        words(&effects),
        ["peers finished", "free", "2 <- forget", "3 <- forget"]
    );
    assert_eq!(bench.core.transactions(0).count(), 0);
}

#[test]
fn a_finish_without_the_number_is_answered_with_the_number() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    commit_to_decision(&mut bench);
    bench.hear(
        3,
        Message::Accepted {
            gid,
            ballot: Ballot::COORDINATOR,
        },
    );
    let effects = bench.hear(
        2,
        Message::Finished {
            gid,
            decision: Decision::Commit,
            csn: None,
        },
    );
    assert_eq!(words(&effects), ["2 <- decided Commit 1.1"]);
}

#[test]
fn a_no_vote_aborts_at_once_in_its_own_words() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    let effects = bench.hear(
        2,
        Message::Vote {
            gid,
            vote: Vote::No(Refusal::retry("row is taken", "")),
        },
    );
    assert_eq!(
        words(&effects),
        [
            "2 <- decided Abort",
            "3 <- decided Abort",
            "write Abort",
            "reply abort: row is taken"
        ]
    );
}

#[test]
fn a_vote_before_the_announcement_is_kept() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    assert_eq!(
        words(&bench.hear(
            2,
            Message::Vote {
                gid,
                vote: Vote::Yes
            }
        )),
        ["look up"]
    );
    assert!(
        bench
            .give(Input::CoordinatorOutcome { gid, outcome: None })
            .is_empty()
    );
    bench.hear(
        3,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    let effects = bench.give(Input::Committing {
        gid,
        wait_peers: false,
        fast: false,
    });
    assert_eq!(words(&effects)[0], "2 <- Precommit 1.0");
}

#[test]
fn a_vanished_backend_leaves_its_finish_to_the_core() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    commit_to_decision(&mut bench);
    bench.hear(
        3,
        Message::Accepted {
            gid,
            ballot: Ballot::COORDINATOR,
        },
    );
    assert_eq!(
        words(&bench.give(Input::Abandoned { gid })),
        ["write Commit", "finish Commit"],
        "it may have gone before it wrote the record itself"
    );
}

/// A backend can be slow between its PREPARE and its announcement, and this node can have restarted and resolved the transaction meanwhile.
#[test]
fn a_late_announcement_is_answered_with_the_outcome() {
    let gid = gid(1, 7);
    let found = Recovered {
        gid,
        record: None,
        prepared: true,
    };
    let (mut bench, _) = Bench::recovered(1, vec![found]);
    for peer in [n(2), n(3)] {
        bench.give(Input::LinkUp { peer, epoch: 1 });
    }
    let told = Message::Decided {
        gid,
        decision: Decision::Abort,
        csn: None,
    };
    bench.hear(2, told);
    bench.give(Input::Finished { gid });
    let committing = Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    };
    let reply = ["reply abort: transaction was aborted by the cluster"];
    assert_eq!(words(&bench.give(committing.clone())), reply, "finished");
    let finished = Message::Finished {
        gid,
        decision: Decision::Abort,
        csn: None,
    };
    bench.hear(2, finished.clone());
    bench.hear(3, finished);
    assert!(bench.core.transactions(0).next().is_none(), "forgotten");
    let effects = words(&bench.give(committing));
    assert_eq!(effects, [reply[0], "peers finished"], "forgotten");
}

#[test]
fn a_participant_makes_its_precommit_durable_before_it_says_so() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(2);
    assert_eq!(words(&bench.vote(gid, Vote::Yes, 50)), ["1 <- yes"]);
    let precommit = Message::Propose {
        gid,
        ballot: Ballot::COORDINATOR,
        verdict: Verdict::Precommit,
    };
    assert_eq!(
        words(&bench.hear(1, precommit)),
        ["persist Precommit 1.0", "1 <- accepted 1.0"]
    );
}

#[test]
fn a_participant_writes_the_decision_before_it_finishes() {
    let gid = gid(1, 7);
    let csn = Some(Csn::start_of(1).next());
    let mut bench = Bench::new(2);
    bench.vote(gid, Vote::Yes, 50);
    let effects = bench.hear(
        1,
        Message::Decided {
            gid,
            decision: Decision::Commit,
            csn,
        },
    );
    assert_eq!(words(&effects), ["write Commit", "finish Commit"]);
    assert_eq!(
        words(&bench.give(Input::Finished { gid })),
        ["1 <- finished Commit"]
    );
}

#[test]
fn a_participant_forgets_when_all_have_finished_and_its_mark_has_passed() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(2);
    bench.vote(gid, Vote::Yes, 50);
    bench.hear(
        1,
        Message::Decided {
            gid,
            decision: Decision::Commit,
            csn: Some(Csn::start_of(1).next()),
        },
    );
    bench.give(Input::Finished { gid });
    assert!(bench.hear(1, Message::Forget { gid }).is_empty());
    assert!(
        bench
            .give(Input::MarkPassed {
                origin: n(1),
                lsn: Lsn(49)
            })
            .is_empty()
    );
    assert_eq!(
        words(&bench.give(Input::MarkPassed {
            origin: n(1),
            lsn: Lsn(50)
        })),
        ["free"]
    );
}

#[test]
fn a_no_vote_is_durable_before_it_is_told() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(2);
    let effects = bench.vote(gid, Vote::No(Refusal::retry("row is taken", "")), 50);
    assert_eq!(
        words(&effects),
        ["persist Abort", "2 <- finished Abort", "1 <- no"]
    );
    assert_eq!(
        bench.core.decision(gid),
        None,
        "a refusal that a crash could undo is not shown"
    );
    bench.hear(
        2,
        Message::Finished {
            gid,
            decision: Decision::Abort,
            csn: None,
        },
    );
    assert_eq!(bench.core.decision(gid), Some(Decision::Abort));
}

#[test]
fn a_number_without_its_predecessor_does_not_settle() {
    let mut bench = Bench::new(2);
    bench.hear(
        1,
        Message::Horizon {
            csn: Csn::start_of(1),
        },
    );
    for (xid, counter) in [(8, 2), (7, 1)] {
        let gid = gid(1, xid);
        bench.vote(gid, Vote::Yes, xid);
        bench.hear(
            1,
            Message::Decided {
                gid,
                decision: Decision::Commit,
                csn: Some(Csn(Csn::start_of(1).0 + counter)),
            },
        );
        bench.give(Input::Finished { gid });
        let expected = if counter == 2 { 0 } else { 2 };
        assert_eq!(bench.core.settled(n(1)), Csn(Csn::start_of(1).0 + expected));
    }
}
