//! Transactions that are sent while they run.
//!
//! Core has a transaction streamed when more than `logical_decoding_work_mem` of it has gathered; otherwise it would write all of it to disk and read it again
//! at the PREPARE. Each message belongs to one subtransaction, so that a receiver can undo that one without looking inside. What takes locks that
//! others cannot work beside, and what a subtransaction did, is *held*: the receiver keeps it, and all that follows, until the PREPARE.

use super::decoder::{Decoder, name_of};
use pgrx::pg_sys;
use protocol::Lsn;
use std::collections::HashMap;
use wire::stream::{Begin, Deps, MessageWriter, Piece, Resume, StreamFrame, Undo};

/// What a walsender knows of the transactions that it sends while they run.
#[derive(Default)]
pub struct Pieces {
    /// Those of which something was sent, by xid, and whether what follows is held.
    running: HashMap<u32, bool>,
    open: Option<Open>,
}

/// The message that gathers.
struct Open {
    top: u32,
    sub: u32,
    /// Length of its first frame: there is nothing to send when it is no longer than that.
    head: usize,
}

impl Pieces {
    /// Whether the message has changes in it.
    fn has_changes(&self, out: &MessageWriter) -> bool {
        let head = self.open.as_ref().map(|open| open.head);
        !out.is_empty() && head.is_some_and(|head| out.len() > head)
    }
}

impl Decoder {
    /// Changes of a running transaction follow.
    pub fn begin_piece(&mut self, top: pg_sys::TransactionId) {
        self.begin_transaction();
        let top = top.into_inner();
        self.pieces.open = Some(Open {
            top,
            sub: top,
            head: 0,
        });
    }

    /// Whether what has gathered must leave before a change of this subtransaction: `hold` says that it is to be held.
    pub fn must_leave(&self, sub: pg_sys::TransactionId, hold: bool) -> bool {
        let Some(open) = &self.pieces.open else {
            return false;
        };
        let held = self.pieces.running.get(&open.top).copied().unwrap_or(false);
        let other = open.sub != sub.into_inner() || (hold && !held);
        other && self.pieces.has_changes(&self.out)
    }

    /// A change of this subtransaction comes next; nothing of another one has gathered.
    pub fn continue_piece(&mut self, sub: pg_sys::TransactionId, hold: bool) {
        let Some(open) = &mut self.pieces.open else {
            return;
        };
        let sub = sub.into_inner();
        let held = self.pieces.running.entry(open.top).or_default();
        let holds = *held || hold || sub != open.top;
        let begun = open.head > 0 && !self.out.is_empty();
        if begun && open.sub == sub && *held == holds {
            return;
        }
        *held = holds;
        open.sub = sub;
        let top = open.top;
        self.restart_message();
        self.note_deps();
        self.out.frame(&StreamFrame::Piece(Piece {
            top,
            sub,
            held: holds,
            deps: Deps::from_bytes(&self.dep_bytes).unwrap_or(Deps::NONE),
        }));
        if let Some(open) = &mut self.pieces.open {
            open.head = self.out.len();
        }
    }

    /// The changes end for now; true when there is something to send.
    pub fn end_piece(&mut self) -> bool {
        self.sending = false;
        let send = self.pieces.has_changes(&self.out);
        self.pieces.open = None;
        send
    }

    /// A transaction or subtransaction was rolled back; true when the receiver has to hear of it.
    ///
    /// # Safety
    /// Core's transaction.
    pub unsafe fn undo(&mut self, transaction: &pg_sys::ReorderBufferTXN) -> bool {
        // SAFETY: null, or the transaction to which this one belongs.
        let top = unsafe { transaction.toptxn.as_ref() }.unwrap_or(transaction);
        let (top, sub) = (top.xid.into_inner(), transaction.xid.into_inner());
        let known = if top == sub {
            self.pieces.running.remove(&top).is_some()
        } else {
            self.pieces.running.contains_key(&top)
        };
        if known {
            self.restart_message();
            self.out.frame(&StreamFrame::Undo(Undo { top, sub }));
        }
        known
    }

    /// A prepared transaction ends. After a connection has begun anew, core may stream one whose PREPARE the receiver has: nothing but its end follows
    /// then, and the receiver is told to drop the pieces.
    pub(super) fn forget_pieces(&mut self, transaction: &pg_sys::ReorderBufferTXN) {
        let top = transaction.xid.into_inner();
        if self.pieces.running.remove(&top).is_some() {
            self.out.frame(&StreamFrame::Undo(Undo { top, sub: top }));
        }
    }

    /// A transaction that was sent while it ran comes to its PREPARE.
    pub fn resume(&mut self, transaction: &pg_sys::ReorderBufferTXN) {
        let top = transaction.xid.into_inner();
        self.pieces.running.remove(&top);
        self.restart_message();
        self.note_deps();
        let gid = self.gid_of(transaction);
        self.out.frame(&StreamFrame::Resume(Resume {
            top,
            begin: Begin {
                gid,
                name: name_of(transaction, &self.names),
                prepare_lsn: Lsn(transaction.final_lsn),
                deps: Deps::from_bytes(&self.dep_bytes).unwrap_or(Deps::NONE),
            },
        }));
    }
}
