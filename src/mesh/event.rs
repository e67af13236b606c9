//! What a mesh reports.

use std::io;
use std::net::SocketAddr;

use protocol::{Message, NodeId};
use thiserror::Error;
use wire::channel::ChannelError;
use wire::frame::{FrameError, Heartbeat};
use wire::handshake::HandshakeError;

use crate::outbox::OUTBOX_BYTES_MAX;

/// Something that happened to a link, or to somebody who wanted one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeshEvent {
    /// A link to the peer stands; everything that follows about this peer is of this link.
    Up {
        peer: NodeId,
        /// Incarnation of the peer's arbiter.
        epoch: u32,
        addr: SocketAddr,
    },
    /// The link is lost. What was sent may or may not have arrived.
    Down {
        peer: NodeId,
        reason: DownReason,
    },
    /// Messages, in the order in which the peer sent them; never empty.
    Messages {
        from: NodeId,
        batch: Vec<Message>,
    },
    Heartbeat {
        from: NodeId,
        heartbeat: Heartbeat,
    },
    /// A connection did not become a link. Reported a limited number of times per second.
    Refused {
        /// The peer this node dialled; `None` for somebody who connected here.
        peer: Option<NodeId>,
        /// The address, if it came to that.
        addr: Option<SocketAddr>,
        reason: MeetError,
        /// Refusals since the last report that were not reported.
        unreported: u64,
    },
}

/// Why a link ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DownReason {
    #[error("the peer closed the connection")]
    Closed,
    #[error("nothing was heard for {0} ms")]
    Silent(u64),
    #[error("the peer has connected anew")]
    Replaced,
    #[error("the peer takes messages too slowly: more than {OUTBOX_BYTES_MAX} bytes are waiting")]
    TooSlow,
    #[error("the connection failed: {0}")]
    Io(String),
    #[error("the peer sent a frame that cannot be right: {0}")]
    Channel(#[from] ChannelError),
    #[error("the peer sent a frame that cannot be right: {0}")]
    Frame(#[from] FrameError),
    #[error("this node stops")]
    Stopping,
}

impl From<io::Error> for DownReason {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(error.to_string()),
        }
    }
}

/// Why a connection did not become a link.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MeetError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("host name \"{host}\" was not resolved: {error}")]
    Resolve { host: String, error: String },
    #[error("could not connect: {0}")]
    Connect(String),
    #[error("the connection was closed during the handshake")]
    Closed,
    #[error("no link within {0} ms")]
    Timeout(u64),
    #[error("too many connections wait for their handshake")]
    Crowded,
    #[error("the connection failed during the handshake: {0}")]
    Io(String),
}

impl From<io::Error> for MeetError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(error.to_string()),
        }
    }
}
