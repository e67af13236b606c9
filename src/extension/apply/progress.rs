//! The mark: up to where a peer's stream never has to be sent again (architecture.md, "Exactly once").

use protocol::Lsn;
use std::collections::VecDeque;

/// A transaction that was handed to a worker.
#[derive(Clone, Copy, Debug)]
struct Handed {
    end: Lsn,
    worker: usize,
    job: u64,
}

/// Transactions under way, in the order of their PREPAREs in the stream.
#[derive(Default)]
pub struct Progress {
    under_way: VecDeque<Handed>,
    /// End of the last thing in the stream that needs nobody.
    passed: Lsn,
    mark: Lsn,
    /// A transaction was handed on since the mark was last stored.
    handed: bool,
}

impl Progress {
    pub fn new(mark: Lsn) -> Progress {
        Progress {
            under_way: VecDeque::new(),
            passed: mark,
            mark,
            handed: false,
        }
    }

    /// A transaction whose PREPARE ends at `end` was given to a worker as its `job`th.
    pub fn hand(&mut self, end: Lsn, worker: usize, job: u64) {
        self.under_way.push_back(Handed { end, worker, job });
        self.passed = end;
        self.handed = true;
    }

    /// The mark has been stored.
    pub fn stored(&mut self) {
        self.handed = !self.under_way.is_empty();
    }

    /// Whether a transaction of the stream waits for its mark to be stored.
    pub fn has_done_work(&self) -> bool {
        self.handed
    }

    /// The stream has been read up to here, and what lies between the last transaction and here needs no work.
    pub fn pass(&mut self, end: Lsn) {
        self.passed = self.passed.max(end);
    }

    /// Moves the mark over everything that is done; `done(worker)` is the number of jobs that the worker has completed.
    pub fn advance(&mut self, done: impl Fn(usize) -> u64) -> Lsn {
        while let Some(first) = self.under_way.front() {
            if done(first.worker) < first.job {
                break;
            }
            self.mark = self.mark.max(first.end);
            self.under_way.pop_front();
        }
        if self.under_way.is_empty() {
            self.mark = self.mark.max(self.passed);
        }
        self.mark
    }

    /// True when no transaction is under way.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_waits_for_the_oldest_transaction() {
        let mut progress = Progress::new(Lsn(10));
        progress.hand(Lsn(20), 0, 1);
        progress.hand(Lsn(30), 1, 1);
        progress.pass(Lsn(35));
        assert_eq!(progress.advance(|worker| u64::from(worker == 1)), Lsn(10));
        assert_eq!(progress.advance(|_| 1), Lsn(35));
        assert!(progress.is_idle());
    }

    #[test]
    fn mark_never_goes_back() {
        let mut progress = Progress::new(Lsn(10));
        progress.pass(Lsn(5));
        assert_eq!(progress.advance(|_| 0), Lsn(10));
    }
}
