//! The mark: up to where a peer's stream never has to be sent again (architecture.md, "Exactly once").

use protocol::membership::Standing;
use protocol::{GenerationNum, Lsn};
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

/// Positions that the mark must not pass before this node is online in a generation: what lies behind may reach it through a donor only, who
/// has it from there on.
#[derive(Default)]
pub struct Fences(VecDeque<(Lsn, GenerationNum)>);

impl Fences {
    /// The mark stays at `at` until this node is online in the generation or a later one. In order of the stream.
    pub fn put(&mut self, at: Lsn, generation: GenerationNum) {
        // One before it of the same or a later generation holds for longer.
        let covered = self.0.back().is_some_and(|(_, last)| *last >= generation);
        if !covered {
            self.0.push_back((at, generation));
        }
    }

    /// Whether the mark is held.
    pub fn stand(&self, standing: Standing) -> bool {
        let mut all = self.0.iter();
        all.any(|(_, generation)| !standing.may_pass(*generation))
    }

    /// The mark, cut back to the first fence that stands.
    pub fn limit(&mut self, mark: Lsn, standing: Standing) -> Lsn {
        while let Some((at, generation)) = self.0.front() {
            if !standing.may_pass(*generation) {
                return mark.min(*at);
            }
            self.0.pop_front();
        }
        mark
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
    fn mark_stays_before_what_comes_through_a_donor() {
        let online = |num| Standing {
            online_in: GenerationNum(num),
            ..Standing::default()
        };
        let mut fences = Fences::default();
        fences.put(Lsn(20), GenerationNum(3));
        fences.put(Lsn(30), GenerationNum(3));
        fences.put(Lsn(40), GenerationNum(4));
        assert_eq!(fences.limit(Lsn(15), online(2)), Lsn(15));
        assert_eq!(fences.limit(Lsn(50), online(2)), Lsn(20));
        assert_eq!(fences.limit(Lsn(50), online(3)), Lsn(40));
        assert_eq!(fences.limit(Lsn(50), online(4)), Lsn(50));
    }

    #[test]
    fn mark_never_goes_back() {
        let mut progress = Progress::new(Lsn(10));
        progress.pass(Lsn(5));
        assert_eq!(progress.advance(|_| 0), Lsn(10));
    }
}
