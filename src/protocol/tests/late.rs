//! A backend that announces its commit late, to a core that has been started beside it in the meantime.

mod common;

use common::{Bench, gid, words};
use protocol::{Decision, Gid, Input, Message, Recovered, Vote};

/// The first xid of the core under test; its transactions below may have ended before.
const FIRST_XID: u64 = 8;

fn announce(bench: &mut Bench, gid: Gid) -> Vec<String> {
    words(&bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: true,
    }))
}

fn log_says(bench: &mut Bench, gid: Gid, outcome: Option<Decision>) -> Vec<String> {
    words(&bench.give(Input::CoordinatorOutcome { gid, outcome }))
}

/// An earlier core resolved it, everybody finished and forgot it, and the core was started anew: only the log knows.
#[test]
fn what_was_resolved_and_forgotten_is_looked_up() {
    for (decision, answer) in [
        (
            Decision::Commit,
            vec![
                "reply commit 0.0",
                "peers finished",
                "2 <- forget",
                "3 <- forget",
            ],
        ),
        (
            Decision::Abort,
            vec![
                "reply abort: transaction was aborted by the cluster",
                "2 <- forget",
                "3 <- forget",
            ],
        ),
    ] {
        let gid = gid(1, 7);
        let mut bench = Bench::successor(1, FIRST_XID);
        assert_eq!(announce(&mut bench, gid), ["look up"]);
        // Nobody is asked meanwhile: who has forgotten too would bar it.
        assert!(bench.give(Input::Interrupted { gid }).is_empty());
        assert!(bench.later(10_000).is_empty());
        assert_eq!(log_says(&mut bench, gid, Some(decision)), answer);
        assert_eq!(bench.core.decision(gid), Some(decision));
        assert!(bench.give(Input::Finished { gid }).is_empty());
    }
}

#[test]
fn a_vote_before_the_late_announcement_does_not_hide_the_log() {
    let gid = gid(1, 7);
    let vote = Message::Vote {
        gid,
        vote: Vote::Yes,
    };
    let mut bench = Bench::successor(1, FIRST_XID);
    assert_eq!(words(&bench.hear(2, vote.clone())), ["look up"]);
    assert!(announce(&mut bench, gid).is_empty());
    assert!(
        bench.hear(3, vote).is_empty(),
        "not before the log has spoken"
    );
    let told = log_says(&mut bench, gid, Some(Decision::Commit));
    assert_eq!(told[0], "reply commit 0.0");
}

/// Prepared after the core read what was prepared: nobody can have decided it here, and it is resolved like what the core found.
#[test]
fn what_is_still_prepared_is_resolved() {
    let gid = gid(1, 7);
    let mut bench = Bench::successor(1, FIRST_XID);
    assert_eq!(announce(&mut bench, gid), ["look up"]);
    assert!(bench.give(Input::Interrupted { gid }).is_empty());
    assert_eq!(log_says(&mut bench, gid, None)[0], "persist promise 2.1");
}

/// A promise was all that was recorded; the transaction has ended since. The backend must hear of it.
#[test]
fn who_waits_hears_what_the_log_says_of_a_recorded_transaction() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    });
    let record =
        bench
            .give(Input::Interrupted { gid })
            .into_iter()
            .find_map(|effect| match effect {
                protocol::Effect::Persist { record, .. } => Some(record),
                _ => None,
            });
    assert!(record.is_some());
    let found = Recovered {
        gid,
        record,
        prepared: false,
    };
    let (mut bench, effects) = Bench::restarted(1, FIRST_XID, vec![found]);
    assert_eq!(words(&effects), ["look up"]);
    assert!(announce(&mut bench, gid).is_empty());
    let told = log_says(&mut bench, gid, Some(Decision::Commit));
    assert!(told.contains(&"reply commit 2.1".to_owned()), "{told:?}");
}

#[test]
fn a_transaction_of_this_life_costs_no_look() {
    let mut bench = Bench::successor(1, FIRST_XID);
    assert!(announce(&mut bench, gid(1, FIRST_XID)).is_empty());
}

/// The shell finds a waiting backend in shared memory, and then its announcement in the queue.
#[test]
fn who_announces_twice_is_answered_once() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    for peer in [2, 3] {
        let vote = Message::Vote {
            gid,
            vote: Vote::Yes,
        };
        bench.hear(peer, vote);
    }
    log_says(&mut bench, gid, None);
    assert_eq!(
        announce(&mut bench, gid),
        ["write Commit", "reply commit 1.1"]
    );
    assert!(announce(&mut bench, gid).is_empty());
    bench.give(Input::Finished { gid });
    assert!(announce(&mut bench, gid).is_empty());
}
