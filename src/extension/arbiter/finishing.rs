//! Orders to finish prepared transactions that have been given and are not carried out yet.
//!
//! One order at a time for each transaction: an order carries a durable record and the tuple it goes to, and a second one that is carried out
//! late could overwrite what the tuple holds by then. And an order that its process could not carry out is given again.

use super::event::FinishOrder;
use protocol::Gid;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};

#[derive(Default)]
pub struct Finishing {
    given: BTreeMap<Gid, FinishOrder>,
    /// Orders that came while one for the same transaction was out.
    next: BTreeMap<Gid, FinishOrder>,
    /// Orders that found the queue full.
    delayed: VecDeque<Gid>,
    /// Numbers of the orders that are out, in the order in which they were given.
    numbers: BTreeMap<Gid, u64>,
    last: u64,
}

impl Finishing {
    /// Gives an order, now or when the one that is out for the same transaction has been carried out.
    pub fn give(&mut self, order: FinishOrder) {
        let gid = order.gid;
        match self.given.entry(gid) {
            Entry::Occupied(_) => {
                self.next.insert(gid, order);
            }
            Entry::Vacant(free) => {
                free.insert(order);
                self.last += 1;
                self.numbers.insert(gid, self.last);
                self.push(gid);
            }
        }
    }

    fn push(&mut self, gid: Gid) {
        let Some(order) = self.given.get(&gid) else {
            return;
        };
        if !self.delayed.is_empty() || !order.push() {
            self.delayed.push_back(gid);
        }
    }

    /// Gives what found the queue full.
    pub fn push_delayed(&mut self) {
        while let Some(gid) = self.delayed.pop_front() {
            if self.given.get(&gid).is_some_and(|order| !order.push()) {
                self.delayed.push_front(gid);
                return;
            }
        }
    }

    /// The transaction is finished; false when another order for it follows.
    pub fn finished(&mut self, gid: Gid) -> bool {
        self.given.remove(&gid);
        self.numbers.remove(&gid);
        match self.next.remove(&gid) {
            Some(order) => {
                self.give(order);
                false
            }
            None => true,
        }
    }

    /// Number of the oldest order that is out: while it stays, that one is not carried out.
    pub fn oldest(&self) -> Option<u64> {
        self.numbers.values().min().copied()
    }

    /// The process that had the order went away.
    pub fn lost(&mut self, gid: Gid) {
        self.push(gid);
    }
}
