//! The row in hand, for whoever has to explain why applying it failed.

use super::plan::TablePlan;
use crate::apply::rows::key_text;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use wire::stream::Field;

thread_local! {
    static TARGET: RefCell<Target> = RefCell::default();
    static CHECKED: RefCell<Checked> = RefCell::default();
    static LISTENER: Cell<Option<fn(&str)>> = const { Cell::new(None) };
}

#[derive(Default, Clone)]
struct Target {
    table: Option<Rc<TablePlan>>,
    fields: Vec<StoredField>,
    bytes: Vec<u8>,
}

/// The rows whose constraints are checked at the end of the statement.
#[derive(Default)]
enum Checked {
    #[default]
    None,
    One(Target),
    Many,
}

#[derive(Clone)]
enum StoredField {
    Null,
    Unchanged,
    Value(Range<usize>),
}

impl Target {
    fn key(&self, table: &TablePlan) -> String {
        let fields = self.fields.iter().map(|field| match field {
            StoredField::Null => Field::Null,
            StoredField::Unchanged => Field::Unchanged,
            StoredField::Value(range) => Field::Value(&self.bytes[range.clone()]),
        });
        key_text::describe(&table.shown, fields)
    }
}

/// The row that is being applied, or was when an error struck: `table "s.t", key (id)=(1)`.
pub fn current_target() -> Option<String> {
    TARGET.with_borrow(|target| {
        let table = target.table.as_ref()?;
        if target.fields.is_empty() {
            return Some(format!("table \"{}\"", table.table));
        }
        Some(format!(
            "table \"{}\", key {}",
            table.table,
            target.key(table)
        ))
    })
}

/// Has `listener` told the row in hand whenever this process is about to wait for others to let go of it.
pub fn tell_waits_to(listener: fn(&str)) {
    LISTENER.set(Some(listener));
}

/// The row in hand is about to be waited for.
pub fn begin_to_wait() {
    if let (Some(listener), Some(target)) = (LISTENER.get(), current_target()) {
        listener(&target);
    }
}

pub fn clear() {
    TARGET.with_borrow_mut(|target| target.table = None);
    CHECKED.set(Checked::None);
}

/// The row in hand will be checked at the end of the statement.
pub fn check_later() {
    CHECKED.with_borrow_mut(|checked| {
        *checked = match checked {
            Checked::None => Checked::One(TARGET.with_borrow(Target::clone)),
            Checked::One(_) | Checked::Many => Checked::Many,
        }
    });
}

/// The statement ends: in hand is the row to be checked now, if it is only one.
pub fn check_now() {
    TARGET.set(match CHECKED.take() {
        Checked::One(target) => target,
        Checked::None | Checked::Many => Target::default(),
    });
}

/// A row put aside, to be named later.
#[derive(Default)]
pub struct Aside(Target);

/// Puts the row in hand aside; what was there before is used again.
pub fn put_aside(place: &mut Aside) {
    TARGET.with_borrow_mut(|target| std::mem::swap(target, &mut place.0));
}

/// The row that was put aside there is in hand again.
pub fn take_up(place: &mut Aside) {
    put_aside(place);
}

/// Begins a row of this table; its key is still to come.
pub fn enter(table: &Rc<TablePlan>) {
    TARGET.with_borrow_mut(|target| {
        if !target
            .table
            .as_ref()
            .is_some_and(|current| Rc::ptr_eq(current, table))
        {
            target.table = Some(Rc::clone(table));
        }
        target.fields.clear();
        target.bytes.clear();
    });
}

/// Adds a column of the row's key.
pub fn add_key_field(field: Field<'_>) {
    TARGET.with_borrow_mut(|target| {
        let stored = match field {
            Field::Null => StoredField::Null,
            Field::Unchanged => StoredField::Unchanged,
            Field::Value(bytes) => {
                let start = target.bytes.len();
                // More of it is never shown.
                target
                    .bytes
                    .extend_from_slice(&bytes[..bytes.len().min(KEY_FIELD_BYTES)]);
                StoredField::Value(start..target.bytes.len())
            }
        };
        target.fields.push(stored);
    });
}

const KEY_FIELD_BYTES: usize = 256;
