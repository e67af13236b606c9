//! Lists that clients on all nodes append to and read, and a search for what the isolation level forbids in what they saw.
//!
//! Every appended number is unique, so a list tells the order of the writes of its row, and a read tells after which of them it came. From that follow
//! edges between transactions: a write after a write, a read of a write, a write over what was read. Under snapshot isolation on every node, with
//! causal order between nodes, each cycle has at least two edges of the last kind: a cycle with none or one is an error. So is a
//! list that is no beginning of the final one, a number of a transaction that was rolled back, and a read that began after a commit was answered
//! and misses it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use multimaster_tests::Session;
use postgres::{Client, NoTls};
use xtask::cluster::Cluster;

use crate::ledger::Dice;

const KEYS: u64 = 6;
/// Most reads and appends of a transaction.
const STEPS: u64 = 4;
/// Of a connection string.
const STRICT_READS: &str =
    "options='-c multimaster.strict_reads=on -c multimaster.wait_peer_commits=off'";
/// Pause of a client whose node serves nothing.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);

static NUMBERS: AtomicI64 = AtomicI64::new(1);

/// What a transaction did to one list.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Append { key: u64, number: i64 },
    Read { key: u64, seen: Vec<i64> },
}

/// How a transaction ended, as far as its client knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Committed,
    RolledBack,
    Unknown,
}

/// One transaction as its client saw it; times are those of this program.
#[derive(Clone, Debug)]
pub struct Transaction {
    node: usize,
    steps: Vec<Step>,
    begun: Instant,
    ended: Instant,
    end: End,
}

/// Clients at work.
pub struct Lists {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Transaction>>>,
}

/// Makes the table of lists.
///
/// # Errors
/// When the node refuses.
pub fn create(session: &mut Session) -> Result<()> {
    session.run(&format!(
        "CREATE TABLE list (id int PRIMARY KEY, items bigint[] NOT NULL);
         INSERT INTO list SELECT id, '{{}}' FROM generate_series(1, {KEYS}) id"
    ))
}

impl Lists {
    /// Starts one client on each node. A read sees what was answered before in two ways: COMMIT waits for the peers, or readers wait.
    pub fn start(cluster: &Cluster, dice: &mut Dice) -> Lists {
        let readers_wait = dice.below(2) == 0;
        let ways = if readers_wait {
            println!("  lists are read with multimaster.strict_reads");
            STRICT_READS
        } else {
            ""
        };
        let stop = Arc::new(AtomicBool::new(false));
        let clients = cluster
            .nodes
            .iter()
            .enumerate()
            .map(|(node, server)| {
                let conninfo = format!(
                    "{} application_name=lists connect_timeout=5 {ways}",
                    server.conninfo()
                );
                let (stop, dice) = (Arc::clone(&stop), Dice::new(dice.below(u64::MAX)));
                std::thread::spawn(move || work(node, &conninfo, &stop, dice))
            })
            .collect();
        Lists { stop, clients }
    }

    /// Stops the clients and returns what they did.
    ///
    /// # Errors
    /// When one panicked.
    pub fn stop(self) -> Result<Vec<Transaction>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for client in self.clients {
            match client.join() {
                Ok(done) => all.extend(done),
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(all)
    }
}

fn work(node: usize, conninfo: &str, stop: &AtomicBool, mut dice: Dice) -> Vec<Transaction> {
    let mut all = Vec::new();
    let mut session: Option<Client> = None;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = session.as_mut().filter(|session| !session.is_closed()) else {
            session = Client::connect(conninfo, NoTls).ok();
            std::thread::sleep(REFUSED_PAUSE);
            continue;
        };
        let done = run(node, open, &mut dice);
        if done.end != End::Committed {
            // Fails too when the connection is gone, which the next round sees.
            let _ = open.batch_execute("ROLLBACK");
            std::thread::sleep(REFUSED_PAUSE);
        }
        all.push(done);
    }
    all
}

fn run(node: usize, session: &mut Client, dice: &mut Dice) -> Transaction {
    let begun = Instant::now();
    let mut steps = Vec::new();
    let mut outcome = session.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ");
    for _ in 0..1 + dice.below(STEPS) {
        if outcome.is_err() {
            break;
        }
        outcome = step(session, dice, &mut steps);
    }
    // Nothing can have happened before COMMIT was sent.
    let end = match outcome {
        Err(_) => End::RolledBack,
        Ok(()) => match session.batch_execute("COMMIT") {
            Ok(()) => End::Committed,
            Err(error) => match error.code().map(|code| code.code()) {
                None | Some("08007" | "57P01" | "57P02" | "XX000") => End::Unknown,
                Some(_) => End::RolledBack,
            },
        },
    };
    Transaction {
        node,
        steps,
        begun,
        ended: Instant::now(),
        end,
    }
}

fn step(
    session: &mut Client,
    dice: &mut Dice,
    steps: &mut Vec<Step>,
) -> std::result::Result<(), postgres::Error> {
    let key = 1 + dice.below(KEYS);
    let id = i32::try_from(key).unwrap_or(1);
    if dice.below(2) == 0 {
        let row = session.query_one("SELECT items FROM list WHERE id = $1", &[&id])?;
        steps.push(Step::Read {
            key,
            seen: row.get(0),
        });
    } else {
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        steps.push(Step::Append { key, number });
        session.execute(
            "UPDATE list SET items = items || $1::bigint WHERE id = $2",
            &[&number, &id],
        )?;
    }
    Ok(())
}

/// The final lists, as a node has them.
///
/// # Errors
/// When the node refuses.
pub fn read_all(session: &mut Session) -> Result<BTreeMap<u64, Vec<i64>>> {
    let rows = session.query("SELECT id, items FROM list", &[])?;
    Ok(rows
        .iter()
        .map(|row| {
            let id: i32 = row.get(0);
            (u64::from(id.unsigned_abs()), row.get(1))
        })
        .collect())
}

/// Looks for what must not be; says how much was looked at.
///
/// # Errors
/// What was found.
pub fn check(all: &[Transaction], lists: &BTreeMap<u64, Vec<i64>>) -> Result<String> {
    let history = History::new(all, lists)?;
    history.check_answers()?;
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
    /// Place of each number in its final list.
    places: BTreeMap<i64, usize>,
}

impl<'a> History<'a> {
    fn new(all: &'a [Transaction], lists: &'a BTreeMap<u64, Vec<i64>>) -> Result<History<'a>> {
        let mut writers = BTreeMap::new();
        for (index, one) in all.iter().enumerate() {
            for step in &one.steps {
                if let Step::Append { number, .. } = step {
                    writers.insert(*number, index);
                }
            }
        }
        let mut places = BTreeMap::new();
        for items in lists.values() {
            for (place, number) in items.iter().enumerate() {
                ensure!(
                    places.insert(*number, place).is_none(),
                    "{number} is there twice"
                );
                ensure!(
                    writers.contains_key(number),
                    "nobody has written {number}, which is there"
                );
            }
        }
        Ok(History {
            all,
            lists,
            writers,
            places,
        })
    }

    /// Nothing answered is lost, nothing refused is there, nothing is there in part.
    fn check_answers(&self) -> Result<()> {
        for one in self.all {
            let mut there = BTreeSet::new();
            for step in &one.steps {
                if let Step::Append { number, .. } = step {
                    there.insert(self.places.contains_key(number));
                }
            }
            let wrong = match one.end {
                End::Committed => there.contains(&false),
                End::RolledBack => there.contains(&true),
                End::Unknown => there.len() > 1,
            };
            ensure!(!wrong, "its numbers are there: {there:?}; {one:?}");
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
                    self.writers[last] != self.writers[next] || self.writers[last] == index,
                    "list {key} was read in the middle of a transaction: {:?}",
                    self.all[index]
                );
            }
        }
        Ok(())
    }

    /// A read sees what was answered before it began.
    fn check_recency(&self) -> Result<()> {
        for (key, list) in self.lists {
            let answered = |number: &i64| {
                let writer = &self.all[self.writers[number]];
                (writer.end == End::Committed).then_some(writer.ended)
            };
            for (index, _, seen) in self.reads().filter(|(_, of, _)| of == key) {
                let reader = &self.all[index];
                let missed = list
                    .iter()
                    .skip(self.others(index, seen).len())
                    .find(|number| {
                        self.writers[*number] != index
                            && answered(number).is_some_and(|at| at < reader.begun)
                    });
                if let Some(number) = missed {
                    let writer = &self.all[self.writers[number]];
                    bail!(
                        "a read on node {} began {:?} after the commit of {number} was answered on node {} and misses it: list {key}, {reader:?}",
                        reader.node + 1,
                        reader.begun - writer.ended,
                        writer.node + 1
                    );
                }
            }
        }
        Ok(())
    }

    /// Reads of transactions that may have committed: who, which list, what.
    fn reads(&self) -> impl Iterator<Item = (usize, u64, &'a Vec<i64>)> {
        let all = self.all.iter().enumerate();
        all.filter(|(_, one)| one.end == End::Committed)
            .flat_map(|(index, one)| {
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

    fn edges(&self) -> Edges {
        let mut edges = Edges::default();
        for list in self.lists.values() {
            for pair in list.windows(2) {
                edges.add(self.writers[&pair[0]], self.writers[&pair[1]]);
            }
        }
        for (index, key, seen) in self.reads() {
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
        edges
    }
}

/// Edges between transactions, by index.
#[derive(Default)]
struct Edges {
    /// Write after write, and read of a write.
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
        for &start in self.follows.keys() {
            if let Some(path) = self.path(start, start) {
                bail!("a cycle of writes and reads: {}", describe(&path, all));
            }
        }
        for &(reader, writer) in &self.over {
            if let Some(path) = self.path(writer, reader) {
                bail!(
                    "a cycle with one overwritten read: {}",
                    describe(&path, all)
                );
            }
        }
        Ok(())
    }

    /// The shortest way over at least one edge.
    fn path(&self, from: usize, to: usize) -> Option<Vec<usize>> {
        let mut before = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(at) = queue.pop_front() {
            for &next in self.follows.get(&at).into_iter().flatten() {
                if before.contains_key(&next) {
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

/// The search itself, on histories made by hand: it must find what it is for.
pub fn finds_what_it_looks_for() -> Result<()> {
    let now = Instant::now();
    let make = |steps: Vec<Step>| Transaction {
        node: 0,
        steps,
        begun: now,
        ended: now,
        end: End::Committed,
    };
    let append = |key, number| Step::Append { key, number };
    let read = |key, seen: &[i64]| Step::Read {
        key,
        seen: seen.to_vec(),
    };
    let lists = BTreeMap::from([(1, vec![1, 2]), (2, vec![3])]);
    let lost_update = [
        make(vec![read(1, &[]), append(1, 1)]),
        make(vec![read(1, &[]), append(1, 2)]),
        make(vec![append(2, 3)]),
    ];
    ensure!(
        check(&lost_update, &lists).is_err(),
        "a lost update is not found"
    );
    let circular = [
        make(vec![append(1, 1), read(2, &[3])]),
        make(vec![append(2, 3), read(1, &[1])]),
        make(vec![append(1, 2)]),
    ];
    ensure!(
        check(&circular, &lists).is_err(),
        "circular information flow is not found"
    );
    let skew = [
        make(vec![read(2, &[]), append(1, 1)]),
        make(vec![read(1, &[]), append(2, 3)]),
        make(vec![append(1, 2)]),
    ];
    check(&skew, &lists)?;
    let mut stale = skew.to_vec();
    stale[2].begun = now + Duration::from_secs(2);
    stale[2].steps = vec![append(1, 2), read(2, &[])];
    ensure!(check(&stale, &lists).is_err(), "a stale read is not found");
    let mut refused = skew.to_vec();
    refused[2].end = End::RolledBack;
    ensure!(
        check(&refused, &lists).is_err(),
        "what was refused and is there is not found"
    );
    Ok(())
}
