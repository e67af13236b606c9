//! Whether what a peer sends is applied here, and what is said when it is not (docs/membership.md, "What an apply does with a PREPARE").

use super::{Receiver, Wait, process};
use crate::pg::locks;
use crate::pg::shared::shared;
use protocol::membership::Admission;
use protocol::{Gid, Refusal};
use std::collections::BTreeSet;
use std::time::Duration;
use wire::stream::Begin;

/// How often a receiver looks whether a transaction may be applied now.
const HOLD_PAUSE: Duration = Duration::from_millis(10);

/// What is said about a transaction that is skipped, when it has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is prepared here: yes, again.
    Yes,
    /// Its generation is over.
    No,
    /// The same, to a user's own PREPARE TRANSACTION.
    NoToUser,
    Nothing,
    /// It comes through a donor: the mark stays before it.
    SetAside,
}

impl Receiver {
    /// What to do with a transaction that is not to be applied; none when it is.
    pub(super) fn answer_at_once(&mut self, begin: &Begin<'_>) -> Option<Answer> {
        let gid = begin.gid;
        let name = begin.name.as_bytes();
        if !name.starts_with(b"mtm-") {
            self.admit_users(gid, name)
        } else if self.prepared.contains(&gid) {
            Some(Answer::Yes)
        } else if self.ended.contains(&gid) {
            Some(Answer::Nothing)
        } else {
            admit(gid)
        }
    }

    /// A user's own PREPARE TRANSACTION. The number in its gid is that of whoever decoded it; which generation it is of, the markers before it
    /// tell, also those before the mark at which this process has started.
    fn admit_users(&mut self, gid: Gid, name: &[u8]) -> Option<Answer> {
        let gid = Gid {
            generation: self.sections.latest(),
            ..gid
        };
        let answer = admit(gid);
        let recovered_to = shared().standing.get().recovered_to;
        if self.recovered_to != recovered_to {
            self.recovered_to = recovered_to;
            self.of_users = names_of_users();
        }
        let is_here = std::str::from_utf8(name).is_ok_and(|name| self.of_users.remove(name));
        match answer {
            _ if is_here => Some(Answer::Nothing),
            Some(Answer::No) => Some(Answer::NoToUser),
            answer => answer,
        }
    }
}

/// Names of the prepared transactions that are users' own.
pub(super) fn names_of_users() -> BTreeSet<String> {
    let names = locks::prepared_names().into_values();
    names.filter(|name| Gid::parse(name).is_none()).collect()
}

/// Waits until it is known what to do with a transaction that is new here; none when it is to be applied.
fn admit(gid: Gid) -> Option<Answer> {
    loop {
        match shared().admit(gid) {
            Admission::Apply => return None,
            Admission::Refuse => return Some(Answer::No),
            Admission::Skip => return Some(Answer::Nothing),
            Admission::SetAside => return Some(Answer::SetAside),
            Admission::Hold => {
                process::wait_latch(HOLD_PAUSE, Wait::Stream);
                process::check_interrupts();
            }
        }
    }
}

pub(super) fn generation_over() -> Refusal {
    Refusal::retry(
        "the set of working nodes changed while the transaction was on its way",
        "",
    )
}
