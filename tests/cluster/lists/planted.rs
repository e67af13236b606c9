//! Histories made by hand: the search must find what it is for, by name, and let the rest pass.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{End, Step, Transaction, check};

/// Parts of the search's answers.
const CYCLE: &str = "a cycle of writes and reads";
const OVERWRITTEN: &str = "a cycle with one overwritten read";
const ANSWER: &str = "its numbers are there";
const STALE: &str = "and misses it";

/// A history: transactions and what became of lists 1 and 2.
struct History {
    name: &'static str,
    all: Vec<Transaction>,
    lists: [Vec<i64>; 2],
}

impl History {
    fn new(name: &'static str, one: &[i64], other: &[i64]) -> History {
        History {
            name,
            all: Vec::new(),
            lists: [one.to_vec(), other.to_vec()],
        }
    }

    /// A transaction of a client of its own that commits at the same time as the others.
    fn then(self, steps: Vec<Step>) -> History {
        let client = self.all.len();
        self.then_of(client, (0, 1000), End::Committed, steps)
    }

    /// A transaction of a client, with the milliseconds when it begins and ends.
    fn then_of(mut self, client: usize, time: (u64, u64), end: End, steps: Vec<Step>) -> History {
        self.all.push(Transaction {
            node: client,
            steps,
            begun: start() + Duration::from_millis(time.0),
            ended: start() + Duration::from_millis(time.1),
            end,
        });
        self
    }

    fn search(&self) -> Result<String> {
        let lists = (1..)
            .zip(self.lists.iter().cloned())
            .collect::<BTreeMap<_, _>>();
        check(&self.all, &lists)
    }

    fn is_found(&self, what: &str) -> Result<()> {
        match self.search() {
            Err(error) => {
                let said = format!("{error:#}");
                ensure!(said.contains(what), "{}: found as: {said}", self.name);
                Ok(())
            }
            Ok(_) => bail!("{} is not found", self.name),
        }
    }
}

fn start() -> Instant {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *START.get_or_init(Instant::now)
}

fn append(key: u64, number: i64) -> Step {
    Step::Append { key, number }
}

fn read(key: u64, seen: &[i64]) -> Step {
    Step::Read {
        key,
        seen: seen.to_vec(),
    }
}

/// The search itself, on histories made by hand.
///
/// # Errors
/// What it does not find, or finds where nothing is.
pub fn finds_what_it_looks_for() -> Result<()> {
    for (history, what) in cycles()
        .into_iter()
        .chain(reads())
        .chain(answers())
        .chain(times())
    {
        history.is_found(what)?;
    }
    for history in allowed() {
        history
            .search()
            .with_context(|| format!("{} is allowed", history.name))?;
    }
    Ok(())
}

fn cycles() -> Vec<(History, &'static str)> {
    vec![
        (
            History::new("a cycle of writes (G0)", &[1, 2], &[4, 3])
                .then(vec![append(1, 1), append(2, 3)])
                .then(vec![append(1, 2), append(2, 4)]),
            CYCLE,
        ),
        (
            History::new("circular information flow (G1c)", &[1], &[3])
                .then(vec![append(1, 1), read(2, &[3])])
                .then(vec![append(2, 3), read(1, &[1])]),
            CYCLE,
        ),
        (
            History::new("a lost update", &[1, 2], &[])
                .then(vec![read(1, &[]), append(1, 1)])
                .then(vec![read(1, &[]), append(1, 2)]),
            OVERWRITTEN,
        ),
        (
            History::new("read skew (G-single)", &[1], &[2])
                .then(vec![append(1, 1), append(2, 2)])
                .then(vec![read(1, &[]), read(2, &[2])]),
            OVERWRITTEN,
        ),
        (
            History::new("read skew over three", &[1], &[2])
                .then(vec![append(1, 1)])
                .then(vec![read(1, &[1]), append(2, 2)])
                .then(vec![read(2, &[2]), read(1, &[])]),
            OVERWRITTEN,
        ),
        (
            History::new("a read that cannot be repeated", &[1], &[])
                .then(vec![append(1, 1)])
                .then(vec![read(1, &[]), read(1, &[1])]),
            OVERWRITTEN,
        ),
        (
            History::new(
                "a lost update of one that did not hear its answer",
                &[1, 2],
                &[],
            )
            .then_of(0, (0, 1000), End::Unknown, vec![read(1, &[]), append(1, 1)])
            .then_of(1, (0, 1000), End::Unknown, vec![read(1, &[]), append(1, 2)]),
            OVERWRITTEN,
        ),
    ]
}

fn reads() -> Vec<(History, &'static str)> {
    vec![
        (
            History::new("a read of what was rolled back (G1a)", &[], &[])
                .then_of(0, (0, 1000), End::RolledBack, vec![append(1, 1)])
                .then(vec![read(1, &[1])]),
            "and became",
        ),
        (
            History::new(
                "the same in a transaction that is rolled back itself",
                &[],
                &[],
            )
            .then_of(0, (0, 1000), End::RolledBack, vec![append(1, 1)])
            .then_of(1, (0, 1000), End::RolledBack, vec![read(1, &[1])]),
            "and became",
        ),
        (
            History::new("a read within a transaction (G1b)", &[1, 2], &[])
                .then(vec![append(1, 1), append(1, 2)])
                .then(vec![read(1, &[1])]),
            "in the middle of a transaction",
        ),
        (
            History::new("an order that changes", &[1, 2], &[])
                .then(vec![append(1, 1)])
                .then(vec![append(1, 2)])
                .then(vec![read(1, &[2])]),
            "and became",
        ),
        (
            History::new("a read without the own write", &[1], &[])
                .then(vec![append(1, 1), read(1, &[])]),
            "own numbers",
        ),
        (
            History::new("a read of the own write before it", &[1], &[])
                .then(vec![read(1, &[1]), append(1, 1)]),
            "own numbers",
        ),
    ]
}

fn answers() -> Vec<(History, &'static str)> {
    vec![
        (
            History::new("a commit that was answered and is lost", &[], &[])
                .then(vec![append(1, 1)]),
            ANSWER,
        ),
        (
            History::new("what was refused and is there", &[1], &[]).then_of(
                0,
                (0, 1000),
                End::RolledBack,
                vec![append(1, 1)],
            ),
            ANSWER,
        ),
        (
            History::new("half a transaction", &[1], &[]).then_of(
                0,
                (0, 1000),
                End::Unknown,
                vec![append(1, 1), append(2, 2)],
            ),
            ANSWER,
        ),
        (
            History::new("what was applied twice", &[1, 1], &[]).then(vec![append(1, 1)]),
            "is there twice",
        ),
        (
            History::new("what nobody has written", &[1], &[]),
            "nobody has written",
        ),
        (
            History::new("what belongs to another list", &[], &[1]).then(vec![append(1, 1)]),
            "nobody has written",
        ),
    ]
}

fn times() -> Vec<(History, &'static str)> {
    let late = (2000, 3000);
    vec![
        (
            History::new("a stale read", &[1], &[])
                .then(vec![append(1, 1)])
                .then_of(1, late, End::Committed, vec![read(1, &[])]),
            STALE,
        ),
        (
            History::new("a stale read of one that is rolled back", &[1], &[])
                .then(vec![append(1, 1)])
                .then_of(1, late, End::RolledBack, vec![read(1, &[])]),
            STALE,
        ),
        (
            History::new("a write before one that was answered earlier", &[2, 1], &[])
                .then(vec![append(1, 1)])
                .then_of(1, late, End::Committed, vec![append(1, 2)]),
            CYCLE,
        ),
        (
            // Its writer never heard an answer, but another client has seen it, and was answered.
            History::new("a stale read of what an answered one has read", &[1], &[2])
                .then_of(0, (0, 5000), End::Unknown, vec![append(1, 1)])
                .then(vec![read(1, &[1]), append(2, 2)])
                .then_of(2, late, End::Committed, vec![read(1, &[])]),
            OVERWRITTEN,
        ),
        (
            History::new("a client that sees less than before", &[1], &[])
                .then_of(0, (0, 5000), End::Unknown, vec![append(1, 1)])
                .then_of(1, (0, 1000), End::Committed, vec![read(1, &[1])])
                .then_of(1, late, End::Committed, vec![read(1, &[])]),
            OVERWRITTEN,
        ),
    ]
}

fn allowed() -> Vec<History> {
    vec![
        History::new("write skew", &[1], &[2])
            .then(vec![read(2, &[]), append(1, 1)])
            .then(vec![read(1, &[]), append(2, 2)]),
        History::new(
            "two orders of transactions that know nothing of each other",
            &[1],
            &[2],
        )
        .then(vec![append(1, 1)])
        .then(vec![append(2, 2)])
        .then(vec![read(1, &[1]), read(2, &[])])
        .then(vec![read(1, &[]), read(2, &[2])]),
        History::new(
            "another client that sees less than a reader before",
            &[1],
            &[],
        )
        .then_of(0, (0, 5000), End::Unknown, vec![append(1, 1)])
        .then_of(1, (0, 1000), End::Committed, vec![read(1, &[1])])
        .then_of(2, (2000, 3000), End::Committed, vec![read(1, &[])]),
        History::new("one after the other", &[1, 2], &[3])
            .then_of(
                0,
                (0, 1000),
                End::Committed,
                vec![append(1, 1), read(1, &[1])],
            )
            .then_of(
                1,
                (2000, 3000),
                End::Committed,
                vec![read(1, &[1]), append(1, 2)],
            )
            .then_of(
                0,
                (4000, 5000),
                End::Committed,
                vec![append(2, 3), read(1, &[1, 2])],
            ),
        History::new("one that is lost without an answer", &[], &[]).then_of(
            0,
            (0, 1000),
            End::Unknown,
            vec![append(1, 1), append(2, 2)],
        ),
    ]
}
