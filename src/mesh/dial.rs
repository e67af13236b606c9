//! The dialling side: one attempt to reach a peer, and the pause before the next.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use crate::config::Peer;
use crate::event::MeetError;
use crate::link::Link;
use crate::meet::{meet_acceptor, prepare};
use crate::shared::Shared;

/// Pause after the first failure.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause. Short, since a node that is back waits for it.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// A growing pause between attempts.
pub(crate) struct BackOff(Duration);

impl BackOff {
    pub(crate) const fn new() -> Self {
        Self(PAUSE_MIN)
    }

    /// The pause to make now; the next is twice as long.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSE_MAX);
        pause
    }

    /// Begins anew after a link that stood for `time`, unless it fell at once: two nodes that cannot
    /// live together must not dial as fast as they can.
    pub(crate) fn link_stood(&mut self, time: Duration) {
        if time >= PAUSE_MAX {
            *self = Self::new();
        }
    }
}

/// Why an attempt failed, and with which address.
pub(crate) type DialError = (Option<SocketAddr>, MeetError);

/// Tries all addresses of the peer once, within the time for a connection.
pub(crate) async fn dial_once(shared: &Shared, peer: &Peer) -> Result<Link, DialError> {
    let limit = shared.connect_timeout;
    match timeout(limit, try_addresses(shared, peer)).await {
        Ok(result) => result,
        Err(_) => {
            let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            Err((None, MeetError::Timeout(ms)))
        }
    }
}

async fn try_addresses(shared: &Shared, peer: &Peer) -> Result<Link, DialError> {
    let unresolved = |error: String| {
        let host = peer.host.clone();
        (None, MeetError::Resolve { host, error })
    };
    let addrs = lookup_host((peer.host.as_str(), peer.port))
        .await
        .map_err(|error| unresolved(error.to_string()))?;
    let mut failure = unresolved("it has no address".to_owned());
    for addr in addrs {
        match try_address(shared, peer, addr).await {
            Ok(link) => return Ok(link),
            Err(reason) => failure = (Some(addr), reason),
        }
    }
    Err(failure)
}

async fn try_address(shared: &Shared, peer: &Peer, addr: SocketAddr) -> Result<Link, MeetError> {
    let mut stream = TcpStream::connect(addr)
        .await
        .map_err(|error| MeetError::Connect(error.to_string()))?;
    prepare(&stream)?;
    let session = meet_acceptor(shared, &mut stream, peer.id).await?;
    Ok(Link {
        stream,
        session,
        addr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_a_lasting_link_resets_them() {
        let mut back_off = BackOff::new();
        let pauses: Vec<_> = (0..8).map(|_| back_off.pause()).collect();
        assert!(pauses.is_sorted());
        assert_eq!((pauses[0], pauses[7]), (PAUSE_MIN, PAUSE_MAX));
        back_off.link_stood(PAUSE_MIN);
        assert_eq!(back_off.pause(), PAUSE_MAX);
        back_off.link_stood(PAUSE_MAX);
        assert_eq!(back_off.pause(), PAUSE_MIN);
    }
}
