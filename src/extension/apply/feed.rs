//! From a receiver to one apply worker: frames of one transaction through the worker's ring.

use crate::pg::process::{self, Wait};
use crate::pg::shared::{self, WorkerSlot, shared, worker};
use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often a receiver that waits for a worker or for room asks again.
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// How long every worker may be stuck behind locks before the youngest transaction gives way (see `claim`).
const STUCK: Duration = Duration::from_millis(200);

thread_local! {
    /// Worker and job that this receiver is writing a transaction for.
    static FEEDING: Cell<Option<(usize, u64)>> = const { Cell::new(None) };
}

/// The longest frame; a longer one is a protocol error. Values of PostgreSQL are limited to 1 GB.
pub const FRAME_BYTES_MAX: usize = 1 << 30;

/// A worker that this receiver feeds.
pub struct Feed {
    pub index: usize,
    pub job: u64,
    slot: &'static WorkerSlot,
}

impl Feed {
    /// Takes an idle worker, waiting for one if need be. `idle` is called while it waits, so that the stream's keepalives go on.
    pub fn claim(mut idle: impl FnMut()) -> Feed {
        let begun = std::time::Instant::now();
        loop {
            if let Some(feed) = Feed::try_claim() {
                return feed;
            }
            shared().worker_awaited.store(true, Ordering::SeqCst);
            if let Some(feed) = Feed::try_claim() {
                return feed;
            }
            shared().workers_wanted.store(1, Ordering::Release);
            shared().arbiter.wake();
            process::wait_latch(Duration::from_millis(5), Wait::Worker);
            process::check_interrupts();
            idle();
            if begun.elapsed() > STUCK {
                // Workers that wait for transactions whose votes wait for workers would wait for ever.
                crate::conflict::give_way();
            }
        }
    }

    fn try_claim() -> Option<Feed> {
        for (index, slot) in shared::workers().iter().enumerate() {
            let taken = slot
                .state
                .compare_exchange(
                    worker::IDLE,
                    worker::BUSY,
                    Ordering::SeqCst,
                    Ordering::Acquire,
                )
                .is_ok();
            if taken {
                slot.fed.store(true, Ordering::Release);
                slot.feeder.set_self();
                let job = slot.jobs_given.fetch_add(1, Ordering::AcqRel) + 1;
                FEEDING.set(Some((index, job)));
                if shared().monitor_idle.swap(false, Ordering::SeqCst) {
                    shared().monitor.wake();
                }
                return Some(Feed { index, job, slot });
            }
        }
        None
    }

    /// Sends bytes, waiting for room; the worker is woken when all are there, or when the ring is full. False when the worker is gone.
    pub fn write(&self, parts: &[&[u8]], mut idle: impl FnMut()) -> bool {
        for part in parts {
            if !self.write_part(part, &mut idle) {
                return false;
            }
        }
        self.slot.process.wake();
        true
    }

    fn write_part(&self, mut bytes: &[u8], mut idle: impl FnMut()) -> bool {
        let ring = shared::ring(self.index);
        loop {
            if self.slot.jobs_done.load(Ordering::Acquire) >= self.job {
                return false;
            }
            bytes = &bytes[ring.write(bytes)..];
            if bytes.is_empty() {
                return true;
            }
            self.slot.feeder_waits.store(true, Ordering::SeqCst);
            // Room that was made before the worker could see this would not be told of.
            bytes = &bytes[ring.write(bytes)..];
            self.slot.process.wake();
            if !bytes.is_empty() {
                process::wait_latch(LOOK_AROUND, Wait::Ring);
                process::check_interrupts();
                idle();
            }
        }
    }

    /// Everything has been written, or need not be.
    pub fn end(self) {
        FEEDING.set(None);
        self.slot.fed.store(false, Ordering::Release);
    }
}

/// Whether some worker went away with a transaction of the calling receiver's that nobody has answered.
pub fn lost_one() -> bool {
    shared::workers()
        .iter()
        .any(|slot| slot.lost.load(Ordering::Acquire) && slot.feeder.is_self())
}

/// The calling receiver goes away: the worker in the middle of a transaction of its stream drops it, and what workers have lost is asked for by
/// the next receiver.
pub fn break_off() {
    if let Some((index, job)) = FEEDING.take() {
        let slot = &shared::workers()[index];
        slot.broken_job.store(job, Ordering::Release);
        slot.process.wake();
        slot.fed.store(false, Ordering::Release);
    }
    for slot in shared::workers()
        .iter()
        .filter(|slot| slot.feeder.is_self())
    {
        slot.lost.store(false, Ordering::Release);
    }
}

/// Waits until no worker is busy with a transaction fed by this process's predecessor for the same peer.
pub fn drain(origin: protocol::NodeId) {
    loop {
        let busy = shared::workers().iter().any(|slot| {
            slot.state.load(Ordering::Acquire) == worker::BUSY
                && slot.gid.get().is_none_or(|gid| gid.coordinator == origin)
        });
        if !busy {
            return;
        }
        process::wait_latch(Duration::from_millis(20), Wait::Worker);
        process::check_interrupts();
    }
}
