//! What waits to be sent to one peer.
//!
//! Messages are encoded where they are sent, straight into the bytes that will be sealed. The link's writer is woken once, runs
//! when the sender gives way, and takes everything that has gathered: one turn of the caller's loop, one write.

use std::sync::{Mutex, MutexGuard, PoisonError};

use protocol::Message;
use tokio::sync::Notify;
use wire::frame::{Batch, FrameError};

/// Most bytes of messages that wait for one peer; one more ends the link.
pub const OUTBOX_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Memory a batch keeps for the next messages.
const BATCH_BYTES_KEPT: usize = 64 * 1024;

/// The queue of one peer. Closed, it takes nothing.
#[derive(Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    work: Notify,
    overflow: Notify,
}

#[derive(Default)]
struct State {
    open: bool,
    heartbeat_due: bool,
    batch: Batch,
}

impl Outbox {
    /// Starts anew for a link.
    pub(crate) fn open(&self) {
        let mut state = self.state();
        state.batch.clear(BATCH_BYTES_KEPT);
        state.heartbeat_due = false;
        state.open = true;
    }

    /// Throws away what waits, and what is sent from now on.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.batch.clear(BATCH_BYTES_KEPT);
        state.open = false;
    }

    /// Queues a message; without a link it is dropped.
    pub(crate) fn push(&self, message: &Message) -> Result<(), FrameError> {
        let mut state = self.state();
        if !state.open {
            return Ok(());
        }
        state.batch.push(message)?;
        if state.batch.len() > OUTBOX_BYTES_MAX {
            state.open = false;
            self.overflow.notify_one();
        }
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Has the writer send a heartbeat, ahead of all messages that wait.
    pub(crate) fn request_heartbeat(&self) {
        self.state().heartbeat_due = true;
        self.work.notify_one();
    }

    /// Has the writer look again.
    pub(crate) fn wake(&self) {
        self.work.notify_one();
    }

    /// Waits until there may be something to send.
    pub(crate) async fn ready(&self) {
        self.work.notified().await;
    }

    /// Swaps what waits for the empty `batch`; says whether a heartbeat is due.
    pub(crate) fn take(&self, batch: &mut Batch) -> bool {
        batch.clear(BATCH_BYTES_KEPT);
        let mut state = self.state();
        std::mem::swap(&mut state.batch, batch);
        std::mem::take(&mut state.heartbeat_due)
    }

    /// Waits until too much waits.
    pub(crate) async fn overflowed(&self) {
        loop {
            self.overflow.notified().await;
            // The wake-up may be of the link before.
            if !self.state().open {
                return;
            }
        }
    }

    /// A panic while the lock was held leaves a batch that is whole frames, or too short by one message.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
