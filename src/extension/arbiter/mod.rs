//! The arbiter: one background worker per server.
//!
//! Its tokio thread (`thread`) runs the protocol core; this file is the main thread, the only one that calls PostgreSQL: it makes durable records,
//! looks into pg_xact, starts the other workers, reads the configuration and writes the log. It decides nothing.

mod counters;
pub mod durable;
mod early_votes;
pub mod event;
mod event_kind;
mod finishing;
mod net_config;
pub mod referee;
mod retention;
pub mod slots;
mod start;
mod thread;
mod trace;
mod user_votes;

pub use start::{MARK_ROWS, body_of, find, number_in, read_membership};

use crate::failpoint::{Failpoint, hit};
use crate::pg::process::{self, Wait};
use crate::pg::records::{self, DurableTable};
use crate::pg::shared::{self, NodeStatus, shared, worker};
use crate::pg::{outcome, recovered, thread as os_thread};
use net_config::NetSettings;
use protocol::{Gid, NodeId};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thread::{FromMain, LogLevel, LogRecord, ToMain};
use tokio::sync::mpsc;

/// How often the main thread looks around although nobody woke it.
const LOOK_AROUND: Duration = Duration::from_millis(200);
/// How long a stopping arbiter goes on for the backends that still wait for an outcome.
const FAREWELL: Duration = Duration::from_secs(3);
/// How often the main thread looks whether the other one has ended.
const JOIN_LOOK: Duration = Duration::from_millis(10);
/// Pause before a worker that went away is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// How often the main thread lets the other one speak on.
const SIGN_OF_LIFE: Duration = Duration::from_millis(100);
/// Apply workers kept ready.
const WORKERS_READY: usize = 4;

/// The main thread's side.
struct MainThread {
    records: DurableTable,
    requests: crossbeam_channel::Receiver<ToMain>,
    replies: mpsc::UnboundedSender<FromMain>,
    peers: Vec<NodeId>,
    children: start::Children,
    retention: retention::Retention,
    alive_at: Instant,
}

/// Body of the background worker `multimaster arbiter`.
pub fn main() {
    process::attach_signals();
    process::stay_local();
    #[cfg(feature = "failpoints")]
    crate::pg::failpoint::arm_as_configured();
    shared().arbiter.set_self();
    process::at_exit(leave);
    start::find_database();
    process::connect(shared().database.load(Ordering::Acquire));
    let Some(identity) = start::await_identity() else {
        process::exit_to_restart()
    };
    let state = start::recover(&identity);
    let (to_main, requests) = crossbeam_channel::unbounded();
    let (replies, from_main) = mpsc::unbounded_channel();
    let peers: Vec<NodeId> = identity.peers().map(|peer| peer.id).collect();
    let main = MainThread {
        records: state.records,
        requests,
        replies,
        peers,
        children: start::Children::default(),
        retention: retention::Retention::default(),
        alive_at: Instant::now(),
    };
    let settings = NetSettings::read(shared().epoch.load(Ordering::Acquire));
    shared().arbiter.set_self();
    shared().set_status(NodeStatus::Starting);
    let handle = os_thread::spawn_without_signals("multimaster-net", move || {
        start::run_thread(
            identity,
            settings,
            state.decider,
            thread::MainLink { queue: to_main },
            from_main,
        )
    });
    main.run(handle);
    // Also when an administrator ended it: a node without an arbiter is none. A server that shuts down does not start it again.
    process::exit_to_restart();
}

/// However this process ends, backends must not take it for alive.
fn leave() {
    shared().arbiter.clear();
    if shared().node_id().is_some() {
        shared().set_status(NodeStatus::Starting);
    }
}

impl MainThread {
    fn run(mut self, network: std::thread::JoinHandle<Result<(), String>>) {
        let mut stop_at: Option<Instant> = None;
        while !network.is_finished() {
            process::wait_latch(LOOK_AROUND, Wait::Work);
            self.serve();
            self.tell_flushed();
            // If this thread stalls, the node has to look dead: nobody would write its records.
            if self.alive_at.elapsed() >= SIGN_OF_LIFE {
                self.alive_at = Instant::now();
                let _ = self.replies.send(FromMain::Alive);
            }
            self.children.look_after(&self.peers);
            self.grow_pool();
            for notice in self.retention.look() {
                process::without_interrupts(|| {
                    pgrx::warning!("multimaster, node {}: {}", notice.node.get(), notice.text);
                });
                let _ = self.replies.send(FromMain::Notice(notice));
            }
            if process::sighup_pending() {
                process::reload();
                let settings = NetSettings::read(shared().epoch.load(Ordering::Acquire));
                let _ = self.replies.send(FromMain::Reconfigure(settings));
            }
            if process::terminate_pending() {
                let deadline = *stop_at.get_or_insert_with(|| Instant::now() + FAREWELL);
                if Instant::now() >= deadline || !somebody_commits() {
                    let _ = self.replies.send(FromMain::Stop);
                    break;
                }
            }
        }
        leave();
        // Not a plain join: the end of the postmaster must be noticed meanwhile.
        while !network.is_finished() {
            process::wait_latch(JOIN_LOOK, Wait::Work);
        }
        match network.join() {
            Ok(Ok(())) => {}
            Ok(Err(message)) => pgrx::warning!("multimaster arbiter stops: {message}"),
            Err(_) => {
                // A broken invariant of the core: stop the whole node before it can act on it.
                pgrx::log!("multimaster arbiter: the protocol thread panicked");
                process::crash_server();
            }
        }
    }

    /// Does everything the tokio thread asked for; all records of one round share one flush.
    fn serve(&mut self) {
        let mut writes = Vec::new();
        let mut written = Vec::new();
        let mut waiting = Vec::new();
        while let Ok(request) = self.requests.try_recv() {
            match request {
                ToMain::Write(batch) => {
                    writes.extend(batch.writes);
                    written.extend(batch.written);
                    waiting.extend(batch.waiting);
                }
                ToMain::LookUp(gid) => self.look_up(gid),
                ToMain::WriteMembership(record) => {
                    hit(Failpoint::MembersBeforeWrite);
                    start::write_membership(record);
                    let _ = self.replies.send(FromMain::MembershipDurable);
                }
                ToMain::WriteMarker(num) => {
                    hit(Failpoint::MarkerBeforeWrite);
                    process::in_transaction(|| recovered::write_marker(num));
                    let _ = self.replies.send(FromMain::MarkerWritten(num));
                }
                ToMain::LookForOlder(num) => {
                    let drained = !start::holds_older(num);
                    let _ = self.replies.send(FromMain::Drained { num, drained });
                }
                ToMain::NeedCopy { node, reason } => {
                    retention::note(node, &reason);
                    let _ = self.replies.send(FromMain::CopyNeeded);
                }
                ToMain::ForgetRecovered => process::in_transaction(recovered::clear),
                ToMain::Log(line) => write_log(&line),
            }
        }
        if writes.is_empty() {
            return;
        }
        hit(Failpoint::RecordsBeforeWrite);
        // Of two records of one transaction only the later counts; a stable sort keeps their order.
        let end = process::in_transaction(|| self.records.write(&mut writes));
        if !written.is_empty() {
            hit(Failpoint::RecordsAfterWrite);
            let _ = self.replies.send(FromMain::Recorded(written));
        }
        if !waiting.is_empty() {
            hit(Failpoint::RecordsBeforeFlush);
            records::flush(end);
            hit(Failpoint::RecordsBeforeAnswer);
            let _ = self.replies.send(FromMain::Recorded(waiting));
            hit(Failpoint::RecordsAfterAnswer);
        }
    }

    /// Heartbeats say how far this server's WAL is.
    fn tell_flushed(&self) {
        if let Some(node) = shared().node_id() {
            let flushed = &shared().node(node).flushed;
            flushed.store(records::flushed().0, Ordering::Relaxed);
        }
    }

    fn look_up(&self, gid: Gid) {
        let outcome = process::in_transaction(|| outcome::of_own_transaction(gid.xid));
        let _ = self.replies.send(FromMain::Outcome { gid, outcome });
    }

    /// Starts apply workers while fewer than wanted exist.
    fn grow_pool(&mut self) {
        let slots = shared::workers();
        let alive = slots
            .iter()
            .filter(|slot| slot.state.load(Ordering::Acquire) != worker::FREE)
            .count();
        let wanted = shared().workers_wanted.swap(0, Ordering::AcqRel).max(0) as usize;
        let target = WORKERS_READY.max(alive + wanted).min(slots.len());
        for _ in alive..target {
            let free = slots.iter().position(|slot| {
                !slot.fed.load(Ordering::Acquire)
                    && !slot.lost.load(Ordering::Acquire)
                    && slot
                        .state
                        .compare_exchange(
                            worker::FREE,
                            worker::STARTING,
                            Ordering::AcqRel,
                            Ordering::Acquire,
                        )
                        .is_ok()
            });
            let Some(index) = free else { return };
            let name = format!("multimaster apply worker {}", index + 1);
            if !process::start_worker(&name, "multimaster_worker_main", index as i32) {
                slots[index].state.store(worker::FREE, Ordering::Release);
                return;
            }
        }
    }
}

/// Writes a line to the server's log. When the server stops, this process has to say good-bye first, and must not end here.
fn write_log(line: &LogRecord) {
    let text = &line.text;
    process::without_interrupts(|| match line.level {
        LogLevel::Debug => pgrx::debug1!("multimaster: {text}"),
        LogLevel::Info => pgrx::log!("multimaster: {text}"),
        LogLevel::Warning => pgrx::warning!("multimaster: {text}"),
    });
}

/// Whether some backend still waits for the outcome of its commit.
fn somebody_commits() -> bool {
    shared::backends()
        .iter()
        .any(|slot| slot.gid.get().is_some())
}
