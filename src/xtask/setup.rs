//! `cargo xtask setup`: the Debian packages that building and testing need, installed only when missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{command, host, installation, screen};

/// Packages for building and testing with `major`. The server's own come first: they must all be of one minor release.
fn packages(major: u32) -> Vec<String> {
    let mut names: Vec<String> = ["postgresql", "postgresql-client", "postgresql-server-dev"]
        .map(|stem| format!("{stem}-{major}"))
        .to_vec();
    // bindgen reads PostgreSQL's headers through libclang; cluster tests use `ip`, and psycopg as an application would.
    let others = [
        "build-essential",
        "clang",
        "libclang-dev",
        "iproute2",
        "python3-psycopg",
    ];
    names.extend(others.map(String::from));
    names
}

/// A file that stops the server package from creating and starting a cluster nobody asked for; gone when dropped.
struct NoStrayCluster(PathBuf);

impl NoStrayCluster {
    fn new() -> Result<NoStrayCluster> {
        let dir = Path::new("/etc/postgresql-common/createcluster.d");
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let file = dir.join("multimaster-setup.conf");
        std::fs::write(&file, "create_main_cluster = off\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(NoStrayCluster(file))
    }
}

impl Drop for NoStrayCluster {
    fn drop(&mut self) {
        // Leaving it behind would change later installations; there is nobody to report a failure to.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the machine ready; quick when it already is.
///
/// # Errors
/// When packages are missing and cannot be installed; the message says what to do.
pub fn run(major: u32) -> Result<()> {
    let wanted = packages(major);
    let missing = missing(&wanted, major)?;
    if missing.is_empty() {
        screen::good("all packages are there");
    } else {
        install(&missing)?;
    }
    install_pgrx_config()
}

/// Which of `wanted` are absent, or out of step with each other.
fn missing(wanted: &[String], major: u32) -> Result<Vec<String>> {
    if !Path::new("/etc/debian_version").exists() {
        bail!(
            "this is not Debian, so packages cannot be installed for you; needed are PostgreSQL {major} with its \
             server headers, a C compiler, clang, libclang, iproute2 and psycopg 3 for /usr/bin/python3"
        );
    }
    let mut missing = Vec::new();
    let mut server_versions = Vec::new();
    for name in wanted {
        match installed_version(name)? {
            None => missing.push(name.clone()),
            Some(version) if name.starts_with("postgresql-") => server_versions.push(version),
            Some(_) => {}
        }
    }
    server_versions.dedup();
    let server_incomplete = missing.iter().any(|name| name.starts_with("postgresql-"));
    if server_versions.len() > 1 || (server_incomplete && !server_versions.is_empty()) {
        // apt would install new headers beside an old server, and the extension would not load.
        missing.retain(|name| !name.starts_with("postgresql-"));
        missing.extend(
            wanted
                .iter()
                .filter(|name| name.starts_with("postgresql-"))
                .cloned(),
        );
    }
    Ok(missing)
}

fn installed_version(package: &str) -> Result<Option<String>> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Status} ${Version}", package]);
    let output = command::run(&mut query)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.strip_prefix("installed ").map(str::to_owned))
}

fn install(missing: &[String]) -> Result<()> {
    screen::say(format!("missing packages: {}", missing.join(" ")));
    let by_hand = format!(
        "sudo apt-get update && sudo apt-get install --yes --no-install-recommends {}",
        missing.join(" ")
    );
    if !host::is_root() {
        return install_with_sudo(missing, &by_hand);
    }
    let _guard = NoStrayCluster::new()?;
    let explain = || format!("packages could not be installed; by hand: {by_hand}");
    screen::step("apt-get update", || apt(&["update"])).with_context(explain)?;
    screen::step("apt-get install", || {
        let mut args = vec!["install", "--yes", "--no-install-recommends"];
        args.extend(missing.iter().map(String::as_str));
        apt(&args)
    })
    .with_context(explain)
}

fn apt(args: &[&str]) -> Result<()> {
    let mut apt = Command::new("apt-get");
    apt.args([
        "--quiet",
        "--option",
        "Dpkg::Options::=--force-confold",
        "--option",
        "DPkg::Lock::Timeout=120",
    ]);
    apt.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    command::capture(&mut apt).map(drop)
}

/// Runs this very program again as root, for the set-up alone.
fn install_with_sudo(missing: &[String], by_hand: &str) -> Result<()> {
    let allowed = command::run(Command::new("sudo").args(["--non-interactive", "true"]))
        .is_ok_and(|output| output.status.success());
    if !allowed {
        bail!(
            "installing {} needs root; please run: {by_hand}",
            missing.join(" ")
        );
    }
    screen::say("installing them with sudo");
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    command::show(
        Command::new("sudo")
            .arg("--non-interactive")
            .arg(program)
            .arg("setup"),
    )
}

/// Lets a plain `cargo check --package multimaster` find PostgreSQL. A configuration that is already there stays.
fn install_pgrx_config() -> Result<()> {
    let home = match std::env::var_os("PGRX_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => std::env::home_dir()
            .context("the home directory is unknown")?
            .join(".pgrx"),
    };
    let target = home.join("config.toml");
    if target.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    std::fs::copy(installation::pgrx_toml(), &target)
        .with_context(|| format!("cannot write {}", target.display()))?;
    screen::good(format!(
        "{} names the servers to build against",
        target.display()
    ));
    Ok(())
}
