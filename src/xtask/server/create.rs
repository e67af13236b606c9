//! A server's data directory: made by initdb or as a copy, with ports and settings of its own.

use super::{Server, Spec, settings};
use crate::installation::Installation;
use crate::{command, host};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// Ports are taken from here, below the range that the kernel gives to outgoing connections: a stopped server finds its
/// port still free when it comes back.
const PORTS: std::ops::Range<u16> = 21_000..32_000;

/// Ports of a server that has a network namespace to itself.
const PRIVATE_PORTS: [u16; 2] = [5432, 7432];

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
        if server.own_disk {
            initdb.arg("--waldir").arg(server.wal_disk());
        }
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
        let server = Server {
            name: spec.name.clone(),
            address: spec.address,
            port,
            arbiter_port,
            namespace: spec.namespace.clone(),
            own_disk: spec.disk_bytes.is_some(),
            environment: Vec::new(),
            log: log_dir.join(format!("{}.log", spec.name)),
            data,
            installation: installation.clone(),
            process: None,
        };
        make_directory(&server.data, spec.disk_bytes)?;
        if server.own_disk {
            make_directory(&server.wal_disk(), spec.disk_bytes)?;
        }
        Ok(server)
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
}

/// Makes a directory for the server's account alone, on a disk of its own when that has a size.
fn make_directory(path: &Path, disk_bytes: Option<u64>) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
    if let Some(bytes) = disk_bytes {
        mount_disk(path, bytes)?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot protect {}", path.display()))?;
    host::give_to_server(path)
}

/// Mounts a small file system in memory on the directory.
fn mount_disk(directory: &Path, bytes: u64) -> Result<()> {
    let mut mount = Command::new("mount");
    mount
        .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
        .arg(directory);
    command::capture(&mut mount).map(drop)
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
