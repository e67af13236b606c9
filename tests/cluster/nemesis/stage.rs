//! Where a nemesis plays: the hosts, what may befall them, and a log of it.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use xtask::host;
use xtask::server::Server;

use crate::hosts::Hosts;

/// What has met somebody: a disk that is full for a moment may go unnoticed, and a process may not be there when it is looked for.
#[derive(Default)]
pub struct Felt {
    /// Full disks that a server has complained of.
    pub full_disks: u32,
    /// Processes that were killed or stopped.
    pub processes: u32,
}

/// The nodes of a cluster, and the referee if there is one.
pub struct Stage<'h> {
    pub hosts: &'h mut Hosts,
    referee: Option<Server>,
    pub felt: Felt,
    journal: Journal,
}

impl<'h> Stage<'h> {
    /// # Errors
    /// When no log can be written.
    pub fn new(hosts: &'h mut Hosts, name: &str) -> Result<Stage<'h>> {
        Ok(Stage {
            hosts,
            referee: None,
            felt: Felt::default(),
            journal: Journal::new(name)?,
        })
    }

    /// The last host is no node but the referee.
    pub fn with_referee(mut self) -> Stage<'h> {
        self.referee = self.hosts.cluster.nodes.pop();
        self
    }

    /// A node (from 0).
    pub fn node(&mut self, node: usize) -> &mut Server {
        &mut self.hosts.cluster.nodes[node]
    }

    /// # Errors
    /// When there is none.
    pub fn referee(&mut self) -> Result<&mut Server> {
        self.referee.as_mut().context("there is no referee")
    }

    /// Shows a line and keeps it.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn say(&mut self, text: &str) -> Result<()> {
        println!("  {text}");
        self.journal.write(text)
    }

    /// Keeps why the play ended.
    pub fn keep(&mut self, outcome: &Result<()>) -> Result<()> {
        match outcome {
            Ok(()) => self.journal.write("passed"),
            Err(error) => self.journal.write(&format!("FAILED: {error:#}")),
        }
    }
}

impl Drop for Stage<'_> {
    /// The logs of all hosts are shown together.
    fn drop(&mut self) {
        self.hosts.cluster.nodes.extend(self.referee.take());
    }
}

/// A log of what was done that stays, whatever becomes of the run.
struct Journal(File);

impl Journal {
    fn new(name: &str) -> Result<Journal> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let directory: PathBuf = host::checkout().join("target").join("nemesis");
        std::fs::create_dir_all(&directory)?;
        let path = directory.join(format!("{name}-{}.log", now.as_secs()));
        println!("  log: {}", path.display());
        File::create(&path)
            .map(Journal)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn write(&mut self, text: &str) -> Result<()> {
        writeln!(self.0, "{text}").context("cannot write the log")
    }
}
