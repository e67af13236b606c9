//! What a node is, in the words of `mtm.status()`.

/// What this node is, as `mtm.status()` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NodeStatus {
    /// No cluster here (yet).
    Disabled = 0,
    /// The cluster is known; connections and recovery are under way.
    Starting = 1,
    /// Connected to every member in both directions: takes reads and writes.
    Online = 2,
    /// Some member cannot be reached: writes wait or are refused.
    Degraded = 3,
    /// A new generation begins: in a moment it is online or not a member.
    Switching = 4,
    /// A member that is not level yet: the others wait for it.
    Recovery = 5,
    /// Not a member; replays what it has missed.
    Catchup = 6,
    /// Not a member, and nobody to recover from is seen.
    Minority = 7,
    /// Not a member, and it cannot recover: what it has missed is no longer kept.
    NeedsCopy = 8,
    /// Not a member; what others have committed cannot be applied here.
    Failed = 9,
}

impl NodeStatus {
    pub(super) fn from_raw(raw: u32) -> NodeStatus {
        match raw {
            1 => NodeStatus::Starting,
            2 => NodeStatus::Online,
            3 => NodeStatus::Degraded,
            4 => NodeStatus::Switching,
            5 => NodeStatus::Recovery,
            6 => NodeStatus::Catchup,
            7 => NodeStatus::Minority,
            8 => NodeStatus::NeedsCopy,
            9 => NodeStatus::Failed,
            _ => NodeStatus::Disabled,
        }
    }

    /// Whether a node in this state may serve reads and writes while its lease holds.
    pub fn serves(self) -> bool {
        matches!(self, NodeStatus::Online | NodeStatus::Degraded)
    }

    /// The word users see.
    pub fn name(self) -> &'static str {
        match self {
            NodeStatus::Disabled => "disabled",
            NodeStatus::Starting => "starting",
            NodeStatus::Online => "online",
            NodeStatus::Degraded => "degraded",
            NodeStatus::Switching => "switching",
            NodeStatus::Recovery => "recovery",
            NodeStatus::Catchup => "catchup",
            NodeStatus::Minority => "minority",
            NodeStatus::NeedsCopy => "needs_copy",
            NodeStatus::Failed => "failed",
        }
    }
}
