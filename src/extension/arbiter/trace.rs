//! The steps of single transactions in the server log, while `log_min_messages` is `debug1` or lower.
//!
//! A line names the moment, the node and the transaction. Merged by the moments, the logs of all nodes are the course of a transaction;
//! `cargo xtask trace` shows one. While this is off a step costs a look at one variable.

use super::event::LocalEvent;
use crate::pg::thread as os_thread;
use protocol::{
    ClusterTag, Decision, Effect, Gid, Message, NodeId, Outcome, Record, Refusal, Vote,
};
use std::time::{SystemTime, UNIX_EPOCH};

/// Whether steps are to be told.
pub fn enabled() -> bool {
    os_thread::logs_debug()
}

/// A line of the log.
pub fn line(node: NodeId, tag: ClusterTag, gid: Gid, step: &str) -> String {
    format!(
        "step {} n{} {}: {step}",
        time_of_day(),
        node.get(),
        gid.text(tag)
    )
}

/// The time of the day, UTC, to the microsecond.
fn time_of_day() -> String {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = since.as_secs() % 86_400;
    format!(
        "{:02}:{:02}:{:02}.{:06}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_micros()
    )
}

/// What a message says.
pub fn message(msg: &Message) -> String {
    match msg {
        Message::Vote { vote, .. } => format!("Vote {}", vote_text(vote)),
        Message::Propose {
            ballot, verdict, ..
        } => format!("Propose {verdict:?}, ballot {ballot}"),
        Message::Accepted { ballot, .. } => format!("Accepted, ballot {ballot}"),
        Message::Refused { promised, .. } => format!("Refused, promised {promised}"),
        Message::Status { ballot, .. } => format!("Status, ballot {ballot}"),
        Message::Promised {
            ballot,
            accepted,
            voted_yes,
            ..
        } => format!(
            "Promised, ballot {ballot}, accepted {}, voted {}",
            accepted.map_or_else(
                || "nothing".to_owned(),
                |accepted| format!("{:?} {}", accepted.verdict, accepted.ballot)
            ),
            if *voted_yes { "yes" } else { "nothing" }
        ),
        Message::Decided { decision, csn, .. } => match csn {
            Some(csn) => format!("Decided {decision:?}, csn {csn}"),
            None => format!("Decided {decision:?}"),
        },
        Message::Finished { decision, .. } => format!("Finished {decision:?}"),
        Message::Forget { .. } => "Forget".to_owned(),
        Message::Query { .. } => "Query".to_owned(),
        Message::AskHorizon | Message::Horizon { .. } | Message::Membership(_) => {
            format!("{msg:?}")
        }
    }
}

/// What happened on this server, and to which transaction.
pub fn event(event: &LocalEvent) -> Option<(Gid, String)> {
    let (gid, text) = match event {
        LocalEvent::Committing { gid, .. } => {
            (gid, "PREPARE is durable, the backend waits".to_owned())
        }
        LocalEvent::Voted { gid, vote, .. } => (gid, applied(vote)),
        LocalEvent::UserPreparing { gid, .. } => {
            (gid, "a user's PREPARE TRANSACTION begins".to_owned())
        }
        LocalEvent::UserVoted { gid, vote } => (gid, applied(vote)),
        LocalEvent::StreamOutcome { gid, decision } => {
            (gid, format!("the stream says {decision:?}"))
        }
        LocalEvent::Finished { gid } => (gid, "finished in the database, durably".to_owned()),
        LocalEvent::FinishLost { gid } => {
            (gid, "the process that was to finish it ended".to_owned())
        }
        LocalEvent::Interrupted { gid } => (gid, "the backend was interrupted".to_owned()),
        LocalEvent::Abandoned { gid } => (gid, "the backend is gone".to_owned()),
        LocalEvent::Ask { .. }
        | LocalEvent::MarkStored { .. }
        | LocalEvent::MarkerReached { .. }
        | LocalEvent::RecoveryLevel { .. }
        | LocalEvent::RecoveryLost { .. }
        | LocalEvent::RecoveryFailed { .. }
        | LocalEvent::Refereed { .. }
        | LocalEvent::RefereeSeen { .. }
        | LocalEvent::RefereeFails { .. } => return None,
    };
    Some((*gid, text))
}

fn applied(vote: &Vote) -> String {
    match vote {
        Vote::Yes => "applied, PREPARE is durable".to_owned(),
        Vote::No(_) => format!("cannot be applied: {}", vote_text(vote)),
    }
}

fn vote_text(vote: &Vote) -> String {
    match vote {
        Vote::Yes => "yes".to_owned(),
        Vote::No(refusal) => format!("no, {}", refusal_text(refusal)),
    }
}

fn refusal_text(refusal: &Refusal) -> String {
    format!(
        "{} {}",
        String::from_utf8_lossy(&refusal.sqlstate()),
        refusal.message()
    )
}

/// What this node is about to do for a transaction; none for messages, which are told when they leave.
pub fn effect(effect: &Effect) -> Option<(Gid, String)> {
    let (gid, text) = match effect {
        Effect::Persist { gid, record } => {
            (gid, format!("record, to be flushed: {}", kept(record)))
        }
        Effect::Write { gid, record } => (gid, format!("record: {}", kept(record))),
        Effect::Free { gid } => (gid, "record to be emptied".to_owned()),
        Effect::Finish { gid, decision } => (
            gid,
            match decision {
                Decision::Commit => "COMMIT PREPARED is ordered".to_owned(),
                Decision::Abort => "ROLLBACK PREPARED is ordered".to_owned(),
            },
        ),
        Effect::Reply { gid, outcome } => (
            gid,
            match outcome {
                Outcome::Commit { csn } => format!("the backend hears: commit, csn {csn}"),
                Outcome::Abort(refusal) => {
                    format!("the backend hears: abort, {}", refusal_text(refusal))
                }
                Outcome::Unknown => "the backend hears: unknown".to_owned(),
            },
        ),
        Effect::PeersFinished { gid } => {
            (gid, "the backend hears: all peers have finished".to_owned())
        }
        Effect::LookUp { gid } => (
            gid,
            "its fate is looked up in the transaction log".to_owned(),
        ),
        Effect::Send { .. }
        | Effect::Visible { .. }
        | Effect::Settled { .. }
        | Effect::Event(_) => return None,
    };
    Some((*gid, text))
}

/// The last thing that a record says.
fn kept(record: &Record) -> String {
    match (record.decision, record.accepted) {
        (Some(Decision::Commit), _) => format!("decided Commit, csn {}", record.csn),
        (Some(Decision::Abort), _) => "decided Abort".to_owned(),
        (None, Some(accepted)) => {
            format!(
                "accepted {:?}, ballot {}",
                accepted.verdict, accepted.ballot
            )
        }
        (None, None) => format!("promised {}", record.promised),
    }
}
