//! What has ended and was forgotten does not begin anew, whatever comes late. Found by random schedules as "Abort against Commit".

mod common;

use common::{Bench, gid, n};
use protocol::{Decision, Input, Lsn, Message, Refusal, Vote};

fn no() -> Vote {
    Vote::No(Refusal::retry("no", ""))
}

#[test]
fn a_forgotten_refusal_is_not_voted_on_again() {
    let gid = gid(2, 8);
    let mut bench = Bench::new(1);
    bench.vote(gid, no(), 5);
    bench.hear(2, Message::Forget { gid });
    bench.give(Input::MarkPassed {
        origin: n(2),
        lsn: Lsn(9),
    });
    bench.vote(gid, Vote::Yes, 5);
    bench.hear(
        2,
        Message::Finished {
            gid,
            decision: Decision::Commit,
            csn: None,
        },
    );
    assert_eq!(bench.core.decision(gid), Some(Decision::Abort));
}

#[test]
fn a_forgotten_abort_is_not_announced_again() {
    let gid = gid(1, 7);
    let mut bench = Bench::new(1);
    let announcement = Input::Committing {
        gid,
        wait_peers: true,
        fast: false,
    };
    bench.hear(2, Message::Vote { gid, vote: no() });
    bench.give(announcement.clone());
    bench.hear(1, Message::Forget { gid });
    bench.give(Input::Finished { gid });
    assert_eq!(bench.core.decision(gid), Some(Decision::Abort));
    bench.give(announcement);
    bench.hear(
        1,
        Message::Decided {
            gid,
            decision: Decision::Commit,
            csn: None,
        },
    );
    assert_eq!(bench.core.decision(gid), Some(Decision::Abort));
}
