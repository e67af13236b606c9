//! What befalls a server: killed, stopped where it stands, its disk full or lost.

use super::processes::descendants_of;
use super::{START_STOP, Server};
use crate::host;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;

/// The disks of a server that has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Everything but WAL.
    Data,
    Wal,
}

/// Takes all room of a disk.
const BALLAST: &str = "ballast";

impl Server {
    /// Kills the postmaster and all its children with SIGKILL, as a power failure would.
    ///
    /// # Errors
    /// When the server does not run.
    pub fn kill(&mut self) -> Result<()> {
        let Some(child) = &self.process else {
            bail!("{} does not run", self.name)
        };
        let postmaster = child.id();
        let children = descendants_of(postmaster);
        self.signal(Signal::SIGKILL)?;
        for pid in children {
            // It may have ended by itself in the meantime.
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.wait_for_exit(START_STOP)
    }

    /// Stops every process of the server where it is (SIGSTOP).
    ///
    /// # Errors
    /// When the server does not run.
    pub fn freeze(&self) -> Result<()> {
        self.signal_all(Signal::SIGSTOP)
    }

    /// Lets a frozen server go on.
    ///
    /// # Errors
    /// When the server does not run.
    pub fn thaw(&self) -> Result<()> {
        self.signal_all(Signal::SIGCONT)
    }

    /// Stops one process of the server where it is (SIGSTOP).
    ///
    /// # Errors
    /// When there is no such process.
    pub fn freeze_process(&self, pid: i32) -> Result<()> {
        self.signal_one(pid, Signal::SIGSTOP)
    }

    /// Lets a frozen process go on.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn thaw_process(&self, pid: i32) -> Result<()> {
        self.signal_one(pid, Signal::SIGCONT)
    }

    fn signal_one(&self, pid: i32, signal: Signal) -> Result<()> {
        let own = descendants_of(self.postmaster().unwrap_or_default());
        if !own.contains(&Pid::from_raw(pid)) {
            bail!("{} has no process {pid}", self.name)
        }
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal}"))
    }

    fn signal_all(&self, signal: Signal) -> Result<()> {
        // The postmaster first: it starts nobody then.
        self.signal(signal)?;
        let postmaster = self.process.as_ref().map(Child::id).unwrap_or_default();
        for pid in descendants_of(postmaster) {
            // It may have ended by itself in the meantime.
            let _ = kill(pid, signal);
        }
        Ok(())
    }

    /// Sets a variable of the server's environment. Takes effect at the next start.
    pub fn set_variable(&mut self, name: &str, value: impl Into<OsString>) {
        self.environment.push((name.to_owned(), value.into()));
    }

    /// Takes all room that is left on one of the server's own disks.
    ///
    /// # Errors
    /// When the server shares its disk.
    pub fn fill_disk(&self, disk: Disk) -> Result<()> {
        let mut ballast = File::create(self.ballast(disk)?)?;
        let block = [0; 64 * 1024];
        while std::io::Write::write_all(&mut ballast, &block).is_ok() {}
        Ok(())
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// When nothing was taken.
    pub fn free_disk(&self, disk: Disk) -> Result<()> {
        fs::remove_file(self.ballast(disk)?).context("the disk was not full")
    }

    fn ballast(&self, disk: Disk) -> Result<PathBuf> {
        if !self.own_disk {
            bail!("{} has no disk of its own", self.name)
        }
        let place = match disk {
            Disk::Data => self.data.clone(),
            Disk::Wal => self.wal_disk(),
        };
        Ok(place.join(BALLAST))
    }

    /// Moves the data directory of a stopped server to `place`, and what is there to where it was; an empty directory if that is nothing.
    ///
    /// # Errors
    /// When a directory cannot be moved.
    pub fn exchange_data(&self, place: &Path) -> Result<()> {
        let between = place.with_extension("between");
        fs::rename(&self.data, &between).context("cannot move the data directory")?;
        if place.exists() {
            fs::rename(place, &self.data).context("cannot move the other directory")?;
        } else {
            self.make_data_dir()?;
        }
        fs::rename(&between, place).context("cannot move the data directory")
    }

    /// Loses everything that a stopped server had on its disk but for its configuration, which is moved to `keep`.
    ///
    /// # Errors
    /// When a file cannot be moved or removed.
    pub fn lose_data(&self, keep: &Path) -> Result<()> {
        for name in ["postgresql.conf", "pg_hba.conf"] {
            fs::copy(self.data.join(name), keep.join(name))
                .with_context(|| format!("cannot keep {name}"))?;
            host::give_to_server(&keep.join(name))?;
        }
        fs::remove_dir_all(&self.data)?;
        self.make_data_dir()
    }

    fn make_data_dir(&self) -> Result<()> {
        fs::create_dir(&self.data)?;
        fs::set_permissions(&self.data, fs::Permissions::from_mode(0o700))?;
        host::give_to_server(&self.data)
    }
}
