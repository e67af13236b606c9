//! The mesh: one authenticated, encrypted connection between each two arbiters.
//!
//! Of two nodes the one with the higher id dials and keeps dialling; the lower one accepts. Strangers end at the
//! handshake, where their number, their bytes and their time are bounded. A link that stands carries messages in order and
//! heartbeats between them. It ends when the connection closes, when the peer is silent for too long, when a frame cannot be right,
//! when the peer does not keep up, or when the peer has connected anew. What was on its way is then lost: the protocol sends
//! again what matters.
//!
//! Rules:
//! - messages of one link arrive in the order in which they were sent, or not at all;
//! - after [`MeshEvent::Up`] nothing of an earlier link is reported: one task per peer serves its links one after the other;
//! - sending never waits, and no queue grows without bound.
//!
//! The mesh runs as tasks on the caller's runtime. It keeps no time but the monotonic clock, stamps heartbeats by the caller's, and calls
//! nothing that blocks, except the resolver of host names, which has a thread of its own. Encodings and the handshake's rules are in `wire`.
#![forbid(unsafe_code)]

mod config;
mod dial;
mod event;
mod handle;
mod link;
mod listen;
mod meet;
mod outbox;
mod peer;
mod shared;

pub use config::{MeshConfig, Peer, StartError};
pub use event::{DownReason, MeetError, MeshEvent};
pub use handle::{Mesh, MeshHandle};
pub use outbox::OUTBOX_BYTES_MAX;
pub use wire::frame::Heartbeat;
pub use wire::handshake::ClusterSecret;
