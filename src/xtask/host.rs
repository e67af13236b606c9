//! This machine: where the checkout is, where files may go, and who may run PostgreSQL.

use std::ffi::OsStr;
use std::hash::Hasher;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Uid, User};

/// The account that runs the servers when we are root, since PostgreSQL refuses to.
const SERVER_USER: &str = "postgres";

/// Memory-backed files make tests quick; PostgreSQL's flushes are free there.
const MEMORY_DIR: &str = "/dev/shm";

/// Top directory of the checkout that this program was built from.
pub fn checkout() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest
        .ancestors()
        .nth(2)
        .unwrap_or(manifest)
        .to_path_buf()
}

/// A name for this checkout, so that two checkouts on one machine do not share files.
fn checkout_name() -> String {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(checkout().as_os_str().as_encoded_bytes());
    format!("multimaster-{:08x}", hasher.finish() >> 32)
}

/// The directory, outside the checkout, for private installations and logs. The servers' account can read it wherever
/// the checkout lives.
///
/// # Errors
/// When it cannot be created.
pub fn work_dir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(checkout_name());
    create_dir(&dir)?;
    Ok(dir)
}

/// A place for data directories with `bytes` of room: in memory if possible, else on disk.
///
/// # Errors
/// When it cannot be created.
pub fn data_dir(bytes: u64) -> Result<PathBuf> {
    let memory = Path::new(MEMORY_DIR);
    let roomy = statvfs(memory)
        .is_ok_and(|fs| fs.blocks_available().saturating_mul(fs.fragment_size()) >= bytes)
        && memory_available().is_some_and(|available| available >= 2 * bytes);
    let parent = if roomy {
        memory.to_path_buf()
    } else {
        std::env::temp_dir()
    };
    let dir = parent.join(format!("{}-data", checkout_name()));
    create_dir(&dir)?;
    Ok(dir)
}

/// Bytes of memory that programs may still take.
fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Creates `dir` if need be, readable by the servers' account.
///
/// # Errors
/// When it cannot be created.
pub fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} readable", dir.display()))
}

/// Are we root?
pub fn is_root() -> bool {
    Uid::effective().is_root()
}

/// The account that servers run as, when it is not our own.
///
/// # Errors
/// When we are root and the account does not exist.
pub fn server_user() -> Result<Option<User>> {
    if !is_root() {
        return Ok(None);
    }
    let user = User::from_name(SERVER_USER).context("cannot read the list of accounts")?;
    Ok(Some(user.with_context(|| {
        format!("there is no account {SERVER_USER:?}; `cargo xtask setup` installs the package that makes it")
    })?))
}

/// A command that will run as the servers' account.
///
/// # Errors
/// When that account does not exist.
pub fn server_command(program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(program);
    // The account may not be allowed to enter our current directory.
    command.current_dir("/");
    if let Some(user) = server_user()? {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        command.env("HOME", "/").env("USER", SERVER_USER);
    }
    Ok(command)
}

/// Hands `path` to the servers' account.
///
/// # Errors
/// When that is not allowed.
pub fn give_to_server(path: &Path) -> Result<()> {
    if let Some(user) = server_user()? {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .with_context(|| format!("cannot change the owner of {}", path.display()))?;
    }
    Ok(())
}
