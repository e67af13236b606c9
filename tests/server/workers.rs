//! Background workers of other extensions write like anybody else.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{Rig, SharedCase, cases};
use xtask::command;
use xtask::installation::Source;

pub fn cases() -> Vec<SharedCase> {
    cases![commit_of_a_background_worker_reaches_every_node]
}

/// Short, since a worker's library name has at most 95 bytes.
const LIBRARY: &str = "mtm_test_worker";

/// Compiles `background_worker.c` into the private installation, as an extension's library would be.
fn compile(rig: &Rig) -> Result<()> {
    let source = Source::chosen()?;
    let mut compiler = Command::new("cc");
    compiler
        .args([
            "-shared",
            "-fPIC",
            "-O1",
            "-I",
            &source.ask("--includedir-server")?,
        ])
        .arg(format!("-DWORKER_LIBRARY=\"{LIBRARY}\""))
        .arg("-o")
        .arg(rig.server(1).library_dir().join(format!("{LIBRARY}.so")))
        .arg(xtask::host::checkout().join("tests/server/background_worker.c"));
    command::capture(&mut compiler)
        .map(drop)
        .context("cannot compile the background worker")
}

fn commit_of_a_background_worker_reaches_every_node(rig: &Rig) -> Result<()> {
    compile(rig)?;
    let schema = rig.schema();
    let mut session = rig.session(1)?;
    session.run("CREATE TABLE t (id int PRIMARY KEY, v text)")?;
    session.run(&format!("CREATE FUNCTION run_in_worker(text) RETURNS void LANGUAGE c AS '{LIBRARY}', 'run_in_worker'"))?;
    session.run(&format!(
        "SELECT run_in_worker('INSERT INTO {schema}.t VALUES (1, ''by a worker'')')"
    ))?;
    session.run(&format!(
        "SELECT run_in_worker('INSERT INTO {schema}.t VALUES (1, ''twice'')')"
    ))?;
    rig.expect("SELECT * FROM t", "1|by a worker")?;
    let left = session
        .text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'stranger''s worker'")?;
    ensure!(left == "0", "{left} workers are left");
    Ok(())
}
