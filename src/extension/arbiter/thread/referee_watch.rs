//! What is known of the referee of two nodes: whether it can be asked, and whether both nodes would ask the same one.
//!
//! Two referees that know nothing of each other would let both nodes go on alone. Each node tells in its heartbeats which one it has met last. Where that
//! differs from what the other node has said last, it asks nothing and takes no grant.

use super::super::referee::{self, RefereeId};
use super::Arbiter;
use super::extras::{self, Extra};
use super::main_link::LogLevel;
use crate::pg::shared::shared;
use protocol::Millis;
use protocol::membership::{MembershipInput, RefereeAnswer};
use wire::frame::Heartbeat;

/// How often the referee is looked at, milliseconds, and how soon again after it could not be asked.
const LOOK_EVERY: Millis = 60_000;
const LOOK_AGAIN: Millis = 5_000;
/// Nodes of a cluster that has use for a referee.
const NODES: usize = 2;

/// The referee as this node knows it.
#[derive(Default)]
pub struct RefereeWatch {
    /// There is one.
    exists: bool,
    look_at: Millis,
    own: Option<RefereeId>,
    /// The one that the other node has met last, as it has said last.
    theirs: Option<RefereeId>,
    /// Why it cannot be asked.
    failure: Option<String>,
    /// Why it has granted nothing, the last time that it was asked.
    denial: Option<String>,
    /// What was wrong, as it was told last.
    told: Option<String>,
}

impl RefereeWatch {
    /// `configured` is the number of nodes.
    pub fn new(exists: bool, configured: usize) -> RefereeWatch {
        RefereeWatch {
            exists: exists && configured == NODES,
            ..RefereeWatch::default()
        }
    }

    /// What heartbeats carry.
    pub fn extra(&self) -> Option<Extra> {
        extras::put(extras::REFEREE, &self.own?)
    }

    /// Whether the other node asks another one.
    pub fn differs(&self) -> bool {
        self.own
            .zip(self.theirs)
            .is_some_and(|(own, theirs)| own != theirs)
    }

    /// Whether it is likely to answer a question.
    pub fn can_be_asked(&self) -> bool {
        self.own.is_some() && self.failure.is_none() && !self.differs()
    }

    /// What keeps this node from going on alone.
    fn wrong(&self) -> Option<String> {
        let differs = self.differs().then(|| {
            "multimaster.referee_connstring leads to another referee on the other node: neither goes on alone".to_owned()
        });
        differs
            .or_else(|| self.failure.clone())
            .or_else(|| self.denial.clone())
    }
}

impl Arbiter {
    /// Has the referee looked at when it is time.
    pub(super) fn tick_referee(&mut self) {
        let now = self.now();
        if !self.referee.exists || now < self.referee.look_at {
            return;
        }
        self.referee.look_at = now + LOOK_EVERY;
        referee::leave_look();
        shared().arbiter.wake();
        shared().referee.wake();
    }

    /// The heartbeat of the other node says which one it has met.
    pub(super) fn hear_referee(&mut self, heartbeat: &Heartbeat) {
        let theirs = extras::get(heartbeat, extras::REFEREE);
        if theirs.is_some() && theirs != self.referee.theirs {
            self.referee.theirs = theirs;
            self.tell_of_referee();
        }
    }

    /// The referee could be asked.
    pub(super) fn on_referee_seen(&mut self, referee: RefereeId) {
        self.referee.own = Some(referee);
        self.referee.failure = None;
        self.publish();
        self.tell_of_referee();
    }

    /// The referee has answered a question.
    pub(super) fn on_refereed(&mut self, answer: RefereeAnswer, referee: RefereeId) {
        self.referee.denial = (!answer.granted).then(|| {
            format!(
                "the referee does not let this node go on alone: generation {} was granted last, and this node has not been online with the other one since",
                answer.latest.0
            )
        });
        self.on_referee_seen(referee);
        if !self.referee.differs() {
            self.member_input(MembershipInput::Referee(answer));
        }
    }

    /// The referee could not be asked.
    pub(super) fn on_referee_fails(&mut self, reason: &str) {
        self.referee.look_at = self.referee.look_at.min(self.now() + LOOK_AGAIN);
        self.referee.failure = Some(format!("the referee cannot be asked: {reason}"));
        self.tell_of_referee();
    }

    /// Tells once what is wrong, and that nothing is any more.
    fn tell_of_referee(&mut self) {
        let wrong = self.referee.wrong();
        if self.referee.told == wrong {
            return;
        }
        let (level, text) = match &wrong {
            Some(wrong) => (LogLevel::Warning, wrong.as_str()),
            None => (LogLevel::Info, "the referee can be asked"),
        };
        self.note(self.node, "referee", text, None);
        self.main.log(level, text.to_owned());
        self.referee.told = wrong;
    }
}
