//! COMMIT becomes PREPARE: the one sequence that every commit of a replicating transaction goes through.
//!
//! 1. `PrepareTransactionBlock` first: from here on an error aborts the whole block, as a failing COMMIT must.
//! 2. Deferred triggers run and WITH HOLD cursors become static; PREPARE would refuse them.
//! 3. NOTIFY is queued under our xid, and what PREPARE would refuse about temporary objects is done here instead.
//! 4. `CommitTransactionCommand` prepares: WAL is flushed, walsenders see it.
//! 5. The arbiter is told; the backend waits for the outcome without processing interrupts, because the transaction is no longer its own.
//! 6. `FinishPreparedTransaction`, as the bootstrap superuser: SET LOCAL ROLE may have ended with the PREPARE.
//!
//! Every function here is entered from hooks that PostgreSQL's errors cross by `longjmp` (see `raw`): no frame owns a destructor across a
//! call of `raw`. What needs allocation is done in functions of its own that return plain data.

use super::commit_wait::{Peers, await_outcome, await_peers, forget_late_cancel};
use super::process::{self, Wait};
use super::refusal::{
    lost_a_conflict, raise, raise_refusal, raise_refusal_at, raise_unconfirmed, raise_unknown,
    warn_unconfirmed,
};
use super::session_work::{SessionWork, detach_from_session};
use super::shared::{self, outcome, stage};
use super::{
    age, barrier, fixed_text::FixedText, gate, in_flight, raw, records, senders, standby, twophase,
};
use crate::arbiter::event::{LocalEvent, submit};
use crate::conflict;
use crate::failpoint::{Failpoint, hit, hit_in_backend};
use crate::guc;
use crate::latency::Phase;
use pgrx::{PgLogLevel, pg_sys};
use protocol::Gid;
use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Longest name PostgreSQL allows for a prepared transaction, without the terminating zero (`GIDSIZE` - 1 of access/twophase.h).
const GID_TEXT_MAX: usize = 199;

/// Pause while another process has the prepared transaction in its hands.
const BUSY_PAUSE: Duration = Duration::from_millis(2);

thread_local! {
    /// Inside the sequence: the commits it does itself must not enter it again.
    static IN_SEQUENCE: Cell<bool> = const { Cell::new(false) };
    /// The last xid whose existence this session made sure to be on disk.
    static ON_DISK: Cell<pg_sys::TransactionId> = const { Cell::new(pg_sys::InvalidTransactionId) };
    /// Being prepared or prepared, and not finished by this backend yet.
    static UNFINISHED: Cell<Option<Gid>> = const { Cell::new(None) };
    /// A user's own PREPARE TRANSACTION, announced to the arbiter and not answered yet.
    static USER_PREPARING: Cell<Option<Gid>> = const { Cell::new(None) };
}

/// Whose PREPARE it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Preparing {
    /// COMMIT: the transaction ends with this session, so what core's PREPARE refuses for the sake of another one can be allowed.
    Commit,
    /// The user's own PREPARE TRANSACTION: core's rules.
    User,
}

/// True while this backend runs the sequence.
pub fn in_sequence() -> bool {
    IN_SEQUENCE.get()
}

/// True while this backend runs the sequence for a COMMIT, not for a user's PREPARE TRANSACTION.
pub fn commits_globally() -> bool {
    IN_SEQUENCE.get() && USER_PREPARING.get().is_none()
}

/// An error or the end of the process has left the sequence: what may be prepared becomes the arbiter's to finish. Called at abort.
pub fn reset() {
    if IN_SEQUENCE.replace(false) {
        barrier::leave();
    }
    if let Some(gid) = UNFINISHED.take() {
        shared::my_backend().gid.set(None);
        submit(&LocalEvent::Abandoned { gid });
    }
    if let Some(gid) = USER_PREPARING.take() {
        // The PREPARE failed: nobody waits for the votes any more.
        shared::my_backend().gid.set(None);
        submit(&LocalEvent::Interrupted { gid });
    }
}

/// The gid of the running transaction of this backend, which must have an xid.
fn current_gid() -> Option<Gid> {
    // SAFETY: reads this backend's transaction state.
    let xid = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
    let shared = shared::shared();
    (xid != 0).then_some(())?;
    let current = shared.current();
    Some(Gid {
        coordinator: shared.node_id()?,
        xid,
        generation: current.num,
        members: current.members,
        started_at: age::started_at(),
    })
}

/// The part of the gid that is known before COMMIT; assigns the transaction its xid.
///
/// The xid is on disk before anybody hears of it: a server that crashes gives an xid that left no trace in WAL to another transaction, and whoever
/// asked afterwards how the first one ended would hear of the other.
pub fn identifying_text() -> Option<String> {
    // SAFETY: guarded calls in an ordinary function context; assigning an xid may raise (recovery, wraparound) by unwinding.
    unsafe {
        let xid = pg_sys::GetTopTransactionId();
        if ON_DISK.replace(xid) != xid {
            let trace = 0u8;
            pg_sys::XLogBeginInsert();
            pg_sys::XLogRegisterData((&raw const trace).cast_mut().cast(), 1);
            let end =
                pg_sys::XLogInsert(pg_sys::RmgrIds::RM_XLOG_ID as u8, pg_sys::XLOG_NOOP as u8);
            hit(Failpoint::NameBeforeFlush);
            pg_sys::XLogFlush(end);
            hit(Failpoint::NameAfterFlush);
        }
    }
    super::hooks::note_harmless();
    let gid = current_gid()?;
    Some(format!(
        "mtm-{:08x}-{}-{}",
        shared::shared().cluster_tag().0,
        gid.coordinator.get(),
        gid.xid
    ))
}

/// The name of a transaction as PostgreSQL's functions want it.
fn text_of(gid: Gid) -> FixedText<{ GID_TEXT_MAX + 1 }> {
    let mut text = FixedText::new();
    let written = write!(text, "{}", gid.text(shared::shared().cluster_tag()));
    debug_assert!(written.is_ok());
    text
}

/// Turns the current transaction block into a prepared transaction, gets its outcome and finishes it.
///
/// On entry the state is TBLOCK_INPROGRESS or an implicit block, without open subtransactions; on return TBLOCK_STARTED with an empty
/// transaction, which the caller's normal path commits.
///
/// # Safety
/// Only from the commit hooks; raises by `longjmp`.
pub unsafe fn commit_globally() {
    let Some(gid) = current_gid() else { return };
    let name = text_of(gid);
    let latencies = &shared::shared().latencies;
    let begun = Instant::now();
    // SAFETY: the sequence of the module's head, each call as its own code path in xact.c makes it.
    unsafe {
        IN_SEQUENCE.set(true);
        // What SET LOCAL has set ends with the PREPARE.
        let (wait_peers, fast) = (guc::wait_peer_commits(), guc::commits_fast());
        let life = shared::shared().epoch.load(Ordering::Acquire);
        // From the moment the PREPARE can be seen, an error leaves the transaction to the arbiter.
        let session = prepare_under(gid, name.as_ptr(), Preparing::Commit, || {
            UNFINISHED.set(Some(gid));
        });
        // A session whose temporary schema is new takes it for undone after an error.
        let level = if session.new_temp_schema {
            PgLogLevel::FATAL
        } else {
            PgLogLevel::ERROR
        };
        latencies.note(Phase::Prepare, begun.elapsed());
        hit_in_backend(Failpoint::BackendAfterPrepare);
        announce(gid, wait_peers, fast);
        hit_in_backend(Failpoint::BackendAfterAnnouncing);
        let mut peers = Peers::Show;
        match await_outcome(gid) {
            outcome::COMMIT => {
                hit_in_backend(Failpoint::BackendBeforeCommit);
                let decided = Instant::now();
                finish(name.as_ptr(), true);
                in_flight::leave(gid);
                age::won();
                let finished = Instant::now();
                latencies.note(Phase::Commit, finished - decided);
                hit_in_backend(Failpoint::BackendAfterCommit);
                UNFINISHED.set(None);
                // First, since an arbiter that starts waits for the slot and takes no events meanwhile.
                shared::my_backend().gid.set(None);
                submit(&LocalEvent::Finished { gid });
                if wait_peers {
                    peers = await_peers(gid, life);
                    latencies.note(Phase::PeerCommit, finished.elapsed());
                }
                latencies.note(Phase::Total, begun.elapsed());
                shared::shared()
                    .counters
                    .commits
                    .fetch_add(1, Ordering::Relaxed);
                hit_in_backend(Failpoint::BackendBeforeAnswer);
            }
            outcome::ABORT => {
                hit_in_backend(Failpoint::BackendBeforeRollback);
                // While the row is still in hand.
                let passed_by = age::waiting_for(gid.xid as u32);
                finish(name.as_ptr(), false);
                in_flight::leave(gid);
                hit_in_backend(Failpoint::BackendAfterRollback);
                UNFINISHED.set(None);
                if lost_a_conflict() {
                    age::lost(gid.started_at, passed_by);
                }
                submit(&LocalEvent::Finished { gid });
                shared::shared()
                    .counters
                    .aborts
                    .fetch_add(1, Ordering::Relaxed);
                leave();
                raise_refusal_at(level);
            }
            _ => {
                UNFINISHED.set(None);
                submit(&LocalEvent::Abandoned { gid });
                shared::shared()
                    .counters
                    .unknown
                    .fetch_add(1, Ordering::Relaxed);
                leave();
                raise_unknown(name.as_ptr());
            }
        }
        leave();
        forget_late_cancel();
        if session.notified {
            // The signal of the first NOTIFY came while the transaction was still in progress: signal the listeners again from the empty one.
            raw::Async_Notify(c"multimaster".as_ptr(), c"".as_ptr());
        }
        match peers {
            Peers::Show => {}
            Peers::Unknown => raise_unconfirmed(name.as_ptr(), level),
            Peers::NotAwaited => warn_unconfirmed(),
        }
    }
}

/// Prepares the user's own two-phase transaction on every node; the outcome stays the user's duty.
///
/// # Safety
/// As [`commit_globally`]. `name` is the user's gid, already checked.
pub unsafe fn prepare_for_user(name: *const c_char) {
    let Some(gid) = current_gid() else { return };
    // SAFETY: as commit_globally.
    unsafe {
        IN_SEQUENCE.set(true);
        let named = CStr::from_ptr(name);
        // The votes are counted from the moment the PREPARE can be seen.
        prepare_under(gid, name, Preparing::User, || {
            USER_PREPARING.set(Some(gid));
            shared::my_backend()
                .user_prepare
                .store(shared::name_hash(named.to_bytes()), Ordering::Release);
            shared::my_backend().gid.set(Some(gid));
            submit(&LocalEvent::UserPreparing {
                gid,
                backend: shared::my_backend_index(),
            });
        });
        let result = await_outcome(gid);
        shared::my_backend().gid.set(None);
        USER_PREPARING.set(None);
        leave();
        match result {
            outcome::COMMIT => {
                age::won();
                forget_late_cancel();
            }
            outcome::ABORT => {
                IN_SEQUENCE.set(true);
                finish(name, false);
                leave();
                raise_refusal();
            }
            _ => raise_unknown(name),
        }
    }
}

/// From RUNNING to COMMITTING, unless the conflict rule was faster.
unsafe fn claim_commit() {
    let slot = shared::my_backend();
    loop {
        match slot.stage.compare_exchange(
            stage::RUNNING,
            stage::COMMITTING,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) | Err(stage::COMMITTING) => return,
            Err(stage::VICTIM) => {
                age::lost_running();
                leave();
                // SAFETY: raises; this frame owns nothing.
                unsafe { raise_refusal() };
            }
            Err(_) => std::hint::spin_loop(),
        }
    }
}

/// Refuses a transaction that an older one, which is committing, waits for here: it would be refused by the others, after everybody had prepared it.
unsafe fn give_way(gid: Gid) {
    let Some(waiting) = age::older_waiting_for_me(gid) else {
        return;
    };
    age::lost(gid.started_at, Some(waiting));
    let (mut message, mut detail) = (FixedText::<256>::new(), FixedText::<1024>::new());
    conflict::tell_loser(waiting, &mut message, &mut detail);
    leave();
    // SAFETY: as raise_refusal; the texts are plain arrays.
    unsafe {
        raise(
            pgrx::PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32,
            message.as_c_str(),
            detail.as_c_str(),
            c"The transaction was rolled back on every node; run it again.",
        );
    }
}

fn leave() {
    IN_SEQUENCE.set(false);
    shared::my_backend().end_transaction();
}

/// Steps 1 to 4.
///
/// `before_prepare` runs right before the PREPARE; it must not raise.
unsafe fn prepare_under(
    gid: Gid,
    name: *const c_char,
    preparing: Preparing,
    before_prepare: impl FnOnce(),
) -> SessionWork {
    // SAFETY: see commit_globally.
    unsafe {
        raw::PrepareTransactionBlock(name);
        gate::await_online();
        loop {
            raw::AfterTriggerFireDeferred();
            if preparing == Preparing::User || !raw::PreCommit_Portals(false) {
                break;
            }
        }
        crate::pg::ddl_bridge::before_prepare();
        let session = match preparing {
            Preparing::Commit => detach_from_session(),
            Preparing::User => SessionWork::default(),
        };
        mark_decodable();
        // Until here, deferred triggers may have waited for anybody: to the conflict rule the transaction was still running.
        claim_commit();
        give_way(gid);
        reset_outcome(gid);
        standby::wait_in_transaction();
        if barrier::enter() != gid.generation {
            refuse_changed_generation();
        }
        if preparing == Preparing::Commit {
            in_flight::enter(gid, raw::GetTopTransactionIdIfAny().into_inner());
        }
        before_prepare();
        hit_in_backend(Failpoint::BackendBeforePrepare);
        raw::CommitTransactionCommand();
        barrier::leave();
        senders::wake();
        raw::StartTransactionCommand();
        standby::wait_in_transaction();
        session
    }
}

/// Writes a message into the transaction's WAL that nobody reads.
///
/// Decoding hands a prepared transaction to the output plugin only when it changed something. One that has locked a row and then left it alone (ON CONFLICT
/// DO UPDATE ... WHERE false, a BEFORE trigger that suppresses an UPDATE) would never reach the other nodes, and wait for their votes for ever.
unsafe fn mark_decodable() {
    const CONTENT: &CStr = c".";
    // SAFETY: see commit_globally.
    unsafe {
        raw::LogLogicalMessage(
            c"mtm".as_ptr(),
            CONTENT.as_ptr(),
            CONTENT.count_bytes(),
            true,
        );
    }
}

fn reset_outcome(gid: Gid) {
    let slot = shared::my_backend();
    slot.await_outcome(gid.xid);
    slot.user_prepare.store(0, Ordering::Relaxed);
}

/// Tells the arbiter that the PREPARE is durable and that this backend waits.
fn announce(gid: Gid, wait_peers: bool, fast: bool) {
    shared::my_backend().gid.set(Some(gid));
    submit(&LocalEvent::Committing {
        gid,
        backend: shared::my_backend_index(),
        wait_peers,
        fast,
    });
}

/// Step 6.
///
/// The record that came with a commit precedes it in WAL; one flush takes both along. An error between the two leaves the transaction to the arbiter,
/// which has another process write the record and commit.
unsafe fn finish(name: *const c_char, commit: bool) {
    let handed = shared::my_backend().record.get();
    // Written by the first attempt; it stays written while another process has the transaction in its hands.
    let mut unwritten = handed.filter(|_| commit);
    let write_record = |unwritten: &mut Option<(records::Place, records::Body)>| {
        if let Some((place, body)) = unwritten.take() {
            hit(Failpoint::BackendBeforeRecord);
            records::write_at(place, &body);
            hit(Failpoint::BackendAfterRecord);
        }
    };
    // SAFETY: the prepared transaction belongs to the user in effect at PREPARE, who need not be the present one; the bootstrap
    // superuser (oid 10) may finish any.
    unsafe {
        let (mut user, mut context) = (pg_sys::Oid::INVALID, 0);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID),
            context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
        );
        loop {
            match twophase::finish_in_transaction(name, commit, || write_record(&mut unwritten)) {
                twophase::Finished::Done | twophase::Finished::Unknown => break,
                twophase::Finished::Busy => {
                    process::wait_latch(BUSY_PAUSE, Wait::PeerCommits);
                }
                // The outcome stands; the arbiter has it finished by another process.
                twophase::Finished::Failed => raise_unknown(name),
            }
        }
        pg_sys::SetUserIdAndSecContext(user, context);
    }
}

/// The set of members has changed since the transaction got its name: it is not prepared under the old one.
unsafe fn refuse_changed_generation() {
    // SAFETY: as raise_refusal.
    unsafe {
        raise(
            pgrx::PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE as i32,
            c"the set of working nodes has changed during the commit",
            c"",
            c"The transaction was rolled back; run it again.",
        )
    };
}
