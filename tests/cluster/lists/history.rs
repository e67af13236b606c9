//! The search for what must not be in what clients of the lists saw.
//!
//! Every appended number is unique, so a list tells the order of the writes of its row, and a read tells after which of them it came. From that follow
//! edges between transactions: a write after a write, a read of a write, a write over what was read (Adya's dependencies and anti-dependencies). Time adds
//! edges of the first kind: whatever begins after a COMMIT of a writer was answered, on any node, comes after it, and so does what the same client does later.
//! Under snapshot isolation on every node, with causal order between nodes, each cycle has at least two writes over what was read: a cycle with none
//! (G0, G1c) or one (lost update, read skew, stale read) is an error.
//!
//! What transactions read counts also when they did not commit; only they themselves are no part of cycles then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use anyhow::{Result, bail, ensure};

use super::{End, Step, Transaction};

/// Looks for what must not be; says how much was looked at. `all` has the transactions of each client in the order in which it ran them, and `lists` what became
/// of the lists.
///
/// # Errors
/// What was found.
pub fn check(all: &[Transaction], lists: &BTreeMap<u64, Vec<i64>>) -> Result<String> {
    let history = History::new(all, lists)?;
    history.check_answers()?;
    history.check_own()?;
    history.check_reads()?;
    history.check_recency()?;
    let edges = history.edges();
    edges.check_cycles(all)?;
    let committed = all.iter().filter(|one| one.end == End::Committed).count();
    Ok(format!(
        "{committed} of {} list transactions committed, {} edges without a forbidden cycle",
        all.len(),
        edges.count()
    ))
}

/// What happened, by number and key.
struct History<'a> {
    all: &'a [Transaction],
    lists: &'a BTreeMap<u64, Vec<i64>>,
    /// Who appended a number.
    writers: BTreeMap<i64, usize>,
    /// All numbers that are in the final lists.
    there: BTreeSet<i64>,
}

impl<'a> History<'a> {
    fn new(all: &'a [Transaction], lists: &'a BTreeMap<u64, Vec<i64>>) -> Result<History<'a>> {
        let (mut writers, mut keys) = (BTreeMap::new(), BTreeMap::new());
        for (index, one) in all.iter().enumerate() {
            for step in &one.steps {
                if let Step::Append { key, number } = step {
                    writers.insert(*number, index);
                    keys.insert(*number, *key);
                }
            }
        }
        let mut there = BTreeSet::new();
        for (key, items) in lists {
            for number in items {
                ensure!(there.insert(*number), "{number} is there twice");
                ensure!(
                    keys.get(number) == Some(key),
                    "nobody has written {number}, which is in list {key}"
                );
            }
        }
        Ok(History {
            all,
            lists,
            writers,
            there,
        })
    }

    /// Nothing answered is lost, nothing refused is there, nothing is there in part.
    fn check_answers(&self) -> Result<()> {
        for one in self.all {
            let there: BTreeSet<bool> = one
                .numbers()
                .map(|(_, number)| self.there.contains(&number))
                .collect();
            let wrong = match one.end {
                End::Committed => there.contains(&false),
                End::RolledBack => there.contains(&true),
                End::Unknown => there.len() > 1,
            };
            ensure!(!wrong, "its numbers are there: {there:?}; {one:?}");
        }
        Ok(())
    }

    /// A transaction sees what it has written itself, all of it and in order, and nothing that it has not written yet.
    fn check_own(&self) -> Result<()> {
        for (index, one) in self.all.iter().enumerate() {
            let mut own: BTreeMap<u64, Vec<i64>> = BTreeMap::new();
            for step in &one.steps {
                match step {
                    Step::Append { key, number } => own.entry(*key).or_default().push(*number),
                    Step::Read { key, seen } => {
                        let last = &seen[self.others(index, seen).len()..];
                        let expected = own.get(key).map_or(&[][..], Vec::as_slice);
                        ensure!(
                            last == expected,
                            "list {key} was read without the reader's own numbers: {one:?}"
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// Every list that was read is a beginning of the final one, but for the reader's own numbers.
    fn check_reads(&self) -> Result<()> {
        for (index, key, seen) in self.reads() {
            let others = self.others(index, seen);
            let list = &self.lists[&key];
            ensure!(
                list.starts_with(others),
                "list {key} was read as {seen:?} and became {list:?}; {:?}",
                self.all[index]
            );
            if let (Some(last), Some(next)) = (others.last(), list.get(others.len())) {
                ensure!(
                    self.writers[last] != self.writers[next],
                    "list {key} was read in the middle of a transaction: {:?}",
                    self.all[index]
                );
            }
        }
        Ok(())
    }

    /// A read sees what was answered before it began. The search for cycles finds that, too, of what has committed; this names it.
    fn check_recency(&self) -> Result<()> {
        for (index, key, seen) in self.reads() {
            let reader = &self.all[index];
            let missed = self.lists[&key]
                .iter()
                .skip(self.others(index, seen).len())
                .map(|number| (number, &self.all[self.writers[number]]))
                .find(|(_, writer)| writer.end == End::Committed && writer.ended < reader.begun);
            if let Some((number, writer)) = missed {
                bail!(
                    "a read on node {} began {:?} after the commit of {number} was answered on node {} and misses it: list {key}, {reader:?}",
                    reader.node + 1,
                    reader.begun - writer.ended,
                    writer.node + 1
                );
            }
        }
        Ok(())
    }

    /// All reads that were answered: whose, of which list, what.
    fn reads(&self) -> impl Iterator<Item = (usize, u64, &'a Vec<i64>)> {
        self.all.iter().enumerate().flat_map(|(index, one)| {
            one.steps.iter().filter_map(move |step| match step {
                Step::Read { key, seen } => Some((index, *key, seen)),
                Step::Append { .. } => None,
            })
        })
    }

    /// What others have written of a list that was read: the reader's own numbers are last.
    fn others<'s>(&self, reader: usize, seen: &'s [i64]) -> &'s [i64] {
        let own = seen
            .iter()
            .rev()
            .take_while(|number| self.writers.get(*number) == Some(&reader))
            .count();
        &seen[..seen.len() - own]
    }

    /// Whether a transaction is known to have committed, by its answer or by what it left.
    fn has_committed(&self, one: &Transaction) -> bool {
        one.end == End::Committed
            || one
                .numbers()
                .any(|(_, number)| self.there.contains(&number))
    }

    fn edges(&self) -> Edges {
        let mut edges = Edges::default();
        for list in self.lists.values() {
            for pair in list.windows(2) {
                edges.add(self.writers[&pair[0]], self.writers[&pair[1]]);
            }
        }
        let committed = |(index, ..): &(usize, u64, _)| self.has_committed(&self.all[*index]);
        for (index, key, seen) in self.reads().filter(committed) {
            let others = self.others(index, seen);
            if let Some(last) = others.last() {
                edges.add(self.writers[last], index);
            }
            let next = self.lists[&key].iter().skip(others.len());
            if let Some(over) = next
                .map(|number| self.writers[number])
                .find(|one| *one != index)
            {
                edges.over.push((index, over));
            }
        }
        self.add_times(&mut edges);
        edges
    }

    /// What a client was answered precedes what begins later: everything for its own later transactions, and commits of writers for everybody. Of those of a client the
    /// last one is enough, because the others precede it.
    fn add_times(&self, edges: &mut Edges) {
        let mut answered: BTreeMap<usize, [Vec<usize>; 2]> = BTreeMap::new();
        for (index, one) in self.all.iter().enumerate() {
            if one.end == End::Committed {
                let [all, writers] = answered.entry(one.node).or_default();
                all.push(index);
                if one.numbers().next().is_some() {
                    writers.push(index);
                }
            }
        }
        let later = self.all.iter().enumerate();
        for (index, one) in later.filter(|(_, one)| self.has_committed(one)) {
            for (client, [all, writers]) in &answered {
                let earlier = if *client == one.node { all } else { writers };
                let count = earlier.partition_point(|other| self.all[*other].ended < one.begun);
                if count > 0 {
                    edges.add(earlier[count - 1], index);
                }
            }
        }
    }
}

/// Edges between transactions, by index.
#[derive(Default)]
struct Edges {
    /// Write after write, read of a write, and time.
    follows: BTreeMap<usize, BTreeSet<usize>>,
    /// Write over what was read.
    over: Vec<(usize, usize)>,
}

impl Edges {
    fn add(&mut self, from: usize, to: usize) {
        if from != to {
            self.follows.entry(from).or_default().insert(to);
        }
    }

    fn count(&self) -> usize {
        self.follows.values().map(BTreeSet::len).sum::<usize>() + self.over.len()
    }

    /// No way leads back over edges of the first kind alone, nor together with one of the second.
    fn check_cycles(&self, all: &[Transaction]) -> Result<()> {
        let Some(places) = self.places(all) else {
            let cycle = self.follows.keys().find_map(|&start| {
                let anywhere = |_| true;
                self.path(start, start, anywhere)
            });
            bail!(
                "a cycle of writes and reads: {}",
                describe(&cycle.unwrap_or_default(), all)
            );
        };
        for &(reader, writer) in &self.over {
            // No way leads beyond its end's place.
            let before = |at: usize| places[at] <= places[reader];
            let path = if before(writer) {
                self.path(writer, reader, before)
            } else {
                None
            };
            if let Some(path) = path {
                bail!(
                    "a cycle with one overwritten read: {}",
                    describe(&path, all)
                );
            }
        }
        Ok(())
    }

    /// The transactions' places in an order in which every edge of the first kind leads forwards, near to that of their ends; none when there is a cycle.
    fn places(&self, all: &[Transaction]) -> Option<Vec<usize>> {
        let mut awaited = vec![0_usize; all.len()];
        for next in self.follows.values().flatten() {
            awaited[*next] += 1;
        }
        let free = (0..all.len()).filter(|index| awaited[*index] == 0);
        let mut free: BTreeSet<_> = free.map(|index| (all[index].ended, index)).collect();
        let mut places = vec![0; all.len()];
        let mut placed = 0;
        while let Some((_, index)) = free.pop_first() {
            places[index] = placed;
            placed += 1;
            for &next in self.follows.get(&index).into_iter().flatten() {
                awaited[next] -= 1;
                if awaited[next] == 0 {
                    free.insert((all[next].ended, next));
                }
            }
        }
        (placed == all.len()).then_some(places)
    }

    /// The shortest way over at least one edge through transactions that are `allowed`.
    fn path(&self, from: usize, to: usize, allowed: impl Fn(usize) -> bool) -> Option<Vec<usize>> {
        let mut before = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(at) = queue.pop_front() {
            for &next in self.follows.get(&at).into_iter().flatten() {
                if before.contains_key(&next) || !allowed(next) {
                    continue;
                }
                before.insert(next, at);
                if next == to {
                    return Some(walk_back(&before, from, to));
                }
                queue.push_back(next);
            }
        }
        None
    }
}

fn walk_back(before: &BTreeMap<usize, usize>, from: usize, to: usize) -> Vec<usize> {
    let mut path = vec![to];
    let mut at = before[&to];
    while at != from {
        path.push(at);
        at = before[&at];
    }
    path.push(from);
    path.reverse();
    path
}

fn describe(path: &[usize], all: &[Transaction]) -> String {
    let lines = path.iter().map(|index| format!("\n  {:?}", all[*index]));
    lines.collect()
}
