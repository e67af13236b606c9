//! One of two nodes that goes on alone by the referee's leave, and what was in flight then.

mod common;

use common::{Bench, gid, n, resolver_ballot, words};
use protocol::{Config, Core, Effects, Generation, GenerationNum, Gid, Input, Message, NodeSet};

fn set(ids: &[u8]) -> NodeSet {
    ids.iter().map(|id| n(*id)).collect()
}

/// Node 1 of two.
fn bench() -> Bench {
    let mut out = Effects::new();
    let config = Config::new(n(1), set(&[1, 2]), 1);
    let mut bench = Bench {
        core: Core::new(config, Vec::new(), 0, &mut out),
        now: 0,
    };
    let (peer, epoch) = (n(2), 1);
    bench.give(Input::LinkUp { peer, epoch });
    bench
}

fn switch(bench: &mut Bench, num: u32, members: &[u8]) -> Vec<String> {
    let generation = Generation {
        num: GenerationNum(num),
        members: set(members),
    };
    words(&bench.give(Input::Generation { generation }))
}

fn begin(bench: &mut Bench, members: &[u8], num: u32) -> Gid {
    let gid = Gid {
        members: set(members),
        generation: GenerationNum(num),
        ..gid(1, 7)
    };
    bench.give(Input::Committing {
        gid,
        wait_peers: false,
        fast: false,
    });
    gid
}

fn promised(gid: Gid, voted_yes: bool) -> Message {
    Message::Promised {
        gid,
        ballot: resolver_ballot(2, 1),
        accepted: None,
        voted_yes,
    }
}

/// Its own acceptance was not enough when it came, and nobody else's will come.
#[test]
fn what_it_has_accepted_itself_is_decided_when_it_goes_on_alone() {
    let mut bench = bench();
    let gid = begin(&mut bench, &[1, 2], 1);
    bench.give(Input::Interrupted { gid });
    bench.hear(1, promised(gid, true));
    bench.hear(2, promised(gid, true));
    let ballot = resolver_ballot(2, 1);
    bench.hear(1, Message::Accepted { gid, ballot });
    bench.give(Input::LinkDown { peer: n(2) });
    let said = switch(&mut bench, 2, &[1]);
    assert!(said.contains(&"reply commit 1.1".to_owned()), "{said:?}");
}

/// The other one is back, but says nothing about that time: it is a copy.
#[test]
fn what_it_began_alone_waits_for_nobody() {
    let mut bench = bench();
    switch(&mut bench, 2, &[1]);
    let gid = begin(&mut bench, &[1], 2);
    let ballot = protocol::Ballot::COORDINATOR;
    switch(&mut bench, 3, &[1, 2]);
    let said = words(&bench.hear(1, Message::Accepted { gid, ballot }));
    assert!(said.contains(&"reply commit 1.1".to_owned()), "{said:?}");
}
