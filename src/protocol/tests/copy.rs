//! A copy of a lost node answers nothing in that node's name, and keeps nobody waiting for what that node had to finish.

mod common;

use common::{Bench, gid, n, resolver_ballot, words};
use protocol::{
    Config, Core, Decision, Effects, GenerationNum, Gid, Input, Message, NodeSet, Verdict, Vote,
};

/// Node 3, copied in generation 4.
fn copy() -> Bench {
    let mut out = Effects::new();
    let nodes: NodeSet = (1..=3).map(n).collect();
    let config = Config {
        copied_in: GenerationNum(4),
        ..Config::new(n(3), nodes, 9)
    };
    let mut bench = Bench {
        core: Core::new(config, Vec::new(), 0, &mut out),
        now: 0,
    };
    for peer in [1, 2] {
        let (peer, epoch) = (n(peer), 1);
        bench.give(Input::LinkUp { peer, epoch });
    }
    bench
}

fn of_generation(coordinator: u8, num: u32) -> Gid {
    Gid {
        generation: GenerationNum(num),
        ..gid(coordinator, 7)
    }
}

/// Questions that the lost node may have answered already.
fn questions(gid: Gid) -> [Message; 3] {
    let ballot = resolver_ballot(2, 2);
    [
        Message::Status { gid, ballot },
        Message::Propose {
            gid,
            ballot,
            verdict: Verdict::Preabort,
        },
        Message::Query { gid },
    ]
}

#[test]
fn a_copy_promises_and_accepts_nothing_of_its_generation_and_older() {
    for question in [4, 3]
        .into_iter()
        .flat_map(|num| questions(of_generation(1, num)))
    {
        let effects = copy().hear(2, question.clone());
        assert!(effects.is_empty(), "{question:?}: {:?}", words(&effects));
    }
    let newer = of_generation(1, 5);
    assert!(!copy().hear(2, questions(newer)[0].clone()).is_empty());
}

#[test]
fn a_copy_counts_no_vote_on_what_the_lost_node_had_begun() {
    let gid = of_generation(3, 2);
    let vote = Vote::Yes;
    assert!(copy().hear(1, Message::Vote { gid, vote }).is_empty());
}

#[test]
fn a_copy_lets_the_others_forget() {
    let decided = Message::Decided {
        gid: of_generation(1, 3),
        decision: Decision::Commit,
        csn: None,
    };
    let finished = Message::Finished {
        gid: of_generation(3, 3),
        decision: Decision::Commit,
        csn: None,
    };
    let of_an_acceptor = Message::Query {
        gid: Gid {
            members: [2, 3].map(n).into_iter().collect(),
            ..of_generation(3, 3)
        },
    };
    let mut bench = copy();
    assert_eq!(words(&bench.hear(1, decided)), ["1 <- finished Commit"]);
    assert_eq!(words(&bench.hear(1, finished)), ["1 <- forget"]);
    assert_eq!(words(&bench.hear(1, of_an_acceptor)), ["1 <- forget"]);
}
