//! One PostgreSQL server of our own: created ([`create`]), started, stopped, broken ([`faults`]), and gone when dropped.

mod create;
mod faults;
mod processes;

pub use self::faults::Disk;
pub use self::processes::{descendants_of, end_abandoned, kill_all};

use self::processes::{describe, running, working_in};
use crate::installation::Installation;
use crate::{command, host, network};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postgres::{Client, NoTls};
use std::ffi::OsString;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to start or to stop.
const START_STOP: Duration = Duration::from_secs(60);

/// What makes one server differ from another.
#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    /// Where the server listens and where its peers reach it.
    pub address: IpAddr,
    /// The network namespace that it runs in, when it is not this program's own.
    pub namespace: Option<String>,
    /// Size of each of the two disks that it has for itself, for data and for WAL, when it does not share one. Needs root.
    pub disk_bytes: Option<u64>,
    /// Lines of postgresql.conf; later ones win.
    pub settings: Vec<(String, String)>,
}

/// A server; dropping it stops it and removes its data.
#[derive(Debug)]
pub struct Server {
    pub name: String,
    pub address: IpAddr,
    pub port: u16,
    pub arbiter_port: u16,
    namespace: Option<String>,
    data: PathBuf,
    /// The data directory and that of the WAL are file systems of their own.
    own_disk: bool,
    log: PathBuf,
    installation: Installation,
    environment: Vec<(String, OsString)>,
    process: Option<Child>,
}

impl Server {
    /// Settings that only some minor releases know, and refuse to start with or without.
    ///
    /// # Errors
    /// When the server's binary cannot be asked.
    pub fn adjust_to_release(&self) -> Result<()> {
        let mut ask = host::server_command(self.installation.program("postgres"))?;
        ask.args(["-C", "output_plugin_libraries", "-D"])
            .arg(&self.data);
        if command::run(&mut ask)?.status.success() {
            self.configure(&settings(&[(
                "output_plugin_libraries",
                "pgoutput, test_decoding, multimaster",
            )]))?;
        }
        Ok(())
    }

    /// Appends lines to postgresql.conf; the last line of a name wins. Takes effect at the next start or reload.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, settings: &[(String, String)]) -> Result<()> {
        let file = self.data.join("postgresql.conf");
        let mut text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for (name, value) in settings {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Starts the server and waits until it takes connections.
    ///
    /// # Errors
    /// When it does not; the message ends with the end of its log.
    pub fn start(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("{} is already running", self.name);
        }
        self.await_orphans()?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot write {}", self.log.display()))?;
        let program = self.installation.program("postgres");
        let mut postgres = match &self.namespace {
            Some(namespace) => network::server_command_in(namespace, &program)?,
            None => host::server_command(program)?,
        };
        postgres
            .arg("-D")
            .arg(&self.data)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C at the terminal must reach us alone; we stop the servers in order.
            .process_group(0);
        let child = postgres
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))?;
        running().insert(child.id().cast_signed());
        self.process = Some(child);
        self.wait_until_ready()
    }

    /// Waits for processes that a killed postmaster left: they hold its shared memory until they notice, and no server starts meanwhile.
    fn await_orphans(&self) -> Result<()> {
        let data = fs::canonicalize(&self.data)
            .with_context(|| format!("cannot find {}", self.data.display()))?;
        let deadline = Instant::now() + START_STOP;
        while !working_in(&data).is_empty() {
            if Instant::now() > deadline {
                bail!(
                    "processes of an earlier life of {} stay:\n{}",
                    self.name,
                    describe(&working_in(&data))
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_STOP;
        loop {
            if let Some(status) = self.exited()? {
                bail!(
                    "{} did not start ({status})\n{}",
                    self.name,
                    self.log_tail(30)
                );
            }
            match self.connect() {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    bail!(
                        "{} takes no connections: {error:#}\n{}",
                        self.name,
                        self.log_tail(30)
                    );
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// How the server ended, if it did by itself.
    fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.process else {
            return Ok(None);
        };
        let status = child
            .try_wait()
            .context("cannot ask for the server's state")?;
        if status.is_some() {
            running().remove(&child.id().cast_signed());
            self.process = None;
        }
        Ok(status)
    }

    /// Does the postmaster run?
    pub fn is_running(&mut self) -> bool {
        matches!(self.exited(), Ok(None)) && self.process.is_some()
    }

    /// Stops the server in good order (PostgreSQL's "fast" shutdown).
    ///
    /// # Errors
    /// When it takes longer than a minute.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::SIGINT)?;
        self.wait_for_exit(START_STOP)
    }

    /// Ends the server without a checkpoint (PostgreSQL's "immediate" shutdown).
    ///
    /// # Errors
    /// When it takes longer than a minute.
    pub fn stop_immediately(&mut self) -> Result<()> {
        self.signal(Signal::SIGQUIT)?;
        self.wait_for_exit(START_STOP)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let Some(child) = &self.process else {
            bail!("{} does not run", self.name)
        };
        kill(Pid::from_raw(child.id().cast_signed()), signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    fn wait_for_exit(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.exited()?.is_none() && self.process.is_some() {
            if Instant::now() > deadline {
                bail!(
                    "{} does not stop; these are left:\n{}\n{}",
                    self.name,
                    describe(&descendants_of(self.postmaster().unwrap_or_default())),
                    self.log_tail(30)
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Process id of the postmaster.
    pub fn postmaster(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// How libpq reaches this server; also what peers are told.
    pub fn conninfo(&self) -> String {
        format!(
            "host={} port={} user=postgres dbname=postgres",
            self.address, self.port
        )
    }

    /// A new session.
    ///
    /// # Errors
    /// When the server refuses it.
    pub fn connect(&self) -> Result<Client> {
        self.connect_to("postgres")
    }

    /// A new session in another database.
    ///
    /// # Errors
    /// When the server refuses it.
    pub fn connect_to(&self, database: &str) -> Result<Client> {
        let mut config = postgres::Config::new();
        config
            .host(&self.address.to_string())
            .port(self.port)
            .user("postgres")
            .dbname(database)
            .application_name("xtask")
            .connect_timeout(Duration::from_secs(10));
        config
            .connect(NoTls)
            .with_context(|| format!("cannot connect to {}", self.name))
    }

    /// Where a program of this server's installation is.
    pub fn program(&self, name: &str) -> PathBuf {
        self.installation.program(name)
    }

    /// Where this server finds libraries.
    pub fn library_dir(&self) -> &Path {
        self.installation.library_dir()
    }

    /// A program of PostgreSQL (psql, pgbench, pg_dump) that will talk to this server.
    pub fn client_program(&self, name: &str) -> Command {
        let mut program = Command::new(self.installation.program(name));
        program
            .env("PGHOST", self.address.to_string())
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres")
            .env("PGOPTIONS", "-c client_min_messages=warning")
            // Configuration of whoever runs us must not leak in.
            .env("PSQLRC", "/dev/null")
            .env_remove("PGSERVICE");
        program
    }

    /// Everything that the server logged.
    pub fn log_text(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| format!("(no log: {error})"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        format!(
            "--- end of {} ---\n{}",
            self.log.display(),
            command::tail(&self.log_text(), lines)
        )
    }

    /// The file that the server logs to.
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// Where WAL is, for a server with disks of its own.
    fn wal_disk(&self) -> PathBuf {
        self.data.with_file_name(format!("{}-wal", self.name))
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.is_running()
            && self.signal(Signal::SIGQUIT).is_ok()
            && self.wait_for_exit(Duration::from_secs(10)).is_err()
        {
            // Its processes hang; what they write is about to be removed anyway.
            let _ = self.kill();
        }
        if self.own_disk {
            for disk in [self.data.clone(), self.wal_disk()] {
                let _ = command::run(Command::new("umount").arg("--lazy").arg(disk));
            }
        }
        let _ = fs::remove_dir_all(&self.data);
    }
}

/// Settings from literals.
pub fn settings(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}
