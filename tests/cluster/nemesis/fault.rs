//! What can break, which of it comes next and what of it together, and how it is made and taken back.

use std::time::Duration;

use anyhow::Result;
use multimaster_tests::Session;
use xtask::cluster::wait_for;
use xtask::server::{Disk, Server};

use super::stage::Stage;
use crate::hosts::PATIENCE;
use crate::kill;
use crate::ledger::Dice;
use crate::referee::REFEREE;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One node without all others, and without the referee.
    Isolate,
    /// Two nodes without each other.
    Cut,
    /// One direction between them.
    CutOneWay,
    /// Two nodes on one side, all others on the other.
    Split,
    /// Every process of a node stands still.
    Freeze,
    /// One process does.
    FreezeProcess,
    /// All processes of a node, by SIGKILL.
    KillNode,
    KillTwo,
    /// The postmaster alone.
    KillPostmaster,
    /// Another process.
    KillProcess,
    StopImmediately,
    Stop,
    RestartAll,
    FullData,
    FullWal,
    LoseReferee,
    CutFromReferee,
}

/// What befalls any cluster.
pub const ANYWHERE: &[Kind] = &[
    Kind::Isolate,
    Kind::Cut,
    Kind::CutOneWay,
    Kind::Freeze,
    Kind::FreezeProcess,
    Kind::KillNode,
    Kind::KillPostmaster,
    Kind::KillProcess,
    Kind::StopImmediately,
    Kind::Stop,
    Kind::RestartAll,
];
/// What befalls servers with disks of their own.
pub const DISKS: &[Kind] = &[Kind::FullData, Kind::FullWal];
/// What five nodes bear.
pub const TWO_OF_FIVE: &[Kind] = &[Kind::Split, Kind::KillTwo];
/// What befalls two nodes with a referee.
pub const REFEREES: &[Kind] = &[Kind::LoseReferee, Kind::CutFromReferee];

/// What breaks connections; all of them are mended at once.
const CUTS: &[Kind] = &[
    Kind::Isolate,
    Kind::Cut,
    Kind::CutOneWay,
    Kind::Split,
    Kind::CutFromReferee,
];
/// What does not last.
const AT_ONCE: &[Kind] = &[
    Kind::KillPostmaster,
    Kind::RestartAll,
    Kind::FullData,
    Kind::FullWal,
];

/// Processes that are killed or stopped.
const PROCESSES: [&str; 9] = [
    "client backend",
    "walsender",
    "walwriter",
    "checkpointer",
    "multimaster receiver",
    "multimaster apply worker",
    "multimaster finisher",
    "multimaster monitor",
    "multimaster arbiter",
];
/// A disk stays full for at least so long: what is in memory already does not need it.
const FULL_AT_LEAST: Duration = Duration::from_secs(2);
/// Segments of WAL that are begun on a full disk. The next one may have been made before.
const SEGMENTS: u32 = 3;

/// The kinds in random order, all of them before any comes again.
pub struct Deck {
    kinds: Vec<Kind>,
    left: Vec<Kind>,
}

impl Deck {
    pub fn of(kinds: &[&[Kind]]) -> Deck {
        Deck {
            kinds: kinds.concat(),
            left: Vec::new(),
        }
    }

    /// The next fault, and sometimes another one that happens while it lasts.
    pub fn draw(&mut self, nodes: usize, dice: &mut Dice) -> Fault {
        let mut fault = self.draw_one(nodes, dice);
        if dice.below(3) == 0 {
            let inner = self.draw_one(nodes, dice);
            if fault.bears(&inner) {
                fault.inner = Some(Box::new(inner));
            } else {
                self.left.push(inner.kind);
            }
        }
        fault
    }

    fn draw_one(&mut self, nodes: usize, dice: &mut Dice) -> Fault {
        if self.left.is_empty() {
            self.left.clone_from(&self.kinds);
        }
        let kind = dice.below(self.left.len() as u64) as usize;
        let node = dice.below(nodes as u64) as usize;
        let other = (node + 1 + dice.below(nodes as u64 - 1) as usize) % nodes;
        Fault {
            kind: self.left.swap_remove(kind),
            node,
            other,
            process: PROCESSES[dice.below(PROCESSES.len() as u64) as usize],
            lasts: Duration::from_millis(200 + dice.below(5000)),
            inner: None,
        }
    }
}

/// What is done to the cluster, and for how long it stays so.
#[derive(Clone, Debug)]
pub struct Fault {
    kind: Kind,
    /// Whom it befalls (from 0).
    node: usize,
    /// The second one, where two are meant.
    other: usize,
    /// Which process, where one is meant.
    process: &'static str,
    lasts: Duration,
    /// What happens in the middle of it.
    inner: Option<Box<Fault>>,
}

impl Fault {
    /// Whether the other one can happen while this one lasts, and both can be taken back.
    fn bears(&self, inner: &Fault) -> bool {
        let apart = |node: usize| !self.nodes().contains(&node);
        !AT_ONCE.contains(&self.kind)
            && inner.kind != Kind::RestartAll
            && !(CUTS.contains(&self.kind) && CUTS.contains(&inner.kind))
            && (CUTS.contains(&self.kind) || inner.nodes().into_iter().all(apart))
    }

    /// Whom it befalls.
    fn nodes(&self) -> Vec<usize> {
        match self.kind {
            Kind::RestartAll | Kind::LoseReferee => Vec::new(),
            Kind::Cut | Kind::CutOneWay | Kind::Split | Kind::KillTwo => {
                vec![self.node, self.other]
            }
            _ => vec![self.node],
        }
    }

    /// One line about it.
    pub fn describe(&self) -> String {
        let own = self.describe_alone();
        match &self.inner {
            Some(inner) => format!("{own}, meanwhile {}", inner.describe()),
            None => own,
        }
    }

    fn describe_alone(&self) -> String {
        let numbers: String = self
            .nodes()
            .iter()
            .map(|node| format!("{} ", node + 1))
            .collect();
        let process = match self.kind {
            Kind::FreezeProcess | Kind::KillProcess => format!("({}) ", self.process),
            _ => String::new(),
        };
        let ms = self.lasts.as_millis();
        format!("{:?} {numbers}{process}for {ms} ms", self.kind)
    }

    /// How many disks it fills.
    pub fn full_disks(&self) -> u32 {
        self.count(DISKS)
    }

    /// How many single processes it is meant for.
    pub fn processes(&self) -> u32 {
        self.count(&[Kind::FreezeProcess, Kind::KillProcess])
    }

    fn count(&self, kinds: &[Kind]) -> u32 {
        let inner = self.inner.as_ref().map_or(0, |inner| inner.count(kinds));
        u32::from(kinds.contains(&self.kind)) + inner
    }

    /// Makes the fault, lets it last, and takes it back.
    ///
    /// # Errors
    /// When it cannot be made or taken back.
    pub fn happen(&self, stage: &mut Stage) -> Result<()> {
        let (node, other) = (self.node, self.other);
        match self.kind {
            Kind::Isolate | Kind::Cut | Kind::CutOneWay | Kind::Split | Kind::CutFromReferee => {
                self.cut(stage)?;
                self.last(stage)?;
                stage.hosts.network.heal()?;
            }
            Kind::Freeze => {
                stage.node(node).freeze()?;
                self.last(stage)?;
                stage.node(node).thaw()?;
            }
            Kind::FreezeProcess => self.freeze_process(stage)?,
            Kind::KillNode => self.restart(stage, &[node], Server::kill)?,
            Kind::KillTwo => self.restart(stage, &[node, other], Server::kill)?,
            Kind::StopImmediately => self.restart(stage, &[node], Server::stop_immediately)?,
            Kind::Stop => self.restart(stage, &[node], Server::stop)?,
            Kind::KillPostmaster => kill::kill_postmaster(&mut stage.hosts.cluster, node)?,
            Kind::KillProcess => {
                // It may not be there at this moment, or the node does not answer.
                let killed = kill::kill_process(&stage.hosts.cluster, node, self.process);
                stage.felt.processes += u32::from(killed.is_ok());
                self.last(stage)?;
            }
            Kind::RestartAll => kill::kill_all(&mut stage.hosts.cluster)?,
            Kind::FullData => self.fill(stage, Disk::Data)?,
            Kind::FullWal => self.fill(stage, Disk::Wal)?,
            Kind::LoseReferee => {
                stage.referee()?.stop_immediately()?;
                self.last(stage)?;
                stage.referee()?.start()?;
            }
        }
        Ok(())
    }

    /// The fault stays as it is for a while.
    fn last(&self, stage: &mut Stage) -> Result<()> {
        let Some(inner) = &self.inner else {
            std::thread::sleep(self.lasts);
            return Ok(());
        };
        std::thread::sleep(self.lasts / 2);
        let outcome = inner.happen(stage);
        std::thread::sleep(self.lasts / 2);
        outcome
    }

    fn cut(&self, stage: &mut Stage) -> Result<()> {
        let network = &mut stage.hosts.network;
        match self.kind {
            Kind::Isolate => network.isolate(self.node),
            Kind::Cut => network.cut(self.node, self.other),
            Kind::Split => network.split(&[self.node, self.other]),
            Kind::CutFromReferee => network.cut(self.node, REFEREE),
            _ => network.cut_one_way(self.node, self.other),
        }
    }

    /// Ends servers in some way, and starts them after a while.
    fn restart(
        &self,
        stage: &mut Stage,
        nodes: &[usize],
        end: impl Fn(&mut Server) -> Result<()>,
    ) -> Result<()> {
        nodes.iter().try_for_each(|node| end(stage.node(*node)))?;
        self.last(stage)?;
        nodes.iter().try_for_each(|node| stage.node(*node).start())
    }

    fn freeze_process(&self, stage: &mut Stage) -> Result<()> {
        // As above; also when it is to go on it may be gone.
        let Ok(pid) = kill::process(&stage.hosts.cluster, self.node, self.process) else {
            return self.last(stage);
        };
        let frozen = stage.node(self.node).freeze_process(pid);
        stage.felt.processes += u32::from(frozen.is_ok());
        self.last(stage)?;
        let _ = stage.node(self.node).thaw_process(pid);
        Ok(())
    }

    fn fill(&self, stage: &mut Stage, disk: Disk) -> Result<()> {
        let server = stage.node(self.node);
        let before = complaints(server);
        server.fill_disk(disk)?;
        for _ in 0..SEGMENTS {
            // On a server that cannot write WAL this is the last statement of all sessions.
            let _ = server
                .connect()
                .and_then(|client| Session::new(client).text("SELECT pg_switch_wal()"));
        }
        std::thread::sleep(self.lasts.max(FULL_AT_LEAST));
        let felt = complaints(server) > before;
        server.free_disk(disk)?;
        // PostgreSQL ends when it cannot write WAL, first its sessions and then, if it cannot start again, itself.
        wait_for("the server whose disk was full", PATIENCE, || {
            if !server.is_running() {
                server.start()?;
            }
            Ok(server.connect().is_ok())
        })?;
        stage.felt.full_disks += u32::from(felt);
        Ok(())
    }
}

/// How often the server has found no room.
fn complaints(server: &Server) -> usize {
    server.log_text().matches("No space left on device").count()
}
