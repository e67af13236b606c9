//! Order between durable records and what may be seen of them.
//!
//! The core says `Persist` before an effect that shows the new state to somebody. Effects of the same transaction wait here until the record
//! is on disk, or only in WAL where a flush follows anyway; other transactions are not held back. Records are written by the arbiter's main
//! thread in batches, one flush for all.

use crate::pg::records::{BODY_BYTES, Body};
use protocol::{Effect, Gid};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Tuples of `mtm.records`: transactions that may have a durable record at once. Backends beyond it wait.
pub const RECORDS_MAX: u32 = 8192;

/// Which tuple belongs to which transaction.
pub struct Tuples {
    by_gid: BTreeMap<Gid, u32>,
    free: BTreeSet<u32>,
}

impl Tuples {
    /// All tuples free but those that hold the records found at start.
    pub fn new(taken: impl IntoIterator<Item = (Gid, u32)>) -> Tuples {
        let by_gid: BTreeMap<Gid, u32> = taken.into_iter().collect();
        let used: BTreeSet<u32> = by_gid.values().copied().collect();
        Tuples {
            by_gid,
            free: (0..RECORDS_MAX).filter(|id| !used.contains(id)).collect(),
        }
    }

    /// The transaction's tuple, taking a free one at first use; none when all are taken. The lowest free one is taken, so that
    /// few pages are touched.
    pub fn of(&mut self, gid: Gid) -> Option<u32> {
        if let Some(id) = self.by_gid.get(&gid) {
            return Some(*id);
        }
        let id = self.free.pop_first()?;
        self.by_gid.insert(gid, id);
        Some(id)
    }

    /// The transaction's tuple, if it has one.
    pub fn taken_by(&self, gid: Gid) -> Option<u32> {
        self.by_gid.get(&gid).copied()
    }

    pub fn free(&mut self, gid: Gid) {
        if let Some(id) = self.by_gid.remove(&gid) {
            self.free.insert(id);
        }
    }
}

/// A batch for the main thread.
#[derive(Default)]
pub struct Batch {
    pub writes: Vec<(u32, Body)>,
    /// Transactions whose effects wait until their record is in WAL.
    pub written: Vec<Gid>,
    /// Transactions whose effects wait for the flush; empty when none does.
    pub waiting: Vec<Gid>,
}

/// Effects held back, and the batch being collected.
#[derive(Default)]
pub struct DurableOrder {
    held: BTreeMap<Gid, VecDeque<Effect>>,
    batch: Batch,
    /// Records to be emptied; they go with the next flush that somebody waits for.
    empty: Batch,
    emptying: BTreeSet<Gid>,
}

impl DurableOrder {
    /// True when effects of this transaction must queue behind a record that is not durable yet.
    pub fn holds(&self, gid: Gid) -> bool {
        self.held.contains_key(&gid)
    }

    /// Queues an effect of a held transaction.
    pub fn hold(&mut self, gid: Gid, effect: Effect) {
        self.held.entry(gid).or_default().push_back(effect);
    }

    /// Adds a record that later effects of the transaction must wait for.
    pub fn persist(&mut self, gid: Gid, tuple: u32, body: Body) {
        self.batch.writes.push((tuple, body));
        self.batch.waiting.push(gid);
        self.held.entry(gid).or_default();
    }

    /// Adds a record that has to precede the later effects of the transaction in WAL.
    pub fn write_before(&mut self, gid: Gid, tuple: u32, body: Body) {
        self.batch.writes.push((tuple, body));
        self.batch.written.push(gid);
        self.held.entry(gid).or_default();
    }

    /// Adds a record that nobody waits for.
    pub fn write(&mut self, tuple: u32, body: Body) {
        self.batch.writes.push((tuple, body));
    }

    /// Empties a record that nobody needs any more, without a flush of its own. Later effects of the transaction wait: what others have been
    /// told to forget must not rise again at a restart of this node. The tuple is taken until then.
    pub fn clear(&mut self, gid: Gid, tuple: u32) {
        self.empty.writes.push((tuple, [0; BODY_BYTES]));
        self.empty.waiting.push(gid);
        self.emptying.insert(gid);
        self.held.entry(gid).or_default();
    }

    /// The batch collected so far, if there is something in it. Records to be emptied come along when there is a flush anyway, or when they are
    /// `overdue`; behind the others, since a record of the same transaction can be among those.
    pub fn take_batch(&mut self, overdue: bool) -> Option<Batch> {
        if overdue || !self.batch.waiting.is_empty() {
            self.batch.writes.append(&mut self.empty.writes);
            self.batch.waiting.append(&mut self.empty.waiting);
        }
        (!self.batch.writes.is_empty()).then(|| std::mem::take(&mut self.batch))
    }

    /// The record of the transaction is durable: the effects that waited, to be carried out in order, and whether the record is empty now. Those
    /// behind a further `Persist` are held again by the caller, who runs them through the same path.
    pub fn release(&mut self, gid: Gid) -> (VecDeque<Effect>, bool) {
        (
            self.held.remove(&gid).unwrap_or_default(),
            self.emptying.remove(&gid),
        )
    }
}
