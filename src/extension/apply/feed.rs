//! From a receiver to one apply worker: frames of one transaction through the worker's ring.

use crate::guc;
use crate::pg::process::{self, Wait};
use crate::pg::shared::{self, WorkerSlot, shared, worker};
use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often a receiver that waits for a worker or for room asks again.
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// How long every worker may be stuck behind locks before the youngest transaction gives way (see `claim`).
const STUCK: Duration = Duration::from_millis(200);

thread_local! {
    /// Workers and jobs that this receiver is writing transactions for.
    static FEEDING: RefCell<Vec<(usize, u64)>> = const { RefCell::new(Vec::new()) };
}

/// Of so many workers one may apply a transaction that still runs; the others are there for those that commit.
const WORKERS_FOR_ONE_AHEAD: usize = 4;

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

    /// Takes an idle worker for a transaction that still runs; nothing when there is none to spare.
    pub fn claim_ahead() -> Option<Feed> {
        let running = shared::workers()
            .iter()
            .filter(|slot| slot.ahead.load(Ordering::Acquire))
            .count();
        if running >= guc::max_workers() / WORKERS_FOR_ONE_AHEAD {
            return None;
        }
        let feed = Feed::try_claim()?;
        feed.slot.ahead.store(true, Ordering::Release);
        Some(feed)
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
                FEEDING.with_borrow_mut(|feeding| feeding.push((index, job)));
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

    /// Sends a message, with its length before it. `idle` is called while it waits for room.
    pub fn write_message(&self, message: &[u8], idle: impl FnMut()) -> bool {
        let length = (message.len() as u32).to_le_bytes();
        self.write(&[&length, message], idle)
    }

    /// Sends as many bytes as there is room for, and returns their number. The worker wakes this process when it has made room.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let ring = shared::ring(self.index);
        let mut written = ring.write(bytes);
        if written < bytes.len() {
            self.slot.feeder_waits.store(true, Ordering::SeqCst);
            // Room that was made before the worker could see this would not be told of.
            written += ring.write(&bytes[written..]);
        }
        self.slot.process.wake();
        written
    }

    /// Whether the worker has dropped what it had applied of a running transaction.
    pub fn was_dropped(&self) -> bool {
        self.slot.dropped_job.load(Ordering::Acquire) == self.job
            || self.slot.jobs_done.load(Ordering::Acquire) >= self.job
    }

    /// Waits until the worker has read that the PREPARE has come; false when it has dropped the transaction instead, or nothing may be applied
    /// ahead any more.
    pub fn await_begin(&self, may: impl Fn() -> bool) -> bool {
        loop {
            if self.slot.resumed_job.load(Ordering::Acquire) == self.job {
                return true;
            }
            if self.was_dropped() || !may() {
                return false;
            }
            process::wait_latch(LOOK_AROUND, Wait::Worker);
            process::check_interrupts();
        }
    }

    /// Everything has been written, or need not be.
    pub fn end(self) {
        self.forget();
    }

    /// The transaction is not to be applied: the worker drops it.
    pub fn break_off(self) {
        // In this order: another feeder may have the worker as soon as it knows.
        self.forget();
        self.slot.broken_job.store(self.job, Ordering::Release);
        self.slot.process.wake();
    }

    fn forget(&self) {
        FEEDING.with_borrow_mut(|feeding| feeding.retain(|one| *one != (self.index, self.job)));
        self.slot.fed.store(false, Ordering::Release);
    }
}

/// Whether some worker went away with a transaction of the calling receiver's that nobody has answered.
pub fn lost_one() -> bool {
    shared::workers()
        .iter()
        .any(|slot| slot.lost.load(Ordering::Acquire) && slot.feeder.is_self())
}

/// The calling receiver goes away: workers in the middle of a transaction of its stream drop it, and what workers have lost is asked for by
/// the next receiver.
pub fn break_off() {
    for (index, job) in FEEDING.take() {
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

/// Waits until no worker is busy with a transaction fed by this process's predecessor for the same peer. One that still ran is dropped, and leaves
/// nothing to know about.
pub fn drain(origin: protocol::NodeId) {
    loop {
        let busy = shared::workers().iter().any(|slot| {
            slot.state.load(Ordering::Acquire) == worker::BUSY
                && !slot.ahead.load(Ordering::Acquire)
                && slot.gid.get().is_none_or(|gid| gid.coordinator == origin)
        });
        if !busy {
            return;
        }
        process::wait_latch(Duration::from_millis(20), Wait::Worker);
        process::check_interrupts();
    }
}
