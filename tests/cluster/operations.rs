//! The pages of `docs/operations.md`: each is brought about, its commands are run, and what they print must have the shape that the page shows.
//!
//! A block of a page holds lines `n1=> statement`, for psql on node 1 (`r=>`: on the referee), and `n3$ command`, for a shell on node 3, each followed by its output. Numbers of
//! generations and apply workers, milliseconds and names of transactions may differ; everything else may not, but for where servers and directories are.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, member_settings, specs, wait_for};
use xtask::installation::Installation;
use xtask::server::settings;
use xtask::{command, extension, host};

use crate::line::{PATIENCE, await_online};
use crate::stuck::{SLOW_MS, set_everywhere};

pub fn cases() -> Vec<OwnCase> {
    cases![
        the_pages_of_operations_are_true,
        the_pages_of_operations_about_two_nodes_are_true
    ]
}

/// Where the referee is (from 0), behind the two nodes.
const REFEREE: usize = 2;

/// How a page's state is brought about, before its blocks are run and after.
struct Page {
    title: &'static str,
    before: fn(&mut Cluster) -> Result<()>,
    after: fn(&mut Cluster) -> Result<()>,
}

const PAGES: [Page; 6] = [
    Page {
        title: "A node is lost",
        before: lose_third,
        after: start_third,
    },
    Page {
        title: "A node without a majority",
        before: lose_two,
        after: start_two,
    },
    Page {
        title: "A node needs a copy",
        before: lose_disk,
        after: start_third,
    },
    Page {
        title: "A node is stuck",
        before: stop_workers,
        after: let_workers_go_on,
    },
    Page {
        title: "A transaction in doubt",
        before: nothing,
        after: nothing,
    },
    Page {
        title: "All nodes were down",
        before: restart_all,
        after: nothing,
    },
];

fn the_pages_of_operations_are_true(installation: &Installation) -> Result<()> {
    extension::build_command_line(installation)?;
    let text = fs::read_to_string(host::checkout().join("docs/operations.md"))?;
    with_cluster(installation, 3, |cluster| {
        Session::new(cluster.connect(0)?)
            .run("CREATE TABLE account (id int PRIMARY KEY, balance int); INSERT INTO account VALUES (1, 100)")?;
        for page in &PAGES {
            println!("  {}", page.title);
            (page.before)(cluster)?;
            let blocks = blocks_of(&text, page.title)?;
            ensure!(!blocks.is_empty(), "page {:?} shows nothing", page.title);
            for block in blocks {
                run_block(cluster, &block).with_context(|| page.title.to_owned())?;
            }
            (page.after)(cluster)?;
        }
        xtask::checks::whole(cluster, PATIENCE)
    })
}

/// Two nodes and, as the third server, the referee, which the page's first block makes one.
fn the_pages_of_operations_about_two_nodes_are_true(installation: &Installation) -> Result<()> {
    let text = fs::read_to_string(host::checkout().join("docs/operations.md"))?;
    let blocks = blocks_of(&text, "Two nodes")?;
    let [setup, alone] = blocks.as_slice() else {
        bail!("the page shows {} blocks", blocks.len())
    };
    let mut specs = specs(3);
    for spec in &mut specs[..REFEREE] {
        spec.settings.extend(member_settings(2));
    }
    let mut cluster = Cluster::create(installation, &specs)?;
    let outcome = two_nodes(&mut cluster, setup, alone);
    outcome.map_err(|error| {
        cluster.keep_logs();
        anyhow::anyhow!("{error:#}\n{}", cluster.log_tails(25))
    })
}

fn two_nodes(cluster: &mut Cluster, setup: &[Step], alone: &[Step]) -> Result<()> {
    cluster.nodes[REFEREE].start()?;
    run_block(cluster, setup)?;
    let referee = cluster.nodes[REFEREE].conninfo();
    let referee = referee.replace("user=postgres", "user=mtm");
    for node in &mut cluster.nodes[..REFEREE] {
        node.configure(&settings(&[("multimaster.referee_connstring", &referee)]))?;
        node.start()?;
    }
    let [one, other] = [0, 1].map(|node| cluster.nodes[node].conninfo());
    let mut first = Session::new(cluster.connect(0)?);
    first.run("CREATE EXTENSION multimaster")?;
    first.text(&format!(
        "SELECT mtm.init_cluster('{one}', ARRAY['{other}'])"
    ))?;
    await_members(cluster, "{1,2}")?;
    cluster.nodes[1].kill()?;
    await_members(cluster, "{1}")?;
    run_block(cluster, alone)?;
    cluster.nodes[1].start()?;
    await_online(cluster, 1)?;
    await_members(cluster, "{1,2}")
}

/// A command of a page and what it prints.
struct Step {
    node: usize,
    shell: bool,
    text: String,
    output: Vec<String>,
}

/// The blocks of a page that are commands.
fn blocks_of(text: &str, title: &str) -> Result<Vec<Vec<Step>>> {
    let heading = format!("\n## {title}\n");
    let page = text
        .split_once(heading.as_str())
        .with_context(|| format!("there is no page {title:?}"))?
        .1;
    let page = page.split("\n## ").next().unwrap_or(page);
    let blocks = page.split("\n```").skip(1).step_by(2);
    let steps = blocks.map(steps_of).filter(|steps| !steps.is_empty());
    Ok(steps.collect())
}

fn steps_of(block: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in block.lines().skip(1) {
        match command_in(line) {
            Some(step) => steps.push(step),
            None => {
                if let Some(last) = steps.last_mut() {
                    last.output.push(line.to_owned());
                }
            }
        }
    }
    steps
}

/// `n1=> ...`, `r=> ...` or `n1$ ...`.
fn command_in(line: &str) -> Option<Step> {
    let (node, rest) = match line.strip_prefix('r') {
        Some(rest) => (REFEREE, rest),
        None => {
            let rest = line.strip_prefix('n')?;
            let node = rest.chars().next()?.to_digit(10)? as usize - 1;
            (node, &rest[1..])
        }
    };
    let (shell, text) = match (rest.strip_prefix("=> "), rest.strip_prefix("$ ")) {
        (Some(text), _) => (false, text),
        (None, Some(text)) => (true, text),
        (None, None) => return None,
    };
    Some(Step {
        node,
        shell,
        text: text.to_owned(),
        output: Vec::new(),
    })
}

/// Runs a block; statements that follow each other on one node share a session.
fn run_block(cluster: &mut Cluster, block: &[Step]) -> Result<()> {
    let mut gid = None;
    for group in block.chunk_by(|one, next| !one.shell && !next.shell && one.node == next.node) {
        let (printed, expected): (Vec<String>, Vec<String>) = if group[0].shell {
            (shell(cluster, &group[0])?, group[0].output.clone())
        } else {
            let sql: Vec<String> = group.iter().map(|step| named(&step.text, &gid)).collect();
            let output = group.iter().flat_map(|step| step.output.clone()).collect();
            (psql(cluster, group[0].node, &sql.join("\n"))?, output)
        };
        gid = printed
            .iter()
            .find(|line| line.trim().starts_with("mtm-"))
            .map(|line| line.trim().to_owned())
            .or(gid);
        let (shown, seen) = (shapes(&expected), shapes(&printed));
        ensure!(
            shown == seen,
            "the page shows\n{}\nand the node prints\n{}",
            expected.join("\n"),
            printed.join("\n")
        );
    }
    Ok(())
}

/// The statement with the name of the transaction that this run has had instead of the page's.
fn named(statement: &str, gid: &Option<String>) -> String {
    let Some(gid) = gid else {
        return statement.to_owned();
    };
    match statement.split_once("'mtm-") {
        Some((before, rest)) => match rest.split_once('\'') {
            Some((_, after)) => format!("{before}'{gid}'{after}"),
            None => statement.to_owned(),
        },
        None => statement.to_owned(),
    }
}

/// What is left of lines without what differs from run to run.
fn shapes(lines: &[String]) -> Vec<String> {
    let lines = lines.iter().map(|line| line.trim());
    lines.filter(|line| !line.is_empty()).map(shape).collect()
}

/// Takes out the rest of a transaction's name, numbers of generations and of apply workers, and milliseconds. Every other number (nodes, members, sums) has to be the page's.
fn shape(line: &str) -> String {
    if line.starts_with("mtm-") {
        return "mtm-".to_owned();
    }
    let words: Vec<&str> = line.split(' ').collect();
    let shaped = words.iter().enumerate().map(|(place, word)| {
        let before = place.checked_sub(1).map(|place| words[place]);
        let after = words.get(place + 1).copied();
        let varies = matches!(before, Some("generation" | "worker")) || after == Some("ms");
        if varies && word.parse::<u64>().is_ok() {
            "0"
        } else {
            word
        }
    });
    shaped.collect::<Vec<_>>().join(" ")
}

fn psql(cluster: &Cluster, node: usize, sql: &str) -> Result<Vec<String>> {
    let mut psql = cluster.nodes[node].client_program("psql");
    psql.args(["-X", "-q", "-A", "-t", "-F", " | ", "-c"]);
    // One -c for each statement: they share the session and not a transaction.
    let mut statements = sql.lines();
    psql.arg(statements.next().unwrap_or_default());
    for statement in statements {
        psql.arg("-c").arg(statement);
    }
    let output = command::run(psql.stdin(Stdio::null()))?;
    let said = command::joined(&output);
    Ok(said
        .lines()
        .filter(|line| !line.starts_with("HINT:"))
        .map(str::to_owned)
        .collect())
}

/// `mtm clone` with this machine's places instead of the page's.
fn shell(cluster: &mut Cluster, step: &Step) -> Result<Vec<String>> {
    ensure!(
        step.text.starts_with("mtm clone "),
        "the test does not know `{}`",
        step.text
    );
    let node = &cluster.nodes[step.node];
    let program = node.program("mtm");
    let keep = kept();
    let mut mtm = host::server_command(&program)?;
    mtm.arg("clone");
    let mut words = step.text.split_whitespace();
    while let Some(word) = words.next() {
        match word {
            "--node" => mtm.arg(word).args(words.next()),
            "--from" => mtm.arg(word).arg(cluster.nodes[0].conninfo()),
            "--pgdata" => mtm.arg(word).arg(node.data_dir()),
            "--config" => mtm.arg(word).arg(&keep),
            option if option.starts_with("--") => bail!("the test does not know {option}"),
            _ => &mut mtm,
        };
    }
    mtm.arg("--bindir")
        .arg(program.parent().context("a program lies in a directory")?);
    let output = command::run(&mut mtm)?;
    let _ = fs::remove_dir_all(&keep);
    if !output.status.success() {
        bail!("{}", command::joined(&output));
    }
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(said.lines().map(str::to_owned).collect())
}

fn kept() -> std::path::PathBuf {
    host::work_dir().map_or_else(
        |_| std::env::temp_dir(),
        |directory| directory.join(format!("configuration-of-pages-{}", std::process::id())),
    )
}

fn nothing(_: &mut Cluster) -> Result<()> {
    Ok(())
}

fn await_text(cluster: &Cluster, node: usize, sql: &str, expected: &str) -> Result<()> {
    wait_for(
        &format!("{expected} on node {}", node + 1),
        PATIENCE,
        || {
            let found = cluster
                .connect(node)
                .and_then(|client| Session::new(client).text(sql));
            Ok(found.is_ok_and(|found| found == expected))
        },
    )
}

fn await_members(cluster: &Cluster, members: &str) -> Result<()> {
    let sql = "SELECT status || gen_members::text FROM mtm.status()";
    await_text(cluster, 0, sql, &format!("online{members}"))
}

fn lose_third(cluster: &mut Cluster) -> Result<()> {
    cluster.nodes[2].kill()?;
    await_members(cluster, "{1,2}")
}

fn start_third(cluster: &mut Cluster) -> Result<()> {
    if !cluster.nodes[2].is_running() {
        cluster.nodes[2].start()?;
    }
    await_online(cluster, 2)?;
    await_members(cluster, "{1,2,3}")
}

fn lose_two(cluster: &mut Cluster) -> Result<()> {
    cluster.nodes[0].kill()?;
    cluster.nodes[1].kill()?;
    // It serves as long as the last promises of the others hold.
    wait_for("node 3 to refuse", PATIENCE, || {
        let mut session = Session::new(cluster.connect(2)?);
        Ok(session.text("SELECT count(*) FROM account").is_err())
    })
}

fn start_two(cluster: &mut Cluster) -> Result<()> {
    restart(cluster, &[0, 1])
}

fn restart(cluster: &mut Cluster, nodes: &[usize]) -> Result<()> {
    for &node in nodes {
        cluster.nodes[node].start()?;
    }
    (0..3).try_for_each(|node| await_online(cluster, node))
}

fn lose_disk(cluster: &mut Cluster) -> Result<()> {
    lose_third(cluster)?;
    let keep = kept();
    host::create_dir(&keep)?;
    cluster.nodes[2].lose_data(&keep)
}

/// Process ids of the third node's apply workers.
fn workers_of_third(cluster: &Cluster) -> Result<Vec<i32>> {
    let sql = "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE backend_type LIKE 'multimaster apply worker%'";
    let pids = Session::new(cluster.connect(2)?).text(sql)?;
    let pids: Result<Vec<i32>, _> = pids.split_whitespace().map(str::parse).collect();
    pids.context("a process has a number")
}

/// The third node applies nothing any more, and its arbiter answers.
fn stop_workers(cluster: &mut Cluster) -> Result<()> {
    set_everywhere(cluster, "multimaster.slow_node_timeout", SLOW_MS)?;
    for pid in workers_of_third(cluster)? {
        cluster.nodes[2].freeze_process(pid)?;
    }
    // It commits when the others go on without the third.
    Session::new(cluster.connect(0)?)
        .run("SET statement_timeout = 0; INSERT INTO account VALUES (2, 0)")
        .or_else(|_| await_members(cluster, "{1,2}"))?;
    await_members(cluster, "{1,2}")
}

fn let_workers_go_on(cluster: &mut Cluster) -> Result<()> {
    for pid in workers_of_third(cluster)? {
        cluster.nodes[2].thaw_process(pid)?;
    }
    start_third(cluster)
}

fn restart_all(cluster: &mut Cluster) -> Result<()> {
    for node in &mut cluster.nodes {
        node.kill()?;
    }
    restart(cluster, &[0, 1, 2])
}
