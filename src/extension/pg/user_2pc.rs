//! The user's own PREPARE TRANSACTION, COMMIT PREPARED and ROLLBACK PREPARED.
//!
//! PREPARE is a global vote; the outcome stays the user's duty, on any node. It reaches the other nodes as a message in the stream, because
//! the commit record of a transaction that was prepared by apply is not decoded.

use super::fixed_text::FixedText;
use super::process::{self, Wait};
use super::shared::Clearance;
use super::{commit_wait, gate, raw, refusal, shared};
use crate::guc;
use pgrx::pg_sys;
use protocol::NodeId;
use std::ffi::{CStr, c_char};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Prefix of the names that multimaster gives to prepared transactions.
const RESERVED: &[u8] = b"mtm-";

/// Prefix of the stream message; see `wire::stream`.
const FINISH_PREFIX: &CStr = c"mtm-finish";

/// How often a backend looks whether the peers have confirmed. Nobody wakes it: a walsender does not know who waits.
const CONFIRMED_PAUSE: Duration = Duration::from_millis(2);

/// How often a backend looks whether votes and streams are ready for what it is about to finish.
const READY_PAUSE: Duration = Duration::from_millis(1);
/// How long it waits for that. A member whose stream does not come is excluded long before, unless it is stuck in a way that nobody notices.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// Raises an error when a user's gid lies in our name space.
///
/// # Safety
/// From the utility hook: raises by `longjmp`.
pub unsafe fn check_name(gid: *const c_char) {
    // SAFETY: the parser's zero-terminated string.
    unsafe {
        if CStr::from_ptr(gid).to_bytes().starts_with(RESERVED) {
            refusal::raise(
                pgrx::PgSqlErrorCode::ERRCODE_RESERVED_NAME as i32,
                c"transaction identifiers that start with \"mtm-\" are reserved for multimaster",
                c"",
                c"Transactions of multimaster are finished by the cluster itself; see mtm.transactions.",
            );
        }
    }
}

/// COMMIT or ROLLBACK PREPARED of a user's transaction is about to run: waits until no session of this node counts votes on it, and no stream would bring the PREPARE again
/// after a restart (`docs/membership.md`, *Users' prepared transactions*). Returns when this node serves; an interrupt ends the wait as any statement's.
///
/// # Safety
/// As [`check_name`].
pub unsafe fn before_command(gid: *const c_char) {
    // SAFETY: as check_name; what this frame owns has no destructor. Inside of a block the command is core's error.
    unsafe {
        gate::check_finish();
        if raw::IsTransactionBlock() {
            return;
        }
        let begun = Instant::now();
        loop {
            let name = CStr::from_ptr(gid).to_bytes();
            let hindrance = if shared::backends()
                .iter()
                .any(|slot| slot.awaits_votes_on(name))
            {
                Hindrance::Votes
            } else {
                match shared::shared().clearance(name, None) {
                    Clearance::Clear => return,
                    Clearance::Soon => Hindrance::Mark,
                    Clearance::Behind(node) => Hindrance::Stream(node),
                }
            };
            if begun.elapsed() >= READY_PATIENCE {
                raise_not_ready(hindrance);
            }
            process::wait_latch(READY_PAUSE, Wait::PeerCommits);
            raw::check_for_interrupts();
            gate::check_finish();
        }
    }
}

/// What a finish waits for.
#[derive(Clone, Copy)]
enum Hindrance {
    /// A session of this node still waits for PREPARE TRANSACTION to be answered: a node may refuse it yet.
    Votes,
    /// What was prepared ahead of it is not stored.
    Mark,
    Stream(NodeId),
}

/// Raises that the transaction cannot be finished now.
///
/// # Safety
/// As [`check_name`].
unsafe fn raise_not_ready(hindrance: Hindrance) {
    let mut message = FixedText::<256>::new();
    let _ = match hindrance {
        Hindrance::Votes => message.write_str(
            "cannot finish a prepared transaction before its PREPARE TRANSACTION is answered",
        ),
        Hindrance::Stream(node) => write!(
            message,
            "cannot finish a prepared transaction before this node has read what node {} had sent it before",
            node.get()
        ),
        Hindrance::Mark => message.write_str(
            "cannot finish a prepared transaction before what was prepared ahead of it is stored",
        ),
    };
    // SAFETY: as the caller promises; the text is a plain array.
    unsafe {
        refusal::raise(
            pgrx::PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE as i32,
            message.as_c_str(),
            c"",
            c"It is still prepared: try again, on another node if need be; mtm.get_nodes_state() shows whose streams have no receiver.",
        );
    }
}

/// The message's payload (see `wire::stream::UserFinish`) in a fixed array: the caller's frame must own nothing.
fn finish_payload(name: &[u8], commit: bool) -> ([u8; 256], usize) {
    let mut payload = [0u8; 256];
    let length = name.len().min(payload.len() - 1);
    payload[0] = u8::from(commit);
    payload[1..=length].copy_from_slice(&name[..length]);
    (payload, length + 1)
}

/// After COMMIT or ROLLBACK PREPARED of a user's transaction: tells the other nodes, and waits until they have committed too if
/// `multimaster.wait_peer_commits` says so.
///
/// # Safety
/// From the utility hook, after the command succeeded.
pub unsafe fn after_command(statement: *mut pg_sys::TransactionStmt) {
    use pg_sys::TransactionStmtKind::*;
    // SAFETY: as check_name.
    unsafe {
        let commit = match (*statement).kind {
            TRANS_STMT_COMMIT_PREPARED => true,
            TRANS_STMT_ROLLBACK_PREPARED => false,
            _ => return,
        };
        let (payload, length) = finish_payload(CStr::from_ptr((*statement).gid).to_bytes(), commit);
        let lsn = raw::LogLogicalMessage(
            FINISH_PREFIX.as_ptr(),
            payload.as_ptr().cast(),
            length,
            false,
        );
        let begins = pg_sys::ProcLastRecPtr;
        pg_sys::XLogFlush(lsn);
        if commit && guc::wait_peer_commits() {
            await_peers(begins);
            commit_wait::forget_late_cancel();
        }
    }
}

/// The node that a slot of this name is for.
fn reader_of(name: &CStr) -> Option<NodeId> {
    let (_, number) = name.to_str().ok()?.rsplit_once("_n")?;
    NodeId::new(number.parse().ok()?)
}

/// Waits until every peer has confirmed this node's stream beyond `position`, which it does after it has done what the stream says. An interrupt
/// ends this wait, and so does the loss of a peer: the commit is done either way.
fn await_peers(position: pg_sys::XLogRecPtr) {
    // SAFETY: the slots are in shared memory, which this process is attached to.
    while !unsafe { all_confirmed(position) }
        && !process::interrupt_pending()
        && shared::shared().status() == shared::NodeStatus::Online
    {
        process::wait_latch(CONFIRMED_PAUSE, Wait::PeerCommits);
    }
}

/// Whether the slots of all members are confirmed beyond `position`. Who is no member reads it when it recovers.
///
/// # Safety
/// In a process that is attached to shared memory.
unsafe fn all_confirmed(position: pg_sys::XLogRecPtr) -> bool {
    // SAFETY: the array has max_replication_slots elements. What is read may change meanwhile; a position is one aligned word, and the slots of
    // peers stay.
    unsafe {
        let slots = (&raw const (*pg_sys::ReplicationSlotCtl).replication_slots)
            .cast::<pg_sys::ReplicationSlot>();
        (0..pg_sys::max_replication_slots as usize).all(|place| {
            let slot = slots.add(place);
            !std::ptr::read_volatile(&raw const (*slot).in_use)
                || !is_members(&raw const (*slot).data)
                || std::ptr::read_volatile(&raw const (*slot).data.confirmed_flush) > position
        })
    }
}

/// Whether a member of the current generation reads from this slot; see `cluster::slot_name`.
///
/// # Safety
/// The data of a slot in use.
unsafe fn is_members(slot: *const pg_sys::ReplicationSlotPersistentData) -> bool {
    // SAFETY: names are zero-terminated arrays.
    unsafe {
        let name = CStr::from_ptr((&raw const (*slot).name.data).cast());
        let plugin = CStr::from_ptr((&raw const (*slot).plugin.data).cast());
        (*slot).database == pg_sys::MyDatabaseId
            && plugin == c"multimaster"
            && name.to_bytes().starts_with(b"mtm_")
            && reader_of(name).is_some_and(|node| shared::shared().current().members.contains(node))
    }
}
