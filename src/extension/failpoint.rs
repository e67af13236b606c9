//! Failpoints: named places of the commit path, of apply and of the start, at which a test has a server die, wait or fail.
//!
//! Compiled in by the cargo feature `failpoints` only, which no shipped library has. One point of a server is armed at a time, by the
//! setting `multimaster.failpoint`:
//!
//! | value | what happens there |
//! |---|---|
//! | `NAME=crash` | the whole server is killed at once, as by a power failure; `crash@N` at the N-th time |
//! | `NAME=sleep:MS` | the process or thread waits that many milliseconds, every time |
//! | `NAME=hold` | the process or thread waits until the setting changes |
//! | `NAME=error` | the process raises an error, once; the network thread, which cannot, goes on |
//! | empty | nothing |
//!
//! Whatever happens at a point, the server log says so: a test can tell whether the point was passed.
//!
//! `SHOW multimaster.failpoints` lists all points with the role of the nodes that pass them, so that a test forgets none:
//!
//! | role | passed when |
//! |---|---|
//! | `coordinator`, `participant`, `both` | a transaction commits |
//! | `...-refused`, `...-disturbed` | one is refused; the client is interrupted while votes are awaited |
//! | `start` | a node starts again after it was killed under load |
//! | `user` | a user's own prepared transaction is finished |
//! | `change` | the members change |
//! | `rare` | resolvers compete, or a promise was made without a vote: not at will |

/// Declares the points: variant, name, and the role of the nodes that pass it.
macro_rules! points {
    ($($variant:ident $name:literal $role:literal,)*) => {
        /// A place where something can be made to happen.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Failpoint {
            $($variant,)*
        }

        impl Failpoint {
            /// All points, in order of their numbers.
            #[cfg(feature = "failpoints")]
            pub const ALL: &[(Failpoint, &str)] = &[$((Failpoint::$variant, $name),)*];
        }

        /// `name:role` of every point, separated by blanks.
        #[cfg(feature = "failpoints")]
        pub const LISTED: &str = concat!($($name, ":", $role, " ",)* "\0");
    };
}

points! {
    // The backend that learns the name of its transaction before COMMIT: its xid must be on disk by then.
    NameBeforeFlush "name-before-flush" "coordinator",
    NameAfterFlush "name-after-flush" "coordinator",
    // A statement that reads or writes has its snapshot, and has not looked whether the node serves.
    StatementBeforeCheck "statement-before-check" "rare",
    // The backend that commits.
    BackendBeforePrepare "backend-before-prepare" "coordinator",
    BackendAfterPrepare "backend-after-prepare" "coordinator",
    BackendAfterAnnouncing "backend-after-announcing" "coordinator",
    BackendBeforeCommit "backend-before-commit" "coordinator",
    BackendBeforeRecord "backend-before-record" "coordinator",
    BackendAfterRecord "backend-after-record" "coordinator",
    BackendAfterCommit "backend-after-commit" "coordinator",
    BackendBeforeRollback "backend-before-rollback" "coordinator-refused",
    BackendAfterRollback "backend-after-rollback" "coordinator-refused",
    BackendBeforeAnswer "backend-before-answer" "coordinator",
    // The apply worker.
    ApplyBegins "apply-begins" "participant",
    ApplyBeforePrepare "apply-before-prepare" "participant",
    ApplyAfterPrepare "apply-after-prepare" "participant",
    ApplyAfterYes "apply-after-yes" "participant",
    ApplyBeforeNo "apply-before-no" "participant-refused",
    ApplyAfterNo "apply-after-no" "participant-refused",
    // Whoever finishes what it did not prepare for a client of its own.
    FinishBeforeRecord "finish-before-record" "participant",
    FinishAfterRecord "finish-after-record" "participant",
    FinishAfterFinish "finish-after-finish" "participant",
    FinishAfterTelling "finish-after-telling" "participant",
    // Durable records.
    RecordsBeforeWrite "records-before-write" "both",
    RecordsAfterWrite "records-after-write" "coordinator-refused",
    RecordsBeforeFlush "records-before-flush" "both",
    RecordsBeforeAnswer "records-before-answer" "both",
    RecordsAfterAnswer "records-after-answer" "both",
    MembersBeforeWrite "members-before-write" "change",
    // Between the end of the old generation and work in the new one.
    MarkerBeforeWrite "marker-before-write" "change",
    // What the arbiter says. A point after a message lets it leave first.
    BeforeVote "before-vote" "participant",
    AfterVote "after-vote" "participant",
    BeforePrecommit "before-precommit" "coordinator",
    AfterPrecommit "after-precommit" "coordinator",
    BeforePrecommitted "before-precommitted" "participant",
    AfterPrecommitted "after-precommitted" "participant",
    BeforeDecided "before-decided" "coordinator",
    AfterDecided "after-decided" "coordinator",
    BeforeFinished "before-finished" "participant",
    AfterFinished "after-finished" "participant",
    BeforeForget "before-forget" "coordinator",
    AfterForget "after-forget" "coordinator",
    BeforeStatus "before-status" "coordinator-disturbed",
    AfterStatus "after-status" "coordinator-disturbed",
    BeforePromise "before-promise" "participant-disturbed",
    AfterPromise "after-promise" "participant-disturbed",
    BeforeRefused "before-refused" "rare",
    AfterRefused "after-refused" "rare",
    BeforeQuery "before-query" "rare",
    AfterQuery "after-query" "rare",
    BeforeAskHorizon "before-ask-horizon" "start",
    AfterAskHorizon "after-ask-horizon" "start",
    BeforeHorizon "before-horizon" "start",
    AfterHorizon "after-horizon" "start",
    BeforeMembership "before-membership" "rare",
    AfterMembership "after-membership" "rare",
    BeforeReply "before-reply" "coordinator",
    AfterReply "after-reply" "coordinator",
    BeforeFinishOrder "before-finish-order" "participant",
    AfterFinishOrder "after-finish-order" "participant",
    // The receiver.
    ReceiverBegins "receiver-begins" "participant",
    ReceiverHands "receiver-hands" "participant",
    ReceiverSkips "receiver-skips" "start",
    MarkBeforeStore "mark-before-store" "both",
    MarkBeforeFlush "mark-before-flush" "both",
    MarkBeforeConfirm "mark-before-confirm" "both",
    MarkAfterConfirm "mark-after-confirm" "both",
    // The receiver that finishes a user's own prepared transaction.
    UserBeforeMark "user-before-mark" "user",
    UserBeforeFinish "user-before-finish" "user",
    UserAfterFinish "user-after-finish" "user",
    // The recovery has a transaction that is not here, and applies it.
    RecoveryApplies "recovery-applies" "rare",
    // The walsender.
    DecodePrepare "decode-prepare" "coordinator",
    DecodeOutcome "decode-outcome" "coordinator",
    // The arbiter's start.
    StartBeforeEpoch "start-before-epoch" "start",
    StartBeforeEpochFlush "start-before-epoch-flush" "start",
    StartAfterEpoch "start-after-epoch" "start",
    StartBeforeEffects "start-before-effects" "start",
    StartAfterEffects "start-after-effects" "start",
}

/// What a message is to the points around its sending.
pub fn around(message: &protocol::Message) -> (Failpoint, Failpoint) {
    use Failpoint::*;
    use protocol::Message::*;
    match message {
        Vote { .. } => (BeforeVote, AfterVote),
        Propose { .. } => (BeforePrecommit, AfterPrecommit),
        Accepted { .. } => (BeforePrecommitted, AfterPrecommitted),
        Decided { .. } => (BeforeDecided, AfterDecided),
        Finished { .. } => (BeforeFinished, AfterFinished),
        Forget { .. } => (BeforeForget, AfterForget),
        Status { .. } => (BeforeStatus, AfterStatus),
        Promised { .. } => (BeforePromise, AfterPromise),
        Refused { .. } => (BeforeRefused, AfterRefused),
        Query { .. } => (BeforeQuery, AfterQuery),
        AskHorizon => (BeforeAskHorizon, AfterAskHorizon),
        Horizon { .. } => (BeforeHorizon, AfterHorizon),
        Membership(_) => (BeforeMembership, AfterMembership),
    }
}

#[cfg(not(feature = "failpoints"))]
mod hits {
    use super::Failpoint;

    /// Does nothing in a library without failpoints.
    #[inline(always)]
    pub fn hit(_point: Failpoint) {}

    /// Does nothing in a library without failpoints.
    #[inline(always)]
    pub fn hit_in_backend(_point: Failpoint) {}

    /// Does nothing in a library without failpoints.
    #[inline(always)]
    pub fn hit_in_thread(_point: Failpoint) {}

    /// Does nothing in a library without failpoints.
    #[inline(always)]
    pub fn hit_after_sending(_point: Failpoint) {}
}

#[cfg(feature = "failpoints")]
mod hits {
    use super::Failpoint;
    use crate::pg::failpoint::{is_orphan, log_line, lose_power, raise_in_backend, take};
    use std::time::Duration;

    /// Time for a message to leave before the server dies.
    const SENDING: Duration = Duration::from_millis(5);

    /// How often something that is held looks whether it still is.
    const LOOK: Duration = Duration::from_millis(5);

    /// What happens at a point.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Action {
        Crash { at: u32 },
        Sleep { ms: u32 },
        Hold,
        Error,
    }

    impl Action {
        pub fn parse(text: &str) -> Option<Action> {
            if text == "error" {
                return Some(Action::Error);
            }
            if text == "hold" {
                return Some(Action::Hold);
            }
            if let Some(ms) = text.strip_prefix("sleep:") {
                return ms.parse().ok().map(|ms| Action::Sleep { ms });
            }
            match text.strip_prefix("crash")? {
                "" => Some(Action::Crash { at: 1 }),
                count => count
                    .strip_prefix('@')?
                    .parse()
                    .ok()
                    .filter(|at| *at > 0)
                    .map(|at| Action::Crash { at }),
            }
        }
    }

    /// The point and the action that a value of the setting names.
    pub fn parse(value: &str) -> Option<(Failpoint, Action)> {
        let (name, action) = value.split_once('=')?;
        let (point, _) = Failpoint::ALL.iter().find(|(_, known)| *known == name)?;
        Some((*point, Action::parse(action)?))
    }

    /// Passes a point on the main thread of a background worker or walsender.
    pub fn hit(point: Failpoint) {
        match next(point) {
            Some(Action::Error) => pgrx::error!("failpoint {point:?}"),
            action => act(point, action),
        }
    }

    /// Passes a point in the commit sequence of a backend, whose frames PostgreSQL's errors cross by `longjmp`.
    pub fn hit_in_backend(point: Failpoint) {
        match next(point) {
            Some(Action::Error) => raise_in_backend(),
            action => act(point, action),
        }
    }

    /// Passes a point on the arbiter's network thread.
    pub fn hit_in_thread(point: Failpoint) {
        act(point, next(point));
    }

    /// Passes a point behind a message that was queued on the network thread: it must be able to leave.
    pub fn hit_after_sending(point: Failpoint) {
        match next(point) {
            Some(Action::Crash { .. }) => {
                std::thread::spawn(move || {
                    std::thread::sleep(SENDING);
                    lose_power(point);
                });
            }
            action => act(point, action),
        }
    }

    /// What is to happen now; who is held stays until the point is no longer armed, or to do something else.
    fn next(point: Failpoint) -> Option<Action> {
        let mut held = false;
        loop {
            match take(point) {
                Some(Action::Hold) if is_orphan() => return None,
                Some(Action::Hold) if held => std::thread::sleep(LOOK),
                Some(Action::Hold) => {
                    log_line(point, "held");
                    held = true;
                }
                Some(action) => {
                    if let Action::Sleep { .. } | Action::Error = action {
                        log_line(point, "passed");
                    }
                    return Some(action);
                }
                None => return None,
            }
        }
    }

    fn act(point: Failpoint, action: Option<Action>) {
        match action {
            Some(Action::Crash { .. }) => lose_power(point),
            Some(Action::Sleep { ms }) => std::thread::sleep(Duration::from_millis(u64::from(ms))),
            Some(Action::Hold | Action::Error) | None => {}
        }
    }
}

#[cfg(feature = "failpoints")]
pub use hits::{Action, parse};
pub use hits::{hit, hit_after_sending, hit_in_backend, hit_in_thread};
