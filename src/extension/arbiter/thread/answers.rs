//! Answers to the views.

use super::super::counters;
use super::super::event::{Fate, InFlight, Question};
use super::Arbiter;
use crate::pg::shared::shared;
use protocol::Ballot;

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
                        ballot: (view.ballot != Ballot::NONE).then(|| view.ballot.to_string()),
                        resolving: view.resolving,
                        age_ms: view.age_ms,
                        missing: view.missing,
                    })
                    .collect();
                shared().board.answer(number, &rows);
            }
            Question::Counters => {
                let rows = counters::rows(self.core.counters(), &self.refusals);
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
