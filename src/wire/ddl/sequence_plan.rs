//! How the nodes share the values of one sequence, so that no two ever yield the same one.
//!
//! A sequence of step k (the user's INCREMENT) is stored with INCREMENT 17*k: one share per possible node and one to spare, so that nodes may
//! come and go without renumbering. The shares are absolute, not relative to where a sequence starts. Put `offset = value - 1` for an
//! ascending and `offset = -value - 1` for a descending sequence; then
//!
//! > node i owns the values with `floor(offset / |k|) mod 17 = i - 1`.
//!
//! `serial` on node 2 yields 2, 19, 36, ... Because ownership depends on the value and on k alone, START, RESTART, a restored dump of another
//! node and a copy of another node's files all come right by moving to the next value that is one's own ([`Share::next_own`]).
//! A stored increment that is a multiple of 17 is taken as shared already (k = increment / 17), which is what a dump of a cluster contains.
//!
//! CYCLE wraps to MINVALUE (descending: MAXVALUE), so for such a sequence that end is moved to an own value too. A sequence with fewer than
//! 17*|k| values between its start and its limit cannot be shared: it stays as it is, and the user is warned.

/// Shares a sequence is split into: more than there can be nodes, and prime, so that users' own increments rarely look shared.
pub const SHARES: i64 = 17;

/// Definition and position of a sequence, as `pg_sequence` and the sequence relation hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub start: i64,
    pub increment: i64,
    pub min: i64,
    pub max: i64,
    pub cycle: bool,
    pub last_value: i64,
    pub is_called: bool,
}

/// What becomes of a sequence on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The sequence must read so; it may be what it is already.
    Shared(Sequence),
    /// Too few values for all nodes: every node counts for itself.
    TooSmall,
}

/// The values of one node: those of step `step` in the class of node number `node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    step: i128,
    node: i128,
    descending: bool,
    /// Offset of the values within their step, from START.
    phase: i128,
}

impl Share {
    /// The share of node `node` (1..=16) in a sequence with this start whose stored increment is 17*k.
    pub fn of(start: i64, stored_increment: i64, node: u8) -> Self {
        let step = i128::from(stored_increment / SHARES).abs();
        let descending = stored_increment < 0;
        let phase = offset(start, descending).rem_euclid(step);
        Self {
            step,
            node: i128::from(node),
            descending,
            phase,
        }
    }

    /// Whether the value is one of this share, whatever its phase.
    pub fn owns(&self, value: i64) -> bool {
        let slot = offset(value, self.descending).div_euclid(self.step);
        slot.rem_euclid(i128::from(SHARES)) == self.node - 1
    }

    /// The first own value at or after `value` in the direction of counting; may lie beyond every limit.
    pub fn next_own(&self, value: i64) -> i128 {
        let from = offset(value, self.descending);
        let round = self.step * i128::from(SHARES);
        let residue = self.phase + self.step * (self.node - 1);
        let own = from + (residue - from).rem_euclid(round);
        self.value(own)
    }

    /// The last own value at or before `value` in the direction of counting.
    fn previous_own(&self, value: i64) -> i128 {
        let from = offset(value, self.descending);
        let round = self.step * i128::from(SHARES);
        let residue = self.phase + self.step * (self.node - 1);
        let own = from - (from - residue).rem_euclid(round);
        self.value(own)
    }

    fn value(&self, offset: i128) -> i128 {
        if self.descending {
            -offset - 1
        } else {
            offset + 1
        }
    }
}

fn offset(value: i64, descending: bool) -> i128 {
    if descending {
        -i128::from(value) - 1
    } else {
        i128::from(value) - 1
    }
}

impl Sequence {
    /// Whether the increment says that the sequence is shared among nodes.
    pub fn is_shared(&self) -> bool {
        self.increment % SHARES == 0
    }

    /// What the sequence must be on node `node` (1..=16). Applying it twice changes nothing.
    pub fn plan(&self, node: u8) -> Plan {
        let Some(increment) = self.shared_increment() else {
            return Plan::TooSmall;
        };
        let share = Share::of(self.start, increment, node);
        let mut shared = Self { increment, ..*self };
        // A START whose next own value lies beyond the limit (a limit lowered later) stays: the position below then is exhausted.
        shared.start = shared
            .within(share.next_own(self.start))
            .unwrap_or(self.start);
        if self.cycle {
            shared.move_turning_point(&share);
        }
        if self.increment != increment || !share.owns(self.next_value_unchecked()) {
            shared.move_to(&share, self.last_value, self.is_called);
        }
        Plan::Shared(shared)
    }

    /// The position from which this sequence goes on with its first own value beyond the given one.
    ///
    /// `None` when the sequence is not shared: then the given position itself is right.
    pub fn beyond(&self, node: u8, last_value: i64, is_called: bool) -> Option<Self> {
        if !self.is_shared() {
            return None;
        }
        let mut moved = *self;
        moved.move_to(
            &Share::of(self.start, self.increment, node),
            last_value,
            is_called,
        );
        Some(moved)
    }

    /// Whether this sequence's next value comes before the other's, in the direction of counting.
    pub fn is_before(&self, other: &Self) -> bool {
        let (own, others) = (
            self.next_value_unchecked_wide(),
            other.next_value_unchecked_wide(),
        );
        if self.increment < 0 {
            own > others
        } else {
            own < others
        }
    }

    /// Whether the position is of this node's share: what `nextval()` leaves behind.
    pub fn is_at_own_position(&self, node: u8) -> bool {
        !self.is_shared() || Share::of(self.start, self.increment, node).owns(self.last_value)
    }

    /// 17*k, or `None` when the range between start and limit does not hold a value for every share.
    fn shared_increment(&self) -> Option<i64> {
        if self.is_shared() {
            return Some(self.increment);
        }
        let increment = self.increment.checked_mul(SHARES)?;
        let range = if increment > 0 {
            i128::from(self.max) - i128::from(self.start)
        } else {
            i128::from(self.start) - i128::from(self.min)
        };
        (range + 1 >= i128::from(increment).abs()).then_some(increment)
    }

    /// Makes CYCLE wrap to an own value.
    fn move_turning_point(&mut self, share: &Share) {
        let end = if self.increment > 0 {
            self.min
        } else {
            self.max
        };
        if let Some(own) = self.within(share.next_own(end)) {
            if self.increment > 0 {
                self.min = own;
            } else {
                self.max = own;
            }
        }
    }

    /// Sets the position so that the next value is the first own one after `last_value` (at it, when it has not been handed out).
    fn move_to(&mut self, share: &Share, last_value: i64, is_called: bool) {
        let direction = if self.increment > 0 { 1 } else { -1 };
        let next = if is_called {
            last_value.checked_add(direction)
        } else {
            Some(last_value)
        };
        if let Some(own) = next.and_then(|next| self.within(share.next_own(next))) {
            self.last_value = own;
            self.is_called = false;
            return;
        }
        // Nothing is left: stand on the last own value, so that nextval() says so, or wraps.
        let limit = if self.increment > 0 {
            self.max
        } else {
            self.min
        };
        self.last_value = self.within(share.previous_own(limit)).unwrap_or(limit);
        self.is_called = true;
    }

    fn within(&self, value: i128) -> Option<i64> {
        let value = i64::try_from(value).ok()?;
        (self.min..=self.max).contains(&value).then_some(value)
    }

    /// The value of the share in which the position lies: nextval() adds whole rounds, so the class of `last_value` is the class of the next.
    fn next_value_unchecked(&self) -> i64 {
        self.last_value
    }

    fn next_value_unchecked_wide(&self) -> i128 {
        i128::from(self.last_value)
            + if self.is_called {
                i128::from(self.increment)
            } else {
                0
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn serial() -> Sequence {
        Sequence {
            start: 1,
            increment: 1,
            min: 1,
            max: i64::MAX,
            cycle: false,
            last_value: 1,
            is_called: false,
        }
    }

    fn shared(sequence: Sequence, node: u8) -> Sequence {
        match sequence.plan(node) {
            Plan::Shared(shared) => shared,
            Plan::TooSmall => panic!("{sequence:?} is too small on node {node}"),
        }
    }

    /// What nextval() does, for as many values as the sequence gives, at most `count`.
    fn draw(sequence: &mut Sequence, count: usize) -> Vec<i64> {
        let mut values = Vec::new();
        while values.len() < count {
            if sequence.is_called {
                let next = i128::from(sequence.last_value) + i128::from(sequence.increment);
                sequence.last_value = match i64::try_from(next) {
                    Ok(next) if (sequence.min..=sequence.max).contains(&next) => next,
                    _ if sequence.cycle && sequence.increment > 0 => sequence.min,
                    _ if sequence.cycle => sequence.max,
                    _ => return values,
                };
            }
            sequence.is_called = true;
            values.push(sequence.last_value);
        }
        values
    }

    fn assert_disjoint(sequence: Sequence, count: usize) {
        let mut owner = BTreeMap::new();
        for node in 1..=16u8 {
            for value in draw(&mut shared(sequence, node), count) {
                if let Some(other) = owner.insert(value, node) {
                    assert_eq!(
                        other, node,
                        "{value} of {sequence:?} is yielded by two nodes"
                    );
                }
            }
        }
    }

    #[test]
    fn serial_starts_with_the_number_of_the_node() {
        for node in 1..=16u8 {
            let first = i64::from(node);
            assert_eq!(
                draw(&mut shared(serial(), node), 3),
                [first, first + 17, first + 34]
            );
        }
    }

    #[test]
    fn nodes_never_yield_the_same_value() {
        for increment in [1, 2, 5, 10, 16, 18, -1, -3, -10] {
            for start in [-1000, -7, 0, 1, 2, 6, 99, 1000] {
                for cycle in [false, true] {
                    let sequence = Sequence {
                        start,
                        increment,
                        min: -5000,
                        max: 5000,
                        cycle,
                        last_value: start,
                        is_called: false,
                    };
                    if sequence.plan(1) != Plan::TooSmall {
                        assert_disjoint(sequence, 700);
                    }
                }
            }
        }
    }

    #[test]
    fn planning_twice_changes_nothing() {
        for increment in [1, 7, -1, -4] {
            for node in 1..=16u8 {
                let sequence = Sequence {
                    start: 3,
                    increment,
                    min: -900,
                    max: 900,
                    cycle: true,
                    last_value: 11,
                    is_called: true,
                };
                let once = shared(sequence, node);
                assert_eq!(shared(once, node), once);
                let mut used = once;
                draw(&mut used, 3);
                assert_eq!(shared(used, node), used);
            }
        }
    }

    #[test]
    fn the_next_value_lies_beyond_the_former_position() {
        for is_called in [false, true] {
            for last_value in 1..60 {
                for node in 1..=16u8 {
                    let moved = shared(
                        Sequence {
                            last_value,
                            is_called,
                            ..serial()
                        },
                        node,
                    );
                    let least = last_value + i64::from(is_called);
                    let next = draw(&mut { moved }, 1)[0];
                    assert!(
                        next >= least && next < least + 17,
                        "{next} after {last_value}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_restored_dump_of_any_node_stays_disjoint() {
        for dumped_on in 1..=16u8 {
            let mut dumped = shared(serial(), dumped_on);
            draw(&mut dumped, 4);
            assert_disjoint(dumped, 50);
            assert_disjoint(
                Sequence {
                    last_value: dumped.start,
                    is_called: false,
                    ..dumped
                },
                50,
            );
        }
    }

    #[test]
    fn setval_moves_to_the_first_own_value_beyond() {
        let node_2 = shared(serial(), 2);
        let moved = node_2.beyond(2, 42, true).unwrap();
        assert_eq!((moved.last_value, moved.is_called), (53, false));
        let exact = node_2.beyond(2, 53, false).unwrap();
        assert_eq!((exact.last_value, exact.is_called), (53, false));
        assert!(node_2.is_before(&moved));
        assert!(!moved.is_before(&node_2));
    }

    #[test]
    fn an_exhausted_share_says_so() {
        let small = Sequence {
            max: 40,
            ..serial()
        };
        let mut node_16 = shared(small, 16).beyond(16, 39, true).unwrap();
        assert_eq!(draw(&mut node_16, 5), []);
    }

    #[test]
    fn cycle_wraps_within_the_own_share() {
        let cycling = Sequence {
            max: 50,
            cycle: true,
            ..serial()
        };
        assert_eq!(draw(&mut shared(cycling, 3), 5), [3, 20, 37, 3, 20]);
        let descending = Sequence {
            start: -1,
            increment: -1,
            min: -50,
            max: -1,
            cycle: true,
            last_value: -1,
            is_called: false,
        };
        assert_eq!(draw(&mut shared(descending, 3), 5), [-3, -20, -37, -3, -20]);
    }

    #[test]
    fn too_small_a_range_is_left_alone() {
        assert_eq!(
            Sequence {
                max: 16,
                ..serial()
            }
            .plan(1),
            Plan::TooSmall
        );
        assert!(matches!(
            Sequence {
                max: 17,
                ..serial()
            }
            .plan(16),
            Plan::Shared(_)
        ));
        assert_eq!(
            Sequence {
                increment: i64::MAX / 2,
                ..serial()
            }
            .plan(1),
            Plan::TooSmall
        );
    }

    #[test]
    fn extremes_do_not_overflow() {
        let last = Sequence {
            last_value: i64::MAX,
            is_called: true,
            ..serial()
        };
        assert_eq!(draw(&mut shared(last, 5), 2), []);
        let descending = Sequence {
            start: -1,
            increment: -1,
            min: i64::MIN,
            max: -1,
            cycle: false,
            last_value: i64::MIN,
            is_called: true,
        };
        assert_eq!(draw(&mut shared(descending, 5), 2), []);
    }

    #[test]
    fn a_changed_increment_is_shared_anew() {
        let mut owner = BTreeMap::new();
        for node in 1..=16u8 {
            let mut sequence = shared(serial(), node);
            draw(&mut sequence, 2);
            sequence.increment = 5;
            for value in draw(&mut shared(sequence, node), 40) {
                assert_eq!(owner.insert(value, node), None, "{value}");
            }
        }
    }
}
