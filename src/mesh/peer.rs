//! One task per peer, which serves the peer's links one after the other.
//!
//! So an event of a link is never reported after the next link is up, without a lock or a number to compare.

use std::sync::Arc;

use protocol::NodeId;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::config::Peer;
use crate::dial::{BackOff, DialError, dial_once};
use crate::event::{DownReason, MeshEvent};
use crate::link::{self, Link};
use crate::shared::Shared;

/// Most proven connections of one peer that wait for its task.
pub(crate) const RECEPTION_MAX: usize = 4;

/// Serves a peer with a lower id: dials whenever there is no link.
pub(crate) async fn serve_by_dialling(shared: Arc<Shared>, peer: Peer) {
    let mut back_off = BackOff::new();
    let mut last_failure = None;
    while !shared.events.is_closed() {
        // The peer would take a link for a sign of life, and hear nothing on it.
        if !shared.may_speak() {
            sleep(back_off.pause()).await;
            continue;
        }
        match dial_once(&shared, &peer).await {
            Ok(link) => {
                last_failure = None;
                let since = Instant::now();
                serve(&shared, peer.id, link, std::future::pending()).await;
                back_off.link_stood(since.elapsed());
            }
            Err(failure) => report_once(&shared, peer.id, failure, &mut last_failure),
        }
        sleep(back_off.pause()).await;
    }
}

/// A peer that is away fails the same way at each attempt; the first says it all.
fn report_once(shared: &Shared, peer: NodeId, failure: DialError, last: &mut Option<DialError>) {
    if last.as_ref() != Some(&failure) {
        shared.report_refusal(Some(peer), failure.0, failure.1.clone());
        *last = Some(failure);
    }
}

/// Serves a peer with a higher id: takes what the listeners have accepted. The newest connection wins.
pub(crate) async fn serve_by_accepting(
    shared: Arc<Shared>,
    peer: NodeId,
    mut accepted: mpsc::Receiver<Link>,
) {
    let mut waiting = None;
    loop {
        let link = match waiting.take() {
            Some(link) => link,
            None => match accepted.recv().await {
                Some(link) => link,
                None => return,
            },
        };
        waiting = serve(&shared, peer, link, accepted.recv()).await;
    }
}

/// Serves one link from its first to its last event; returns the connection that replaced it.
async fn serve(
    shared: &Shared,
    peer: NodeId,
    link: Link,
    replacement: impl Future<Output = Option<Link>>,
) -> Option<Link> {
    let (epoch, addr) = (link.session.epoch, link.addr);
    shared.link_stands(peer, epoch);
    report(shared, MeshEvent::Up { peer, epoch, addr }).await;
    let (reason, newer) = tokio::select! {
        biased;
        newer = replacement => match newer {
            Some(newer) => (DownReason::Replaced, Some(newer)),
            None => (DownReason::Stopping, None),
        },
        reason = link::run(shared, link) => (reason, None),
    };
    shared.link_ended(peer);
    report(shared, MeshEvent::Down { peer, reason }).await;
    newer
}

async fn report(shared: &Shared, event: MeshEvent) {
    // A caller that no longer listens is about to drop the mesh.
    let _ = shared.events.send(event).await;
}
