//! Everything that can break does, at random, while clients move money and append to lists.
//!
//! After each round the cluster must be whole by itself: all nodes online and equal, nothing prepared, every answered commit there, nothing refused there,
//! the sum held at every read, and no forbidden cycle among the lists.

mod fault;
mod stage;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use postgres::{Client, NoTls};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::suite::Size;

use self::fault::{ANYWHERE, DISKS, Deck, REFEREES, TWO_OF_FIVE};
use self::stage::Stage;
use crate::crash::dice_named;
use crate::hosts::{DISK_BYTES, with_hosts_and_disks};
use crate::ledger::{Dice, Ledger, SUMS, check_equal};
use crate::line::{PATIENCE, await_commit};
use crate::lists::{self, Lists};
use crate::referee::with_referee;
use crate::stuck::set_everywhere;

/// The larger ones are for the long run only.
pub fn cases() -> Vec<OwnCase> {
    let mut all: Vec<OwnCase> = cases![
        the_search_finds_forbidden_histories,
        whatever_breaks_nothing_is_lost
    ];
    if Size::chosen() == Size::Long {
        let larger: Vec<OwnCase> = cases![
            whatever_breaks_of_five_nodes_nothing_is_lost,
            whatever_breaks_of_two_nodes_and_a_referee_nothing_is_lost
        ];
        all.extend(larger);
    }
    all
}

/// Overrides how many seconds faults are made.
const SECONDS_VARIABLE: &str = "MULTIMASTER_TEST_SECONDS";
/// Pause of a reader between two looks, and of one whose node serves nothing.
const READ_PAUSE: Duration = Duration::from_millis(20);
/// Load before the first fault of a round and after the last.
const QUIET: Duration = Duration::from_millis(500);
/// Faults of a round.
const FAULTS: u64 = 4;
/// Of so many faults that may meet nobody, one must have.
const SOME: u32 = 6;
/// After so many faults of any kind somebody must have been excluded.
const MANY: u64 = 30;
/// Short enough for what is stopped to be found out.
const SLOW_MS: &str = "2000";

/// How long faults are made, when the environment does not say.
fn duration(long_seconds: u64) -> Duration {
    let chosen = std::env::var(SECONDS_VARIABLE).ok();
    let chosen = chosen.and_then(|text| text.parse().ok());
    Duration::from_secs(chosen.unwrap_or(match Size::chosen() {
        Size::Ci => 20,
        Size::Full => 120,
        Size::Long => long_seconds,
    }))
}

fn the_search_finds_forbidden_histories(_: &Installation) -> Result<()> {
    lists::finds_what_it_looks_for()
}

fn whatever_breaks_nothing_is_lost(installation: &Installation) -> Result<()> {
    with_hosts_and_disks(installation, 3, DISK_BYTES, |hosts| {
        let stage = Stage::new(hosts, "three")?;
        play(stage, Deck::of(&[ANYWHERE, DISKS]), duration(1800))
    })
}

/// Two of five may be lost at once.
fn whatever_breaks_of_five_nodes_nothing_is_lost(installation: &Installation) -> Result<()> {
    with_hosts_and_disks(installation, 5, DISK_BYTES, |hosts| {
        let stage = Stage::new(hosts, "five")?;
        let deck = Deck::of(&[ANYWHERE, DISKS, TWO_OF_FIVE, TWO_OF_FIVE]);
        play(stage, deck, duration(600))
    })
}

fn whatever_breaks_of_two_nodes_and_a_referee_nothing_is_lost(
    installation: &Installation,
) -> Result<()> {
    with_referee(installation, |hosts| {
        let stage = Stage::new(hosts, "referee")?.with_referee();
        let deck = Deck::of(&[ANYWHERE, REFEREES]);
        play(stage, deck, duration(600))
    })
}

/// Rounds until the time is over.
fn play(mut stage: Stage, deck: Deck, time: Duration) -> Result<()> {
    let outcome = play_rounds(&mut stage, deck, time);
    stage.keep(&outcome)?;
    outcome
}

fn play_rounds(stage: &mut Stage, mut deck: Deck, time: Duration) -> Result<()> {
    let (seed, mut dice) = dice_named();
    stage.say(&seed)?;
    set_everywhere(
        &stage.hosts.cluster,
        "multimaster.slow_node_timeout",
        SLOW_MS,
    )?;
    let mut ledger = Ledger::open(&stage.hosts.cluster)?;
    lists::create(&mut stage.hosts.session(0)?)?;
    let started = Instant::now();
    let (mut rounds, mut seen) = (0, Seen::default());
    while rounds == 0 || started.elapsed() < time {
        rounds += 1;
        round(stage, &mut ledger, &mut deck, &mut dice, &mut seen)
            .with_context(|| format!("round {rounds}, {} s", started.elapsed().as_secs()))?;
    }
    let answers = ledger.conclude(&stage.hosts.cluster)?;
    seen.check(stage)?;
    stage.say(&format!(
        "{rounds} rounds with {} faults in {} s: {answers}; the sum held at {} reads; {} list transactions",
        seen.faults,
        started.elapsed().as_secs(),
        seen.reads,
        seen.lists
    ))?;
    stage.say(&format!(
        "{} of {} full disks were noticed, {} of {} processes met",
        stage.felt.full_disks, seen.full_disks, stage.felt.processes, seen.processes
    ))
}

/// How much was looked at.
#[derive(Default)]
struct Seen {
    faults: u64,
    full_disks: u32,
    processes: u32,
    /// Reads of the sums.
    reads: u64,
    /// Transactions on lists.
    lists: usize,
}

impl Seen {
    /// A run that looked at nothing has not passed.
    fn check(&self, stage: &Stage) -> Result<()> {
        ensure!(self.reads > 0, "the sums were never read");
        ensure!(self.lists > 0, "there was no transaction on lists");
        ensure!(
            self.full_disks < SOME || stage.felt.full_disks > 0,
            "{} disks were full, and no server noticed",
            self.full_disks
        );
        ensure!(
            self.processes < SOME || stage.felt.processes > 0,
            "of {} processes none was found",
            self.processes
        );
        let generation = stage
            .hosts
            .session(0)?
            .text("SELECT gen_num FROM mtm.status()")?;
        ensure!(
            self.faults < MANY || generation != "1",
            "after {} faults nobody was ever excluded",
            self.faults
        );
        Ok(())
    }
}

/// Some faults under load, then a look at everything.
fn round(
    stage: &mut Stage,
    ledger: &mut Ledger,
    deck: &mut Deck,
    dice: &mut Dice,
    seen: &mut Seen,
) -> Result<()> {
    let nodes: Vec<usize> = (0..stage.hosts.cluster.nodes.len()).collect();
    let load = ledger.load(&stage.hosts.cluster, &nodes, dice);
    let lists = Lists::start(&stage.hosts.cluster, dice);
    let readers = Readers::start(&stage.hosts.cluster);
    std::thread::sleep(QUIET);
    let broken = break_some(stage, deck, dice, seen);
    std::thread::sleep(QUIET);
    let transactions = lists.stop();
    let reads = readers.stop();
    let closed = ledger.close(&stage.hosts.cluster, load);
    broken?;
    closed?;
    ledger.audit(&stage.hosts.cluster)?;
    let (transactions, reads) = (transactions?, reads?);
    let cluster = &stage.hosts.cluster;
    let node = dice.below(nodes.len() as u64) as usize;
    // On a machine that stalls, a node may be taken for stuck at this moment, too.
    let mut left = None;
    wait_for("the lists to be read", PATIENCE, || {
        left = cluster
            .connect(node)
            .and_then(|client| lists::read_all(&mut Session::new(client)))
            .ok();
        Ok(left.is_some())
    })?;
    let found = lists::check(&transactions, &left.unwrap_or_default())?;
    await_commit(cluster, node, "UPDATE list SET items = '{}'")?;
    stage.say(&format!("{found}, {reads} reads of the sums"))?;
    seen.reads += reads;
    seen.lists += transactions.len();
    Ok(())
}

fn break_some(stage: &mut Stage, deck: &mut Deck, dice: &mut Dice, seen: &mut Seen) -> Result<()> {
    for _ in 0..FAULTS {
        let fault = deck.draw(stage.hosts.cluster.nodes.len(), dice);
        stage.say(&fault.describe())?;
        fault.happen(stage).with_context(|| fault.describe())?;
        seen.faults += 1;
        seen.full_disks += fault.full_disks();
        seen.processes += fault.processes();
        std::thread::sleep(Duration::from_millis(dice.below(3000)));
    }
    Ok(())
}

/// Clients that read the sums, one on each node.
struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Readers {
    fn start(cluster: &Cluster) -> Readers {
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let clients = cluster
            .nodes
            .iter()
            .map(|server| {
                let conninfo = format!("{} connect_timeout=5", server.conninfo());
                let (stop, reads) = (Arc::clone(&stop), Arc::clone(&reads));
                std::thread::spawn(move || watch_sums(&conninfo, &stop, &reads))
            })
            .collect();
        Readers {
            stop,
            reads,
            clients,
        }
    }

    fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            match client.join() {
                Ok(outcome) => outcome?,
                Err(_) => bail!("a reader panicked"),
            }
        }
        Ok(self.reads.load(Ordering::Relaxed))
    }
}

fn watch_sums(conninfo: &str, stop: &AtomicBool, reads: &AtomicU64) -> Result<()> {
    let mut session: Option<Session> = None;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(READ_PAUSE);
        let Some(open) = session.as_mut().filter(|session| !session.is_closed()) else {
            session = Client::connect(conninfo, NoTls).ok().map(Session::new);
            continue;
        };
        // A node that serves nothing says so.
        if let Ok(sums) = open.text(SUMS) {
            check_equal(&sums).with_context(|| conninfo.to_owned())?;
            reads.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
