//! The mark: up to where a peer's stream never has to be sent again (architecture.md, "Exactly once").

use crate::arbiter::{body_of, number_in};
use crate::pg::records::Body;
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

    /// Up to where the stream has been read; what comes next begins there or later.
    pub fn passed(&self) -> Lsn {
        self.passed
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

/// Which generation a position of the stream belongs to: that of the last marker before it. A user's PREPARE does not say it.
///
/// It is stored with the mark, because whoever starts at a mark does not read the markers before it.
pub struct Sections {
    /// That of the mark.
    at_mark: GenerationNum,
    /// Markers behind the mark, in order of the stream, each of a higher generation than the one before.
    markers: VecDeque<(Lsn, GenerationNum)>,
}

impl Sections {
    /// `at_mark` is what was stored with the mark. The first generation has no marker.
    pub fn new(at_mark: GenerationNum) -> Sections {
        Sections {
            at_mark: at_mark.max(GenerationNum(1)),
            markers: VecDeque::new(),
        }
    }

    /// A marker has been read that begins at `at`.
    pub fn mark(&mut self, at: Lsn, generation: GenerationNum) {
        if generation > self.latest() {
            self.markers.push_back((at, generation));
        }
    }

    /// The generation of what is read now.
    pub fn latest(&self) -> GenerationNum {
        self.markers.back().map_or(self.at_mark, |(_, num)| *num)
    }

    /// The generation to be stored with a mark, which does not go back.
    pub fn at(&mut self, mark: Lsn) -> GenerationNum {
        // A marker that begins at the mark comes again.
        while let Some((_, generation)) = self.markers.pop_front_if(|(at, _)| *at < mark) {
            self.at_mark = generation;
        }
        self.at_mark
    }
}

/// Bytes of a mark's row that hold its generation; before them is its position.
const GENERATION: std::ops::Range<usize> = 8..12;

/// Bytes that hold up to where the peer held this node's stream when the mark was stored (`apply::ends` reads them as column `b2`).
const HELD: std::ops::Range<usize> = 16..24;

/// A mark and its generation as they are stored.
pub fn mark_in(body: &Body) -> (Lsn, GenerationNum) {
    let mut generation = [0; 4];
    generation.copy_from_slice(&body[GENERATION]);
    let generation = GenerationNum(u32::from_le_bytes(generation));
    (Lsn(number_in(body)), generation)
}

/// Up to where the peer held this node's stream.
pub fn held_in(body: &Body) -> Lsn {
    let mut held = [0; 8];
    held.copy_from_slice(&body[HELD]);
    Lsn(u64::from_le_bytes(held))
}

/// What [`mark_in`] and [`held_in`] read.
pub fn body_of_mark(mark: Lsn, generation: GenerationNum, held: Lsn) -> Body {
    let mut body = body_of(mark.0);
    body[GENERATION].copy_from_slice(&generation.0.to_le_bytes());
    body[HELD].copy_from_slice(&held.0.to_le_bytes());
    body
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

    /// Its place in a peer's WAL is amid a generation, of which it has what lies before. Who was online in any has all of the generation of its mark.
    #[test]
    fn mark_of_a_fresh_copy_stays_until_it_is_online() {
        let mut standing = Standing::default();
        let mut fences = Fences::default();
        fences.put(Lsn(40), Sections::new(GenerationNum(0)).latest());
        assert_eq!(fences.limit(Lsn(90), standing), Lsn(40));
        standing.online_in = GenerationNum(5);
        assert_eq!(fences.limit(Lsn(90), standing), Lsn(90));
        fences.put(Lsn(90), Sections::new(GenerationNum(5)).latest());
        assert_eq!(fences.limit(Lsn(95), standing), Lsn(95));
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
    fn a_position_belongs_to_the_marker_before_it() {
        let mut sections = Sections::new(GenerationNum(0));
        assert_eq!(sections.latest(), GenerationNum(1));
        sections.mark(Lsn(20), GenerationNum(3));
        sections.mark(Lsn(30), GenerationNum(3));
        sections.mark(Lsn(40), GenerationNum(5));
        assert_eq!(sections.latest(), GenerationNum(5));
        assert_eq!(sections.at(Lsn(20)), GenerationNum(1));
        assert_eq!(sections.at(Lsn(21)), GenerationNum(3));
        assert_eq!(sections.at(Lsn(40)), GenerationNum(3));
        assert_eq!(sections.latest(), GenerationNum(5));
        assert_eq!(sections.at(Lsn(41)), GenerationNum(5));
        assert_eq!(sections.latest(), GenerationNum(5));
    }

    #[test]
    fn a_mark_is_stored_with_its_generation() {
        let body = body_of_mark(Lsn(u64::MAX - 1), GenerationNum(7), Lsn(9));
        assert_eq!(held_in(&body), Lsn(9));
        assert_eq!(mark_in(&body), (Lsn(u64::MAX - 1), GenerationNum(7)));
        assert_eq!(mark_in(&body_of(5)), (Lsn(5), GenerationNum(0)));
    }

    #[test]
    fn mark_never_goes_back() {
        let mut progress = Progress::new(Lsn(10));
        progress.pass(Lsn(5));
        assert_eq!(progress.advance(|_| 0), Lsn(10));
    }
}
