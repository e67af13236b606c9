//! How transactions ended, in the words of `mtm.stat_commits`.

use super::event::Ended;
use protocol::{Counters, Decision, Refusal, Source};
use std::collections::BTreeMap;

/// SQLSTATEs that one node may count; others share a line.
const SQLSTATES_MAX: usize = 64;

/// The errors that clients of this node were given for aborted transactions, by SQLSTATE.
#[derive(Default)]
pub struct Refusals {
    by_sqlstate: BTreeMap<[u8; 5], u64>,
    others: u64,
}

impl Refusals {
    pub fn count(&mut self, refusal: &Refusal) {
        let sqlstate = refusal.sqlstate();
        if self.by_sqlstate.len() < SQLSTATES_MAX || self.by_sqlstate.contains_key(&sqlstate) {
            *self.by_sqlstate.entry(sqlstate).or_default() += 1;
        } else {
            self.others += 1;
        }
    }

    fn rows(&self) -> impl Iterator<Item = Ended> + '_ {
        let named = self
            .by_sqlstate
            .iter()
            .map(|(sqlstate, count)| (String::from_utf8_lossy(sqlstate).into_owned(), *count));
        let others = (self.others > 0).then(|| ("another error".to_owned(), self.others));
        named.chain(others).map(|(what, count)| Ended {
            outcome: "refused".to_owned(),
            reason: format!("the client was told {what}"),
            count,
        })
    }
}

/// All lines that the arbiter knows.
pub fn rows(counters: &Counters, refusals: &Refusals) -> Vec<Ended> {
    let own = counters.own().map(|ended| (true, ended));
    let foreign = counters.foreign().map(|ended| (false, ended));
    own.chain(foreign)
        .map(|(own, (decision, source, count))| Ended {
            outcome: outcome(own, decision).to_owned(),
            reason: reason(source).to_owned(),
            count,
        })
        .chain(refusals.rows())
        .collect()
}

fn outcome(own: bool, decision: Decision) -> &'static str {
    match (own, decision) {
        (true, Decision::Commit) => "committed",
        (true, Decision::Abort) => "aborted",
        (false, Decision::Commit) => "committed for another node",
        (false, Decision::Abort) => "aborted for another node",
    }
}

/// Who or what decided.
fn reason(source: Source) -> &'static str {
    match source {
        Source::Central => "a majority has precommitted",
        Source::Fast => "all members have voted yes",
        Source::VotedNo => "a node voted no",
        Source::Resolver => "this node resolved it",
        Source::Refused => "this node refused it",
        Source::Told => "another node said so",
        Source::Stream => "read in the coordinator's stream",
        Source::Log => "found in the transaction log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_by_sqlstate_within_bounds() {
        let mut refusals = Refusals::default();
        for number in 0..SQLSTATES_MAX + 2 {
            let text = format!("{number:05}");
            let sqlstate = text.as_bytes().try_into().expect("five digits");
            refusals.count(&Refusal::new(sqlstate, "", ""));
            refusals.count(&Refusal::new(sqlstate, "", ""));
        }
        let rows: Vec<Ended> = refusals.rows().collect();
        assert_eq!(rows.len(), SQLSTATES_MAX + 1);
        assert_eq!(rows[0].reason, "the client was told 00000");
        assert_eq!((rows[0].count, rows[SQLSTATES_MAX].count), (2, 4));
    }
}
