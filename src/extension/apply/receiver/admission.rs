//! Whether what a peer sends is applied here, and what is said when it is not (docs/membership.md, "What an apply does with a PREPARE").

use super::users::Met;
use super::{Receiver, Wait, process};
use crate::pg::shared::shared;
use protocol::membership::Admission;
use protocol::{GenerationNum, Gid, Refusal};
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
    /// An earlier one of its name is still to be finished here.
    NoToNamesake,
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
            self.admit(gid)
        }
    }

    /// A user's own PREPARE TRANSACTION. The number in its gid is that of whoever decoded it; which generation it is of, the markers before it
    /// tell, also those before the mark at which this process has started.
    fn admit_users(&mut self, gid: Gid, name: &[u8]) -> Option<Answer> {
        let gid = Gid {
            generation: self.sections.latest(),
            ..gid
        };
        let answer = self.admit(gid);
        let Ok(name) = std::str::from_utf8(name) else {
            return answer;
        };
        let met = self.users.meet(name);
        if met == Met::Itself {
            self.users.expect(name);
            return Some(Answer::Nothing);
        }
        let standing = shared().standing.get();
        match answer {
            None if met == Met::Namesake || !self.pass_namesake(name) => Some(Answer::NoToNamesake),
            None => {
                self.users.expect(name);
                None
            }
            Some(Answer::No) => Some(Answer::NoToUser),
            // It comes, or came, through a donor, and so did the end of an earlier one.
            Some(Answer::SetAside) => {
                self.users.forget_namesake(name, standing.online_in);
                answer
            }
            Some(Answer::Nothing) if gid.generation < standing.recovered_to => {
                self.users.forget_namesake(name, GenerationNum(0));
                answer
            }
            answer => answer,
        }
    }

    /// Waits until it is known what to do with a transaction that is new here; none when it is to be applied.
    ///
    /// Without the peer's arbiter it may never be known. The stream then ends with this process; it comes again.
    fn admit(&mut self, gid: Gid) -> Option<Answer> {
        loop {
            match shared().admit(gid) {
                Admission::Apply => {
                    // It may build on what was set aside until a moment ago.
                    self.finish_users();
                    return None;
                }
                Admission::Refuse => return Some(Answer::No),
                Admission::Skip => return Some(Answer::Nothing),
                Admission::SetAside => return Some(Answer::SetAside),
                Admission::Hold if self.has_lost_peer() => process::exit_to_restart(),
                Admission::Hold => {
                    self.write_wanted_mark();
                    self.finish_users();
                    process::wait_latch(HOLD_PAUSE, Wait::Stream);
                    process::check_interrupts();
                }
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

pub(super) fn name_in_use() -> Refusal {
    Refusal::retry(
        "an earlier prepared transaction of this name is still being finished on another node",
        "",
    )
}
