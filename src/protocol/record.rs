//! The durable state of one transaction on one node.

use crate::message::Accept;
use crate::types::{Ballot, Csn, Decision, Gid, Lsn};

/// Size of an encoded [`Record`].
pub const RECORD_BYTES: usize = 64;

/// What a node must remember of a transaction beyond a crash; everything else follows from its prepared transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub gid: Gid,
    /// Lower ballots are ignored.
    pub promised: Ballot,
    /// The last accepted verdict.
    pub accepted: Option<Accept>,
    /// The vote was yes. A no vote is a decision: no transaction can commit against it.
    pub voted_yes: bool,
    pub decision: Option<Decision>,
    /// The coordinator's number of the commit, [`Csn::ZERO`] when it was not told.
    pub csn: Csn,
    /// End of the PREPARE in the coordinator's stream, [`Lsn::ZERO`] until it came.
    pub prepare_lsn: Lsn,
}
