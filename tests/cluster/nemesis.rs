//! Everything that can break does, at random, while clients move money and append to lists.
//!
//! After each round the cluster must be whole by itself: all nodes online and equal, nothing prepared, every answered commit there, nothing refused there,
//! the sum held at every read, and no forbidden cycle among the lists.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use multimaster_tests::{OwnCase, Session, cases};
use postgres::{Client, NoTls};
use xtask::cluster::Cluster;
use xtask::installation::Installation;
use xtask::suite::Size;

use crate::crash::dice;
use crate::hosts::{DISK_BYTES, Hosts, with_hosts_and_disks};
use crate::kill;
use crate::ledger::{Dice, Ledger, SUMS, check_equal};
use crate::lists::{self, Lists};

pub fn cases() -> Vec<OwnCase> {
    cases![
        the_search_finds_forbidden_histories,
        whatever_breaks_nothing_is_lost
    ]
}

/// Clients that move money, by node.
const MOVERS: [usize; 3] = [0, 1, 2];
/// Pause of a reader between two looks, and of one whose node serves nothing.
const READ_PAUSE: Duration = Duration::from_millis(20);
/// Load before the first fault of a round and after the last.
const QUIET: Duration = Duration::from_millis(500);
/// Faults of a round.
const FAULTS: u64 = 4;

/// How long faults are made.
fn duration() -> Duration {
    Duration::from_secs(match Size::chosen() {
        Size::Ci => 20,
        Size::Full => 120,
        Size::Long => 1800,
    })
}

/// What is done to the cluster, and for how long it stays so.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Isolate(usize),
    Cut(usize, usize),
    CutOneWay(usize, usize),
    Freeze(usize),
    KillNode(usize),
    KillPostmaster(usize),
    KillProcess(usize, &'static str),
    StopImmediately(usize),
    Stop(usize),
    RestartAll,
    FullDisk(usize),
}

const PROCESSES: [&str; 6] = [
    "client backend",
    "walsender",
    "multimaster receiver",
    "multimaster apply worker",
    "multimaster arbiter",
    "checkpointer",
];

impl Fault {
    fn random(dice: &mut Dice) -> Fault {
        let node = dice.below(3) as usize;
        let other = (node + 1 + dice.below(2) as usize) % 3;
        match dice.below(11) {
            0 => Fault::Isolate(node),
            1 => Fault::Cut(node, other),
            2 => Fault::CutOneWay(node, other),
            3 => Fault::Freeze(node),
            4 => Fault::KillNode(node),
            5 => Fault::KillPostmaster(node),
            6 => {
                let kind = PROCESSES[dice.below(PROCESSES.len() as u64) as usize];
                Fault::KillProcess(node, kind)
            }
            7 => Fault::StopImmediately(node),
            8 => Fault::Stop(node),
            9 => Fault::RestartAll,
            _ => Fault::FullDisk(node),
        }
    }

    /// Makes the fault, lets it last, and takes it back.
    fn happen(self, hosts: &mut Hosts, lasts: Duration) -> Result<()> {
        let nodes = &mut hosts.cluster.nodes;
        match self {
            Fault::Isolate(node) => hosts.network.isolate(node)?,
            Fault::Cut(one, other) => hosts.network.cut(one, other)?,
            Fault::CutOneWay(from, to) => hosts.network.cut_one_way(from, to)?,
            Fault::Freeze(node) => nodes[node].freeze()?,
            Fault::KillNode(node) => nodes[node].kill()?,
            Fault::KillPostmaster(node) => return kill::kill_postmaster(&mut hosts.cluster, node),
            Fault::KillProcess(node, kind) => {
                // It may not be there at this moment, or the node does not answer.
                let _ = kill::kill_process(&hosts.cluster, node, kind);
            }
            Fault::StopImmediately(node) => nodes[node].stop_immediately()?,
            Fault::Stop(node) => nodes[node].stop()?,
            Fault::RestartAll => return kill::kill_all(&mut hosts.cluster),
            Fault::FullDisk(node) => nodes[node].fill_disk()?,
        }
        std::thread::sleep(lasts);
        match self {
            Fault::Isolate(_) | Fault::Cut(..) | Fault::CutOneWay(..) => hosts.network.heal(),
            Fault::Freeze(node) => hosts.cluster.nodes[node].thaw(),
            Fault::KillNode(node) | Fault::StopImmediately(node) | Fault::Stop(node) => {
                hosts.cluster.nodes[node].start()
            }
            Fault::FullDisk(node) => {
                hosts.cluster.nodes[node].free_disk()?;
                if hosts.cluster.nodes[node].is_running() {
                    return Ok(());
                }
                // PostgreSQL ends when it cannot write WAL.
                hosts.cluster.nodes[node].start()
            }
            Fault::KillPostmaster(_) | Fault::KillProcess(..) | Fault::RestartAll => Ok(()),
        }
    }
}

fn the_search_finds_forbidden_histories(_: &Installation) -> Result<()> {
    lists::finds_what_it_looks_for()
}

fn whatever_breaks_nothing_is_lost(installation: &Installation) -> Result<()> {
    with_hosts_and_disks(installation, 3, DISK_BYTES, |hosts| {
        let mut dice = dice();
        let mut ledger = Ledger::open(&hosts.cluster)?;
        lists::create(&mut hosts.session(0)?)?;
        let started = Instant::now();
        let (mut rounds, mut reads) = (0, 0);
        while rounds == 0 || started.elapsed() < duration() {
            rounds += 1;
            reads += round(hosts, &mut ledger, &mut dice)
                .with_context(|| format!("round {rounds}, {} s", started.elapsed().as_secs()))?;
        }
        let seen = ledger.conclude(&hosts.cluster)?;
        println!(
            "  {rounds} rounds in {} s: {seen}; the sum held at {reads} reads",
            started.elapsed().as_secs()
        );
        Ok(())
    })
}

/// Some faults under load, then a look at everything; returns how often the sum was read.
fn round(hosts: &mut Hosts, ledger: &mut Ledger, dice: &mut Dice) -> Result<u64> {
    let load = ledger.load(&hosts.cluster, &MOVERS, dice);
    let lists = Lists::start(&hosts.cluster, dice);
    let readers = Readers::start(&hosts.cluster);
    std::thread::sleep(QUIET);
    let mut broken = Ok(());
    for _ in 0..FAULTS {
        let fault = Fault::random(dice);
        let lasts = Duration::from_millis(200 + dice.below(5000));
        println!("  {fault:?} for {} ms", lasts.as_millis());
        broken = fault
            .happen(hosts, lasts)
            .with_context(|| format!("{fault:?}"));
        if broken.is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(dice.below(3000)));
    }
    std::thread::sleep(QUIET);
    let transactions = lists.stop();
    let reads = readers.stop();
    ledger.close(&hosts.cluster, load)?;
    broken?;
    ledger.audit(&hosts.cluster)?;
    let reads = reads?;
    let mut session = hosts.session(dice.below(3) as usize)?;
    let found = lists::check(&transactions?, &lists::read_all(&mut session)?)?;
    println!("  {found}");
    session.run("UPDATE list SET items = '{}'")?;
    Ok(reads)
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
