//! What goes into the core and what comes out of it.

use crate::message::Message;
use crate::record::Record;
use crate::types::{Ballot, Csn, Decision, Gid, Lsn, NodeId, Refusal, Verdict, Vote};

/// Something that happened, told to the core by its shell.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// A message of an authenticated peer, or of this node itself (see [`Effect::Send`]).
    Message { from: NodeId, msg: Message },
    /// The link to a peer works, in the peer's epoch. Messages of earlier links no longer arrive.
    LinkUp { peer: NodeId, epoch: u32 },
    /// The link to a peer is lost; what was sent may or may not have arrived.
    LinkDown { peer: NodeId },
    /// A backend of this node waits for the outcome of its transaction, whose PREPARE is durable here. `fast` asks for one round trip
    /// (rule D2), which is granted where at most [`crate::FAST_NODES_MAX`] nodes are configured.
    Committing {
        gid: Gid,
        wait_peers: bool,
        fast: bool,
    },
    /// The answer of this node's apply worker to a PREPARE of another node. Yes only after the PREPARE is durable here. Told again
    /// when the PREPARE comes again. `prepare_lsn` is the end of the PREPARE in the coordinator's stream.
    Voted {
        gid: Gid,
        vote: Vote,
        prepare_lsn: Lsn,
    },
    /// The coordinator's COMMIT or ROLLBACK PREPARED came in its stream.
    StreamOutcome { gid: Gid, decision: Decision },
    /// The PREPARE ends at or before this position of the coordinator's stream. Told for transactions of [`crate::Core::unplaced`], with
    /// an end of the peer's WAL that was heard of later than the transaction: if the stored mark was beyond the PREPARE, it does not
    /// come again to tell its own position.
    PrepareBefore { gid: Gid, lsn: Lsn },
    /// This node's database has executed COMMIT or ROLLBACK PREPARED, durably, now or earlier.
    Finished { gid: Gid },
    /// The waiting backend was cancelled, timed out or terminated; it still waits for its [`Effect::Reply`].
    Interrupted { gid: Gid },
    /// The backend is gone and will not finish its transaction.
    Abandoned { gid: Gid },
    /// Answer to [`Effect::LookUp`]; `None` while the transaction is prepared or still runs.
    CoordinatorOutcome { gid: Gid, outcome: Option<Decision> },
    /// The mark stored for `origin`'s stream has reached `lsn`: no PREPARE that ends there or before comes again.
    MarkPassed { origin: NodeId, lsn: Lsn },
    /// Time has passed. Needed a few times within the shortest interval of the [`crate::Config`].
    Tick,
}

/// Something the shell has to do.
///
/// Effects of one gid are carried out in order, and nothing of a gid leaves the node before the gid's earlier
/// [`Effect::Persist`] or [`Effect::Free`] is durable. Gids do not wait for each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Send to a peer; dropped while there is no link. To the node itself: comes back as [`Input::Message`].
    Send { to: NodeId, msg: Message },
    /// Write the record and flush it before anything that follows for this gid.
    Persist { gid: Gid, record: Record },
    /// Write the record without waiting for the flush: it only has to precede the finish in WAL.
    Write { gid: Gid, record: Record },
    /// The record is no longer needed. Like a `Persist` it has to be durable before anything that follows for this gid; that has no
    /// hurry and can wait for the next flush.
    Free { gid: Gid },
    /// Raise `visible[node]`; at once, before a [`Effect::Finish`] or [`Effect::Reply`] that follows.
    Visible { node: NodeId, csn: Csn },
    /// Every commit that `node` announced up to `csn` is finished here.
    Settled { node: NodeId, csn: Csn },
    /// Have the local database finish the transaction; answered by [`Input::Finished`].
    Finish { gid: Gid, decision: Decision },
    /// Tell the waiting backend. After a commit or abort it finishes the transaction itself; after [`Outcome::Unknown`] the core sees to it.
    Reply { gid: Gid, outcome: Outcome },
    /// Every member that can be reached has finished the commit.
    PeersFinished { gid: Gid },
    /// Find out from this node's own transaction log how its own transaction ended.
    LookUp { gid: Gid },
    /// For logs and counters.
    Event(Event),
}

impl Effect {
    /// The transaction in whose order it has to be carried out; `None` for what is done at once.
    pub const fn gid(&self) -> Option<Gid> {
        match self {
            Self::Send { msg, .. } => msg.gid(),
            Self::Persist { gid, .. }
            | Self::Write { gid, .. }
            | Self::Free { gid }
            | Self::Finish { gid, .. }
            | Self::Reply { gid, .. }
            | Self::PeersFinished { gid }
            | Self::LookUp { gid } => Some(*gid),
            Self::Visible { .. } | Self::Settled { .. } | Self::Event(_) => None,
        }
    }
}

/// What a waiting backend learns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Commit {
        csn: Csn,
    },
    Abort(Refusal),
    /// No quorum answered in time. It may have happened.
    Unknown,
}

/// Something a post-mortem wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// This node starts to resolve.
    ResolverStarted { gid: Gid, ballot: Ballot },
    /// A higher ballot stopped this node's resolver.
    ResolverOutvoted { gid: Gid, promised: Ballot },
    /// A quorum has promised; this is what the answers call for.
    VerdictProposed {
        gid: Gid,
        ballot: Ballot,
        verdict: Verdict,
    },
    /// Asked about a transaction it had never heard of, this node has barred it.
    Barred { gid: Gid, by: NodeId },
    /// The outcome is known here.
    Decided {
        gid: Gid,
        decision: Decision,
        source: Source,
    },
    /// A peer said what it cannot have meant; ignored.
    Rejected { from: NodeId, reason: &'static str },
    /// A table is full; what would have gone into it was ignored and will come again.
    TableFull { table: &'static str },
}

/// How a node came to know an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The coordinator's own count of precommits.
    Central,
    /// The coordinator's COMMIT PREPARED, with all votes in hand.
    Fast,
    /// A member voted no.
    VotedNo,
    /// This node's resolver.
    Resolver,
    /// This node barred or refused the transaction.
    Refused,
    /// Another node said so.
    Told,
    /// The coordinator's replication stream.
    Stream,
    /// The coordinator's own transaction log.
    Log,
}

/// Effects in the order in which they have to be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects(Vec<Effect>);

impl Effects {
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    pub fn push(&mut self, effect: Effect) {
        self.0.push(effect);
    }

    /// Takes all effects out, leaving the allocation for the next input.
    pub fn drain(&mut self) -> impl Iterator<Item = Effect> + '_ {
        self.0.drain(..)
    }

    pub fn as_slice(&self) -> &[Effect] {
        &self.0
    }

    pub(crate) fn send(&mut self, to: NodeId, msg: Message) {
        self.push(Effect::Send { to, msg });
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.push(Effect::Event(event));
    }
}
