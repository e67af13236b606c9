//! Drivers with several hosts: they leave a node that takes no writes, by themselves or at the error that it gives them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, cases};
use xtask::cluster::wait_for;
use xtask::command;
use xtask::installation::Installation;

use crate::hosts::{Hosts, PATIENCE, with_hosts};

pub fn cases() -> Vec<OwnCase> {
    cases![
        libpq_goes_on_to_a_node_that_takes_writes,
        psycopg_leaves_a_node_that_is_cut_off_or_dies,
    ]
}

/// Debian's, which has the package; another one on the path may not.
const PYTHON: &str = "/usr/bin/python3";
/// Rows that an application writes before its node is lost, and after.
const ROWS: u64 = 20;
/// An application that takes longer than this has lost its way.
const APPLICATION_LIMIT: Duration = Duration::from_secs(90);

/// A connection string that names nodes (from 0) in this order.
fn several_hosts(hosts: &Hosts, order: &[usize], target: &str) -> String {
    let addresses: Vec<String> = order
        .iter()
        .map(|node| hosts.network.address(*node).to_string())
        .collect();
    format!(
        "host={} port=5432 user=postgres dbname=postgres target_session_attrs={target} connect_timeout=5",
        addresses.join(",")
    )
}

/// Waits until a node says to new sessions that it is read-only.
fn await_read_only(hosts: &Hosts, node: usize) -> Result<()> {
    wait_for("a session to be read-only", PATIENCE, || {
        let said = hosts
            .session(node)?
            .text("SHOW default_transaction_read_only")?;
        Ok(said == "on")
    })
}

/// The node that psql comes to.
fn node_of(hosts: &Hosts, order: &[usize], target: &str) -> Result<String> {
    let mut psql = hosts.cluster.nodes[0].client_program("psql");
    psql.args(["--no-psqlrc", "--no-align", "--tuples-only", "--dbname"])
        .arg(several_hosts(hosts, order, target))
        .args(["--command", "SELECT my_node_id FROM mtm.status()"]);
    command::capture(&mut psql).map(|text| text.trim().to_owned())
}

fn libpq_goes_on_to_a_node_that_takes_writes(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        ensure!(node_of(hosts, &[2, 0], "read-write")? == "3");
        hosts.network.isolate(2)?;
        await_read_only(hosts, 2)?;
        for (order, target, node) in [
            (&[2, 0][..], "read-write", "1"),
            (&[2, 1, 0], "read-write", "2"),
            (&[2, 0], "read-only", "3"),
            (&[0, 2], "read-only", "3"),
            (&[2, 0], "any", "3"),
            // Not in recovery: only standbys say that.
            (&[2, 0], "primary", "3"),
        ] {
            let found = node_of(hosts, order, target)?;
            ensure!(
                found == node,
                "{order:?} with {target} leads to node {found}"
            );
        }
        let alone = node_of(hosts, &[2], "read-write")
            .err()
            .map(|error| format!("{error:#}"));
        ensure!(
            alone
                .as_ref()
                .is_some_and(|text| text.contains("session is read-only")),
            "{alone:?}"
        );
        Ok(())
    })
}

/// The application reads each answer as what it is: every row is there once.
fn psycopg_leaves_a_node_that_is_cut_off_or_dies(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts
            .session(0)?
            .run("CREATE TABLE line (n int PRIMARY KEY)")?;
        run_application(
            hosts,
            |hosts| hosts.network.isolate(2),
            |hosts| hosts.network.heal(),
        )?;
        hosts.await_status(2, "online")?;
        hosts.session(0)?.run("TRUNCATE line")?;
        run_application(
            hosts,
            |hosts| hosts.cluster.nodes[2].kill(),
            |hosts| hosts.cluster.nodes[2].start(),
        )?;
        hosts.await_status(2, "online")?;
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

/// Lets the application write on the third node, loses that node until the application has come to another one, and counts what was written.
fn run_application(
    hosts: &mut Hosts,
    lose: impl FnOnce(&mut Hosts) -> Result<()>,
    restore: impl FnOnce(&mut Hosts) -> Result<()>,
) -> Result<()> {
    let mut application = Application::start(&several_hosts(hosts, &[2, 0, 1], "read-write"))?;
    application.await_line(&format!("row {ROWS} node 3"))?;
    lose(hosts)?;
    // It asks there how its last transaction has ended, or writes the next row.
    application.await_one_of(&["asked 1", "asked 2"], &["node 1", "node 2"])?;
    restore(hosts)?;
    let last = application.await_line("written ")?;
    let written: u64 = last.parse().context("no number of rows")?;
    let found = hosts
        .session(0)?
        .text("SELECT count(*), min(n), max(n) FROM line")?;
    ensure!(
        found == format!("{written}|1|{written}"),
        "{found} instead of {written} rows; it said {:?}",
        application.said
    );
    let lost: Vec<&String> = application
        .said
        .iter()
        .filter(|line| !line.starts_with("row"))
        .collect();
    println!("  {written} rows; on the way: {lost:?}");
    Ok(())
}

/// `clients.py`, until it is dropped.
struct Application {
    process: Child,
    lines: std::sync::mpsc::Receiver<String>,
    said: Vec<String>,
}

impl Application {
    fn start(conninfo: &str) -> Result<Application> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/clients.py");
        let mut process = Command::new(PYTHON)
            .arg(script)
            .args([conninfo, &ROWS.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {PYTHON}"))?;
        let output = process.stdout.take().context("no output")?;
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // Nobody listens any more when the test is over.
                let _ = sender.send(line);
            }
        });
        Ok(Application {
            process,
            lines,
            said: Vec::new(),
        })
    }

    /// The rest of the first line that begins like this.
    fn await_line(&mut self, start: &str) -> Result<String> {
        let line = self.await_one_of(&[start], &[])?;
        Ok(line[start.len()..].to_owned())
    }

    /// The first line that begins or ends like one of these.
    fn await_one_of(&mut self, starts: &[&str], ends: &[&str]) -> Result<String> {
        loop {
            let Ok(line) = self.lines.recv_timeout(APPLICATION_LIMIT) else {
                bail!(
                    "the application has not said {starts:?} or {ends:?}, but {:?}",
                    self.said
                );
            };
            self.said.push(line.clone());
            if starts.iter().any(|start| line.starts_with(start))
                || ends.iter().any(|end| line.ends_with(end))
            {
                return Ok(line);
            }
        }
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
