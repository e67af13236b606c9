//! A core whose generation changes while it has transactions in flight.

mod common;

use common::{Bench, gid, n, words};
use protocol::membership::{
    Elected, Membership, MembershipConfig, MembershipEffect, MembershipEffects, MembershipInput,
    MembershipMessage, Presence,
};
use protocol::{
    Csn, Decision, Effect, Event, Generation, GenerationNum, Gid, Input, Leases, Lsn, Message,
    Millis, NodeSet, Refusal, Vote,
};

fn next_generation(bench: &mut Bench) -> Vec<Effect> {
    bench.give(Input::Generation {
        generation: Generation {
            num: GenerationNum(2),
            members: (1..=3).map(n).collect(),
        },
    })
}

fn asks_for_promises(effects: &[Effect]) -> bool {
    let is_status = |effect: &Effect| {
        matches!(
            effect,
            Effect::Send {
                msg: Message::Status { .. },
                ..
            }
        )
    };
    effects.iter().any(is_status)
}

/// The missing voter may wait for the end of *its* older transactions before it votes on anything.
#[test]
fn a_vote_that_is_missing_when_the_generation_ends_is_not_waited_for() {
    let gid = gid(1, 7);
    let (wait_peers, fast) = (true, false);
    let mut bench = Bench::new(1);
    bench.give(Input::Committing {
        gid,
        wait_peers,
        fast,
    });
    bench.hear(
        2,
        Message::Vote {
            gid,
            vote: Vote::Yes,
        },
    );
    assert!(asks_for_promises(&next_generation(&mut bench)));
}

#[test]
fn nor_is_it_when_the_session_comes_late() {
    let gid = gid(1, 7);
    let (wait_peers, fast) = (true, false);
    let mut bench = Bench::new(1);
    assert!(next_generation(&mut bench).is_empty());
    let effects = bench.give(Input::Committing {
        gid,
        wait_peers,
        fast,
    });
    assert!(asks_for_promises(&effects));
}

/// Its no would be taken for the end of the transaction by everybody who asks this node.
#[test]
fn a_node_without_a_vote_does_not_decide_by_voting() {
    let gid = Gid {
        members: [1, 3].map(n).into_iter().collect(),
        ..gid(1, 7)
    };
    let mut bench = Bench::new(2);
    for vote in [Vote::Yes, Vote::No(Refusal::retry("", ""))] {
        let effects = bench.give(Input::Voted {
            gid,
            vote,
            prepare_lsn: Lsn(1),
        });
        assert!(matches!(
            effects[..],
            [Effect::Event(Event::Rejected { from, .. })] if from == n(2)
        ));
        assert_eq!(bench.core.decision(gid), None);
    }
}

/// What node 3 says of a commit that node 2 had numbered and told, when node 2 leaves the generation.
fn said_of_a_commit_of_a_lost_node(members: &[u8]) -> Vec<String> {
    let gid = Gid {
        members: members.iter().copied().map(n).collect(),
        ..gid(2, 7)
    };
    let mut bench = Bench::new(3);
    bench.vote(gid, Vote::Yes, 50);
    let told = Message::Decided {
        gid,
        decision: Decision::Commit,
        csn: Some(Csn::start_of(1).next()),
    };
    bench.hear(2, told);
    bench.give(Input::Finished { gid });
    let effects = bench.give(Input::Generation {
        generation: Generation {
            num: GenerationNum(2),
            members: [1, 3].map(n).into_iter().collect(),
        },
    });
    words(&effects)
}

#[test]
fn a_commit_of_a_lost_coordinator_gets_a_number_of_those_that_stay() {
    let said = said_of_a_commit_of_a_lost_node(&[1, 2, 3]);
    assert!(
        said.contains(&"1 <- decided Commit 1.1".to_owned()),
        "{said:?}"
    );
}

/// A number that a member is not told would stop the count of all later ones there.
#[test]
fn but_not_if_a_member_has_come_since() {
    let said = said_of_a_commit_of_a_lost_node(&[2, 3]);
    assert!(
        said.iter().all(|word| !word.contains("decided")),
        "{said:?}"
    );
}

/// A node's membership and its leases, of three nodes.
struct Voter {
    membership: Membership,
    leases: Leases,
    all: NodeSet,
}

impl Voter {
    fn new() -> Self {
        let all: NodeSet = (1..=3).map(n).collect();
        let mut out = MembershipEffects::new();
        let config = MembershipConfig {
            promise_ms_max: 0,
            ..MembershipConfig::new(n(2), all)
        };
        Self {
            membership: Membership::new(config, None, 0, &mut out),
            leases: Leases::new(n(2), 1, all, 500),
            all,
        }
    }

    /// Says whether the input made this node vote.
    fn give(&mut self, now: Millis, input: MembershipInput) -> bool {
        let mut out = MembershipEffects::new();
        self.membership.handle(now, input, &mut out);
        let mut voted = false;
        for effect in out.drain() {
            match effect {
                MembershipEffect::Withhold { from } => {
                    self.leases.withhold_from_all_but(self.all.difference(from));
                }
                MembershipEffect::Send {
                    msg: MembershipMessage::Granted { .. },
                    ..
                } => voted = true,
                _ => {}
            }
        }
        voted
    }

    fn sees(&mut self, now: Millis, peer: u8, sees: &[u8]) {
        let current = self.current();
        let presence = Presence {
            current,
            online_in: current.generation.num,
            sees: sees.iter().map(|id| n(*id)).collect(),
            ..Presence::default()
        };
        let from = n(peer);
        self.give(now, MembershipInput::Presence { from, presence });
    }

    fn current(&self) -> Elected {
        self.membership.current()
    }

    fn tick(&mut self, now: Millis) {
        let free = |node| self.leases.bound_until(NodeSet::EMPTY.with(node)) <= now;
        let unbound = self.all.iter().filter(|node| free(*node)).collect();
        self.give(now, MembershipInput::Tick { unbound });
    }
}

/// Between two ticks a link comes, brings a promise, and goes again.
#[test]
fn a_promise_made_since_the_last_tick_binds() {
    let mut voter = Voter::new();
    voter.give(10, MembershipInput::LinkUp { peer: n(1) });
    voter.sees(10, 1, &[1, 2]);
    voter.tick(20);
    voter.give(21, MembershipInput::LinkUp { peer: n(3) });
    voter.sees(21, 3, &[1, 2, 3]);
    voter.sees(21, 1, &[1, 2, 3]);
    voter.leases.heard(n(3), 1, 21, 22);
    assert!(voter.leases.grants().any(|grant| grant.to == n(3)));
    voter.give(23, MembershipInput::LinkDown { peer: n(3) });
    voter.sees(23, 1, &[1, 2]);
    let request = MembershipInput::Message {
        from: n(1),
        msg: MembershipMessage::RequestVote {
            generation: Generation {
                num: GenerationNum(2),
                members: [n(1), n(2)].into_iter().collect(),
            },
            current: voter.current(),
        },
    };
    assert!(!voter.give(24, request.clone()));
    voter.tick(543);
    assert!(
        voter.give(544, request),
        "it votes when the promise is over"
    );
}

/// What a participant does when the generation without its coordinator begins, at the next tick.
fn said_when_its_coordinator_is_lost(node: u8, coordinator: u8) -> Vec<String> {
    let gid = gid(coordinator, 7);
    let mut bench = Bench::new(node);
    bench.vote(gid, Vote::Yes, 50);
    let left = (1..=3).filter(|other| *other != coordinator);
    let generation = Generation {
        num: GenerationNum(2),
        members: left.map(n).collect(),
    };
    bench.give(Input::Generation { generation });
    words(&bench.later(0))
}

/// Nobody waits for a node that is lost.
#[test]
fn the_first_of_those_that_are_left_decides_at_once() {
    for (node, coordinator) in [(2, 1), (1, 2), (1, 3)] {
        let said = said_when_its_coordinator_is_lost(node, coordinator);
        let promise = format!("persist promise 2.{node}");
        assert!(said.contains(&promise), "{node}, {coordinator}: {said:?}");
    }
    for (node, coordinator) in [(3, 1), (3, 2), (2, 3)] {
        let said = said_when_its_coordinator_is_lost(node, coordinator);
        let begins = said.iter().any(|word| word.starts_with("persist promise"));
        assert!(!begins, "{node}, {coordinator}: {said:?}");
    }
}
