//! Building the extension and putting it into a private copy of PostgreSQL.
//!
//! cargo-pgrx is not needed: the SQL is written by hand, so a plain `cargo build` that is told where `pg_config` is
//! does everything.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::installation::{Installation, MAJOR, Source};
use crate::{command, host};

/// The cargo profile of everything that tests and demonstrations run.
pub const PROFILE: &str = "fast";

/// How the extension is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// Quick to build; a test can let it die at any failpoint.
    Test,
    /// As users get it.
    Release,
}

impl Build {
    fn profile(self) -> &'static str {
        match self {
            Build::Test => PROFILE,
            Build::Release => "release",
        }
    }

    fn features(self) -> String {
        match self {
            Build::Test => format!("pg{MAJOR},failpoints"),
            Build::Release => format!("pg{MAJOR}"),
        }
    }
}

/// What tells cargo of the extension as tests and demonstrations run it.
pub fn test_build_arguments() -> Vec<String> {
    arguments(Build::Test)
}

fn arguments(how: Build) -> Vec<String> {
    let features = how.features();
    let profile = how.profile();
    [
        "--package",
        "multimaster",
        "--profile",
        profile,
        "--features",
        &features,
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Builds the extension for `source`, for tests and demonstrations, and returns an installation that has it.
///
/// # Errors
/// When the compiler or a copy fails.
pub fn build(source: &Source) -> Result<Installation> {
    build_as(source, Build::Test)
}

/// Builds the extension for `source` and returns an installation that has it.
///
/// # Errors
/// When the compiler or a copy fails.
pub fn build_as(source: &Source, how: Build) -> Result<Installation> {
    let installation = Installation::prepare(source)?;
    let target = target_dir(source)?;
    let mut cargo = cargo();
    cargo
        .args(["build", "--quiet"])
        .args(arguments(how))
        .arg("--target-dir")
        .arg(&target)
        .env("PGRX_PG_CONFIG_PATH", &source.pg_config);
    command::show(&mut cargo)?;
    installation.install_extension(&target.join(how.profile()).join("libmultimaster.so"))?;
    Ok(installation)
}

/// Builds the users' command line and puts it beside the servers' programs; returns its place.
///
/// # Errors
/// When the compiler or the copy fails.
pub fn build_command_line(installation: &Installation) -> Result<PathBuf> {
    let mut cargo = cargo();
    cargo.args(["build", "--quiet", "--package", "multimaster-cli"]);
    command::show(&mut cargo)?;
    let built = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => host::checkout().join(dir),
        None => host::checkout().join("target"),
    };
    installation.install_program(&built.join("debug").join("mtm"), "mtm")
}

/// Debian's PostgreSQL shares cargo's usual directory; any other build has its own, since the headers differ.
fn target_dir(source: &Source) -> Result<PathBuf> {
    let usual = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => host::checkout().join(dir),
        None => host::checkout().join("target"),
    };
    let packaged = Source::packaged()?;
    Ok(if packaged.name == source.name {
        usual
    } else {
        usual.join(&source.name)
    })
}

/// The cargo that runs us, in the checkout.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(host::checkout());
    cargo
}
