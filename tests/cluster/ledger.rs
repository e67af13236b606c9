//! TPC-B written by clients on several nodes who keep what they were answered, and its audit.
//!
//! Each transaction adds an amount to an account, a teller and a branch, counts itself, and leaves a line of history that nothing else writes: a
//! line that is there twice was applied twice, one that is missing was lost. History has no key, so that nothing but the cluster
//! prevents doubles.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::Session;
use postgres::error::{DbError, Severity};
use postgres::{Client, NoTls, SimpleQueryMessage};
use xtask::checks;
use xtask::cluster::{Cluster, wait_for};

/// Few, so that transactions of different nodes meet.
const ACCOUNTS: u64 = 40;
const TELLERS: u64 = 20;
const BRANCHES: u64 = 8;
/// Pause of a client whose node takes no commits.
const REFUSED_PAUSE: Duration = Duration::from_millis(10);
/// How long the cluster may take to be whole again.
const WHOLE_LIMIT: Duration = Duration::from_secs(120);

/// Four sums that are equal in every snapshot.
pub const SUMS: &str = "SELECT (SELECT sum(balance) FROM account), (SELECT sum(balance) FROM teller), (SELECT sum(balance) FROM branch),
            (SELECT coalesce(sum(delta), 0) FROM history)";

/// Whether the answer to [`SUMS`] is right.
///
/// # Errors
/// When it is not.
pub fn check_equal(sums: &str) -> Result<()> {
    let mut each = sums.split('|');
    let first = each.next();
    ensure!(
        each.all(|sum| Some(sum) == first),
        "accounts, tellers, branches and history sum up to {sums}"
    );
    Ok(())
}

/// Tells clients of all rounds apart.
static CLIENTS: AtomicU64 = AtomicU64::new(1);

/// What a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Committed,
    Refused,
    /// The connection broke, or the server said that it does not know.
    Unknown,
    /// An internal error, which is a failpoint or a bug. Nothing is known.
    Internal,
}

#[derive(Clone, Debug)]
struct Attempt {
    client: u64,
    number: u64,
    gid: Option<String>,
    answer: Answer,
}

/// A small deterministic source of choices (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// What all clients of a test were told, for the final audit.
#[derive(Debug, Default)]
pub struct Ledger {
    attempts: Vec<Attempt>,
    audited: usize,
    /// Failpoints raise internal errors, too.
    failpoints: bool,
}

/// Clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Attempt>>>,
}

impl Ledger {
    /// Makes the tables.
    pub fn open(cluster: &Cluster) -> Result<Ledger> {
        Session::new(cluster.connect(0)?).run(&format!(
            "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE teller (id int PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE branch (id int PRIMARY KEY, balance bigint NOT NULL);
             CREATE TABLE tally (client bigint PRIMARY KEY, n bigint NOT NULL);
             CREATE TABLE history (client bigint, n bigint, delta bigint);
             INSERT INTO account SELECT id, 0 FROM generate_series(1, {ACCOUNTS}) id;
             INSERT INTO teller SELECT id, 0 FROM generate_series(1, {TELLERS}) id;
             INSERT INTO branch SELECT id, 0 FROM generate_series(1, {BRANCHES}) id"
        ))?;
        Ok(Ledger::default())
    }

    /// Makes the tables where failpoints are armed: an internal error is no bug then.
    pub fn open_among_failpoints(cluster: &Cluster) -> Result<Ledger> {
        Ok(Ledger {
            failpoints: true,
            ..Ledger::open(cluster)?
        })
    }

    /// Starts clients on the nodes named (from 0); a node named twice gets two.
    pub fn load(&self, cluster: &Cluster, nodes: &[usize], dice: &mut Dice) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = nodes
            .iter()
            .map(|&node| {
                let conninfo = format!(
                    "{} application_name=ledger connect_timeout=5",
                    cluster.nodes[node].conninfo()
                );
                let (stop, dice) = (Arc::clone(&stop), Dice::new(dice.below(u64::MAX)));
                std::thread::spawn(move || write(&conninfo, &stop, dice))
            })
            .collect();
        Load { stop, clients }
    }

    /// Waits until the clients have stopped and keeps their answers.
    pub fn close(&mut self, cluster: &Cluster, load: Load) -> Result<()> {
        load.stop.store(true, Ordering::Relaxed);
        let stopped = wait_for("the clients' last answers", WHOLE_LIMIT, || {
            Ok(load.clients.iter().all(JoinHandle::is_finished))
        });
        stopped.with_context(|| stuck(cluster))?;
        for client in load.clients {
            match client.join() {
                Ok(attempts) => self.attempts.extend(attempts),
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(())
    }

    /// Waits until the cluster is whole and has forgotten all transactions, and compares what is there with what clients were told since the last audit.
    pub fn audit(&mut self, cluster: &Cluster) -> Result<()> {
        await_whole(cluster)?;
        await_forgotten(cluster)?;
        self.compare(cluster)
    }

    /// The same between two faults: what has ended may be remembered until idle receivers store their marks, every five seconds, and so meets the next fault, too.
    pub fn audit_round(&mut self, cluster: &Cluster) -> Result<()> {
        await_whole(cluster)?;
        self.compare(cluster)
    }

    fn compare(&mut self, cluster: &Cluster) -> Result<()> {
        let mut session = Session::new(cluster.connect(0)?);
        check_sums(&mut session)?;
        let lines = lines(&mut session)?;
        for attempt in &self.attempts[self.audited..] {
            let found = lines
                .get(&(attempt.client, attempt.number))
                .copied()
                .unwrap_or(0);
            ensure!(
                self.failpoints || attempt.answer != Answer::Internal,
                "COMMIT raised an internal error (XX000) where no failpoint is armed: {attempt:?}"
            );
            check(cluster, attempt, found).with_context(|| format!("{attempt:?}"))?;
        }
        self.audited = self.attempts.len();
        Ok(())
    }

    /// Audits everything once more and says what was seen.
    pub fn conclude(mut self, cluster: &Cluster) -> Result<String> {
        self.audited = 0;
        self.audit(cluster)?;
        let count = |answer| {
            let attempts = self.attempts.iter();
            attempts.filter(|attempt| attempt.answer == answer).count()
        };
        let committed = count(Answer::Committed);
        ensure!(committed > 0, "no transaction was committed");
        Ok(format!(
            "{committed} committed, {} refused, {} unknown",
            count(Answer::Refused),
            count(Answer::Unknown) + count(Answer::Internal)
        ))
    }
}

/// What holds clients up: the transactions of every node.
fn stuck(cluster: &Cluster) -> String {
    const SQL: &str = "
        SELECT 'prepared', gid FROM pg_prepared_xacts
        UNION ALL SELECT concat(role, ' ', state, ' ', ballot, ' missing ', missing), gid FROM mtm.transactions
        UNION ALL SELECT concat(backend_type, ' ', wait_event), query FROM pg_stat_activity
        WHERE application_name = 'ledger' OR backend_type LIKE 'multimaster%'";
    let tell = |node: &xtask::server::Server| {
        let rows = node
            .connect()
            .and_then(|client| Session::new(client).text(SQL));
        format!(
            "{}:\n{}",
            node.name,
            rows.unwrap_or_else(|error| format!("{error:#}"))
        )
    };
    cluster
        .nodes
        .iter()
        .map(tell)
        .collect::<Vec<_>>()
        .join("\n")
}

/// All nodes online, equal, nothing prepared.
fn await_whole(cluster: &Cluster) -> Result<()> {
    for node in &cluster.nodes {
        wait_for(&format!("{} to be online", node.name), WHOLE_LIMIT, || {
            let status = node
                .connect()
                .and_then(|client| Session::new(client).text("SELECT status FROM mtm.status()"));
            Ok(status.is_ok_and(|status| status == "online"))
        })?;
    }
    checks::whole(cluster, WHOLE_LIMIT)
}

/// Nothing in flight, no record left.
fn await_forgotten(cluster: &Cluster) -> Result<()> {
    for node in &cluster.nodes {
        let mut session = Session::new(node.connect()?);
        let mut left = String::new();
        let emptied = wait_for("nothing in flight", WHOLE_LIMIT, || {
            left =
                session.text("SELECT gid, role, state, ballot, missing FROM mtm.transactions")?;
            Ok(left.is_empty())
        });
        emptied.with_context(|| format!("{} still has\n{left}", node.name))?;
        let records = wait_for("all records to be empty", WHOLE_LIMIT, || {
            left = session.text(
                "SELECT count(*) FROM mtm.records WHERE (b0, b1, b2, b3, b4, b5, b6, b7) <> (0, 0, 0, 0, 0, 0, 0, 0)",
            )?;
            Ok(left == "0")
        });
        records.with_context(|| format!("{} has {left} records", node.name))?;
    }
    Ok(())
}

fn check_sums(session: &mut Session) -> Result<()> {
    check_equal(&session.text(SUMS)?)?;
    let tallies = session.text(
        "SELECT client, t.n, k.n FROM tally t FULL JOIN (SELECT client, count(*) AS n FROM history GROUP BY 1) k USING (client)
         WHERE coalesce(t.n, 0) <> coalesce(k.n, 0)",
    )?;
    ensure!(
        tallies.is_empty(),
        "tallies and history differ (client, tally, lines):\n{tallies}"
    );
    Ok(())
}

fn lines(session: &mut Session) -> Result<BTreeMap<(u64, u64), u64>> {
    let mut found = BTreeMap::new();
    for row in session.query("SELECT client, n FROM history", &[])? {
        let (client, number): (i64, i64) = (row.get(0), row.get(1));
        *found
            .entry((client.cast_unsigned(), number.cast_unsigned()))
            .or_default() += 1;
    }
    Ok(found)
}

/// Whether what was found is what the client was told; an unknown outcome is asked for on every node.
fn check(cluster: &Cluster, attempt: &Attempt, found: u64) -> Result<()> {
    let expected = match (attempt.answer, &attempt.gid) {
        (Answer::Committed, _) => 1,
        (Answer::Refused, _) => 0,
        (Answer::Unknown | Answer::Internal, None) => bail!("a commit was tried without a gid"),
        (Answer::Unknown | Answer::Internal, Some(gid)) => {
            let mut told = Vec::new();
            for node in &cluster.nodes {
                told.push(
                    Session::new(node.connect()?)
                        .text(&format!("SELECT mtm.transaction_status('{gid}')"))?,
                );
            }
            match told[0].as_str() {
                "committed" => ensure!(
                    told.iter().all(|word| word == "committed"),
                    "nodes say {told:?}"
                ),
                "aborted" => ensure!(
                    told.iter().all(|word| word == "aborted"),
                    "nodes say {told:?}"
                ),
                _ => bail!("nodes say {told:?}"),
            }
            u64::from(told[0] == "committed")
        }
    };
    ensure!(
        found == expected,
        "its line is there {found} times instead of {expected}"
    );
    Ok(())
}

/// One client: works until it is stopped.
fn write(conninfo: &str, stop: &AtomicBool, mut dice: Dice) -> Vec<Attempt> {
    let client = CLIENTS.fetch_add(1, Ordering::Relaxed);
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut session: Option<Client> = None;
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = session.as_mut().filter(|session| !session.is_closed()) else {
            session = Client::connect(conninfo, NoTls).ok();
            std::thread::sleep(REFUSED_PAUSE);
            continue;
        };
        number += 1;
        let attempt = transact(open, client, number, &mut dice);
        if attempt.answer != Answer::Committed {
            // Fails too when the connection is gone, which the next round sees.
            let _ = open.batch_execute("ROLLBACK");
            std::thread::sleep(Duration::from_millis(dice.below(10)));
        }
        attempts.push(attempt);
    }
    attempts
}

fn transact(session: &mut Client, client: u64, number: u64, dice: &mut Dice) -> Attempt {
    let mut attempt = Attempt {
        client,
        number,
        gid: None,
        answer: Answer::Refused,
    };
    // Both ways of deciding, side by side.
    let mode = if number.is_multiple_of(2) {
        "fast"
    } else {
        "e3pc"
    };
    attempt.gid = begin(session, mode);
    let (account, teller, branch) = (
        1 + dice.below(ACCOUNTS),
        1 + dice.below(TELLERS),
        1 + dice.below(BRANCHES),
    );
    let delta = dice.below(10_000).cast_signed() - 5_000;
    let work = format!(
        "UPDATE account SET balance = balance + {delta} WHERE id = {account};
         UPDATE teller SET balance = balance + {delta} WHERE id = {teller};
         UPDATE branch SET balance = balance + {delta} WHERE id = {branch};
         INSERT INTO tally VALUES ({client}, 1) ON CONFLICT (client) DO UPDATE SET n = tally.n + 1;
         INSERT INTO history VALUES ({client}, {number}, {delta})"
    );
    // Nothing can happen before COMMIT is sent.
    if attempt.gid.is_some() && session.batch_execute(&work).is_ok() {
        attempt.answer = commit(session);
    }
    attempt
}

/// Begins a transaction and learns its name.
fn begin(session: &mut Client, mode: &str) -> Option<String> {
    let messages = session
        .simple_query(&format!(
            "BEGIN; SET LOCAL multimaster.commit_mode = '{mode}'; SELECT mtm.current_gid()"
        ))
        .ok()?;
    messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    })
}

/// Whether the session ended with the error, or the whole server: then it tells nothing of the commit.
pub fn ends_session(error: &DbError) -> bool {
    matches!(
        error.parsed_severity(),
        Some(Severity::Fatal | Severity::Panic)
    )
}

fn commit(session: &mut Client) -> Answer {
    let Err(error) = session.batch_execute("COMMIT") else {
        return Answer::Committed;
    };
    if error.as_db_error().is_some_and(ends_session) {
        return Answer::Unknown;
    }
    match error.code().map(|code| code.code()) {
        // The server went down or the session was ended, with the commit under way.
        None | Some("08007") => Answer::Unknown,
        Some("XX000") => Answer::Internal,
        Some(_) => Answer::Refused,
    }
}
