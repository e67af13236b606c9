//! A node dies at every failpoint of the commit path, of apply and of its start, under load.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::server::{Server, settings};
use xtask::suite::Size;

use crate::ledger::{Dice, Ledger};

pub fn cases() -> Vec<OwnCase> {
    cases![
        coordinator_dies_at_every_failpoint,
        participant_dies_at_every_failpoint,
        resolver_dies_at_every_failpoint,
        node_dies_at_every_failpoint_of_its_start,
        errors_and_delays_at_every_failpoint_do_no_harm,
    ]
}

/// Makes a run repeat another one's choices.
const SEED_VARIABLE: &str = "MULTIMASTER_TEST_SEED";
/// A point that is not passed by then is not on the path that it names.
const HIT_LIMIT: Duration = Duration::from_secs(15);
/// The same for a point of the start, before another attempt.
const START_HIT_LIMIT: Duration = Duration::from_secs(4);
const START_ATTEMPTS: u32 = 6;
/// Load before and after the fault, whose moment is random: there is nothing to wait for.
const LOAD: Duration = Duration::from_millis(150);
/// Nodes (from 0) with the clients: two of them, so that the first takes part in others' transactions as well.
const CLIENTS: [usize; 4] = [0, 0, 2, 2];
const COORDINATOR: usize = 0;
/// Has no clients: it only takes part.
const PARTICIPANT: usize = 1;

/// What a resolver says while the coordinator is gone.
const RESOLVING: [&str; 6] = [
    "before-status",
    "after-status",
    "before-precommit",
    "after-precommit",
    "before-decided",
    "after-decided",
];

/// How often each point is visited.
fn rounds() -> u64 {
    match Size::chosen() {
        Size::Ci | Size::Full => 1,
        Size::Long => 10,
    }
}

/// The points of this run in an order of its own: all of them, but for a short run, which visits `few`.
pub fn chosen<T>(mut points: Vec<T>, dice: &mut Dice, few: usize) -> Vec<T> {
    for last in (1..points.len()).rev() {
        points.swap(last, dice.below(last as u64 + 1) as usize);
    }
    if Size::chosen() == Size::Ci {
        points.truncate(few);
    }
    points
}

/// The seed of this run, printed so that it can be repeated.
pub fn dice() -> Dice {
    let (seed, dice) = dice_named();
    println!("  {seed}");
    dice
}

/// The same, with the words to repeat it.
pub fn dice_named() -> (String, Dice) {
    let chosen = std::env::var(SEED_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = chosen.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |since| u64::from(since.subsec_nanos()))
    });
    (format!("{SEED_VARIABLE}={seed}"), Dice::new(seed))
}

/// A cluster of three that notices lost nodes soon.
pub fn with_quick_cluster(
    installation: &Installation,
    work: impl FnOnce(&mut Cluster) -> Result<()>,
) -> Result<()> {
    with_quick_nodes(installation, 3, work)
}

/// The same with so many nodes.
pub fn with_quick_nodes(
    installation: &Installation,
    nodes: usize,
    work: impl FnOnce(&mut Cluster) -> Result<()>,
) -> Result<()> {
    let mut specs = xtask::cluster::specs(nodes);
    for spec in &mut specs {
        spec.settings.extend(xtask::cluster::member_settings(nodes));
        spec.settings.extend(settings(&[
            ("multimaster.heartbeat_send_timeout", "100"),
            ("multimaster.heartbeat_recv_timeout", "1000"),
        ]));
    }
    let mut cluster = Cluster::start_servers(installation, &specs)?;
    let outcome = cluster.init_cluster().and_then(|()| work(&mut cluster));
    outcome.map_err(|error| {
        cluster.keep_logs();
        anyhow::anyhow!("{error:#}\n{}", cluster.log_tails(15))
    })
}

/// All failpoints with their roles, as the server lists them.
pub fn failpoints(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let list = Session::new(cluster.connect(0)?).text("SHOW multimaster.failpoints")?;
    list.split_whitespace()
        .map(|item| {
            let (name, role) = item.split_once(':').context("a failpoint without a role")?;
            Ok((name.to_owned(), role.to_owned()))
        })
        .collect()
}

pub fn arm(server: &Server, value: &str) -> Result<()> {
    Session::new(server.connect()?).run(&format!("SET multimaster.failpoint = '{value}'"))
}

fn coordinator_dies_at_every_failpoint(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        die_at_all(cluster, "coordinator", COORDINATOR)
    })
}

fn participant_dies_at_every_failpoint(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        die_at_all(cluster, "participant", PARTICIPANT)
    })
}

/// Visits all points of a role (and of both) on a node.
fn die_at_all(cluster: &mut Cluster, role: &str, node: usize) -> Result<()> {
    let mut dice = dice();
    let mut ledger = Ledger::open_among_failpoints(cluster)?;
    let started = Instant::now();
    let points: Vec<(String, String)> = failpoints(cluster)?
        .into_iter()
        .filter(|(_, its_role)| its_role == "both" || its_role.starts_with(role))
        .collect();
    let mut visited = 0;
    for _ in 0..rounds() {
        for (name, its_role) in chosen(points.clone(), &mut dice, 7) {
            let disturbed = its_role.ends_with("-disturbed");
            die_at(cluster, &mut ledger, &mut dice, node, &name, disturbed)
                .with_context(|| format!("at {name} on node {}", node + 1))?;
            visited += 1;
        }
    }
    let seen = ledger.conclude(cluster)?;
    println!(
        "  a {role} died {visited} times in {} s: {seen}",
        started.elapsed().as_secs()
    );
    ensure!(visited > 0, "there are no failpoints");
    Ok(())
}

fn die_at(
    cluster: &mut Cluster,
    ledger: &mut Ledger,
    dice: &mut Dice,
    node: usize,
    name: &str,
    disturbed: bool,
) -> Result<()> {
    let load = ledger.load(cluster, &CLIENTS, dice);
    std::thread::sleep(LOAD);
    let count = 1 + dice.below(3);
    let before = deaths(&cluster.nodes[node], name);
    // The server may be gone before it can say that it is armed.
    let armed = arm(&cluster.nodes[node], &format!("{name}=crash@{count}"));
    let died = await_death(cluster, node, disturbed).and_then(|()| armed.or(Ok(())));
    std::thread::sleep(Duration::from_millis(dice.below(300)));
    let started = died
        .and_then(|()| died_there(&cluster.nodes[node], name, before))
        .and_then(|()| cluster.nodes[node].start());
    std::thread::sleep(LOAD);
    ledger.close(cluster, load)?;
    started?;
    ledger.audit_round(cluster)
}

/// How often a server has died at a point.
pub fn deaths(server: &Server, name: &str) -> usize {
    let line = format!("failpoint {name}: the server dies");
    server.log_text().matches(&line).count()
}

pub fn died_there(server: &Server, name: &str, before: usize) -> Result<()> {
    ensure!(
        deaths(server, name) > before,
        "the server died, but not there"
    );
    Ok(())
}

/// Waits until the server is gone; meanwhile, when it is to be disturbed, commits are interrupted there.
fn await_death(cluster: &mut Cluster, node: usize, disturbed: bool) -> Result<()> {
    let coordinator = cluster.nodes[COORDINATOR].conninfo();
    wait_for("the failpoint to be passed", HIT_LIMIT, || {
        if disturbed
            && let Ok(mut client) = postgres::Client::connect(&coordinator, postgres::NoTls)
        {
            // Fails when it is this very server that dies.
            let _ = client.batch_execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity
                 WHERE application_name = 'ledger' AND state = 'active' AND query = 'COMMIT'",
            );
        }
        Ok(!cluster.nodes[node].is_running())
    })
}

/// The coordinator is gone, and then the node that resolves what it left.
fn resolver_dies_at_every_failpoint(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut dice = dice();
        let mut ledger = Ledger::open_among_failpoints(cluster)?;
        for _ in 0..rounds() {
            for name in chosen(RESOLVING.to_vec(), &mut dice, 2) {
                die_while_resolving(cluster, &mut ledger, &mut dice, name)
                    .with_context(|| format!("at {name}"))?;
            }
        }
        let seen = ledger.conclude(cluster)?;
        println!("  {seen}");
        Ok(())
    })
}

fn die_while_resolving(
    cluster: &mut Cluster,
    ledger: &mut Ledger,
    dice: &mut Dice,
    name: &str,
) -> Result<()> {
    for _ in 0..START_ATTEMPTS {
        let load = ledger.load(cluster, &CLIENTS, dice);
        std::thread::sleep(LOAD + Duration::from_millis(dice.below(100)));
        let died = lose_coordinator(cluster, name);
        let started = cluster.nodes[COORDINATOR].start();
        ledger.close(cluster, load)?;
        let died = died?;
        started?;
        ledger.audit_round(cluster)?;
        if died {
            return Ok(());
        }
    }
    bail!("the failpoint was not passed")
}

/// Lets the coordinator die with every vote given and nothing proposed, so that there is something to resolve, and starts the resolver again that
/// has died at the point; false when another node was faster.
fn lose_coordinator(cluster: &mut Cluster, name: &str) -> Result<bool> {
    let before = deaths(&cluster.nodes[PARTICIPANT], name);
    arm(&cluster.nodes[PARTICIPANT], &format!("{name}=crash"))?;
    // It may be gone before it can say that it is armed.
    let armed = arm(&cluster.nodes[COORDINATOR], "before-precommit=crash");
    await_death(cluster, COORDINATOR, false).and(armed.or(Ok(())))?;
    let resolver = &mut cluster.nodes[PARTICIPANT];
    if wait_for("a resolver", START_HIT_LIMIT, || Ok(!resolver.is_running())).is_err() {
        arm(resolver, "")?;
        return Ok(false);
    }
    died_there(resolver, name, before)?;
    resolver.start()?;
    Ok(true)
}

fn node_dies_at_every_failpoint_of_its_start(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut dice = dice();
        let mut ledger = Ledger::open_among_failpoints(cluster)?;
        let starting: Vec<(String, usize)> = failpoints(cluster)?
            .into_iter()
            .filter(|(_, role)| role == "start")
            .flat_map(|(name, _)| [(name.clone(), COORDINATOR), (name, PARTICIPANT)])
            .collect();
        ensure!(!starting.is_empty(), "there are no failpoints");
        for _ in 0..rounds() {
            for (name, node) in chosen(starting.clone(), &mut dice, 5) {
                die_at_start(cluster, &mut ledger, &mut dice, node, &name)
                    .with_context(|| format!("at {name} on node {}", node + 1))?;
            }
        }
        let seen = ledger.conclude(cluster)?;
        println!("  {seen}");
        Ok(())
    })
}

/// The node is killed, killed again while it starts, and then left to start.
fn die_at_start(
    cluster: &mut Cluster,
    ledger: &mut Ledger,
    dice: &mut Dice,
    node: usize,
    name: &str,
) -> Result<()> {
    let load = ledger.load(cluster, &CLIENTS, dice);
    std::thread::sleep(LOAD + Duration::from_millis(dice.below(200)));
    let server = &mut cluster.nodes[node];
    let outcome = server
        .kill()
        .and_then(|()| {
            server.configure(&settings(&[(
                "multimaster.failpoint",
                &format!("{name}=crash"),
            )]))
        })
        .and_then(|()| die_again(server, name))
        .and_then(|()| server.configure(&settings(&[("multimaster.failpoint", "")])))
        .and_then(|()| server.start());
    ledger.close(cluster, load)?;
    outcome?;
    ledger.audit_round(cluster)
}

/// Starts the server until it dies at its failpoint. Some points are passed only when there is something to be done again: then it is
/// killed once more under load.
fn die_again(server: &mut Server, name: &str) -> Result<()> {
    let before = deaths(server, name);
    for _ in 0..START_ATTEMPTS {
        // It may die before it takes connections.
        let started = server.start();
        let died = wait_for(
            "the failpoint",
            START_HIT_LIMIT,
            || Ok(!server.is_running()),
        );
        if died.is_ok() {
            return died_there(server, name, before).or_else(|error| started.and(Err(error)));
        }
        server.kill()?;
    }
    bail!("the failpoint was not passed")
}

/// What is done at each point, and how often it has to be passed meanwhile.
const DISTURBANCES: [(&str, usize); 2] = [("sleep:100", 3), ("error", 1)];
/// An arbiter that starts again, because of the point before, takes what is armed away.
const ARMED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How long a point is armed that lies on the way of few commits, or of none: there is nothing to wait for.
const OFF_THE_WAY: Duration = Duration::from_millis(400);

/// Nothing may depend on how long something takes, and a process that fails with an error is replaced.
fn errors_and_delays_at_every_failpoint_do_no_harm(installation: &Installation) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        let mut dice = dice();
        let mut ledger = Ledger::open_among_failpoints(cluster)?;
        let points = chosen(failpoints(cluster)?.into_iter().collect(), &mut dice, 20);
        let load = ledger.load(cluster, &[0, 0, 1, 1, 2, 2], &mut dice);
        let mut passed = 0;
        let outcome = points.iter().try_for_each(|(name, role)| -> Result<()> {
            let awaited = ON_THE_WAY.contains(&role.as_str());
            for (action, times) in DISTURBANCES {
                let server = &cluster.nodes[dice.below(3) as usize];
                let times = awaited.then_some(times);
                passed += usize::from(
                    disturb(server, name, action, times)
                        .with_context(|| format!("{name}={action} on {}", server.name))?,
                );
            }
            Ok(())
        });
        ledger.close(cluster, load)?;
        outcome?;
        let seen = ledger.conclude(cluster)?;
        let armed = DISTURBANCES.len() * points.len();
        println!("  {passed} of {armed} disturbances at points that were passed: {seen}");
        Ok(())
    })
}

/// Roles whose points are passed whenever transactions of all nodes commit.
const ON_THE_WAY: [&str; 3] = ["coordinator", "participant", "both"];

/// Arms a point until it was passed so many times, if it has to be; whether it was.
fn disturb(server: &Server, name: &str, action: &str, times: Option<usize>) -> Result<bool> {
    let line = format!("failpoint {name}: passed");
    let before = server.log_text().matches(&line).count();
    let passed = || server.log_text().matches(&line).count() - before;
    arm(server, &format!("{name}={action}"))?;
    let mut outcome = Ok(());
    if let Some(times) = times {
        outcome = wait_for("the failpoint to be passed", HIT_LIMIT, || {
            let soon = wait_for("it", ARMED_AGAIN_AFTER, || Ok(passed() >= times));
            if soon.is_err() {
                // Not while the server takes no sessions.
                let _ = arm(server, &format!("{name}={action}"));
            }
            Ok(soon.is_ok())
        });
    } else {
        std::thread::sleep(OFF_THE_WAY);
    }
    disarm(server)?;
    outcome.map(|()| passed() > 0)
}

/// The arbiter may just be starting again, and everybody waits for it then.
fn disarm(server: &Server) -> Result<()> {
    let deadline = Instant::now() + HIT_LIMIT;
    while let Err(error) = arm(server, "") {
        if Instant::now() > deadline {
            bail!("cannot disarm: {error:#}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
