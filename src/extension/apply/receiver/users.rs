//! Users' own prepared transactions in a stream, whose PREPARE and finish come apart (docs/membership.md, "Users' prepared transactions").
//!
//! A finish that must wait is set aside, and the stream goes on: held, two streams could wait for each other. The mark stays before it. Only where nothing but
//! the writing of a mark is missing the stream waits, as what follows may build on the finish.

use super::Receiver;
use crate::failpoint::{Failpoint, hit};
use crate::pg::process::{self, Wait};
use crate::pg::shared::{Clearance, shared};
use crate::pg::{locks, twophase};
use protocol::membership::{Phase, Standing};
use protocol::{GenerationNum, Gid, Lsn};
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// How often a stream that waits for a mark looks again.
pub(super) const MARK_PAUSE: Duration = Duration::from_millis(1);
/// How often one that another process has in its hands is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// Finishes that are remembered while this node is not online. With more of them the stream is read once more when it is. Few where tests are to come to that.
const ASIDE_MAX: usize = if cfg!(feature = "failpoints") {
    50
} else {
    10_000
};

/// A COMMIT or ROLLBACK PREPARED that was read and not carried out.
struct Finish {
    name: String,
    commit: bool,
    /// That of the peer's WAL there.
    generation: GenerationNum,
    /// It lies behind this place, and before or at `end`.
    behind: Lsn,
    end: Lsn,
    /// A user waits at the peer.
    awaited: bool,
}

/// What a receiver knows of them.
#[derive(Default)]
pub(super) struct Users {
    /// Names found prepared at the start, or when this node had last recovered, whose PREPARE has not come again yet.
    here: BTreeSet<String>,
    recovered_to: GenerationNum,
    /// Finishes set aside, in order of the stream.
    aside: VecDeque<Finish>,
    /// The first one for which there was no room, by what it lies behind, and its generation. Nothing is remembered from there on.
    overflow: Option<(Lsn, GenerationNum)>,
    /// Names of those carried out, and their ends, until the mark that is written is behind them.
    done: Vec<(String, Lsn)>,
    /// The name of the one whose PREPARE is being received, if it is here or will be.
    coming: Option<String>,
}

/// What a user's PREPARE meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Met {
    /// Its own transaction.
    Itself,
    /// An earlier one of the same name, which is still to be finished here.
    Namesake,
    Nothing,
}

impl Users {
    pub(super) fn new() -> Users {
        Users {
            here: names_of_users(),
            recovered_to: shared().standing.get().recovered_to,
            ..Users::default()
        }
    }

    /// The mark, cut back to the first finish that was not carried out.
    pub(super) fn limit(&self, mark: Lsn) -> Lsn {
        let aside = self.aside.front().map(|finish| finish.behind);
        let overflow = self.overflow.map(|(behind, _)| behind);
        aside.into_iter().chain(overflow).fold(mark, Lsn::min)
    }

    /// A recovery may have prepared others.
    fn refresh(&mut self, recovered_to: GenerationNum) {
        if self.recovered_to != recovered_to {
            self.recovered_to = recovered_to;
            self.here = names_of_users();
        }
    }

    /// What a PREPARE of this name meets here.
    pub(super) fn meet(&mut self, name: &str) -> Met {
        self.refresh(shared().standing.get().recovered_to);
        if self.aside.iter().any(|finish| finish.name == name) {
            return Met::Namesake;
        }
        // It may have ended since the start.
        if self.here.remove(name) && names_of_users().contains(name) {
            return Met::Itself;
        }
        Met::Nothing
    }

    /// A later PREPARE of this name has come: drops finishes of generations beyond this one.
    pub(super) fn forget_namesake(&mut self, name: &str, beyond: GenerationNum) {
        self.aside
            .retain(|finish| finish.name != name || finish.generation <= beyond);
    }

    /// The transaction that is being received is a user's, and is here or will be.
    pub(super) fn expect(&mut self, name: &str) {
        self.coming = Some(name.to_owned());
    }

    /// The transaction that was being received ends.
    pub(super) fn take_expected(&mut self) -> Option<String> {
        self.coming.take()
    }

    /// Whether an earlier one of this name was finished by this stream, beyond the mark that is written.
    fn ended_beyond(&mut self, name: &str, written: Lsn) -> bool {
        self.done.retain(|(_, end)| *end > written);
        self.done.iter().any(|(done, _)| done == name)
    }

    fn add(&mut self, finish: Finish, standing: Standing) {
        let early = finish.generation > standing.online_in;
        if early && self.overflow.is_none() && self.aside.len() >= ASIDE_MAX {
            self.overflow = Some((finish.behind, finish.generation));
        }
        if self.overflow.is_none() {
            self.aside.push_back(finish);
        }
    }

    /// Whether what found no room could be carried out now.
    fn is_to_be_read_again(&self, standing: Standing) -> bool {
        self.overflow
            .is_some_and(|(_, generation)| generation <= standing.online_in)
    }
}

impl Receiver {
    /// A user's COMMIT or ROLLBACK PREPARED that ends at `end`.
    pub(super) fn on_finish(&mut self, name: &[u8], commit: bool, end: Lsn, awaited: bool) {
        hit(Failpoint::UserBeforeMark);
        if let Ok(name) = std::str::from_utf8(name) {
            let finish = Finish {
                name: name.to_owned(),
                commit,
                generation: self.sections.latest(),
                behind: self.progress.passed(),
                end,
                awaited,
            };
            self.users.add(finish, shared().standing.get());
        }
        self.progress.pass(end);
        self.finish_users();
    }

    /// Carries out what was set aside and nothing stands against any more. True when the stream should wait for the rest of it, which takes no longer than the writing of
    /// a mark.
    pub(super) fn finish_users(&mut self) -> bool {
        if self.users.aside.is_empty() && self.users.overflow.is_none() {
            return false;
        }
        if self.users.is_to_be_read_again(shared().standing.get()) {
            pgrx::log!(
                "multimaster receiver of node {}: starts anew, to find all prepared transactions of users that were finished while this node was away",
                self.peer.get()
            );
            process::exit_to_restart();
        }
        let mut waits = false;
        let mut place = 0;
        while let Some(clearance) = self.clearance_of(place) {
            match clearance {
                // What follows is no better off.
                Clearance::Behind(_) => break,
                Clearance::Soon => {
                    waits = true;
                    place += 1;
                }
                Clearance::Clear => self.carry_out(place),
            }
        }
        waits
    }

    /// Whether one that was set aside may be carried out; none while this node is not online in its generation, nor in those of what follows.
    fn clearance_of(&mut self, place: usize) -> Option<Clearance> {
        let standing = shared().standing.get();
        let Finish {
            name, generation, ..
        } = self.users.aside.get(place)?;
        if *generation > standing.online_in {
            return None;
        }
        // Its PREPARE is of no later generation: should it come, it is skipped.
        let over = standing.phase == Phase::Online && *generation < standing.recovered_to;
        if over && !names_of_users().contains(name) {
            return Some(Clearance::Clear);
        }
        let (peer, name) = (self.peer, name.clone());
        let ask = || shared().clearance(name.as_bytes(), Some(peer));
        let clearance = ask();
        let again = clearance == Clearance::Soon && self.write_wanted_mark();
        Some(if again { ask() } else { clearance })
    }

    fn carry_out(&mut self, place: usize) {
        let Some(finish) = self.users.aside.get(place) else {
            return;
        };
        hit(Failpoint::UserBeforeFinish);
        while twophase::finish(&finish.name, finish.commit) == twophase::Finished::Busy {
            process::wait_latch(BUSY_PAUSE, Wait::Work);
            process::check_interrupts();
        }
        hit(Failpoint::UserAfterFinish);
        if let Some(finish) = self.users.aside.remove(place) {
            self.users.here.remove(&finish.name);
            self.confirm_now |= finish.awaited;
            let written = self.node.replay.written();
            self.users.done.retain(|(_, end)| *end > written);
            self.users.done.push((finish.name, finish.end));
        }
    }

    /// Writes the mark if somebody waits for that and it has moved; says whether it did. It is flushed with what follows it in WAL.
    pub(super) fn write_wanted_mark(&mut self) -> bool {
        if !self.node.replay.take_wanted() {
            return false;
        }
        let mark = self.advance();
        self.write_mark(mark)
    }

    fn write_mark(&mut self, mark: Lsn) -> bool {
        if mark <= self.node.replay.written() {
            return false;
        }
        let row = self.row_of(mark);
        process::in_transaction(|| self.marks.write(&mut [row]));
        self.node.replay.wrote(mark);
        true
    }

    /// Has the mark pass the finish of an earlier transaction of this name before the next one is prepared: if it came again it would finish that one. False when
    /// something that was set aside is in the way.
    pub(super) fn pass_namesake(&mut self, name: &str) -> bool {
        loop {
            if !self.users.ended_beyond(name, self.node.replay.written()) {
                return true;
            }
            if !self.users.aside.is_empty() {
                return false;
            }
            let mark = self.advance();
            if !self.write_mark(mark) {
                process::wait_latch(MARK_PAUSE, Wait::Worker);
                process::check_interrupts();
            }
        }
    }

    /// The stream has come as far as its peer's WAL went when this process started.
    pub(super) fn note_level(&mut self) {
        if !self.node.replay.is_level() && self.progress.passed() >= self.again {
            self.node.replay.come_level();
            shared().wake_receivers();
        }
    }
}

/// Names of the prepared transactions that are users' own.
fn names_of_users() -> BTreeSet<String> {
    let names = locks::prepared_names().into_values();
    names.filter(|name| Gid::parse(name).is_none()).collect()
}
