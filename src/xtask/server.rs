//! One PostgreSQL server of our own: created, started, stopped, killed, and gone when dropped.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postgres::{Client, NoTls};

use crate::installation::Installation;
use crate::{command, host, network};

/// How long a server may take to start or to stop.
const START_STOP: Duration = Duration::from_secs(60);

/// Ports are taken from here, below the range that the kernel gives to outgoing connections: a stopped server finds its
/// port still free when it comes back.
const PORTS: std::ops::Range<u16> = 21_000..32_000;

/// Ports of a server that has a network namespace to itself.
const PRIVATE_PORTS: [u16; 2] = [5432, 7432];

/// Takes all room of a disk.
const BALLAST: &str = "ballast";

/// Process ids of the servers that run, for [`kill_all`].
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// What makes one server differ from another.
#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    /// Where the server listens and where its peers reach it.
    pub address: IpAddr,
    /// The network namespace that it runs in, when it is not this program's own.
    pub namespace: Option<String>,
    /// Size of the disk that it has for itself, when it does not share one. Needs root.
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
    /// The data directory is a file system of its own.
    own_disk: bool,
    log: PathBuf,
    installation: Installation,
    process: Option<Child>,
}

impl Server {
    /// Runs initdb and writes the settings; does not start the server.
    ///
    /// # Errors
    /// When initdb fails or no port is free.
    pub fn create(
        installation: &Installation,
        spec: &Spec,
        data_root: &Path,
        log_dir: &Path,
    ) -> Result<Server> {
        let server = Server::placed(installation, spec, data_root, log_dir)?;
        let mut initdb = host::server_command(installation.program("initdb"))?;
        initdb
            .args([
                "--no-sync",
                "--auth=trust",
                "--username=postgres",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
            ])
            .arg("--pgdata")
            .arg(&server.data);
        command::capture(&mut initdb)?;
        server.trust_network()?;
        server.configure(&server.base_settings())?;
        server.configure(&spec.settings)?;
        Ok(server)
    }

    /// Copies a running server, to follow it as a physical standby; does not start the copy.
    ///
    /// # Errors
    /// When pg_basebackup fails or no port is free.
    pub fn create_standby(
        installation: &Installation,
        spec: &Spec,
        primary: &Server,
        data_root: &Path,
        log_dir: &Path,
    ) -> Result<Server> {
        let server = Server::placed(installation, spec, data_root, log_dir)?;
        let mut backup = host::server_command(installation.program("pg_basebackup"))?;
        backup
            .args([
                "--no-sync",
                "--checkpoint=fast",
                "--write-recovery-conf",
                "--dbname",
            ])
            .arg(format!(
                "{} application_name={}",
                primary.conninfo(),
                spec.name
            ))
            .arg("--pgdata")
            .arg(&server.data);
        command::capture(&mut backup)?;
        server.configure(&server.base_settings())?;
        server.configure(&spec.settings)?;
        Ok(server)
    }

    /// A server with ports and an empty data directory.
    fn placed(
        installation: &Installation,
        spec: &Spec,
        data_root: &Path,
        log_dir: &Path,
    ) -> Result<Server> {
        let [port, arbiter_port] = match spec.namespace {
            // Nobody else is there.
            Some(_) => PRIVATE_PORTS,
            None => free_ports(spec.address)?,
        };
        let data = data_root.join(&spec.name);
        fs::create_dir(&data).with_context(|| format!("cannot create {}", data.display()))?;
        if let Some(bytes) = spec.disk_bytes {
            mount_disk(&data, bytes)?;
        }
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot protect {}", data.display()))?;
        host::give_to_server(&data)?;
        Ok(Server {
            name: spec.name.clone(),
            address: spec.address,
            port,
            arbiter_port,
            namespace: spec.namespace.clone(),
            own_disk: spec.disk_bytes.is_some(),
            log: log_dir.join(format!("{}.log", spec.name)),
            data,
            installation: installation.clone(),
            process: None,
        })
    }

    /// Lets the other hosts in, where the server is one by itself; initdb trusts the loopback address only.
    fn trust_network(&self) -> Result<()> {
        if self.namespace.is_none() {
            return Ok(());
        }
        let file = self.data.join("pg_hba.conf");
        let mut text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        text.push_str("host all all 10.0.0.0/8 trust\nhost replication all 10.0.0.0/8 trust\n");
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    fn base_settings(&self) -> Vec<(String, String)> {
        settings(&[
            ("listen_addresses", &self.address.to_string()),
            ("port", &self.port.to_string()),
            ("unix_socket_directories", ""),
            ("log_line_prefix", "%m [%p] %b: "),
            ("timezone", "UTC"),
            // Segments of a killed server then go with its data directory.
            ("dynamic_shared_memory_type", "mmap"),
        ])
    }

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
        while works_in(&data) {
            if Instant::now() > deadline {
                bail!("processes of an earlier life of {} stay", self.name);
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

    /// Ends the server without a checkpoint (PostgreSQL's "immediate" shutdown).
    ///
    /// # Errors
    /// When it takes longer than a minute.
    pub fn stop_immediately(&mut self) -> Result<()> {
        self.signal(Signal::SIGQUIT)?;
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

    /// Takes all room that is left on the server's own disk.
    ///
    /// # Errors
    /// When the server shares its disk.
    pub fn fill_disk(&self) -> Result<()> {
        if !self.own_disk {
            bail!("{} has no disk of its own", self.name)
        }
        let mut ballast = File::create(self.data.join(BALLAST))?;
        let block = [0; 64 * 1024];
        while std::io::Write::write_all(&mut ballast, &block).is_ok() {}
        Ok(())
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// When nothing was taken.
    pub fn free_disk(&self) -> Result<()> {
        fs::remove_file(self.data.join(BALLAST)).context("the disk was not full")
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
                bail!("{} does not stop\n{}", self.name, self.log_tail(30));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
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
        fs::create_dir(&self.data)?;
        fs::set_permissions(&self.data, fs::Permissions::from_mode(0o700))?;
        host::give_to_server(&self.data)
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
            let _ = command::run(Command::new("umount").arg("--lazy").arg(&self.data));
        }
        let _ = fs::remove_dir_all(&self.data);
    }
}

/// Mounts a small file system in memory on the directory.
fn mount_disk(directory: &Path, bytes: u64) -> Result<()> {
    let mut mount = Command::new("mount");
    mount
        .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
        .arg(directory);
    command::capture(&mut mount).map(drop)
}

/// Settings from literals.
pub fn settings(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// Stops every server at once; for a signal handler, when there is no time for destructors.
pub fn kill_all() {
    for &pid in running().iter() {
        for child in descendants_of(pid.cast_unsigned()) {
            let _ = kill(child, Signal::SIGKILL);
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Kills the server of a data directory that an earlier run of ours made and left. A process that merely has the same
/// number as that server had is left alone: PostgreSQL's working directory is its data directory.
pub fn end_abandoned(data: &Path) {
    let pid = fs::read_to_string(data.join("postmaster.pid"))
        .ok()
        .and_then(|text| {
            text.lines()
                .next()
                .and_then(|line| line.trim().parse::<u32>().ok())
        });
    if let Some(pid) = pid
        && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|directory| directory == data)
    {
        let children = descendants_of(pid);
        let postmaster = Pid::from_raw(pid.cast_signed());
        for process in std::iter::once(postmaster).chain(children) {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let place = data.to_string_lossy();
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(&*place))
    {
        let _ = command::run(Command::new("umount").arg("--lazy").arg(data));
    }
}

/// Whether any process has this working directory, which is what every process of a server has as its data directory.
fn works_in(data: &Path) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| fs::read_link(process.path().join("cwd")).ok())
        .any(|directory| directory == data)
}

fn running() -> std::sync::MutexGuard<'static, BTreeSet<i32>> {
    RUNNING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Children of a postmaster; they have none of their own.
pub fn descendants_of(parent: u32) -> Vec<Pid> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<i32>>()
        })
        .map(Pid::from_raw)
        .collect()
}

/// Distinct ports that nobody listens on, and that no other server of this program was given.
fn free_ports<const N: usize>(address: IpAddr) -> Result<[u16; N]> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // Runs side by side begin at different places.
    let start = usize::try_from(std::process::id()).unwrap_or(0) * 101 % PORTS.len();
    let free: Vec<u16> = PORTS
        .skip(start)
        .chain(PORTS.take(start))
        .filter(|port| !given.contains(port) && TcpListener::bind((address, *port)).is_ok())
        .take(N)
        .collect();
    let Ok(ports) = <[u16; N]>::try_from(free) else {
        bail!("no free ports on {address}")
    };
    given.extend(ports);
    Ok(ports)
}
