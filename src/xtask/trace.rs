//! `cargo xtask trace`: the course of one transaction through three real servers, out of their logs.

use std::time::Duration;

use anyhow::{Context, Result};
use postgres::{Client, SimpleQueryMessage};

use crate::cluster::{Cluster, explain, member_settings, specs, stop_servers_on_signal, wait_for};
use crate::installation::{MAJOR, Source};
use crate::server::settings;
use crate::{extension, screen, setup};

/// Servers of the cluster.
const NODES: usize = 3;

/// How long a finished transaction may stay on record.
const FORGET_LIMIT: Duration = Duration::from_secs(20);

/// What comes before a step in a log: written by `arbiter/trace.rs` of the extension.
const MARK: &str = "multimaster: step ";

/// One line of a log.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Step {
    /// Microseconds since midnight.
    pub at: u64,
    pub node: String,
    pub gid: String,
    pub text: String,
}

impl Step {
    /// Reads `… multimaster: step HH:MM:SS.ffffff NODE GID: TEXT`.
    pub fn read(line: &str) -> Option<Step> {
        let (_, step) = line.split_once(MARK)?;
        let (head, text) = step.split_once(": ")?;
        let mut words = head.split(' ');
        let (at, node, gid) = (words.next()?, words.next()?, words.next()?);
        let (time, micros) = at.split_once('.')?;
        let seconds = time.split(':').try_fold(0, |sum: u64, part| {
            Some(sum * 60 + part.parse::<u64>().ok()?)
        })?;
        Some(Step {
            at: seconds * 1_000_000 + micros.parse::<u64>().ok()?,
            node: node.to_owned(),
            gid: gid.to_owned(),
            text: text.to_owned(),
        })
    }
}

/// The steps of the transaction whose name begins with `gid`, of all nodes, in order of time. The nodes' clocks must agree.
pub fn steps(cluster: &Cluster, gid: &str) -> Vec<Step> {
    let whole = format!("{gid}-");
    let logs = cluster.nodes.iter().map(|node| node.log_text());
    let mut steps: Vec<Step> = logs
        .flat_map(|log| log.lines().filter_map(Step::read).collect::<Vec<_>>())
        .filter(|step| step.gid.starts_with(&whole))
        .collect();
    // Stable: what one node did within a microsecond stays in its order.
    steps.sort_by_key(|step| step.at);
    steps
}

/// Starts a cluster, commits one transaction in each commit mode, and shows their steps.
///
/// # Errors
/// When the cluster does not start, or the transaction is not forgotten in time.
pub fn run() -> Result<()> {
    stop_servers_on_signal()?;
    setup::run(MAJOR)?;
    let installation = screen::step("building the extension (minutes the first time)", || {
        extension::build(&Source::packaged()?)
    })?;
    let mut specs = specs(NODES);
    for spec in &mut specs {
        spec.settings.extend(member_settings(NODES));
        spec.settings
            .extend(settings(&[("log_min_messages", "debug1")]));
    }
    let cluster = Cluster::start_servers(&installation, &specs)?;
    let outcome = show(&cluster);
    if outcome.is_err() {
        cluster.keep_logs();
    }
    outcome
}

fn show(cluster: &Cluster) -> Result<()> {
    cluster.init_cluster()?;
    let mut client = cluster.connect(0)?;
    client
        .batch_execute("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        .map_err(explain)?;
    // So that what is new to a process does not show: catalogs to be read, workers to be started.
    for id in 1..=20 {
        client
            .batch_execute(&format!("INSERT INTO account VALUES ({id}, 100)"))
            .map_err(explain)?;
    }
    for mode in ["e3pc", "fast"] {
        await_forgotten(cluster)?;
        let gid = transfer(&mut client, mode)?;
        await_forgotten(cluster)?;
        screen::heading(&format!(
            "The course of {gid} with multimaster.commit_mode = {mode}, in milliseconds"
        ));
        print(&steps(cluster, &gid))?;
    }
    Ok(())
}

fn print(steps: &[Step]) -> Result<()> {
    let first = steps.first().context("the logs tell of no step")?.at;
    for step in steps {
        println!(
            "{:7.3} {}  {}",
            (step.at - first) as f64 / 1000.0,
            step.node,
            step.text
        );
    }
    Ok(())
}

/// Commits a transaction; its name.
fn transfer(client: &mut Client, mode: &str) -> Result<String> {
    client
        .batch_execute(&format!("BEGIN; SET LOCAL multimaster.commit_mode = '{mode}'; UPDATE account SET balance = balance - 30 WHERE id = 1; UPDATE account SET balance = balance + 30 WHERE id = 2"))
        .map_err(explain)?;
    let answer = client
        .simple_query("SELECT mtm.current_gid()")
        .map_err(explain)?;
    let gid = answer
        .iter()
        .find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .context("the transaction has no name")?;
    client.batch_execute("COMMIT").map_err(explain)?;
    Ok(gid)
}

/// Waits until no node remembers a transaction.
fn await_forgotten(cluster: &Cluster) -> Result<()> {
    for mut client in cluster.connect_all()? {
        wait_for("all transactions to be forgotten", FORGET_LIMIT, || {
            let left: i64 = client
                .query_one("SELECT (SELECT count(*) FROM mtm.transactions) + (SELECT count(*) FROM mtm.records WHERE (b0, b1) <> (0, 0))", &[])
                .map_err(explain)?
                .get(0);
            Ok(left == 0)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Step;

    #[test]
    fn step_is_read_out_of_a_line() {
        let line = "2026-01-02 03:04:05.678 UTC [9] multimaster arbiter: DEBUG:  multimaster: step 03:04:05.678901 n2 mtm-0a-1-7-1-9: Vote yes: to n1";
        let step = Step::read(line).expect("a step");
        assert_eq!(step.at, ((3 * 60 + 4) * 60 + 5) * 1_000_000 + 678_901);
        assert_eq!(
            (step.node.as_str(), step.gid.as_str()),
            ("n2", "mtm-0a-1-7-1-9")
        );
        assert_eq!(step.text, "Vote yes: to n1");
    }

    #[test]
    fn other_lines_are_no_steps() {
        assert_eq!(
            Step::read("LOG:  multimaster: this node is now online"),
            None
        );
    }
}
