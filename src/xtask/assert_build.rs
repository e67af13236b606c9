//! PostgreSQL with assertions, built from Debian's source package.
//!
//! Its assertions, and its freed memory that is overwritten at once, show mistakes that a production build hides. The
//! sources come through lists of our own, so that the machine's package lists stay as they are; the result is kept in
//! the work directory and built only once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::installation::{MAJOR, Source};
use crate::{command, host, screen};

/// Where Debian's sources are; the security archive does not always have the newest.
const ARCHIVES: [&str; 2] = [
    "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security bookworm-security main",
    "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main",
];

/// Contributed modules that the tests use.
const CONTRIB: [&str; 3] = ["hstore", "auto_explain", "pg_surgery"];

/// Builds it, unless that was done before.
///
/// # Errors
/// When no source can be had, or the compiler fails.
pub fn prepare() -> Result<Source> {
    let top = host::work_dir()?.join("assert");
    let prefix = top.join("installed");
    let source = Source {
        pg_config: prefix.join("bin/pg_config"),
        name: format!("pg{MAJOR}-assert"),
    };
    if source.pg_config.exists() && has_contrib(&source)? {
        screen::good(format!(
            "{} with assertions is there",
            source.ask("--version")?
        ));
        return Ok(source);
    }
    fs::create_dir_all(&top).with_context(|| format!("cannot create {}", top.display()))?;
    let (tree, version) = screen::step("fetching PostgreSQL's source", || fetch(&top))?;
    screen::say(format!("version {version}"));
    screen::step(
        "building PostgreSQL with assertions (about four minutes)",
        || build(&tree, &prefix),
    )?;
    Ok(source)
}

/// Whether the contributed modules are installed: an earlier version of this program may have built fewer of them.
fn has_contrib(source: &Source) -> Result<bool> {
    let libraries = PathBuf::from(source.ask("--pkglibdir")?);
    Ok(CONTRIB
        .iter()
        .all(|module| libraries.join(format!("{module}.so")).exists()))
}

/// Downloads the newest source that an archive really has; returns its directory and version.
fn fetch(top: &Path) -> Result<(PathBuf, String)> {
    let apt = PrivateApt::new(top)?;
    apt.run("apt-get", &["update"])?;
    let mut failures = Vec::new();
    for version in apt.versions()? {
        let tree = top.join(format!("source-{version}"));
        if tree.join("configure").exists() {
            return Ok((tree, version));
        }
        match apt.unpack(&version, &tree) {
            Ok(()) => return Ok((tree, version)),
            Err(error) => failures.push(format!("{version}: {error:#}")),
        }
    }
    bail!(
        "no archive has a source package of PostgreSQL {MAJOR}\n{}",
        failures.join("\n")
    )
}

/// apt with lists of its own.
struct PrivateApt {
    top: PathBuf,
    options: Vec<String>,
}

impl PrivateApt {
    fn new(top: &Path) -> Result<PrivateApt> {
        let (sources, lists) = (top.join("sources.list"), top.join("lists"));
        fs::write(&sources, ARCHIVES.join("\n") + "\n")
            .with_context(|| format!("cannot write {}", sources.display()))?;
        fs::create_dir_all(lists.join("partial"))
            .with_context(|| format!("cannot create {}", lists.display()))?;
        let options = [
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", lists.display()),
            format!(
                "Dir::Cache::pkgcache={}",
                top.join("pkgcache.bin").display()
            ),
            format!(
                "Dir::Cache::srcpkgcache={}",
                top.join("srcpkgcache.bin").display()
            ),
            // apt's own account cannot enter our directory.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(PrivateApt {
            top: top.to_path_buf(),
            options: options.to_vec(),
        })
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut apt = Command::new(program);
        for option in &self.options {
            apt.arg("--option").arg(option);
        }
        command::capture(apt.args(arguments).current_dir(&self.top))
    }

    /// Versions of the source package, newest first.
    fn versions(&self) -> Result<Vec<String>> {
        let text = self.run("apt-cache", &["showsrc", &format!("postgresql-{MAJOR}")])?;
        let mut versions: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("Version: "))
            .map(str::to_owned)
            .collect();
        versions.sort_by_key(|version| std::cmp::Reverse(minor(version)));
        versions.dedup();
        if versions.is_empty() {
            bail!("the archives know no source package of PostgreSQL {MAJOR}");
        }
        Ok(versions)
    }

    fn unpack(&self, version: &str, tree: &Path) -> Result<()> {
        self.run(
            "apt-get",
            &[
                "source",
                "--download-only",
                &format!("postgresql-{MAJOR}={version}"),
            ],
        )?;
        let upstream = version.split('-').next().unwrap_or(version);
        let archive = self
            .top
            .join(format!("postgresql-{MAJOR}_{upstream}.orig.tar.bz2"));
        fs::create_dir_all(tree).with_context(|| format!("cannot create {}", tree.display()))?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--strip-components=1", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(tree);
        command::capture(&mut tar).map(drop)
    }
}

/// The minor release in a version such as `15.18-0+deb12u1`.
fn minor(version: &str) -> u32 {
    version
        .split(['.', '-'])
        .nth(1)
        .and_then(|minor| minor.parse().ok())
        .unwrap_or(0)
}

fn build(tree: &Path, prefix: &Path) -> Result<()> {
    let mut configure = Command::new("./configure");
    configure
        .arg(format!("--prefix={}", prefix.display()))
        // What the assertions cover needs none of these libraries, so nothing has to be installed for them.
        .args([
            "--enable-cassert",
            "--enable-debug",
            "--without-readline",
            "--without-zlib",
            "--without-icu",
        ])
        .env("CFLAGS", "-O1 -g");
    command::capture(configure.current_dir(tree))?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let make = |directory: &Path, target: &str| {
        let mut make = Command::new("make");
        make.args(["--silent", &format!("--jobs={jobs}"), target])
            .current_dir(directory);
        command::capture(&mut make).map(drop)
    };
    make(tree, "all")?;
    for module in CONTRIB {
        make(&tree.join("contrib").join(module), "install")?;
    }
    make(tree, "install")
}
