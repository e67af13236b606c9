//! The accepting side: listening sockets, and the strangers that have connected to them.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use protocol::{MAX_NODES, NodeId};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::event::MeetError;
use crate::link::Link;
use crate::meet::{meet_dialer, prepare};
use crate::shared::Shared;

/// Most connections per listening socket that have not proven themselves. One more ends the oldest.
const STRANGERS_MAX: usize = 64;
/// Connections the kernel holds for us.
const BACKLOG: i32 = 128;
/// Pause after a failed accept: out of file descriptors is nothing that passes at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where proven connections go: the task of each peer that dials this node.
pub(crate) type Receptions = [Option<mpsc::Sender<Link>>; MAX_NODES as usize];

/// Opens a listening socket; needs a runtime.
pub(crate) fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        // So that [::] leaves 0.0.0.0 to a socket of its own.
        socket.set_only_v6(true)?;
    }
    // Connections of the process before us must not keep the port from us.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts for ever.
pub(crate) async fn accept(shared: Arc<Shared>, listener: TcpListener, receptions: Receptions) {
    let receptions = Arc::new(receptions);
    let mut strangers = Strangers::default();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                // Whoever connects would take a link for a sign of life of this node.
                Ok(_) if !shared.may_speak() => {}
                Ok((stream, addr)) => {
                    if let Some(evicted) = strangers.make_room() {
                        shared.report_refusal(None, Some(evicted), MeetError::Crowded);
                    }
                    strangers.admit(addr, receive(Arc::clone(&shared), Arc::clone(&receptions), stream, addr));
                }
                Err(_) => sleep(ACCEPT_RETRY).await,
            },
            Some(_) = strangers.tasks.join_next() => {}
        }
    }
}

/// Connections whose handshake is under way, oldest first.
#[derive(Default)]
struct Strangers {
    tasks: JoinSet<()>,
    ages: VecDeque<(SocketAddr, AbortHandle)>,
}

impl Strangers {
    /// Ends the oldest if there are too many; returns its address.
    fn make_room(&mut self) -> Option<SocketAddr> {
        self.ages.retain(|(_, task)| !task.is_finished());
        if self.ages.len() < STRANGERS_MAX {
            return None;
        }
        let (addr, task) = self.ages.pop_front()?;
        task.abort();
        Some(addr)
    }

    fn admit(&mut self, addr: SocketAddr, task: impl Future<Output = ()> + Send + 'static) {
        self.ages.push_back((addr, self.tasks.spawn(task)));
    }
}

/// Takes a stranger through the handshake and hands the link to the peer's task.
async fn receive(
    shared: Arc<Shared>,
    receptions: Arc<Receptions>,
    mut stream: TcpStream,
    addr: SocketAddr,
) {
    let limit = shared.connect_timeout;
    let met = async {
        prepare(&stream)?;
        meet_dialer(&shared, &mut stream).await
    };
    let session = match timeout(limit, met).await {
        Ok(Ok(session)) => session,
        Ok(Err(reason)) => return shared.report_refusal(None, Some(addr), reason),
        Err(_) => {
            let reason = MeetError::Timeout(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
            return shared.report_refusal(None, Some(addr), reason);
        }
    };
    let peer = session.peer;
    let link = Link {
        stream,
        session,
        addr,
    };
    let delivered = reception(&receptions, peer).is_some_and(|to| to.try_send(link).is_ok());
    if !delivered {
        // The peer's task has not begun with the connections before this one; the peer will dial again.
        shared.report_refusal(None, Some(addr), MeetError::Crowded);
    }
}

fn reception(receptions: &Receptions, peer: NodeId) -> Option<&mpsc::Sender<Link>> {
    receptions[peer.index()].as_ref()
}
