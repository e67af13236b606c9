//! Applying row changes of one transaction of the stream with PostgreSQL's executor.
//!
//! - What a relation of the stream is here is worked out once and kept across transactions ([`plan`]);
//! - tables are open as long as no DDL comes between ([`segment`]);
//! - rows are found by an index or by comparison ([`identity`], [`find`]) and changed with the checks that have to be made on this node
//!   ([`write`], [`triggers`]).
//!
//! Errors of PostgreSQL unwind out of every function here. The transaction is then to be aborted; whatever was open ends with it.

mod batch;
mod find;
mod identity;
mod plan;
mod segment;
mod target;
mod triggers;
mod truncate;
mod unbound;
mod values;
mod write;

use super::memory;
use crate::apply::rows::ApplyError;
use pgrx::pg_sys;
use plan::{Known, KnownRelations};
use segment::{OpenTable, Segment, Statement};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use wire::stream::{Malformed, Relation, RelationId, Row, StreamFrame, Truncate};

pub use target::{current_target, tell_waits_to};

thread_local! {
    static KNOWN: RefCell<KnownRelations> = RefCell::default();
}

/// Applies the row changes of one transaction.
pub struct RowApplier {
    /// The relations this transaction has told of.
    told: BTreeMap<RelationId, Rc<Known>>,
    /// Open while row changes come one after another.
    segment: Option<Segment>,
}

impl RowApplier {
    /// To be called at the start of a transaction, before anything has taken a snapshot.
    pub fn begin() -> Self {
        target::clear();
        // SAFETY: what SET TRANSACTION does. The defaults of users' transactions do not concern applying: constraints across nodes
        // need snapshots that see what was committed meanwhile.
        unsafe {
            pg_sys::XactIsoLevel = pg_sys::XACT_READ_COMMITTED as i32;
            pg_sys::XactReadOnly = false;
            pg_sys::XactDeferrable = false;
        }
        RowApplier {
            told: BTreeMap::new(),
            segment: None,
        }
    }

    /// Applies a frame that concerns rows: a relation, a row change or a TRUNCATE. Others are not accepted.
    ///
    /// Waits for transactions in progress that have the row in hand; [`current_target`] then names it.
    pub fn apply(&mut self, frame: &StreamFrame<'_>) -> Result<(), ApplyError> {
        match frame {
            StreamFrame::Relation(relation) => self.tell(relation),
            StreamFrame::Truncate(truncate) => self.truncate(truncate)?,
            StreamFrame::Insert { relation, new } => self.insert(*relation, new)?,
            StreamFrame::Update { relation, old, new } => {
                // SAFETY: `change` gives a table of the statement, within its context.
                self.change(*relation, |statement, table| unsafe {
                    write::update(statement, table, old, new)
                })?;
            }
            StreamFrame::Delete { relation, old } => {
                // SAFETY: as above.
                self.change(*relation, |statement, table| unsafe {
                    write::delete(statement, table, old)
                })?;
            }
            _ => return Err(Malformed("a frame that is no row change").into()),
        }
        Ok(())
    }

    /// To be called before a DDL command: fires the triggers that wait for the end of a statement and closes all tables.
    pub fn before_ddl(&mut self) {
        if let Some(segment) = &mut self.segment {
            segment.flush();
        }
        target::check_now();
        if let Some(segment) = self.segment.take() {
            segment.end();
        }
        target::clear();
    }

    /// Ends the transaction's row changes; what is deferred fires at the PREPARE.
    pub fn finish(mut self) -> Result<(), ApplyError> {
        self.before_ddl();
        Ok(())
    }

    /// Drops the changes; the caller aborts the transaction.
    pub fn abandon(self) {
        forget_all();
    }

    fn tell(&mut self, relation: &Relation<'_>) {
        let known = self.told.get(&relation.id);
        if known.is_some_and(|known| known.is(relation)) {
            return;
        }
        if self
            .segment
            .as_ref()
            .is_some_and(|segment| segment.has_open(relation.id))
        {
            self.before_ddl();
        }
        let known = KNOWN.with_borrow_mut(|all| all.of(relation));
        self.told.insert(relation.id, known);
    }

    fn known(&self, id: RelationId) -> Result<&Rc<Known>, Malformed> {
        self.told
            .get(&id)
            .ok_or(Malformed("a change of a relation that was not told of"))
    }

    /// Inserts a row, or has it wait for others that are inserted with it.
    fn insert(&mut self, id: RelationId, new: &Row<'_>) -> Result<(), ApplyError> {
        pgrx::check_for_interrupts!();
        let known = Rc::clone(self.known(id)?);
        let segment = self.segment();
        segment.flush_others(id);
        let (statement, table) = segment.table(id, &known)?;
        target::enter(&table.plan);
        // SAFETY: as in `change`.
        let full = unsafe {
            let _entered = memory::enter(statement.context());
            if !table.batch.allowed {
                write::insert(statement, table, new)?;
                after_row(statement, table);
                return Ok(());
            }
            batch::add(statement, table, new)?;
            table.batch.is_full()
        };
        segment.set_waiting(id);
        if full {
            segment.flush();
        }
        Ok(())
    }

    fn segment(&mut self) -> &mut Segment {
        // SAFETY: within the transaction that the caller has begun.
        self.segment
            .get_or_insert_with(|| unsafe { Segment::begin() })
    }

    fn change(
        &mut self,
        id: RelationId,
        work: impl FnOnce(&mut Statement, &mut OpenTable) -> Result<(), ApplyError>,
    ) -> Result<(), ApplyError> {
        pgrx::check_for_interrupts!();
        let known = Rc::clone(self.known(id)?);
        let segment = self.segment();
        segment.flush();
        let (statement, table) = segment.table(id, &known)?;
        target::enter(&table.plan);
        {
            // SAFETY: both contexts live as long as the segment. The executor remembers things between rows where it runs.
            let _entered = unsafe { memory::enter(statement.context()) };
            work(statement, table)?;
        }
        after_row(statement, table);
        Ok(())
    }

    fn truncate(&mut self, truncate: &Truncate<'_>) -> Result<(), ApplyError> {
        self.before_ddl();
        let tables = truncate.relations().map(|id| self.known(id).cloned());
        let tables = tables.collect::<Result<Vec<_>, _>>()?;
        // SAFETY: within the transaction that the caller has begun; no table is open.
        unsafe { truncate::truncate(&tables, truncate.restart_identity) }
    }
}

/// A row was written; nothing that it left in the row context is used after it.
fn after_row(statement: &Statement, table: &OpenTable) {
    if table.checked_later {
        target::check_later();
    }
    // SAFETY: as said.
    unsafe { pg_sys::MemoryContextReset(statement.row_context()) };
}

/// To be called when a transaction was aborted because of an error.
pub fn forget_all() {
    target::clear();
}
