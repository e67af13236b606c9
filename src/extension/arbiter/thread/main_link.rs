//! What the two threads of the arbiter say to each other.

use super::super::durable::Batch;
use super::super::net_config::NetSettings;
use super::super::retention::Notice;
use crate::pg::shared::shared;
use protocol::membership::MEMBERSHIP_RECORD_BYTES;
use protocol::{Decision, GenerationNum, Gid, NodeId};

/// What the main thread is asked to do.
pub enum ToMain {
    /// Write the records, answer, flush if somebody waits for that, and answer again: `FromMain::Recorded`.
    Write(Batch),
    /// Look into pg_xact for the outcome of a transaction of this node.
    LookUp(Gid),
    /// Write and flush the membership's record, and answer with `FromMain::MembershipDurable`.
    WriteMembership([u8; MEMBERSHIP_RECORD_BYTES]),
    /// Write and flush the marker of the generation, and answer with `FromMain::MarkerWritten`.
    WriteMarker(GenerationNum),
    /// Look whether a transaction of an older generation is prepared here, and answer with `FromMain::Drained`.
    LookForOlder(GenerationNum),
    /// Note durably that a node needs a copy, and answer with `FromMain::CopyNeeded`.
    NeedCopy { node: NodeId, reason: String },
    /// What was recovered need not be known by name any more.
    ForgetRecovered,
    /// Something for the server log.
    Log(LogRecord),
}

/// A line for the server log.
pub struct LogRecord {
    pub level: LogLevel,
    pub text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// A step of one transaction.
    Debug,
    Info,
    Warning,
}

/// `multimaster.heartbeat_send_timeout`, `multimaster.heartbeat_recv_timeout` and `multimaster.slow_node_timeout`, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeartbeatTimes {
    pub send_ms: u64,
    pub recv_ms: u64,
    pub slow_ms: u64,
}

/// What the main thread answers.
pub enum FromMain {
    Recorded(Vec<Gid>),
    Outcome {
        gid: Gid,
        outcome: Option<Decision>,
    },
    MembershipDurable,
    MarkerWritten(GenerationNum),
    Drained {
        num: GenerationNum,
        drained: bool,
    },
    /// A node was noted to need a copy, as the main thread was asked.
    CopyNeeded,
    /// What the main thread has found out about a node, for `mtm.events`.
    Notice(Notice),
    /// The main thread works: this node may speak to its peers for another while.
    Alive,
    /// Settings were read again.
    Reconfigure(NetSettings),
    Stop,
}

/// Sends to the main thread and wakes it.
pub struct MainLink {
    pub queue: crossbeam_channel::Sender<ToMain>,
}

impl MainLink {
    pub(super) fn send(&self, request: ToMain) {
        if self.queue.send(request).is_ok() {
            shared().arbiter.wake();
        }
    }

    pub(super) fn log(&self, level: LogLevel, text: String) {
        self.send(ToMain::Log(LogRecord { level, text }));
    }
}
