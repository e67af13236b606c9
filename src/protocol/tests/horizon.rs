//! Who asks for a horizon is told all numbers of which it does not hear otherwise.

mod common;

use common::{gid, n};
use protocol::{
    Config, Core, Csn, Decision, Effect, Effects, Generation, GenerationNum, Gid, Input, Lsn,
    Message, NodeSet, Vote,
};

fn set(ids: &[u8]) -> NodeSet {
    ids.iter().map(|id| n(*id)).collect()
}

/// A node of three that tells only what it says of horizons.
struct Bench(Core);

impl Bench {
    fn new(node: u8) -> Self {
        let mut out = Effects::new();
        let core = Core::new(
            Config::new(n(node), set(&[1, 2, 3]), 1),
            vec![],
            0,
            &mut out,
        );
        let mut bench = Self(core);
        for peer in set(&[1, 2, 3]).without(n(node)).iter() {
            bench.link(peer.get());
        }
        bench
    }

    fn link(&mut self, peer: u8) -> Vec<(u8, Message)> {
        let (peer, epoch) = (n(peer), 1);
        self.give(Input::LinkUp { peer, epoch })
    }

    fn give(&mut self, input: Input) -> Vec<(u8, Message)> {
        let mut out = Effects::new();
        self.0.handle(0, input, &mut out);
        let said = out.drain().filter_map(|effect| match effect {
            Effect::Send { to, msg } => Some((to.get(), msg)),
            _ => None,
        });
        said.filter(|(_, msg)| matches!(msg, Message::AskHorizon | Message::Horizon { .. }))
            .collect()
    }

    fn hear(&mut self, from: u8, msg: Message) -> Vec<(u8, Message)> {
        self.give(Input::Message { from: n(from), msg })
    }

    /// A transaction of node 1 with these members is prepared here, and committed without a number of node 1: this node gives it one.
    fn number(&mut self, xid: u64, members: &[u8]) -> Gid {
        let gid = Gid {
            members: set(members),
            ..gid(1, xid)
        };
        let (vote, prepare_lsn) = (Vote::Yes, Lsn(xid));
        self.give(Input::Voted {
            gid,
            vote,
            prepare_lsn,
        });
        gid
    }

    fn decide(&mut self, gid: Gid) -> Vec<(u8, Message)> {
        let (decision, csn) = (Decision::Commit, None);
        self.hear(1, Message::Decided { gid, decision, csn })
    }

    /// Node 3 has finished what this node has numbered.
    fn acknowledge(&mut self, gid: Gid, csn: u64) -> Vec<(u8, Message)> {
        let (decision, csn) = (Decision::Commit, Some(number(csn)));
        self.hear(3, Message::Finished { gid, decision, csn })
    }
}

fn number(counter: u64) -> Csn {
    (0..counter).fold(Csn::start_of(1), |csn, _| csn.next())
}

/// Node 3 asks before it comes online and again when it is; in between numbers were given of which it is not told.
#[test]
fn who_asks_again_before_an_answer_is_answered_for_both() {
    let mut bench = Bench::new(2);
    bench.hear(3, Message::AskHorizon);
    let first = bench.number(11, &[1, 2, 3]);
    bench.decide(first);
    assert_eq!(bench.hear(3, Message::AskHorizon), []);
    let second = bench.number(12, &[1, 2, 3]);
    bench.decide(second);
    let without_it = bench.number(13, &[1, 2]);
    bench.decide(without_it);
    assert_eq!(bench.hear(3, Message::AskHorizon), []);
    let told = |csn| {
        let csn = number(csn);
        vec![(3, Message::Horizon { csn })]
    };
    assert_eq!(bench.acknowledge(first, 1), told(1));
    assert_eq!(
        bench.acknowledge(second, 2),
        told(3),
        "beyond what it is not told"
    );
}

/// The question that counts was lost with the link, and an answer to an earlier one had come.
#[test]
fn a_new_link_asks_again() {
    let mut bench = Bench::new(3);
    let csn = number(4);
    bench.hear(2, Message::Horizon { csn });
    let generation = Generation {
        num: GenerationNum(2),
        members: set(&[1, 2, 3]),
    };
    bench.give(Input::Generation { generation });
    assert!(
        bench
            .give(Input::Online)
            .contains(&(2, Message::AskHorizon))
    );
    bench.hear(2, Message::Horizon { csn });
    bench.give(Input::LinkDown { peer: n(2) });
    assert_eq!(bench.link(2), [(2, Message::AskHorizon)]);
}
