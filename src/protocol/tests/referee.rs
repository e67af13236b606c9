//! Two nodes and a referee: what it grants, and who asks it.

mod common;

use common::n;
use protocol::membership::{
    Elected, Generation, Membership, MembershipConfig, MembershipEffect, MembershipEffects,
    MembershipInput, MembershipMessage, MembershipRecord, Referee, RefereeRequest,
};
use protocol::{GenerationNum, NodeSet};

fn set(ids: &[u8]) -> NodeSet {
    ids.iter().map(|id| n(*id)).collect()
}

fn elected(num: u32, members: &[u8], donors: &[u8]) -> Elected {
    Elected {
        generation: Generation {
            num: GenerationNum(num),
            members: set(members),
        },
        donors: set(donors),
    }
}

/// Asks one referee after the other question: node, number, last online in, and whether it is granted.
fn answers(questions: &[(u8, u32, u32, bool)]) {
    let mut referee = Referee::default();
    for (node, num, online_in, granted) in questions {
        let answer = referee.answer(RefereeRequest {
            node: n(*node),
            num: GenerationNum(*num),
            online_in: GenerationNum(*online_in),
        });
        assert_eq!(answer.granted, *granted, "node {node} asks for {num}");
    }
}

#[test]
fn who_was_not_online_since_the_other_went_on_alone_is_refused() {
    answers(&[
        (1, 2, 1, true),
        (2, 3, 1, false),
        (2, 4, 3, true),
        (1, 5, 3, false),
    ]);
}

#[test]
fn a_question_that_is_late_or_asked_again_changes_nothing() {
    answers(&[
        (1, 2, 1, true),
        (1, 2, 1, true),
        (2, 4, 3, true),
        (1, 2, 1, false),
        (1, 3, 1, false),
        (2, 4, 3, true),
        (2, 5, 3, true),
    ]);
}

/// Node 1 went on alone in 6 and has been copied for node 2, which went on alone in 8. The disk that node 2 had before knows nothing later than 5, which
/// it was granted itself.
#[test]
fn an_old_disk_of_the_node_that_is_alone_is_refused() {
    let before = [(2, 5, 4, true), (1, 7, 6, true), (2, 9, 8, true)];
    for number in [9, 10] {
        let mut questions = before.to_vec();
        questions.push((2, number, 5, false));
        answers(&questions);
    }
}

#[test]
fn a_copy_that_was_never_online_is_refused_by_a_new_referee() {
    answers(&[(2, 5, 0, false), (2, 5, 4, true)]);
}

/// Node 2, alone for a while, with what it finds at its start.
fn asks(referee: bool, online_in: u32, current: Elected) -> bool {
    let config = MembershipConfig {
        referee,
        ..MembershipConfig::new(n(2), set(&[1, 2]))
    };
    let found = MembershipRecord {
        current,
        online_in: GenerationNum(online_in),
        last_vote: current.generation,
        recovered_to: GenerationNum(0),
    };
    let mut out = MembershipEffects::new();
    let mut membership = Membership::new(config, Some(found), 0, &mut out);
    let num = current.generation.num;
    let unbound = set(&[1]);
    let inputs = [
        MembershipInput::Closed { num },
        MembershipInput::Tick { unbound },
        MembershipInput::Tick { unbound },
    ];
    for (input, now) in inputs.into_iter().zip([10_000, 10_100, 11_000]) {
        membership.handle(now, input, &mut out);
    }
    out.drain()
        .any(|effect| matches!(effect, MembershipEffect::AskReferee(_)))
}

#[test]
fn who_may_hold_all_asks() {
    assert!(asks(true, 4, elected(4, &[1, 2], &[1])));
    assert!(asks(true, 2, elected(4, &[1, 2], &[1, 2])));
    assert!(!asks(false, 4, elected(4, &[1, 2], &[1])));
}

/// The referee would refuse it; one that is new would not. A copy is among those that know: it has never been online.
#[test]
fn who_knows_that_it_lacks_something_does_not_ask() {
    assert!(!asks(true, 3, elected(4, &[1], &[1])));
    assert!(!asks(true, 3, elected(4, &[1, 2], &[1])));
    assert!(!asks(true, 0, elected(4, &[1, 2], &[1])));
}

/// Only one of the two was told of the referee: the other one follows all the same, or it would stay what it was for ever.
#[test]
fn a_node_without_the_setting_believes_in_the_other_ones_grant() {
    let alone = elected(2, &[1], &[1]);
    let mut out = MembershipEffects::new();
    let config = MembershipConfig::new(n(2), set(&[1, 2]));
    let mut membership = Membership::new(config, None, 0, &mut out);
    let from = n(1);
    let msg = MembershipMessage::Elected(alone);
    membership.handle(0, MembershipInput::Message { from, msg }, &mut out);
    assert_eq!(membership.current(), alone);
}
