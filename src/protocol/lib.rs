//! The commit protocol: how the nodes of a cluster commit one transaction on all of them or on none.
//!
//! Problem: a client's transaction is prepared on every member of the cluster. Nodes and links fail at any moment, and yet no two
//! nodes may end it differently, no client may hear a falsehood, and whoever still forms a majority must be able to end it.
//!
//! The answer is E3PC in the form of single-decree Paxos (see `docs/protocol.md`): all members vote, the coordinator proposes to
//! precommit, durable precommits of a majority of the configured nodes are the commit. Whatever goes wrong starts a resolver, on any node.
//!
//! [`Core`] is a function: [`Input`]s and the time go in, [`Effect`]s come out, and its shell carries them out. It uses no clock,
//! thread, file or random source, so the same inputs always give the same effects; the simulator drives this very code.
//!
//! What the shell owes it:
//! - effects of one gid in order, nothing of a gid before the gid's earlier `Persist` is durable; what is sent to the node itself
//!   comes back as a message;
//! - `Visible` at once; transactions are sent with `visible[]` read when they are decoded, not earlier than the core was started; an
//!   apply starts only when `settled[X]` has reached it for every X;
//! - `LinkDown` for every link that is lost and `LinkUp` for every new one, with nothing of the old link after it;
//! - `Abandoned` when a backend disappears between its PREPARE and its finish, whatever it had said before;
//! - `Voted` whenever a PREPARE of another node has been dealt with, also when it came again;
//! - a stored mark per origin: up to there every PREPARE is prepared here, finished here, or durably refused. `MarkPassed` for each at
//!   the start and whenever it has grown, after every `Voted` up to there. What comes again at or below the mark is skipped;
//! - `PrepareBefore` for what was found at the start.
//!
//! Where to read on: `coordinator` and `participant` (the two parts), `resolver` (when something went wrong), `outcome` (after the decision),
//! `stranger` (what is not kept), `recovery`, `causal` and
//! `horizon` (what may be applied when), `core` (dispatch), `record` (what is durable).
#![forbid(unsafe_code)]

mod causal;
mod change;
mod config;
mod coordinator;
mod core;
mod effect;
mod gid;
mod horizon;
mod lease;
pub mod membership;
mod message;
mod nodes;
mod outcome;
mod participant;
mod record;
mod recovery;
mod resolver;
mod site;
mod stranger;
mod txn;
mod types;
mod view;
mod votes;

pub use self::core::Core;
pub use config::{
    AHEAD_MAX, Config, EARLY_VOTES_MAX, FAST_NODES_MAX, FORGOTTEN_MAX, Fault, Recovered,
    TRANSACTIONS_MAX,
};
pub use effect::{Effect, Effects, Event, Input, Outcome, Source};
pub use lease::{Grant, Leases};
pub use membership::Generation;
pub use message::{Accept, Message};
pub use record::{InvalidRecord, RECORD_BYTES, Record};
pub use types::{
    Age, Ballot, ClusterTag, Csn, Decision, GenerationNum, Gid, InvalidValue, Lsn, MAX_NODES,
    Millis, NodeId, NodeSet, REFUSAL_TEXT_BYTES_MAX, Refusal, Verdict, Vote,
};
pub use view::{Counters, State, TransactionView};
