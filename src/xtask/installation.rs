//! A private copy of PostgreSQL with the extension in it.
//!
//! The servers of tests and demonstrations must load our library, but nothing may be installed in the system's
//! directories. PostgreSQL finds its files relative to its own binary, so a copy of Debian's two directories below
//! another prefix is a complete installation.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{command, host};

/// The release that everything is built for and run with.
pub const MAJOR: u32 = 15;

/// Names the build of PostgreSQL that tests run on, as `NAME=PG_CONFIG`.
pub const SOURCE_VARIABLE: &str = "MULTIMASTER_TEST_SOURCE";

/// Where PostgreSQL comes from: its `pg_config` tells everything else.
#[derive(Clone, Debug)]
pub struct Source {
    pub pg_config: PathBuf,
    /// Names the private copy and the target directory: one per build of PostgreSQL.
    pub name: String,
}

/// PostgreSQL with the extension.
#[derive(Clone, Debug)]
pub struct Installation {
    bin: PathBuf,
    library: PathBuf,
    share: PathBuf,
}

/// The file that lists the servers to build against.
pub fn pgrx_toml() -> PathBuf {
    host::checkout().join("pgrx.toml")
}

impl Source {
    /// Debian's own packages, as `pgrx.toml` names them.
    ///
    /// # Errors
    /// When the file does not name this release.
    pub fn packaged() -> Result<Source> {
        let file = pgrx_toml();
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let config: toml::Table = text
            .parse()
            .with_context(|| format!("{} is no TOML", file.display()))?;
        let name = format!("pg{MAJOR}");
        let pg_config = config
            .get("configs")
            .and_then(|configs| configs.get(&name))
            .and_then(toml::Value::as_str)
            .with_context(|| format!("{} names no {name}", file.display()))?;
        Ok(Source {
            pg_config: PathBuf::from(pg_config),
            name,
        })
    }

    /// Debian's packages, unless the environment names another build ([`SOURCE_VARIABLE`]).
    ///
    /// # Errors
    /// When the variable makes no sense.
    pub fn chosen() -> Result<Source> {
        let Ok(text) = std::env::var(SOURCE_VARIABLE) else {
            return Source::packaged();
        };
        let (name, pg_config) = text
            .split_once('=')
            .with_context(|| format!("{SOURCE_VARIABLE} must be NAME=PG_CONFIG"))?;
        Ok(Source {
            pg_config: PathBuf::from(pg_config),
            name: name.to_owned(),
        })
    }

    /// One value of `pg_config`, for example `--bindir`.
    ///
    /// # Errors
    /// When `pg_config` cannot be run.
    pub fn ask(&self, option: &str) -> Result<String> {
        let text =
            command::capture(Command::new(&self.pg_config).arg(option)).with_context(|| {
                format!("PostgreSQL {MAJOR} is not installed; `cargo xtask setup` does that")
            })?;
        Ok(text.trim().to_owned())
    }
}

impl Installation {
    /// Copies PostgreSQL, unless a copy of the same release is already there.
    ///
    /// # Errors
    /// When PostgreSQL is missing, lies in unexpected places, or cannot be copied.
    pub fn prepare(source: &Source) -> Result<Installation> {
        let prefix = host::work_dir()?.join(&source.name);
        let base = common_base(source)?;
        let installation = Installation {
            bin: relocated(source, "--bindir", &base, &prefix)?,
            library: relocated(source, "--pkglibdir", &base, &prefix)?,
            share: relocated(source, "--sharedir", &base, &prefix)?,
        };
        let stamp_file = prefix.join("stamp");
        let stamp = stamp(source)?;
        if fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
            return Ok(installation);
        }
        let _ = fs::remove_dir_all(&prefix);
        for option in ["--bindir", "--pkglibdir", "--sharedir"] {
            let from = PathBuf::from(source.ask(option)?);
            copy_tree(&from, &relocated(source, option, &base, &prefix)?)?;
        }
        fs::write(&stamp_file, stamp)
            .with_context(|| format!("cannot write {}", stamp_file.display()))?;
        Ok(installation)
    }

    /// Puts the built library, the control files and the SQL scripts in place.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn install_extension(&self, library: &Path) -> Result<()> {
        replace(library, &self.library.join("multimaster.so"))?;
        let extensions = self.share.join("extension");
        for control in ["multimaster.control", "multimaster_referee.control"] {
            replace(&host::checkout().join(control), &extensions.join(control))?;
        }
        let scripts = host::checkout().join("sql");
        if !scripts.is_dir() {
            return Ok(());
        }
        for entry in
            fs::read_dir(&scripts).with_context(|| format!("cannot list {}", scripts.display()))?
        {
            let path = entry?.path();
            if let (Some(name), true) = (
                path.file_name(),
                path.extension().is_some_and(|end| end == "sql"),
            ) {
                replace(&path, &extensions.join(name))?;
            }
        }
        Ok(())
    }

    /// The directory of shared objects, for libraries that tests add.
    pub fn library_dir(&self) -> &Path {
        &self.library
    }

    /// Puts a program beside those of PostgreSQL; returns its place.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn install_program(&self, program: &Path, name: &str) -> Result<PathBuf> {
        let place = self.bin.join(name);
        replace(program, &place)?;
        Ok(place)
    }

    /// A program of this installation.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

/// The directory that the binaries and the shared files have in common; PostgreSQL may be moved as long as both keep
/// their place below it.
fn common_base(source: &Source) -> Result<PathBuf> {
    let bin = PathBuf::from(source.ask("--bindir")?);
    let share = PathBuf::from(source.ask("--sharedir")?);
    bin.ancestors()
        .find(|dir| share.starts_with(dir))
        .filter(|dir| dir.components().count() > 1)
        .map(Path::to_path_buf)
        .with_context(|| format!("{} and {} share no prefix", bin.display(), share.display()))
}

fn relocated(source: &Source, option: &str, base: &Path, prefix: &Path) -> Result<PathBuf> {
    let path = PathBuf::from(source.ask(option)?);
    match path.strip_prefix(base) {
        Ok(rest) => Ok(prefix.join(rest)),
        Err(_) => bail!("{} is not below {}", path.display(), base.display()),
    }
}

/// Changes when PostgreSQL was upgraded or built anew.
fn stamp(source: &Source) -> Result<String> {
    let server = Path::new(&source.ask("--bindir")?).join("postgres");
    let meta =
        fs::metadata(&server).with_context(|| format!("cannot find {}", server.display()))?;
    Ok(format!(
        "{} {} {:?}",
        source.ask("--version")?,
        meta.len(),
        meta.modified().ok()
    ))
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let parent = to
        .parent()
        .with_context(|| format!("{} has no parent", to.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    if to.is_dir() {
        // A nested directory (pkglibdir below bindir's parent, say) that an earlier copy brought along.
        return Ok(());
    }
    command::capture(
        Command::new("cp")
            .args(["--archive", "--reflink=auto", "--"])
            .arg(from)
            .arg(to),
    )
    .map(drop)
}

/// Copies and renames: a running server keeps the file that it has mapped, and two runs at once do not meet.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let fresh = to.with_extension(format!("new-{}", std::process::id()));
    let explain = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::copy(from, &fresh).with_context(explain)?;
    fs::rename(&fresh, to).with_context(explain)
}
