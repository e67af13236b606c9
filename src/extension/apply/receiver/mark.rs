//! The mark of a stream: up to where everything is safe here, stored, and told to the peer.

use super::Receiver;
use crate::apply::feed;
use crate::apply::progress::body_of_mark;
use crate::apply::stream_message::status_message;
use crate::arbiter::event::{LocalEvent, submit};
use crate::failpoint::{Failpoint, hit};
use crate::pg::process;
use crate::pg::records::{self, Body};
use crate::pg::shared::{self, shared};
use crate::pg::walreceiver::Stream;
use protocol::Lsn;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often the mark is stored and the peer is told, while it moves.
pub(super) const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// The same while the peer asks for an answer.
const STATUS_INTERVAL_ASKED: Duration = Duration::from_millis(10);
/// How often the mark is stored while no transaction has come, only WAL that concerns nobody here: storing a mark makes WAL too, and the peers would keep each other
/// awake.
const STATUS_INTERVAL_IDLE: Duration = Duration::from_secs(5);
/// How often the peer is asked how far its WAL goes, when nothing else has come; well below any sensible wal_sender_timeout.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// So far ahead of what has been seen the peer hears that its WAL was received.
///
/// A walsender that goes to sleep tells the receiver where it stands, each time, unless the receiver has that already. With every transaction of the
/// cluster that would cost each stream three messages that nobody needs. What is said about flushed and applied WAL, on which the slot
/// and the peer's shutdown depend, is always the truth.
const UNSAID_BYTES: u64 = 16 * 1024 * 1024;

impl Receiver {
    /// How far everything is safe here.
    pub(super) fn advance(&mut self) -> Lsn {
        let mark = self
            .progress
            .advance(|worker| shared::workers()[worker].jobs_done.load(Ordering::Acquire));
        // In this order: a job that was lost is called lost before it is called done.
        if feed::lost_one() {
            pgrx::error!(
                "an apply worker went away; the stream of node {} starts again from {}",
                self.peer.get(),
                self.stored
            );
        }
        let mark = self.fences.limit(mark, shared().standing.get());
        self.users.limit(mark)
    }

    /// Stores the mark if it has moved, and tells the peer.
    pub(super) fn tell(&mut self, stream: &mut Stream) {
        let mark = self.advance();
        let quiet = self.told_at.elapsed();
        let now = std::mem::take(&mut self.confirm_now);
        if mark > self.stored && (now || self.stored_at.elapsed() >= self.store_pause()) {
            self.store(mark);
        } else if !self.reply_wanted
            && quiet < ASK_INTERVAL
            && (!self.told_too_much || quiet < STATUS_INTERVAL_ASKED)
        {
            return;
        }
        // A peer that asks, or is asked, hears the truth.
        let written = if self.reply_wanted || quiet >= ASK_INTERVAL || self.stored == Lsn::ZERO {
            self.seen
        } else {
            Lsn(self.seen.0 + UNSAID_BYTES)
        };
        stream.send(&status_message(written, self.stored));
        hit(Failpoint::MarkAfterConfirm);
        self.reply_wanted = false;
        self.told_too_much = false;
        self.told_at = Instant::now();
    }

    /// The same when the peer has not heard for a while, or somebody waits for it to hear.
    pub(super) fn tell_in_time(&mut self, stream: &mut Stream) {
        if self.confirm_now || self.told_at.elapsed() >= STATUS_INTERVAL {
            self.tell(stream);
        }
    }

    /// How old the stored mark may become.
    fn store_pause(&self) -> Duration {
        if self.reply_wanted {
            // A walsender that stops with its server asks again and again until everything it sent is confirmed.
            STATUS_INTERVAL_ASKED
        } else if self.progress.has_done_work() {
            STATUS_INTERVAL
        } else {
            STATUS_INTERVAL_IDLE
        }
    }

    /// The durable row of a mark.
    pub(super) fn row_of(&mut self, mark: Lsn) -> (u32, Body) {
        let generation = self.sections.at(mark);
        let held = Lsn(self.node.held.load(Ordering::Acquire));
        let body = body_of_mark(mark, generation, held);
        (u32::from(self.peer.get()), body)
    }

    fn store(&mut self, mark: Lsn) {
        let row = self.row_of(mark);
        hit(Failpoint::MarkBeforeStore);
        let end = process::in_transaction(|| self.marks.write(&mut [row]));
        hit(Failpoint::MarkBeforeFlush);
        records::flush(end);
        hit(Failpoint::MarkBeforeConfirm);
        self.stored = mark;
        self.stored_at = Instant::now();
        self.progress.stored();
        self.node.mark.store(mark.0, Ordering::Release);
        self.node.replay.wrote(mark);
        submit(&LocalEvent::MarkStored {
            node: self.peer,
            lsn: mark,
        });
    }
}
