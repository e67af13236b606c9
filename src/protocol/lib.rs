//! The commit protocol as a pure state machine.
#![forbid(unsafe_code)]

mod effect;
mod message;
mod record;
mod types;

pub use effect::{Effect, Effects, Event, Input, Outcome, Source};
pub use message::{Accept, Message};
pub use record::{RECORD_BYTES, Record};
pub use types::{
    Age, Ballot, ClusterTag, Csn, Decision, GenerationNum, Gid, InvalidValue, Lsn, MAX_NODES,
    Millis, NodeId, NodeSet, REFUSAL_TEXT_BYTES_MAX, Refusal, Verdict, Vote,
};

/// What the core is told once, at its start.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    pub node: NodeId,
    pub configured: NodeSet,
    /// Nodes whose yes votes a transaction needs.
    pub members: NodeSet,
    pub generation: GenerationNum,
    /// Grows at every start of this node, durably. Starts at 1.
    pub epoch: u32,
    /// How long a participant's link to the coordinator is down before it resolves.
    pub resolve_after_ms: u64,
    /// How long a competing resolver waits per place in the order of nodes.
    pub resolve_step_ms: u64,
    /// How long an unanswered message waits before it is sent again.
    pub resend_after_ms: u64,
    /// How long a resolver looks for a quorum before the client is told that the outcome is unknown.
    pub give_up_after_ms: u64,
}

/// What the server finds at its start: a durable record, a prepared transaction, or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Recovered {
    pub gid: Gid,
    pub record: Option<Record>,
    pub prepared: bool,
}
