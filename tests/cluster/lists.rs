//! Lists that clients on all nodes append to and read, and a search for what the isolation level forbids in what they saw.
//!
//! The search is in [`history`]; [`planted`] proves what it finds.

mod history;
mod planted;

pub use self::history::check;
pub use self::planted::finds_what_it_looks_for;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use multimaster_tests::Session;
use postgres::{Client, NoTls};
use xtask::cluster::Cluster;

use crate::ledger::{Dice, ends_session};

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

impl Transaction {
    /// What it appended, or tried to: list and number.
    fn numbers(&self) -> impl Iterator<Item = (u64, i64)> {
        self.steps.iter().filter_map(|step| match step {
            Step::Append { key, number } => Some((*key, *number)),
            Step::Read { .. } => None,
        })
    }
}

/// Clients at work.
pub struct Lists {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<Vec<Transaction>>>>,
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
    /// When one panicked, or was told of an internal error at COMMIT.
    pub fn stop(self) -> Result<Vec<Transaction>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for client in self.clients {
            match client.join() {
                Ok(done) => all.extend(done?),
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(all)
    }
}

fn work(
    node: usize,
    conninfo: &str,
    stop: &AtomicBool,
    mut dice: Dice,
) -> Result<Vec<Transaction>> {
    let mut all = Vec::new();
    let mut session: Option<Client> = None;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = session.as_mut().filter(|session| !session.is_closed()) else {
            session = Client::connect(conninfo, NoTls).ok();
            std::thread::sleep(REFUSED_PAUSE);
            continue;
        };
        let done = run(node, open, &mut dice)?;
        if done.end != End::Committed {
            // Fails too when the connection is gone, which the next round sees.
            let _ = open.batch_execute("ROLLBACK");
            std::thread::sleep(REFUSED_PAUSE);
        }
        all.push(done);
    }
    Ok(all)
}

fn run(node: usize, session: &mut Client, dice: &mut Dice) -> Result<Transaction> {
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
            Err(error) if error.as_db_error().is_some_and(ends_session) => End::Unknown,
            Err(error) => match error.code().map(|code| code.code()) {
                // Nothing here raises one on purpose.
                Some("XX000") => bail!("COMMIT raised an internal error: {error:?}"),
                None | Some("08007") => End::Unknown,
                Some(_) => End::RolledBack,
            },
        },
    };
    Ok(Transaction {
        node,
        steps,
        begun,
        ended: Instant::now(),
        end,
    })
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
