//! A node is lost under load and comes back.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use postgres::{Client, Config, NoTls};

use super::{name, query};
use crate::cluster::{Cluster, explain, wait_for};
use crate::screen;

/// Node (from 0) that is killed.
const LOST: usize = 2;
/// How often it is shown how many commits there were.
const BEAT: Duration = Duration::from_millis(500);
/// Beats before the loss, without the node, and after its return.
const BEATS: [u32; 3] = [6, 6, 4];
/// How long the others may take to go on, and the lost one to return.
const PATIENCE: Duration = Duration::from_secs(60);
const MEMBERS: &str = "SELECT id, is_member, is_online FROM mtm.nodes()";

/// One application per node: it writes numbered payments there, one after the other.
struct Payer {
    config: Config,
    node: usize,
    /// Payments whose COMMIT was answered.
    paid: AtomicUsize,
}

impl Payer {
    /// Pays until told to stop. What was refused or not answered is tried again, so a payment that is there already was the last one.
    fn pay(&self, stop: &AtomicBool) {
        let mut session = None::<Client>;
        while !stop.load(Ordering::Relaxed) {
            let Some(client) = &mut session else {
                session = self.config.connect(NoTls).ok();
                thread::sleep(Duration::from_millis(5));
                continue;
            };
            let number = self.paid.load(Ordering::Relaxed);
            let sql = format!(
                "INSERT INTO payment VALUES ({}, {number}) ON CONFLICT DO NOTHING",
                self.node + 1
            );
            match client.batch_execute(&sql) {
                Ok(()) => {
                    self.paid.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) if client.is_closed() => session = None,
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Shows it, second by second.
pub(super) fn show(cluster: &mut Cluster) -> Result<()> {
    screen::heading("A node is lost under load, the others go on, it comes back");
    let create = "CREATE TABLE payment (node int, number int, PRIMARY KEY (node, number))";
    let mut first = cluster.connect(0)?;
    screen::statement("node1", create);
    first.batch_execute(create).map_err(explain)?;
    screen::say(
        "A client on each node inserts payments, one COMMIT each. Commits in each half second:",
    );
    let payers: Vec<Payer> = (0..cluster.nodes.len())
        .map(|node| Payer {
            config: config(cluster, node),
            node,
            paid: AtomicUsize::new(0),
        })
        .collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for payer in &payers {
            scope.spawn(|| payer.pay(&stop));
        }
        let outcome = lose_and_return(cluster, &payers);
        stop.store(true, Ordering::Relaxed);
        outcome
    })?;
    count(&mut first, &payers)?;
    screen::statement("node1", MEMBERS);
    screen::answer(query(&mut first, MEMBERS)?);
    Ok(())
}

fn config(cluster: &Cluster, node: usize) -> Config {
    let server = &cluster.nodes[node];
    let mut config = Config::new();
    config
        .host(&server.address.to_string())
        .port(server.port)
        .user("postgres")
        .dbname("postgres")
        .connect_timeout(PATIENCE);
    config
}

fn lose_and_return(cluster: &mut Cluster, payers: &[Payer]) -> Result<()> {
    let [before, without, after] = BEATS;
    watch(payers, before);
    screen::say(format!("kill -9 of every process of {}", name(LOST)));
    cluster.nodes[LOST].kill()?;
    let lost = Instant::now();
    let paid = payers[0].paid.load(Ordering::Relaxed);
    wait_for("a commit without the lost node", PATIENCE, || {
        // Of what was under way one may have been answered.
        Ok(payers[0].paid.load(Ordering::Relaxed) > paid + 1)
    })?;
    screen::good(format!(
        "node1 commits again {} ms after the loss, by itself",
        lost.elapsed().as_millis()
    ));
    watch(payers, without);
    screen::say(format!("{} is started again", name(LOST)));
    let started = Instant::now();
    cluster.nodes[LOST].start()?;
    wait_for("the lost node to be online", PATIENCE, || {
        let status = cluster
            .connect(LOST)
            .and_then(|mut client| query(&mut client, "SELECT status FROM mtm.status()"));
        Ok(status.is_ok_and(|status| status == "online"))
    })?;
    screen::good(format!(
        "{} has caught up and is online {} ms after it was started",
        name(LOST),
        started.elapsed().as_millis()
    ));
    watch(payers, after);
    Ok(())
}

/// Shows how many payments each client makes in each beat.
fn watch(payers: &[Payer], beats: u32) {
    let mut paid = progress(payers);
    for _ in 0..beats {
        thread::sleep(BEAT);
        let now = progress(payers);
        let line: Vec<String> = now
            .iter()
            .zip(&paid)
            .enumerate()
            .map(|(node, (now, before))| format!("{} {:>4}", name(node), now - before))
            .collect();
        screen::answer(line.join("   "));
        paid = now;
    }
}

fn progress(payers: &[Payer]) -> Vec<usize> {
    payers
        .iter()
        .map(|payer| payer.paid.load(Ordering::Relaxed))
        .collect()
}

/// Every payment that was answered is there, once; at most one per client has been made and not answered.
fn count(client: &mut Client, payers: &[Payer]) -> Result<()> {
    for payer in payers {
        let paid = payer.paid.load(Ordering::Relaxed);
        let sql = format!(
            "SELECT count(*) FROM payment WHERE node = {} AND number < {paid}",
            payer.node + 1
        );
        let found: usize = query(client, &sql)?
            .parse()
            .context("a count is a number")?;
        ensure!(
            found == paid,
            "{} answered {paid} payments, of which {found} are there",
            name(payer.node)
        );
    }
    let all: usize = progress(payers).iter().sum();
    screen::good(format!("all {all} payments that were answered are there"));
    Ok(())
}
