//! Elections and switches, one rule each.

mod common;

use common::n;
use protocol::membership::{
    Admission, Elected, Generation, Membership, MembershipConfig, MembershipEffect,
    MembershipEffects, MembershipInput, MembershipMessage, MembershipRecord, Presence, Status,
};
use protocol::{GenerationNum, Gid, Millis, NodeSet};

fn set(ids: &[u8]) -> NodeSet {
    ids.iter().map(|id| n(*id)).collect()
}

fn generation(num: u32, members: &[u8]) -> Generation {
    Generation {
        num: GenerationNum(num),
        members: set(members),
    }
}

fn elected(num: u32, members: &[u8], donors: &[u8]) -> Elected {
    Elected {
        generation: generation(num, members),
        donors: set(donors),
    }
}

/// One of three nodes.
struct Bench {
    membership: Membership,
    now: Millis,
}

impl Bench {
    /// All three see each other, and nobody is bound by a promise.
    fn new(node: u8, record: Option<MembershipRecord>) -> Self {
        let config = MembershipConfig::new(n(node), set(&[1, 2, 3]));
        let mut out = MembershipEffects::new();
        let membership = Membership::new(config, record, 0, &mut out);
        let mut bench = Self {
            membership,
            now: 10_000,
        };
        for peer in set(&[1, 2, 3]).without(n(node)).iter() {
            bench.give(MembershipInput::LinkUp { peer });
            let online_in = bench.membership.record().online_in;
            bench.hear(peer.get(), &[1, 2, 3], online_in.0);
        }
        bench
    }

    fn give(&mut self, input: MembershipInput) -> Vec<MembershipEffect> {
        let mut out = MembershipEffects::new();
        self.membership.handle(self.now, input, &mut out);
        let noise = |effect: &MembershipEffect| {
            matches!(
                effect,
                MembershipEffect::Event(_)
                    | MembershipEffect::Beat
                    | MembershipEffect::Withhold { .. }
            )
        };
        out.drain().filter(|effect| !noise(effect)).collect()
    }

    fn hear(&mut self, from: u8, sees: &[u8], online_in: u32) -> Vec<MembershipEffect> {
        let presence = Presence {
            current: self.membership.current(),
            online_in: GenerationNum(online_in),
            sees: set(sees),
            willing: false,
            leaving: false,
        };
        let from = n(from);
        self.give(MembershipInput::Presence { from, presence })
    }

    fn say(&mut self, from: u8, msg: MembershipMessage) -> Vec<MembershipEffect> {
        self.give(MembershipInput::Message { from: n(from), msg })
    }

    fn tick(&mut self, unbound: &[u8]) -> Vec<MembershipEffect> {
        self.now += 1_000;
        let unbound = set(unbound);
        self.give(MembershipInput::Tick { unbound })
    }

    fn lose(&mut self, peer: u8, remaining: &[u8]) {
        self.give(MembershipInput::LinkDown { peer: n(peer) });
        for other in remaining {
            let online_in = self.membership.record().online_in;
            self.hear(*other, &[1, 2, 3], online_in.0);
        }
    }

    fn ask(&mut self, from: u8, wanted: Generation) -> Vec<MembershipEffect> {
        let current = self.membership.current();
        let generation = wanted;
        let msg = MembershipMessage::RequestVote {
            generation,
            current,
        };
        self.say(from, msg)
    }

    fn close(&mut self, num: u32) -> Vec<MembershipEffect> {
        let num = GenerationNum(num);
        self.give(MembershipInput::Closed { num })
    }
}

fn record(online_in: u32, last_vote: Generation, current: Elected) -> MembershipRecord {
    MembershipRecord {
        current,
        online_in: GenerationNum(online_in),
        last_vote,
        recovered_to: GenerationNum(0),
    }
}

fn grants(effects: &[MembershipEffect]) -> bool {
    effects.iter().any(|effect| {
        matches!(
            effect,
            MembershipEffect::Send {
                msg: MembershipMessage::Granted { .. },
                ..
            }
        )
    })
}

#[test]
fn a_new_cluster_is_online_and_so_is_whoever_was() {
    let first = Bench::new(1, None);
    assert_eq!(first.membership.status(), Status::Online);
    let again = record(4, generation(4, &[1, 2]), elected(4, &[1, 2], &[2]));
    let restarted = Bench::new(1, Some(again));
    assert_eq!(restarted.membership.status(), Status::Online);
}

#[test]
fn a_lost_member_is_dropped_when_nothing_is_promised_to_it() {
    let mut bench = Bench::new(1, None);
    bench.lose(3, &[2]);
    assert_eq!(bench.tick(&[]), [], "it is still promised something");
    let effects = bench.tick(&[3]);
    let wanted = generation(2, &[1, 2]);
    assert!(matches!(
        effects[..],
        [
            MembershipEffect::Persist(MembershipRecord { last_vote, .. }),
            MembershipEffect::Send { to, msg: MembershipMessage::RequestVote { generation, .. } }
        ] if last_vote == wanted && generation == wanted && to == n(2)
    ));
    let granted = MembershipMessage::Granted {
        generation: wanted,
        online_in: GenerationNum(1),
    };
    let effects = bench.say(2, granted);
    let next = elected(2, &[1, 2], &[1, 2]);
    assert!(effects.contains(&MembershipEffect::Close { generation: wanted }));
    assert_eq!(bench.membership.current(), next);
    assert!(!bench.membership.is_online());
    assert_eq!(
        bench.close(2),
        [MembershipEffect::WriteMarker { elected: next }]
    );
    let num = GenerationNum(2);
    let effects = bench.give(MembershipInput::MarkerWritten { num });
    assert!(matches!(
        effects[..],
        [MembershipEffect::Persist(MembershipRecord { online_in, .. }), MembershipEffect::Open { generation }]
            if online_in == num && generation == wanted
    ));
}

#[test]
fn a_voter_is_silent_while_it_is_bound_or_sees_the_dropped_one() {
    let mut bench = Bench::new(2, None);
    let wanted = generation(2, &[1, 2]);
    bench.tick(&[1, 2, 3]);
    assert_eq!(bench.ask(1, wanted), [], "node 3 is seen");
    bench.lose(3, &[1]);
    assert_eq!(
        bench.ask(1, wanted),
        [],
        "it may have been promised something"
    );
    bench.now -= 995;
    bench.tick(&[3]);
    assert!(grants(&bench.ask(1, wanted)));
    assert!(
        grants(&bench.ask(1, wanted)),
        "the same vote is given again"
    );
    let denied = bench.ask(1, generation(2, &[1, 2, 3]));
    assert!(
        !grants(&denied) && !denied.is_empty(),
        "one number, one vote"
    );
}

/// By the giver's clock that is a little more than what was promised: the other one's may be slower.
#[test]
fn promises_of_an_earlier_life_bind_as_long_as_any_can() {
    let online = record(
        1,
        generation(1, &[1, 2, 3]),
        elected(1, &[1, 2, 3], &[1, 2, 3]),
    );
    for found in [None, Some(online)] {
        let mut bench = Bench::new(2, found);
        bench.now = 20;
        bench.lose(3, &[1]);
        let wanted = generation(2, &[1, 2]);
        let unbound = set(&[3]);
        for (now, votes) in [(1_000, false), (1_029, false), (1_030, true)] {
            bench.now = now;
            bench.give(MembershipInput::Tick { unbound });
            let voted = grants(&bench.ask(1, wanted));
            assert_eq!(voted, votes, "at {now} after a start with {found:?}");
        }
    }
}

/// Nodes 1 to 4 see each other, node 5 only two of them; of equal cliques it finds the one without itself.
#[test]
fn a_node_that_is_online_does_not_vote_itself_out() {
    let all = set(&[1, 2, 3, 4, 5]);
    let config = MembershipConfig::new(n(5), all);
    let mut out = MembershipEffects::new();
    let membership = Membership::new(config, None, 0, &mut out);
    let mut bench = Bench {
        membership,
        now: 10_000,
    };
    for peer in [1, 2, 3] {
        bench.give(MembershipInput::LinkUp { peer: n(peer) });
        let sees: &[u8] = if peer == 3 {
            &[1, 2, 3, 4]
        } else {
            &[1, 2, 3, 4, 5]
        };
        bench.hear(peer, sees, 1);
    }
    assert_eq!(bench.membership.clique(), set(&[1, 2, 3]));
    bench.tick(&[1, 2, 3, 4]);
    assert_eq!(bench.ask(1, generation(2, &[1, 2, 3])), []);
}

#[test]
fn who_has_said_good_bye_opens_nothing_any_more() {
    let mut bench = Bench::new(1, None);
    bench.give(MembershipInput::Leave);
    let next = elected(2, &[1, 2, 3], &[1, 2, 3]);
    bench.say(2, MembershipMessage::Elected(next));
    assert_eq!(
        bench.close(2),
        [MembershipEffect::WriteMarker { elected: next }]
    );
    let num = GenerationNum(2);
    let effects = bench.give(MembershipInput::MarkerWritten { num });
    assert!(matches!(effects[..], [MembershipEffect::Persist(_)]));
    assert!(!bench.membership.is_online());
}

#[test]
fn who_voted_higher_does_not_come_online() {
    let before = record(
        1,
        generation(1, &[1, 2, 3]),
        elected(1, &[1, 2, 3], &[1, 2, 3]),
    );
    let mut bench = Bench::new(1, Some(before));
    bench.say(2, MembershipMessage::Elected(elected(2, &[1, 2], &[1, 2])));
    bench.lose(2, &[3]);
    bench.tick(&[2, 3]);
    bench.hear(3, &[1, 3], 1);
    assert!(grants(&bench.ask(3, generation(3, &[1, 3]))));
    assert_eq!(bench.close(2), []);
    assert_eq!(bench.membership.status(), Status::Disabled);
}

#[test]
fn a_donor_drains_when_somebody_recovers() {
    let mut bench = Bench::new(1, None);
    bench.say(
        2,
        MembershipMessage::Elected(elected(5, &[1, 2, 3], &[1, 2])),
    );
    let num = GenerationNum(5);
    assert_eq!(bench.close(5), [MembershipEffect::Drain { num }]);
    let drained = bench.give(MembershipInput::Drained { num });
    assert!(matches!(
        drained[..],
        [MembershipEffect::WriteMarker { .. }]
    ));
}

#[test]
fn who_recovers_is_online_at_the_marker_also_when_it_came_early() {
    let mut bench = Bench::new(3, None);
    bench.say(2, MembershipMessage::Elected(elected(4, &[1, 2], &[1, 2])));
    bench.close(4);
    let effects = bench.hear(1, &[1, 2, 3], 4);
    let from = n(1);
    assert_eq!(effects, [MembershipEffect::Recover { from }]);
    assert_eq!(bench.membership.status(), Status::Catchup);
    let num = GenerationNum(5);
    bench.give(MembershipInput::MarkerReached { from, num });
    bench.say(
        2,
        MembershipMessage::Elected(elected(5, &[1, 2, 3], &[1, 2])),
    );
    let effects = bench.close(5);
    assert!(matches!(
        effects[..],
        [
            MembershipEffect::WriteMarker { .. },
            MembershipEffect::StopRecovery
        ]
    ));
    bench.give(MembershipInput::MarkerWritten { num });
    assert!(bench.membership.is_online());
    assert_eq!(bench.membership.record().recovered_to, num);
}

/// A node of `all` that was left out of generation `num`, in which all `donors` are online, each as good as the other.
fn returning(node: u8, num: u32, donor_seed: u64, donors: &[u8]) -> (Bench, Vec<u8>) {
    let all: NodeSet = donors.iter().copied().chain([node]).map(n).collect();
    let config = MembershipConfig {
        donor_seed,
        ..MembershipConfig::new(n(node), all)
    };
    let current = elected(num, donors, donors);
    let left_out = record(num - 1, current.generation, current);
    let mut out = MembershipEffects::new();
    let membership = Membership::new(config, Some(left_out), 0, &mut out);
    let mut bench = Bench {
        membership,
        now: 10_000,
    };
    for donor in donors {
        bench.give(MembershipInput::LinkUp { peer: n(*donor) });
        bench.hear(*donor, donors, num);
    }
    let effects = bench.close(num);
    (bench, recovers_from(&effects))
}

fn recovers_from(effects: &[MembershipEffect]) -> Vec<u8> {
    let from = |effect: &MembershipEffect| match effect {
        MembershipEffect::Recover { from } => Some(from.get()),
        _ => None,
    };
    effects.iter().filter_map(from).collect()
}

/// The same seed for all, as if there were no chance at all: nodes and generations alone spread them.
#[test]
fn nodes_that_return_spread_over_the_donors() {
    let donors = [1, 2, 3, 4, 5];
    for seed in 0..100 {
        let mut served = [0; 5];
        for node in 6..=16 {
            for num in 2..12 {
                let (_, from) = returning(node, num, seed, &donors);
                assert_eq!(from.len(), 1, "one order");
                served[usize::from(from[0]) - 1] += 1;
            }
        }
        // 22 each on the average; the deviation of fair chance is 4.
        assert!(
            served.iter().all(|served| (4..=40).contains(served)),
            "{served:?}"
        );
    }
}

#[test]
fn the_seed_alone_spreads_one_node() {
    let donors = [1, 2, 3];
    let mut served = [0; 3];
    for seed in 0..300 {
        let (_, from) = returning(4, 2, seed, &donors);
        served[usize::from(from[0]) - 1] += 1;
    }
    assert!(served.iter().all(|served| *served > 60), "{served:?}");
}

#[test]
fn a_donor_that_failed_comes_after_all_others() {
    for seed in 0..50 {
        let (mut bench, first) = returning(5, 2, seed, &[1, 2, 3, 4]);
        let mut tried = first;
        for _ in 1..8 {
            let from = n(tried[tried.len() - 1]);
            let effects = bench.give(MembershipInput::RecoveryLost { from });
            tried.extend(recovers_from(&effects));
        }
        for round in tried.chunks(4) {
            let mut sorted = round.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [1, 2, 3, 4], "{tried:?}");
        }
    }
}

/// Chance is among the most advanced only.
#[test]
fn who_was_online_last_goes_first() {
    for seed in 0..50 {
        let (mut bench, _) = returning(5, 6, seed, &[1, 2, 3, 4]);
        bench.hear(3, &[1, 2, 3, 4], 7);
        let from = n(3);
        assert_eq!(bench.membership.donor(), Some(from));
        bench.hear(1, &[1, 2, 3, 4], 7);
        assert_eq!(bench.membership.donor(), Some(from), "it still serves");
    }
}

#[test]
fn a_level_node_asks_in_and_takes_nobody_out() {
    let mut bench = Bench::new(3, None);
    bench.say(2, MembershipMessage::Elected(elected(4, &[1, 2], &[1, 2])));
    bench.close(4);
    bench.hear(1, &[1, 2, 3], 4);
    assert!(!bench.membership.presence().willing);
    let (from, level) = (n(1), true);
    bench.give(MembershipInput::Level { from, level });
    assert!(bench.membership.presence().willing);
    let effects = bench.tick(&[]);
    let asks = |effect: &MembershipEffect| {
        matches!(effect, MembershipEffect::Send { msg: MembershipMessage::RequestVote { generation, .. }, .. }
            if *generation == self::generation(5, &[1, 2, 3]))
    };
    assert_eq!(effects.iter().filter(|effect| asks(effect)).count(), 2);
}

#[test]
fn what_becomes_of_a_prepare() {
    let gid = |num, members: &[u8]| Gid {
        generation: GenerationNum(num),
        members: set(members),
        ..common::gid(2, 7)
    };
    let mut online = record(6, generation(6, &[1, 2]), elected(6, &[1, 2], &[1, 2]));
    online.recovered_to = GenerationNum(4);
    let bench = Bench::new(1, Some(online));
    for (num, members, expected) in [
        (7, &[1, 2][..], Admission::Hold),
        (6, &[1, 2], Admission::Apply),
        (5, &[1, 2], Admission::Refuse),
        (5, &[2, 3], Admission::Skip),
        (6, &[2, 3], Admission::Skip),
        (3, &[1, 2], Admission::Skip),
    ] {
        let admission = bench.membership.admit(gid(num, members));
        assert_eq!(admission, expected, "generation {num}");
    }
    assert!(bench.membership.may_pass(GenerationNum(6)));
    assert!(!bench.membership.may_pass(GenerationNum(7)));
}

#[test]
fn what_no_quorum_can_have_elected_is_refused() {
    let mut bench = Bench::new(1, None);
    for wrong in [
        elected(9, &[1], &[1]),
        elected(9, &[1, 2], &[]),
        elected(9, &[1, 2], &[3]),
        elected(9, &[1, 2, 4], &[1]),
        elected(1, &[1, 2], &[1]),
    ] {
        bench.say(2, MembershipMessage::Elected(wrong));
        assert_eq!(bench.membership.current().generation.num, GenerationNum(1));
    }
}
