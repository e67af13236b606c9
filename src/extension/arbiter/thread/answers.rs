//! Answers to the views.

use super::super::event::{Ended, Fate, InFlight, Question};
use super::Arbiter;
use crate::pg::shared::shared;
use protocol::Source;

/// Transactions in flight that a view shows at most; they fit the board.
const IN_FLIGHT_SHOWN: usize = 2000;

impl Arbiter {
    /// Answers a view.
    pub(super) fn answer(&self, number: u64, question: &Question) {
        match question {
            Question::Transactions => {
                let rows: Vec<InFlight> = self
                    .core
                    .transactions(self.now())
                    .take(IN_FLIGHT_SHOWN)
                    .map(|view| InFlight {
                        gid: view.gid,
                        state: view.state.as_str().to_owned(),
                        ballot: view.ballot.to_string(),
                        resolving: view.resolving,
                        age_ms: view.age_ms,
                        missing: view.missing,
                    })
                    .collect();
                shared().board.answer(number, &rows);
            }
            Question::Counters => {
                let counters = self.core.counters();
                let own = counters.own().map(|ended| (true, ended));
                let foreign = counters.foreign().map(|ended| (false, ended));
                let rows: Vec<Ended> = own
                    .chain(foreign)
                    .map(|(own, (decision, source, count))| Ended {
                        own,
                        decision,
                        reason: reason(source).to_owned(),
                        count,
                    })
                    .collect();
                shared().board.answer(number, &rows);
            }
            Question::Fate { gid } => {
                let fate = match self.core.decision(*gid) {
                    Some(decision) => Fate::Decided(decision),
                    None if self.core.promised(*gid).is_some() => Fate::InFlight,
                    None => Fate::Unknown,
                };
                shared().board.answer(number, &fate);
            }
        }
    }
}

/// Why a transaction ended as it did, in the words of `mtm.stat_commits`.
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
