//! Histories made by hand, one for each invariant that the checker itself decides: each must be reported, by its name.
//!
//! I8 and I10 are demanded where the simulation looks at its nodes (`shell`, `settling`, `members`).

use std::collections::BTreeMap;

use protocol::membership::{Elected, Generation, MembershipRecord};
use protocol::{
    Accept, Ballot, Csn, Decision, GenerationNum, Gid, Lsn, Message, NodeId, NodeSet, Record,
    Verdict, Vote,
};

use crate::checker::{Checker, Evidence};

fn node(number: u8) -> NodeId {
    NodeId::new(number).expect("a node")
}

fn all() -> NodeSet {
    (1..=3).map(node).collect()
}

fn gid(xid: u64, generation: u32) -> Gid {
    Gid {
        coordinator: node(1),
        xid,
        generation: GenerationNum(generation),
        members: all(),
        started_at: 0,
    }
}

const fn generation(num: u32, members: NodeSet) -> Generation {
    Generation {
        num: GenerationNum(num),
        members,
    }
}

fn ballot(term: u32) -> Ballot {
    Ballot {
        term,
        node: Some(node(1)),
    }
}

fn record(promised: u32, accepted: Option<(u32, Verdict)>) -> Record {
    Record {
        gid: gid(1, 1),
        promised: ballot(promised),
        accepted: accepted.map(|(term, verdict)| Accept {
            ballot: ballot(term),
            verdict,
        }),
        voted_yes: true,
        decision: None,
        csn: Csn::ZERO,
        prepare_lsn: Lsn::ZERO,
    }
}

/// A checker that knows `gid(1, 1)` and `gid(2, …)` as prepared everywhere.
fn prepared() -> Checker {
    let mut checker = Checker::new(all());
    for gid in [gid(1, 1), gid(2, 1), gid(2, 2)] {
        all()
            .iter()
            .for_each(|at| checker.on_prepared(at, gid, None));
    }
    assert_eq!(checker.violation(), None);
    checker
}

/// The history must be fine without its last step, `breaks`, and be reported as `name` with it.
fn reports(name: &str, mut checker: Checker, breaks: impl FnOnce(&mut Checker)) {
    assert_eq!(checker.violation(), None, "before {name}");
    breaks(&mut checker);
    let found = checker.violation().map(|violation| violation.invariant);
    assert_eq!(found, Some(name));
}

fn propose(term: u32, verdict: Verdict) -> Message {
    Message::Propose {
        gid: gid(1, 1),
        ballot: ballot(term),
        verdict,
    }
}

#[test]
fn outcomes_that_differ_or_change() {
    let mut checker = prepared();
    checker.on_outcome(node(1), gid(1, 1), Decision::Commit);
    reports("I1", checker.clone(), |checker| {
        checker.on_outcome(node(2), gid(1, 1), Decision::Abort);
    });
    reports("I6", checker, |checker| {
        checker.on_outcome(node(1), gid(1, 1), Decision::Abort);
    });
}

#[test]
fn a_commit_that_a_member_never_prepared() {
    let mut checker = Checker::new(all());
    checker.on_prepared(node(1), gid(1, 1), None);
    checker.on_prepared(node(2), gid(1, 1), None);
    reports("I2", checker, |checker| {
        checker.on_outcome(node(1), gid(1, 1), Decision::Commit);
    });
}

#[test]
fn ballots_that_carry_two_verdicts() {
    let mut checker = prepared();
    checker.on_sent(node(1), &propose(1, Verdict::Precommit));
    reports("I3", checker.clone(), |checker| {
        checker.on_sent(node(2), &propose(1, Verdict::Preabort));
    });
    for at in [1, 2] {
        checker.on_durable(node(at), record(1, Some((1, Verdict::Precommit))));
    }
    reports("I4", checker, |checker| {
        checker.on_sent(node(3), &propose(2, Verdict::Preabort));
    });
}

#[test]
fn promises_that_go_back_or_are_exceeded() {
    reports("I5", prepared(), |checker| {
        checker.on_durable(node(1), record(1, Some((2, Verdict::Precommit))));
    });
    let mut checker = prepared();
    checker.on_durable(node(1), record(2, None));
    reports("I5", checker, |checker| {
        checker.on_durable(node(1), record(1, None));
    });
}

#[test]
fn a_yes_after_a_no() {
    let mut checker = prepared();
    checker.on_durable(
        node(2),
        Record {
            voted_yes: false,
            decision: Some(Decision::Abort),
            ..record(0, None)
        },
    );
    reports("I7", checker, |checker| {
        let vote = Message::Vote {
            gid: gid(1, 1),
            vote: Vote::Yes,
        };
        checker.on_sent(node(2), &vote);
    });
}

#[test]
fn a_commit_that_a_quorum_would_abort() {
    // All speak, and nobody knows of it.
    let evidence = all().iter().map(|node| (node, Evidence::default()));
    let evidence: BTreeMap<NodeId, Evidence> = evidence.collect();
    reports("I9", prepared(), |checker| {
        checker.demand_commit_survives(gid(1, 1), &evidence);
    });
}

/// Node 3 comes online in generation 2 without a transaction of generation 1, which commits.
#[test]
fn a_node_that_comes_online_without_a_commit() {
    let mut checker = prepared();
    checker.on_open(node(3), generation(2, all()), true, |_| false);
    reports("G1", checker, |checker| {
        checker.on_outcome(node(1), gid(1, 1), Decision::Commit);
    });
}

#[test]
fn a_prepare_behind_the_marker() {
    let mut checker = prepared();
    checker.on_marker(node(3), GenerationNum(2));
    checker.on_prepare_logged(node(3), gid(1, 1));
    reports("G2", checker, |checker| {
        checker.on_outcome(node(1), gid(1, 1), Decision::Commit);
    });
}

/// Two commits of one row in opposite orders: of one generation they break G3, of two G9.
#[test]
fn rows_in_two_orders() {
    for (name, second) in [("G3", gid(2, 1)), ("G9", gid(2, 2))] {
        let mut checker = prepared();
        for (at, order) in [(1, [gid(1, 1), second]), (2, [second, gid(1, 1)])] {
            for gid in order {
                checker.on_row_committed(node(at), 7, gid);
            }
        }
        reports(name, checker, Checker::demand_one_order);
    }
}

#[test]
fn members_records_that_are_wrong() {
    let first = MembershipRecord::first(all());
    let elected = |num, donors| Elected {
        generation: generation(num, all()),
        donors,
    };
    reports("G4", Checker::new(all()), |checker| {
        let ahead = MembershipRecord {
            online_in: GenerationNum(2),
            ..first
        };
        checker.on_members_durable(node(1), ahead);
    });
    reports("G5", Checker::new(all()), |checker| {
        let orphaned = MembershipRecord {
            current: elected(1, NodeSet::EMPTY),
            ..first
        };
        checker.on_members_durable(node(1), orphaned);
    });
    let mut checker = Checker::new(all());
    checker.on_members_durable(node(1), first);
    reports("G6", checker, |checker| {
        let other = MembershipRecord {
            current: elected(1, NodeSet::EMPTY.with(node(2))),
            ..first
        };
        checker.on_members_durable(node(2), other);
    });
}

#[test]
fn a_members_record_that_goes_back() {
    let mut checker = Checker::new(all());
    let first = MembershipRecord::first(all());
    let voted = MembershipRecord {
        last_vote: generation(2, all()),
        ..first
    };
    checker.on_members_durable(node(1), voted);
    reports("G4", checker, |checker| {
        checker.on_members_durable(node(1), first);
    });
}

/// Node 1 voted for generation 3 and then comes online in 2.
#[test]
fn a_voter_that_comes_online_in_an_older_generation() {
    let mut checker = Checker::new(all());
    let voted = MembershipRecord {
        last_vote: generation(3, all()),
        ..MembershipRecord::first(all())
    };
    checker.on_members_durable(node(1), voted);
    reports("G7", checker, |checker| {
        let online = MembershipRecord {
            current: Elected {
                generation: generation(2, all()),
                donors: all(),
            },
            online_in: GenerationNum(2),
            ..voted
        };
        checker.on_members_durable(node(1), online);
    });
}

#[test]
fn online_without_a_majority() {
    reports("G8", Checker::new(all()), |checker| {
        let alone = generation(2, NodeSet::EMPTY.with(node(1)));
        checker.on_open(node(1), alone, false, |_| true);
    });
}

#[test]
fn serving_without_what_was_answered() {
    let mut checker = prepared();
    checker.on_answered(gid(1, 1));
    reports("LEASE", checker, |checker| {
        checker.on_serving(node(2), |_| false);
    });
}
