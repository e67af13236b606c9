//! What can happen in the simulated world, ordered by time.

use std::collections::BTreeMap;

use crate::clones::CloneStep;
use crate::hazards::Hazard;
use protocol::NodeSet;
use protocol::membership::{MembershipInput, Presence, RefereeRequest};
use protocol::{Decision, Gid, Lsn, Message, Millis, NodeId};
use protocol::{GenerationNum, Grant};

/// Everything that happens to a node carries the node's life, and ends with it.
#[derive(Clone, Debug, Hash)]
pub(crate) enum Event {
    Deliver {
        link: u32,
        from: NodeId,
        to: NodeId,
        msg: Message,
    },
    /// A message of a node to itself.
    Loop {
        node: NodeId,
        life: u32,
        msg: Message,
    },
    /// A worker tells that it has prepared.
    Prepared {
        node: NodeId,
        life: u32,
        gid: Gid,
        lsn: Lsn,
    },
    Tick {
        node: NodeId,
        life: u32,
    },
    /// WAL up to here has reached the disk.
    Flushed {
        node: NodeId,
        life: u32,
        upto: u64,
    },
    Session {
        node: NodeId,
        life: u32,
        gid: Gid,
        step: SessionStep,
    },
    /// The local database executes COMMIT or ROLLBACK PREPARED on the core's order.
    Finish {
        node: NodeId,
        life: u32,
        gid: Gid,
        decision: Decision,
    },
    LookUp {
        node: NodeId,
        life: u32,
        gid: Gid,
    },
    /// An item of the origin's stream arrives.
    Stream {
        connection: u32,
        origin: NodeId,
        to: NodeId,
        lsn: Lsn,
        deps: Vec<(NodeId, protocol::Csn)>,
    },
    Apply {
        node: NodeId,
        life: u32,
        gid: Gid,
        step: ApplyStep,
    },
    StoreMarks {
        node: NodeId,
        life: u32,
    },
    MarkStored {
        node: NodeId,
        life: u32,
        origin: NodeId,
        lsn: Lsn,
        upto: u64,
    },
    Client {
        node: NodeId,
    },
    Crash {
        node: NodeId,
    },
    Restart {
        node: NodeId,
    },
    DiskLost {
        node: NodeId,
    },
    /// A copy of another node is made in place of a lost one.
    Clone {
        node: NodeId,
        step: CloneStep,
    },
    /// An old disk of a node that was replaced is started.
    OldDisk {
        node: NodeId,
    },
    OldDiskEnds {
        node: NodeId,
    },
    /// The arbiter of a server that goes on.
    ArbiterEnds {
        node: NodeId,
    },
    ArbiterStarts {
        node: NodeId,
        life: u32,
    },
    /// The link between the two breaks, or the stream alone.
    Cut {
        a: NodeId,
        b: NodeId,
        stream_only: bool,
    },
    Connect {
        a: NodeId,
        b: NodeId,
    },
    ConnectStream {
        origin: NodeId,
        to: NodeId,
    },
    /// Something goes wrong beside crashes and cuts.
    Strike(Hazard),
    /// The second node has not heard from the first one for too long, if that still holds.
    Silence {
        from: NodeId,
        to: NodeId,
    },
    Audible {
        from: NodeId,
        to: NodeId,
    },
    /// The node looks whether the peer's votes are missing.
    Judge {
        node: NodeId,
        life: u32,
        peer: NodeId,
    },
    LinkDown {
        node: NodeId,
        life: u32,
        peer: NodeId,
    },
    /// Something for a node's membership.
    Members {
        node: NodeId,
        life: u32,
        input: MembershipInput,
    },
    /// The membership's record has reached the disk.
    MembersStored {
        node: NodeId,
        life: u32,
    },
    WriteMarker {
        node: NodeId,
        life: u32,
        num: GenerationNum,
    },
    /// Time for heartbeats.
    Beat {
        node: NodeId,
        life: u32,
    },
    Heartbeat {
        link: u32,
        from: NodeId,
        to: NodeId,
        beat: Beat,
    },
    /// A node's question arrives at the referee.
    AskReferee {
        node: NodeId,
        life: u32,
        request: RefereeRequest,
    },
    LoseReferee {
        nodes: NodeSet,
    },
    FindReferee {
        nodes: NodeSet,
    },
    /// The next transaction of the donor.
    Recover {
        node: NodeId,
        life: u32,
        from: NodeId,
        number: u64,
    },
}

/// What a heartbeat carries.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Beat {
    pub sent: Millis,
    pub epoch: u32,
    pub presence: Presence,
    pub grants: Vec<Grant>,
}

#[derive(Clone, Copy, Debug, Hash)]
pub(crate) enum SessionStep {
    Prepare,
    Announce,
    Interrupt,
    Vanish,
    Finish,
}

#[derive(Clone, Copy, Debug, Hash)]
pub(crate) enum ApplyStep {
    Start,
    Prepare,
}

/// Events in the order in which they happen: by time, then by the order in which they were planned.
#[derive(Debug, Default)]
pub(crate) struct Agenda {
    events: BTreeMap<(Millis, u64), Event>,
    planned: u64,
}

impl Agenda {
    pub fn plan(&mut self, at: Millis, event: Event) {
        self.planned += 1;
        self.events.insert((at, self.planned), event);
    }

    /// The next event up to this time.
    pub fn next(&mut self, end: Millis) -> Option<(Millis, Event)> {
        let first = self
            .events
            .first_entry()
            .filter(|entry| entry.key().0 <= end)?;
        let ((at, _), event) = first.remove_entry();
        Some((at, event))
    }
}
