//! The process that asks the referee: `multimaster referee`, while this node wants to go on alone, and for a look now and then.
//!
//! The network thread leaves its question in shared memory, again and again until it has an answer; the main thread starts this process. It gives every
//! answer back as an event. What is asked and what follows is decided in `protocol::membership`.
//!
//! A referee that cannot be asked when it is needed, or another one than the other node asks, should be known before. So between questions the process looks whether it
//! could ask, and which server that is (`thread::referee_watch`).

use super::event::{LocalEvent, submit};
use crate::cluster::slot_name;
use crate::guc;
use crate::pg::process::{self, Wait};
use crate::pg::remote::{Connection, RemoteError};
use crate::pg::shared::shared;
use protocol::membership::{RefereeAnswer, RefereeRequest};
use protocol::{GenerationNum, NodeId};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long the referee is given to take a connection, and to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Without anything to do for so long, the process ends.
const IDLE: Duration = Duration::from_secs(5);
/// Pause between two looks for a question.
const LOOK_AROUND: Duration = Duration::from_millis(20);
/// Pause after a referee that could not be asked, ms.
const FAILURE_PAUSE_MS: u64 = 500;
/// In place of a question: only look at the referee. No node was ever online in a generation of that number.
const LOOK: u64 = u64::MAX;
/// An error is cut after so many characters, so that the event fits.
const REASON_CHARS: usize = 250;

/// Which database answers as the referee: system identifier of its server, and its oid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefereeId {
    system: u64,
    database: u32,
}

/// What the process is to do.
enum Task {
    Look,
    Ask(RefereeRequest),
}

/// Leaves a question for the process. Callable from any thread.
pub fn leave(request: RefereeRequest) {
    let question = u64::from(request.num.0) << 32 | u64::from(request.online_in.0);
    shared().referee_question.store(question, Ordering::Release);
}

/// Has the process look at the referee, unless it has a question for it. Callable from any thread.
pub fn leave_look() {
    let question = &shared().referee_question;
    // A question says more.
    let _ = question.compare_exchange(0, LOOK, Ordering::AcqRel, Ordering::Acquire);
}

/// Whether there is something to do.
pub fn is_wanted() -> bool {
    shared().referee_question.load(Ordering::Acquire) != 0
}

fn take(node: NodeId) -> Option<Task> {
    match shared().referee_question.swap(0, Ordering::AcqRel) {
        0 => None,
        LOOK => Some(Task::Look),
        question => Some(Task::Ask(RefereeRequest {
            node,
            num: GenerationNum((question >> 32) as u32),
            online_in: GenerationNum(question as u32),
        })),
    }
}

/// Body of the background worker.
pub fn main() {
    process::attach_signals();
    process::stay_local();
    if !shared().referee.claim() {
        return;
    }
    process::at_exit(release);
    process::connect_to_cluster();
    let (Some(node), Some(conninfo)) = (shared().node_id(), guc::referee_connstring()) else {
        return;
    };
    let mut idle_since = Instant::now();
    while idle_since.elapsed() < IDLE {
        process::check_interrupts();
        let Some(task) = take(node) else {
            process::wait_latch(LOOK_AROUND, Wait::Work);
            continue;
        };
        idle_since = Instant::now();
        match process::in_transaction(|| serve(&conninfo, &task)) {
            Ok(event) => submit(&event),
            Err(error) => {
                let reason = error.0.chars().take(REASON_CHARS).collect();
                submit(&LocalEvent::RefereeFails { reason });
                process::pause_ms(FAILURE_PAUSE_MS);
                // A connection that was given up has left its socket to the process.
                return;
            }
        }
    }
}

fn release() {
    shared().referee.release();
}

/// Opens a connection for each task: it lives in the memory of the transaction.
fn serve(conninfo: &str, task: &Task) -> Result<LocalEvent, RemoteError> {
    let open = Connection::open(conninfo, "multimaster referee", PATIENCE)?;
    let referee = identify(&open)?;
    match task {
        Task::Look => Ok(LocalEvent::RefereeSeen { referee }),
        Task::Ask(request) => {
            let answer = ask(&open, *request)?;
            Ok(LocalEvent::Refereed { answer, referee })
        }
    }
}

/// Who answers, if it can be a referee at all.
fn identify(open: &Connection) -> Result<RefereeId, RemoteError> {
    let tag = shared().cluster_tag();
    let slots: Vec<String> = shared()
        .configured_nodes()
        .iter()
        .map(|node| format!("'{}'", slot_name(tag, node)))
        .collect();
    let sql = format!(
        "SELECT s.system_identifier::text, d.oid::text, pg_is_in_recovery()::text, \
                has_function_privilege('mtm_referee.ask(text, integer, bigint, bigint)', 'EXECUTE')::text, \
                (SELECT count(*) FROM pg_replication_slots WHERE slot_name IN ({}))::text \
           FROM pg_control_system() s, pg_database d WHERE d.datname = current_database()",
        slots.join(", ")
    );
    let rows = open.query(&sql, 5)?;
    let row: Vec<&str> = rows
        .iter()
        .flatten()
        .flatten()
        .map(String::as_str)
        .collect();
    let [system, database, standby, allowed, slots] = row[..] else {
        return Err(unreadable());
    };
    let wrong = |text: &str| Err(RemoteError(text.to_owned()));
    if standby == "true" {
        return wrong("multimaster.referee_connstring leads to a standby");
    }
    if slots != "0" {
        return wrong("multimaster.referee_connstring leads to a node of this cluster");
    }
    if allowed != "true" {
        return wrong("its role may not execute mtm_referee.ask");
    }
    let id = system.parse().ok().zip(database.parse().ok());
    let (system, database) = id.ok_or_else(unreadable)?;
    Ok(RefereeId { system, database })
}

fn ask(open: &Connection, request: RefereeRequest) -> Result<RefereeAnswer, RemoteError> {
    let sql = format!(
        "SELECT granted::text, latest::text FROM mtm_referee.ask('{:08x}', {}, {}, {})",
        shared().cluster_tag().0,
        request.node.get(),
        request.num.0,
        request.online_in.0,
    );
    let rows = open.query(&sql, 2)?;
    let answer = rows.first().and_then(|row| read(request.num, row));
    answer.ok_or_else(unreadable)
}

fn read(num: GenerationNum, row: &[Option<String>]) -> Option<RefereeAnswer> {
    let [Some(granted), Some(latest)] = row else {
        return None;
    };
    Some(RefereeAnswer {
        num,
        granted: granted == "true",
        latest: GenerationNum(latest.parse().ok()?),
    })
}

fn unreadable() -> RemoteError {
    RemoteError("its answer cannot be read".to_owned())
}
