//! Random schedules against one core: whatever comes in whatever order, it does not panic, keeps its promises and its outcomes.

mod common;

use std::collections::BTreeMap;

use common::{Bench, gid, n};
use proptest::prelude::*;
use protocol::{
    Accept, Ballot, Csn, Decision, Effect, Gid, Input, Lsn, Message, Refusal, Verdict, Vote,
};

fn any_message(gid: Gid) -> impl Strategy<Value = Message> {
    let ballot = (1u32..5, 0u8..4).prop_map(|(term, node)| Ballot {
        term,
        node: protocol::NodeId::new(node),
    });
    let verdict = prop::sample::select(vec![Verdict::Precommit, Verdict::Preabort]);
    let decision = prop::sample::select(vec![Decision::Commit, Decision::Abort]);
    let csn = prop::option::of((1u64..6).prop_map(|counter| Csn(Csn::start_of(1).0 + counter)));
    let accepted = prop::option::of((ballot.clone(), verdict.clone()));
    prop_oneof![
        Just(Message::Vote {
            gid,
            vote: Vote::Yes
        }),
        Just(Message::Vote {
            gid,
            vote: Vote::No(Refusal::retry("no", ""))
        }),
        (ballot.clone(), verdict).prop_map(move |(ballot, verdict)| Message::Propose {
            gid,
            ballot,
            verdict
        }),
        ballot
            .clone()
            .prop_map(move |ballot| Message::Accepted { gid, ballot }),
        ballot
            .clone()
            .prop_map(move |promised| Message::Refused { gid, promised }),
        ballot
            .clone()
            .prop_map(move |ballot| Message::Status { gid, ballot }),
        (ballot, accepted, any::<bool>()).prop_map(move |(ballot, accepted, voted_yes)| {
            let accepted = accepted.map(|(ballot, verdict)| Accept { ballot, verdict });
            Message::Promised {
                gid,
                ballot,
                accepted,
                voted_yes,
            }
        }),
        (decision.clone(), csn.clone()).prop_map(move |(decision, csn)| Message::Decided {
            gid,
            decision,
            csn
        }),
        (decision, csn).prop_map(move |(decision, csn)| Message::Finished { gid, decision, csn }),
        Just(Message::Forget { gid }),
        Just(Message::Query { gid }),
        Just(Message::AskHorizon),
        Just(Message::Horizon {
            csn: Csn(Csn::start_of(1).0 + 2)
        }),
    ]
}

fn any_input() -> impl Strategy<Value = Input> {
    let (own, foreign) = (gid(1, 7), gid(2, 8));
    let of_own = prop_oneof![
        any::<bool>().prop_map(move |fast| Input::Committing {
            gid: own,
            wait_peers: true,
            fast
        }),
        Just(Input::Interrupted { gid: own }),
        Just(Input::Abandoned { gid: own }),
        Just(Input::CoordinatorOutcome {
            gid: own,
            outcome: None
        }),
        Just(Input::Finished { gid: own }),
    ];
    let of_foreign = prop_oneof![
        Just(Input::Voted {
            gid: foreign,
            vote: Vote::Yes,
            prepare_lsn: Lsn(5)
        }),
        Just(Input::Voted {
            gid: foreign,
            vote: Vote::No(Refusal::retry("no", "")),
            prepare_lsn: Lsn(5)
        }),
        Just(Input::StreamOutcome {
            gid: foreign,
            decision: Decision::Abort
        }),
        Just(Input::Finished { gid: foreign }),
        Just(Input::MarkPassed {
            origin: n(2),
            lsn: Lsn(9)
        }),
    ];
    let of_links = (2u8..4, any::<bool>()).prop_map(|(peer, up)| {
        if up {
            Input::LinkUp {
                peer: n(peer),
                epoch: 1,
            }
        } else {
            Input::LinkDown { peer: n(peer) }
        }
    });
    let message = (1u8..4, prop_oneof![any_message(own), any_message(foreign)])
        .prop_map(|(from, msg)| Input::Message { from: n(from), msg });
    prop_oneof![4 => message, 2 => of_own, 2 => of_foreign, 1 => of_links, 1 => Just(Input::Tick)]
}

proptest! {
    // A failure prints its inputs; they belong into a test with a name, not into a file of seeds.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_core_keeps_its_word(inputs in prop::collection::vec((any_input(), 0u64..500), 0..60)) {
        let mut bench = Bench::new(1);
        let mut promised: BTreeMap<Gid, Ballot> = BTreeMap::new();
        let mut decided: BTreeMap<Gid, Decision> = BTreeMap::new();
        for (input, pause) in inputs {
            bench.now += pause;
            for effect in bench.give(input) {
                if let Effect::Persist { gid, record } | Effect::Write { gid, record } = effect {
                    let before = promised.insert(gid, record.promised).unwrap_or_default();
                    prop_assert!(record.promised >= before, "{gid} went back from {before} to {}", record.promised);
                }
                if let Effect::Free { gid } = effect {
                    promised.remove(&gid);
                }
            }
            for gid in [gid(1, 7), gid(2, 8)] {
                if let Some(decision) = bench.core.decision(gid) {
                    let before = *decided.entry(gid).or_insert(decision);
                    prop_assert_eq!(before, decision);
                }
            }
        }
    }
}
