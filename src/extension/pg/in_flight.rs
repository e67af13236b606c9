//! Which transactions of the cluster are prepared here and not finished yet: for readers that wait for them (`strict`), and for the conflict rule.
//!
//! Whoever prepares a transaction enters it before; whoever finishes it strikes it out afterwards. So an entry may be there although the transaction is over
//! (its PREPARE failed, or its finisher died in between), and never the other way round. Readers and full tables strike out what is over. A user's
//! own prepared transaction is not entered: it is not being committed, and nobody knows how long it stays.
//!
//! No lock is taken. An entry is owned by whoever changes its key from or to zero.

use super::raw;
use super::shared::GidCell;
use pgrx::pg_sys;
use protocol::Gid;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// Readers that wait are spread over so many lists; each wakes only those whose transactions are in entries of its own.
const WAITING_LISTS: usize = 16;

/// Key of an entry that is being struck out.
const LEAVING: u64 = u64::MAX;

/// The table's head.
#[repr(C)]
struct Head {
    /// Entries in use. While it is zero, nobody looks further.
    count: AtomicU32,
    /// No entry from here on was ever used.
    reach: AtomicU32,
    /// The last number given to an entry.
    last: AtomicU64,
    waiting: [pg_sys::ConditionVariable; WAITING_LISTS],
}

#[repr(C)]
struct Entry {
    /// Who it is among all nodes' transactions; 0 for a free entry.
    key: AtomicU64,
    /// Its place in the order of entering.
    number: AtomicU64,
    gid: GidCell,
    /// Its xid on this server; 0 until the entry is complete.
    xid: AtomicU32,
}

static HEAD: AtomicPtr<Head> = AtomicPtr::new(std::ptr::null_mut());
static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(std::ptr::null_mut());

/// As many as can be prepared, and those whose PREPARE fails in this moment.
fn capacity() -> usize {
    // SAFETY: a setting that only a start of the server changes.
    unsafe { raw::max_prepared_xacts as usize + super::shared::backend_count() }
}

/// Bytes of shared memory.
pub(super) fn shared_bytes() -> usize {
    size_of::<Head>() + capacity() * size_of::<Entry>()
}

/// Finds or makes the table.
///
/// # Safety
/// From the hook for shared memory, with `AddinShmemInitLock` held.
pub(super) unsafe fn attach() {
    // SAFETY: as the caller promises; all-zero bytes are an empty table but for the waiting lists.
    unsafe {
        let (head, found) = super::shared::area::<Head>(c"multimaster in flight", 1);
        if !found {
            for list in &mut (*head).waiting {
                raw::ConditionVariableInit(list);
            }
        }
        HEAD.store(head, Ordering::Release);
        let (entries, _) = super::shared::area(c"multimaster in flight entries", capacity());
        ENTRIES.store(entries, Ordering::Release);
    }
}

fn head() -> &'static Head {
    // SAFETY: made at the server's start, before any process that calls this; see `shared`.
    unsafe { &*HEAD.load(Ordering::Acquire) }
}

fn entries() -> &'static [Entry] {
    // SAFETY: as head().
    unsafe { std::slice::from_raw_parts(ENTRIES.load(Ordering::Acquire), capacity()) }
}

fn used_entries() -> &'static [Entry] {
    &entries()[..head().reach.load(Ordering::SeqCst) as usize]
}

fn key_of(gid: Gid) -> u64 {
    u64::from(gid.coordinator.get()) << 56 | gid.xid
}

/// A transaction is about to be prepared here under the local `xid`, or was found prepared: it is in the table afterwards.
pub fn enter(gid: Gid, xid: u32) {
    let key = key_of(gid);
    loop {
        if used_entries()
            .iter()
            .any(|entry| entry.key.load(Ordering::SeqCst) == key)
        {
            return;
        }
        let free = entries().iter().position(|entry| {
            entry.key.load(Ordering::Relaxed) == 0
                && entry
                    .key
                    .compare_exchange(0, key, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
        });
        if let Some(place) = free {
            let head = head();
            head.reach.fetch_max(place as u32 + 1, Ordering::SeqCst);
            head.count.fetch_add(1, Ordering::SeqCst);
            let entry = &entries()[place];
            entry.number.store(
                head.last.fetch_add(1, Ordering::SeqCst) + 1,
                Ordering::SeqCst,
            );
            entry.gid.set(Some(gid));
            entry.xid.store(xid, Ordering::SeqCst);
            return;
        }
        // There are more entries than transactions that can be under way.
        strike_out_ended();
    }
}

/// A transaction is finished here, and visible.
pub fn leave(gid: Gid) {
    let key = key_of(gid);
    for (place, entry) in used_entries().iter().enumerate() {
        if entry.key.load(Ordering::SeqCst) == key {
            strike_out(place, key);
            return;
        }
    }
}

/// The transaction of the cluster that has this xid here, if it is being committed.
pub fn gid_of(xid: u32) -> Option<Gid> {
    let entry = used_entries()
        .iter()
        .find(|entry| entry.xid.load(Ordering::SeqCst) == xid)?;
    let gid = entry.gid.get()?;
    // It is still the one that was looked for.
    (entry.xid.load(Ordering::SeqCst) == xid).then_some(gid)
}

fn strike_out(place: usize, key: u64) {
    let entry = &entries()[place];
    let owned = entry
        .key
        .compare_exchange(key, LEAVING, Ordering::SeqCst, Ordering::SeqCst);
    if owned.is_err() {
        return;
    }
    entry.xid.store(0, Ordering::SeqCst);
    entry.key.store(0, Ordering::SeqCst);
    head().count.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: a list in shared memory, made in attach(); takes a spinlock and sets latches.
    unsafe { raw::ConditionVariableBroadcast(list_of(place)) };
}

fn list_of(place: usize) -> *mut pg_sys::ConditionVariable {
    // SAFETY: as head(); the list has a lock of its own.
    unsafe { &raw mut (*HEAD.load(Ordering::Acquire)).waiting[place % WAITING_LISTS] }
}

fn strike_out_ended() {
    for (place, entry) in used_entries().iter().enumerate() {
        let key = entry.key.load(Ordering::SeqCst);
        let xid = entry.xid.load(Ordering::SeqCst);
        if key != 0 && key != LEAVING && xid != 0 && !in_progress(xid) {
            strike_out(place, key);
        }
    }
}

/// Whether the transaction with this xid on this server has not ended.
pub fn in_progress(xid: u32) -> bool {
    // SAFETY: looks at shared memory and the commit log, in a process that is attached to both.
    unsafe { raw::TransactionIdIsInProgress(pg_sys::TransactionId::from(xid)) }
}

/// The transactions that were prepared here at one moment, or were just being prepared.
#[derive(Clone, Copy)]
pub struct Prepared {
    /// Entries with a higher number came later.
    last: u64,
}

/// One of them that has not ended.
#[derive(Clone, Copy)]
pub struct Pending {
    place: usize,
    key: u64,
    number: u64,
}

impl Prepared {
    /// Those of this moment; `None` when there are none, which costs one look.
    pub fn now() -> Option<Prepared> {
        let head = head();
        (head.count.load(Ordering::SeqCst) != 0).then(|| Prepared {
            last: head.last.load(Ordering::SeqCst),
        })
    }

    /// The youngest of them that has not ended: when it has, most of the others have, too.
    pub fn pending(self) -> Option<Pending> {
        loop {
            let youngest = used_entries()
                .iter()
                .enumerate()
                .filter(|(_, entry)| entry.xid.load(Ordering::SeqCst) != 0)
                .map(|(place, entry)| Pending {
                    place,
                    key: entry.key.load(Ordering::SeqCst),
                    number: entry.number.load(Ordering::SeqCst),
                })
                .filter(|found| found.number <= self.last)
                .max_by_key(|found| found.number)?;
            let xid = entries()[youngest.place].xid.load(Ordering::SeqCst);
            if xid != 0 && youngest.is_there() {
                if in_progress(xid) {
                    return Some(youngest);
                }
                strike_out(youngest.place, youngest.key);
            }
        }
    }
}

impl Pending {
    /// Whether its entry has not been struck out.
    pub fn is_there(self) -> bool {
        let entry = &entries()[self.place];
        entry.key.load(Ordering::SeqCst) == self.key
            && entry.number.load(Ordering::SeqCst) == self.number
    }

    /// Where to wait for it to be struck out.
    pub(super) fn list(self) -> *mut pg_sys::ConditionVariable {
        list_of(self.place)
    }
}
