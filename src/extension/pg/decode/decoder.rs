//! What one walsender knows and gathers while it decodes.

use super::pieces::Pieces;
use super::plan::{Plans, SentRelation};
use super::values::{Deformed, Scratch};
use crate::decode::{self, Environment};
use pgrx::pg_sys;
use protocol::{Csn, Gid, Lsn, NodeId};
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use wire::stream::{
    Begin, Deps, Marker, MessageWriter, OldRowWriter, Prepare, Prepared, RelationId,
    ReplicaIdentity, RowWriter, StreamFrame, Text, UserFinish,
};

/// A message leaves when it is longer than this.
const MESSAGE_BYTES: usize = 32 * 1024;
/// A buffer swollen beyond this by a huge row is given back.
const BUFFER_BYTES_MAX: usize = 1024 * 1024;
/// So many changes that are not sent, and the receiver is told that we are alive.
const SKIPPED_CHANGES_MAX: u32 = 256;

/// State of one walsender's decoding.
pub struct Decoder {
    environment: Environment,
    /// Stored bytes may be sent: the receiver runs this major version.
    raw: bool,
    /// The receiver wants the transactions of all nodes, each at its commit.
    recovers: bool,
    /// The prepared transaction that core asked about last: if it commits now, that follows at once.
    asked: Option<(pg_sys::TransactionId, Gid)>,
    /// The transaction that is being sent at its commit.
    committing: Option<Gid>,
    plans: Plans,
    pub(super) pieces: Pieces,
    pub(super) out: MessageWriter,
    old: Deformed,
    new: Deformed,
    scratch: Scratch,
    /// Counts transactions, so that each is told of its relations anew.
    transaction: u64,
    /// The changes that come now belong to a transaction that is sent.
    pub(super) sending: bool,
    skipped: u32,
    deps: Vec<(NodeId, Csn)>,
    pub(super) dep_bytes: Vec<u8>,
    pub(super) names: Names,
}

/// Names of transactions whose PREPARE has been decoded, by xid, until they end. See [`Decoder::take_name`].
pub(super) type Names = HashMap<u32, CString>;

/// The transaction's name in PostgreSQL.
pub(super) fn name_of<'t>(transaction: &'t pg_sys::ReorderBufferTXN, names: &'t Names) -> Text<'t> {
    if transaction.gid.is_null() {
        let taken = names.get(&transaction.xid.into_inner());
        return Text(taken.map_or(&[], |name| name.to_bytes()));
    }
    // SAFETY: a zero-terminated string that lives as long as the transaction.
    unsafe { Text(CStr::from_ptr(transaction.gid).to_bytes()) }
}

/// The 64-bit form of a transaction id that is younger than the oldest one in use.
fn full_xid(xid: pg_sys::TransactionId) -> u64 {
    // SAFETY: reads shared memory under a lock.
    let next = unsafe { pg_sys::ReadNextFullTransactionId() }.value;
    let epoch = next >> 32;
    let xid = u64::from(xid.into_inner());
    // An id above the next one to be given belongs to the epoch before.
    if xid > (next & 0xFFFF_FFFF) {
        (epoch.saturating_sub(1) << 32) | xid
    } else {
        (epoch << 32) | xid
    }
}

impl Decoder {
    /// For a receiver that named these publications.
    pub fn new(environment: Environment, publications: &str) -> Self {
        Decoder {
            environment,
            raw: decode::same_major(publications, pg_sys::PG_VERSION_NUM / 10_000),
            recovers: decode::recovers(publications),
            asked: None,
            committing: None,
            plans: Plans::default(),
            pieces: Pieces::default(),
            out: MessageWriter::new(),
            old: Deformed::default(),
            new: Deformed::default(),
            scratch: Scratch::new(),
            transaction: 0,
            sending: false,
            skipped: 0,
            deps: Vec::new(),
            dep_bytes: Vec::new(),
            names: Names::new(),
        }
    }

    /// The transaction as the cluster knows it; a user's own prepared transaction gets a number here.
    pub(super) fn gid_of(&self, transaction: &pg_sys::ReorderBufferTXN) -> Gid {
        let name = std::str::from_utf8(name_of(transaction, &self.names).as_bytes());
        if let Some((_, gid)) = name.ok().and_then(Gid::parse) {
            return gid;
        }
        let Some(node) = (self.environment.node)() else {
            pgrx::error!("this node does not belong to a multimaster cluster");
        };
        let current = (self.environment.generation)();
        Gid {
            coordinator: node,
            xid: full_xid(transaction.xid),
            generation: current.num,
            members: current.members,
            // SAFETY: both members of the union are timestamps.
            started_at: unsafe { transaction.xact_time.prepare_time },
        }
    }

    /// What has gathered.
    pub fn message(&self) -> &[u8] {
        self.out.bytes()
    }

    /// What has gathered has left.
    pub fn sent(&mut self) {
        self.out.reset(BUFFER_BYTES_MAX);
        self.skipped = 0;
    }

    pub fn is_full(&self) -> bool {
        self.out.len() > MESSAGE_BYTES
    }

    /// Whether the changes that come now are sent.
    pub fn is_sending(&self) -> bool {
        self.sending
    }

    /// Whether the receiver recovers from this node.
    pub fn recovers(&self) -> bool {
        self.recovers
    }

    /// Whether a prepared transaction is decoded at its commit only. A user's own never is: nobody knows when that comes.
    pub fn is_for_commit(&mut self, xid: pg_sys::TransactionId, name: &CStr) -> bool {
        if !self.recovers {
            return false;
        }
        let gid = name.to_str().ok().and_then(Gid::parse);
        self.asked = gid.map(|(_, gid)| (xid, gid));
        self.asked.is_some()
    }

    /// A transaction begins that has committed. It is sent to a receiver that recovers if it was prepared before, or says itself that it is one
    /// of the cluster; all others are local.
    pub fn begin_commit(&mut self, transaction: &pg_sys::ReorderBufferTXN) {
        self.sending = false;
        self.committing = None;
        let asked = self.asked.take().filter(|(xid, _)| *xid == transaction.xid);
        if let Some((_, gid)) = asked.filter(|_| self.recovers) {
            self.send_committed(gid, transaction);
        }
    }

    fn send_committed(&mut self, gid: Gid, transaction: &pg_sys::ReorderBufferTXN) {
        self.begin_transaction();
        self.committing = Some(gid);
        self.out.frame(&StreamFrame::Begin(Begin {
            gid,
            name: Text(b""),
            prepare_lsn: Lsn(transaction.final_lsn),
            deps: Deps::NONE,
        }));
    }

    /// It ends; true when there is something to send.
    pub fn end_commit(&mut self, transaction: &pg_sys::ReorderBufferTXN) -> bool {
        let Some(gid) = self.committing.take() else {
            return false;
        };
        self.sending = false;
        self.out.frame(&StreamFrame::Prepare(Prepare {
            gid,
            end_lsn: Lsn(transaction.end_lsn),
            aborted: false,
        }));
        true
    }

    /// Notes a change that is not sent; true when the receiver should hear from us meanwhile.
    pub fn skip(&mut self) -> bool {
        self.skipped = (self.skipped + 1) % SKIPPED_CHANGES_MAX;
        self.skipped == 0
    }

    /// A prepared transaction begins.
    pub fn begin(&mut self, transaction: &pg_sys::ReorderBufferTXN) {
        self.begin_transaction();
        self.note_deps();
        let gid = self.gid_of(transaction);
        self.out.frame(&StreamFrame::Begin(Begin {
            gid,
            name: name_of(transaction, &self.names),
            prepare_lsn: Lsn(transaction.final_lsn),
            deps: Deps::from_bytes(&self.dep_bytes).unwrap_or(Deps::NONE),
        }));
    }

    /// Changes follow that are sent; of their relations the receiver knows nothing yet.
    pub(super) fn begin_transaction(&mut self) {
        self.restart_message();
        self.transaction += 1;
        self.sending = true;
    }

    /// Forgets what has gathered.
    pub(super) fn restart_message(&mut self) {
        self.out.reset(BUFFER_BYTES_MAX);
    }

    /// Notes what the changes decoded now can have seen.
    pub(super) fn note_deps(&mut self) {
        self.deps.clear();
        self.dep_bytes.clear();
        (self.environment.visible)(&mut self.deps);
        Deps::describe(&self.deps, &mut self.dep_bytes);
    }

    /// It ends.
    pub fn prepare(&mut self, transaction: &pg_sys::ReorderBufferTXN) {
        self.sending = false;
        self.out.frame(&StreamFrame::Prepare(Prepare {
            gid: self.gid_of(transaction),
            end_lsn: Lsn(transaction.end_lsn),
            aborted: transaction.concurrent_abort,
        }));
    }

    /// Takes the name away from a transaction whose PREPARE was sent; to be called at the end of the prepare callback.
    ///
    /// Core gives it another copy at its COMMIT or ROLLBACK PREPARED and forgets to free this one: 80 bytes for each transaction, in the
    /// walsender's longest-lived context. One that is decoded only at its end gets no other copy: so the name is kept here.
    ///
    /// # Safety
    /// Core's transaction, which nobody else reads meanwhile.
    pub unsafe fn take_name(&mut self, transaction: *mut pg_sys::ReorderBufferTXN) {
        // SAFETY: the name was allocated with palloc by core, which frees it only where it is not null.
        unsafe {
            let name = (*transaction).gid;
            if !name.is_null() {
                let kept = CStr::from_ptr(name).to_owned();
                self.names.insert((*transaction).xid.into_inner(), kept);
                (*transaction).gid = std::ptr::null_mut();
                pg_sys::pfree(name.cast());
            }
        }
    }

    /// It was committed or rolled back.
    pub fn finish(&mut self, transaction: &pg_sys::ReorderBufferTXN, committed: bool) {
        self.restart_message();
        self.forget_pieces(transaction);
        let end = Prepared {
            gid: self.gid_of(transaction),
            name: name_of(transaction, &self.names),
            end_lsn: Lsn(transaction.end_lsn),
        };
        self.out.frame(&if committed {
            StreamFrame::CommitPrepared(end)
        } else {
            StreamFrame::RollbackPrepared(end)
        });
        self.names.remove(&transaction.xid.into_inner());
    }

    /// A logical message within the transaction.
    pub fn transactional_message(
        &mut self,
        prefix: &CStr,
        payload: &[u8],
        transaction: &pg_sys::ReorderBufferTXN,
    ) {
        if self.recovers && prefix == decode::RECOVERED_PREFIX {
            let gid = std::str::from_utf8(payload).ok().and_then(Gid::parse);
            if let Some((_, gid)) = gid {
                self.send_committed(gid, transaction);
            }
        }
        if !self.sending {
            return;
        }
        if prefix == decode::DDL_PREFIX {
            self.out.frame(&StreamFrame::Ddl(payload));
        } else if prefix == decode::SEQUENCE_PREFIX {
            self.out.frame(&StreamFrame::Sequence(payload));
        }
    }

    /// A logical message outside of any transaction; false when it is not for the receivers.
    pub fn lone_message(&mut self, prefix: &CStr, payload: &[u8], lsn: Lsn) -> bool {
        let frame = if prefix == decode::FINISH_PREFIX {
            UserFinish::from_payload(payload, lsn).map(StreamFrame::FinishUser)
        } else if prefix == decode::MARKER_PREFIX {
            Marker::from_payload(payload, lsn).map(StreamFrame::Marker)
        } else {
            return false;
        };
        self.out.reset(BUFFER_BYTES_MAX);
        match frame {
            Ok(frame) => self.out.frame(&frame),
            Err(error) => pgrx::error!("cannot decode a logical message: {error}"),
        }
        true
    }

    /// A TRUNCATE of these tables; those that are not replicated are left out.
    ///
    /// # Safety
    /// The relations are open.
    pub unsafe fn truncate(&mut self, relations: &[pg_sys::Relation], restart_identity: bool) {
        if !self.sending {
            return;
        }
        // SAFETY: as the caller promises.
        let introduced = relations
            .iter()
            .map(|relation| unsafe { self.introduce(*relation) });
        let ids: Vec<_> = introduced.flatten().collect();
        if !ids.is_empty() {
            self.out.truncate(restart_identity, &ids);
        }
    }

    /// Tells the receiver of a relation, once per transaction and again when it has changed; `None` when it is not replicated.
    ///
    /// # Safety
    /// `relation` is an open relation.
    unsafe fn introduce(&mut self, relation: pg_sys::Relation) -> Option<RelationId> {
        // SAFETY: as the caller promises.
        let (plan, id) = unsafe {
            let id = RelationId((*relation).rd_id.to_u32());
            (self.plans.of(relation, &self.environment, self.raw), id)
        };
        let sent = plan.sent.as_mut()?;
        tell(&mut self.out, sent, id, self.transaction);
        Some(id)
    }

    /// Sends a change of a row; false when its relation is not replicated.
    ///
    /// # Safety
    /// `relation` is open and `change` concerns it.
    pub unsafe fn change(
        &mut self,
        relation: pg_sys::Relation,
        change: &pg_sys::ReorderBufferChange,
    ) -> bool {
        // SAFETY: as the caller promises. The tuples stay where they are during this call, and belong to the relation.
        unsafe {
            let id = RelationId((*relation).rd_id.to_u32());
            let Some(sent) = self
                .plans
                .of(relation, &self.environment, self.raw)
                .sent
                .as_mut()
            else {
                return false;
            };
            tell(&mut self.out, sent, id, self.transaction);
            let tuples = change.data.tp;
            if !tuples.oldtuple.is_null() {
                self.old.load(relation, tuples.oldtuple);
            }
            if !tuples.newtuple.is_null() {
                self.new.load(relation, tuples.newtuple);
            }
            let has_old = !tuples.oldtuple.is_null();
            let (out, old, new) = (&mut self.out, &self.old, &self.new);
            self.scratch
                .run(|| write_change(out, sent, id, change.action, has_old.then_some(old), new));
        }
        true
    }
}

fn tell(out: &mut MessageWriter, relation: &mut SentRelation, id: RelationId, transaction: u64) {
    if relation.told_in != transaction {
        out.relation(id, &relation.fingerprint);
        relation.told_in = transaction;
    }
}

/// # Safety
/// The rows are loaded from tuples of the relation that are still there: the new one for an insert or update, the old one
/// if given.
unsafe fn write_change(
    out: &mut MessageWriter,
    relation: &SentRelation,
    id: RelationId,
    action: pg_sys::ReorderBufferChangeType::Type,
    old: Option<&Deformed>,
    new: &Deformed,
) {
    use pg_sys::ReorderBufferChangeType::*;
    let full = relation.identity == ReplicaIdentity::Full;
    let columns = &relation.columns;
    let mut write_old = |row: &mut RowWriter<'_>| {
        if let Some(old) = old {
            let sent = columns.iter().filter(|column| full || column.key);
            // SAFETY: as the caller promises.
            unsafe { old.write(sent, row) }
        }
    };
    // SAFETY: as the caller promises.
    let write_new = |row: &mut RowWriter<'_>| unsafe { new.write(columns.iter(), row) };
    let old_row = match old {
        None => OldRowWriter::Absent,
        Some(_) if full => OldRowWriter::Full(&mut write_old),
        Some(_) => OldRowWriter::Key(&mut write_old),
    };
    match action {
        REORDER_BUFFER_CHANGE_INSERT => out.insert(id, write_new),
        REORDER_BUFFER_CHANGE_UPDATE => out.update(id, old_row, write_new),
        REORDER_BUFFER_CHANGE_DELETE => out.delete(id, old_row),
        other => pgrx::error!("unexpected kind of change in the WAL: {other}"),
    }
}
