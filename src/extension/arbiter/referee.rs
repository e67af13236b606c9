//! The process that asks the referee: `multimaster referee`, while this node wants to go on alone.
//!
//! The network thread leaves its question in shared memory, again and again until it has an answer; the main thread starts this process. It gives every
//! answer back as an event. What is asked and what follows is decided in `protocol::membership`.

use super::event::{LocalEvent, submit};
use crate::guc;
use crate::pg::process::{self, Wait};
use crate::pg::remote::{Connection, RemoteError};
use crate::pg::shared::shared;
use protocol::membership::{RefereeAnswer, RefereeRequest};
use protocol::{GenerationNum, NodeId};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long the referee is given to take a connection, and to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Without a question for so long, the process ends.
const IDLE: Duration = Duration::from_secs(5);
/// Pause between two looks for a question.
const LOOK_AROUND: Duration = Duration::from_millis(20);
/// Pause after a referee that could not be asked, ms.
const FAILURE_PAUSE_MS: u64 = 500;

/// Leaves a question for the process. Callable from any thread.
pub fn leave(request: RefereeRequest) {
    let question = u64::from(request.num.0) << 32 | u64::from(request.online_in.0);
    shared().referee_question.store(question, Ordering::Release);
}

/// Whether there is a question.
pub fn is_wanted() -> bool {
    shared().referee_question.load(Ordering::Acquire) != 0
}

fn take(node: NodeId) -> Option<RefereeRequest> {
    let question = shared().referee_question.swap(0, Ordering::AcqRel);
    (question != 0).then_some(RefereeRequest {
        node,
        num: GenerationNum((question >> 32) as u32),
        online_in: GenerationNum(question as u32),
    })
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
        let Some(request) = take(node) else {
            process::wait_latch(LOOK_AROUND, Wait::Work);
            continue;
        };
        idle_since = Instant::now();
        match process::in_transaction(|| ask(&conninfo, request)) {
            Ok(answer) => submit(&LocalEvent::Refereed { answer }),
            Err(error) => {
                pgrx::warning!("multimaster could not ask the referee: {error}");
                process::pause_ms(FAILURE_PAUSE_MS);
            }
        }
    }
}

fn release() {
    shared().referee.release();
}

/// Opens a connection for each question: it lives in the memory of the transaction.
fn ask(conninfo: &str, request: RefereeRequest) -> Result<RefereeAnswer, RemoteError> {
    let open = Connection::open(conninfo, "multimaster referee", PATIENCE)?;
    let sql = format!(
        "SELECT granted::text, latest::text FROM mtm_referee.ask('{:08x}', {}, {}, {})",
        shared().cluster_tag().0,
        request.node.get(),
        request.num.0,
        request.online_in.0,
    );
    let rows = open.query(&sql, 2)?;
    let answer = rows.first().and_then(|row| read(request.num, row));
    answer.ok_or_else(|| RemoteError("its answer cannot be read".to_owned()))
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
