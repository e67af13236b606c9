//! Servers on a machine that misbehaves: a library of ours stands between them and the C library.

use std::process::Command;

use anyhow::{Context, Result};
use xtask::server::Server;
use xtask::{command, host};

/// Starts the server again with a source file of this directory compiled and preloaded. Its variables must have been set.
pub fn start_with(server: &mut Server, source: &str) -> Result<()> {
    let library = server.library_dir().join(format!("mtm_{source}.so"));
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(host::checkout().join("tests/cluster").join(source))
        .arg("-ldl");
    command::capture(&mut compiler).with_context(|| format!("cannot compile {source}"))?;
    server.stop()?;
    server.set_variable("LD_PRELOAD", library);
    server.start()
}
