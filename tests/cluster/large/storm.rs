//! Large and small transactions of all nodes at random, while processes of the streams end.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use multimaster_tests::Session;
use xtask::cluster::Cluster;
use xtask::installation::Installation;

use super::{PIECE_ROWS, insert, session, with_nodes};
use crate::crash;
use crate::ledger::Dice;

/// Large transactions of each client, by turns committed and refused.
const LARGE: u64 = 15;
/// How often some process of the stream is ended meanwhile.
const DEATH_INTERVAL: Duration = Duration::from_millis(400);

/// What a client was told of its transactions.
#[derive(Default)]
struct Told {
    committed: BTreeSet<i64>,
    refused: BTreeSet<i64>,
}

/// One client of the storm; its transactions leave their number in the table `told`.
struct Client {
    conninfo: String,
    number: i64,
    dice: Dice,
    told: Told,
}

pub fn large_and_small_transactions_of_all_nodes_leave_equal_rows(
    installation: &Installation,
) -> Result<()> {
    let mut dice = crash::dice();
    with_nodes(installation, &[], |cluster| {
        let mut setup = session(cluster, 0)?;
        setup.run("CREATE TABLE told (number bigint PRIMARY KEY)")?;
        setup.run(&insert(1, 0))?;
        let over = AtomicBool::new(false);
        let told = thread::scope(|scope| {
            let mut clients = (0..6).map(|place| Client {
                conninfo: cluster.nodes[place % 3].conninfo(),
                number: 1_000_000 * (place as i64 + 1),
                dice: Dice::new(dice.below(u64::MAX)),
                told: Told::default(),
            });
            let large: Vec<_> = clients
                .by_ref()
                .take(3)
                .map(|mut client| {
                    scope.spawn(move || {
                        (0..LARGE).try_for_each(|_| client.large())?;
                        Ok::<_, anyhow::Error>(client.told)
                    })
                })
                .collect();
            let small: Vec<_> = clients
                .map(|mut client| {
                    let over = &over;
                    scope.spawn(move || {
                        while !over.load(Ordering::Relaxed) {
                            client.small()?;
                        }
                        Ok::<_, anyhow::Error>(client.told)
                    })
                })
                .collect();
            while !large.iter().all(thread::ScopedJoinHandle::is_finished) {
                // Deaths come at any moment: there is nothing to wait for.
                thread::sleep(DEATH_INTERVAL);
                let _ = end_some_process(cluster, &mut dice);
            }
            over.store(true, Ordering::Relaxed);
            large
                .into_iter()
                .chain(small)
                .map(|client| {
                    client
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect::<Result<Vec<Told>>>()
        })?;
        let large: usize = told[..3].iter().map(|told| told.committed.len()).sum();
        let small: usize = told[3..].iter().map(|told| told.committed.len()).sum();
        println!("  {large} large and {small} small transactions committed");
        ensure!(large > 0 && small > 0, "nothing committed");
        for node in 0..cluster.nodes.len() {
            let there: BTreeSet<i64> = session(cluster, node)?
                .text("SELECT number FROM told")?
                .lines()
                .filter_map(|line| line.parse().ok())
                .collect();
            for told in &told {
                ensure!(
                    told.committed.is_subset(&there),
                    "node {}: a commit is lost",
                    node + 1
                );
                ensure!(
                    told.refused.is_disjoint(&there),
                    "node {}: a refused transaction is there",
                    node + 1
                );
            }
        }
        Ok(())
    })
}

/// Ends a walsender or an apply worker.
fn end_some_process(cluster: &Cluster, dice: &mut Dice) -> Result<()> {
    let node = dice.below(3) as usize;
    let kind = ["walsender", "multimaster apply worker%"][dice.below(2) as usize];
    session(cluster, node)?.run(&format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE '{kind}' ORDER BY random() LIMIT 1"
    ))
}

impl Client {
    fn large(&mut self) -> Result<()> {
        let mut statements = Vec::new();
        for step in 0..2 + self.dice.below(4) {
            if self.dice.below(4) == 0 {
                statements.push(format!("SAVEPOINT s{step}"));
                statements.push(self.step());
                let kept = self.dice.below(2) == 0;
                let end = if kept { "RELEASE" } else { "ROLLBACK TO" };
                statements.push(format!("{end} s{step}"));
            }
            statements.push(self.step());
        }
        self.transaction(&statements)
    }

    /// A statement that changes many rows.
    fn step(&mut self) -> String {
        let first = self.dice.below(u64::from(PIECE_ROWS));
        let last = first + 100 + self.dice.below(1500);
        match self.dice.below(4) {
            0 => format!("UPDATE t SET v = v + 1 WHERE id BETWEEN {first} AND {last}"),
            1 => format!("DELETE FROM t WHERE id BETWEEN {first} AND {first} + 20"),
            2 => format!(
                "INSERT INTO t SELECT g, 1 FROM generate_series({first}, {last}) g ON CONFLICT (id) DO UPDATE SET v = t.v + 1"
            ),
            _ => {
                let own = self.number * 1000 % 2_000_000_000 + self.dice.below(1_000_000) as i64;
                format!(
                    "INSERT INTO t SELECT g, 2 FROM generate_series({own}, {own} + 1500) g ON CONFLICT DO NOTHING"
                )
            }
        }
    }

    fn small(&mut self) -> Result<()> {
        let id = self.dice.below(u64::from(PIECE_ROWS));
        self.transaction(&[format!("UPDATE t SET v = v + 1 WHERE id = {id}")])
    }

    /// Runs a transaction and notes what became of it. Errors that a client of a cluster has to expect are none.
    fn transaction(&mut self, statements: &[String]) -> Result<()> {
        self.number += 1;
        let number = self.number;
        let client = postgres::Client::connect(&self.conninfo, postgres::NoTls);
        let mut client = Session::new(client.context("cannot connect")?);
        let before = std::iter::once("BEGIN".to_owned())
            .chain(statements.iter().cloned())
            .chain([format!("INSERT INTO told VALUES ({number})")]);
        for statement in before {
            if let Err(error) = client.batch_execute(&statement) {
                self.told.refused.insert(number);
                return expected(&error);
            }
        }
        match client.batch_execute("COMMIT") {
            Ok(()) => {
                self.told.committed.insert(number);
            }
            Err(error) => {
                expected(&error)?;
                let nothing_happened = error.code().is_some_and(|code| code.code() == "40001");
                if nothing_happened {
                    self.told.refused.insert(number);
                }
            }
        }
        Ok(())
    }
}

/// A conflict, an end of the session because of one, or an unknown outcome; nothing else.
fn expected(error: &postgres::Error) -> Result<()> {
    match error.code() {
        None => Ok(()),
        Some(code) if code.code().starts_with("40") || code.code() == "08007" => Ok(()),
        Some(code) => Err(anyhow!("{}: {error:?}", code.code())),
    }
}
