//! The network takes a coordinator away at each moment of a COMMIT: what its client hears, and what then is true on all nodes.

use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::cluster::wait_for;
use xtask::installation::Installation;
use xtask::server::Server;

use crate::crash::{arm, chosen, dice};
use crate::hosts::{Hosts, PATIENCE, with_hosts};

pub fn cases() -> Vec<OwnCase> {
    cases![a_client_of_a_coordinator_that_is_cut_off_hears_the_truth]
}

/// Who is cut off from whom.
pub struct Scene {
    /// The node (from 0) that is cut off: the last one of the cluster.
    pub coordinator: usize,
    /// The members that are left, as a node shows them.
    pub survivors: &'static str,
}

const THREE_NODES: Scene = Scene {
    coordinator: 2,
    survivors: "{1,2}",
};
/// A client that hears nothing for so long has been forgotten. The core gives up looking for a quorum after 5 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Rows of the clients; smaller ones are others'.
const FIRST_ROW: usize = 1_000_000;
/// How many moments a short run visits.
const IN_CI: usize = 3;

/// Where the commit stops when the coordinator is cut off, on which side that failpoint is, and what the client may hear.
struct Moment {
    name: &'static str,
    side: Side,
    hears: &'static [Heard],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Coordinator,
    /// The first node, which stays.
    Participant,
}
use Side::{Coordinator, Participant};

/// What a client hears of its COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Committed,
    /// 40001 and 57P03: nothing has happened.
    Nothing,
    /// 08007.
    Unknown,
}

const FAST: &[Moment] = &[
    at(
        "backend-before-prepare",
        Coordinator,
        &[Heard::Nothing, Heard::Unknown],
    ),
    at(
        "backend-after-prepare",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
    at(
        "backend-after-announcing",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
    at("decode-prepare", Coordinator, &[Heard::Unknown]),
    at("apply-before-prepare", Participant, &[Heard::Unknown]),
    at("before-vote", Participant, &[Heard::Unknown]),
    // All votes are in: its COMMIT PREPARED is the decision, whoever listens.
    at(
        "backend-before-commit",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
    at(
        "backend-after-commit",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
    at(
        "before-decided",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
];

const E3PC: &[Moment] = &[
    at(
        "backend-after-announcing",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
    at("before-vote", Participant, &[Heard::Unknown]),
    at("before-precommit", Coordinator, &[Heard::Unknown]),
    at(
        "before-precommitted",
        Participant,
        &[Heard::Unknown, Heard::Committed],
    ),
    at(
        "before-decided",
        Coordinator,
        &[Heard::Unknown, Heard::Committed],
    ),
];

const fn at(name: &'static str, side: Side, hears: &'static [Heard]) -> Moment {
    Moment { name, side, hears }
}

fn a_client_of_a_coordinator_that_is_cut_off_hears_the_truth(
    installation: &Installation,
) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts
            .session(0)?
            .run("CREATE TABLE line (n int PRIMARY KEY)")?;
        cut_off_at_many(hosts, &THREE_NODES)?;
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

/// Cuts the coordinator off at all moments, or at some. There is a table `line`.
///
/// # Errors
/// When a client was not told what has happened.
pub fn cut_off_at_many(hosts: &mut Hosts, scene: &Scene) -> Result<()> {
    let fast = FAST.iter().map(|moment| ("fast", moment));
    let all = fast.chain(E3PC.iter().map(|moment| ("e3pc", moment)));
    let moments = chosen(all.collect(), &mut dice(), IN_CI);
    for (number, (mode, moment)) in moments.into_iter().enumerate() {
        cut_off_at(hosts, scene, mode, moment, FIRST_ROW + number)
            .with_context(|| format!("{mode}, at {}", moment.name))?;
    }
    Ok(())
}

fn cut_off_at(
    hosts: &mut Hosts,
    scene: &Scene,
    mode: &str,
    moment: &Moment,
    number: usize,
) -> Result<()> {
    let node = match moment.side {
        Coordinator => scene.coordinator,
        Participant => 0,
    };
    let mut client = hosts.session(scene.coordinator)?;
    client.run(&format!(
        "SET multimaster.commit_mode = {mode}; BEGIN; INSERT INTO line VALUES ({number})"
    ))?;
    let gid = client.text("SELECT mtm.current_gid()")?;
    let before = holds(&hosts.cluster.nodes[node], moment);
    arm(&hosts.cluster.nodes[node], &format!("{}=hold", moment.name))?;
    let answer = commit_aside(client);
    await_hold(&hosts.cluster.nodes[node], moment, before)?;
    hosts.network.isolate(scene.coordinator)?;
    let cut = Instant::now();
    if moment.side == Participant {
        // One of the two that go on: it may be its network thread that is held.
        arm(&hosts.cluster.nodes[node], "")?;
    }
    // The others have gone on before the coordinator moves again.
    wait_for("a generation without the node", PATIENCE, || {
        let members = hosts
            .session(0)?
            .text("SELECT gen_members FROM mtm.status()")?;
        Ok(members == scene.survivors)
    })?;
    arm(&hosts.cluster.nodes[node], "")?;
    let heard = answer
        .recv_timeout(ANSWER_LIMIT)
        .context("the client hears nothing")??;
    let after = cut.elapsed();
    hosts.network.heal()?;
    hosts.await_status(scene.coordinator, "online")?;
    let there = truth(hosts, scene, &gid, number)?;
    println!(
        "  {mode}, {}: the client hears {heard:?} {} ms after the cut; {}",
        moment.name,
        after.as_millis(),
        if there { "committed" } else { "rolled back" }
    );
    ensure!(moment.hears.contains(&heard), "the client hears {heard:?}");
    match heard {
        Heard::Committed => ensure!(there, "it was told committed and is not there"),
        Heard::Nothing => ensure!(!there, "it was told that nothing happened, and is there"),
        Heard::Unknown => {}
    }
    Ok(())
}

fn commit_aside(mut client: Session) -> Receiver<Result<Heard>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let heard = match client.batch_execute("COMMIT") {
            Ok(()) => Ok(Heard::Committed),
            Err(error) => match error.code().map(|code| code.code()) {
                Some("40001" | "57P03") => Ok(Heard::Nothing),
                Some("08007") => Ok(Heard::Unknown),
                _ => Err(anyhow::Error::new(error).context("in COMMIT")),
            },
        };
        // Nobody listens any more when it took too long.
        let _ = sender.send(heard);
    });
    receiver
}

fn await_hold(server: &Server, moment: &Moment, before: usize) -> Result<()> {
    wait_for("the failpoint to be passed", PATIENCE, || {
        Ok(holds(server, moment) > before)
    })
}

/// How often something was held there.
fn holds(server: &Server, moment: &Moment) -> usize {
    let line = format!("failpoint {}: held", moment.name);
    server.log_text().matches(&line).count()
}

/// Whether the row is there: on all nodes or on none, and as every node says of the transaction.
fn truth(hosts: &Hosts, scene: &Scene, gid: &str, number: usize) -> Result<bool> {
    let mut found = Vec::new();
    for node in 0..=scene.coordinator {
        let mut session = hosts.session(node)?;
        let ask = format!("SELECT mtm.transaction_status('{gid}')");
        wait_for("an outcome", PATIENCE, || {
            Ok(["committed", "aborted"].contains(&session.text(&ask)?.as_str()))
        })?;
        let told = session.text(&ask)?;
        let count = format!("SELECT count(*) FROM line WHERE n = {number}");
        wait_for("the row to be as the node says", PATIENCE, || {
            Ok((session.text(&count)? == "1") == (told == "committed"))
        })?;
        found.push(told);
    }
    if found.iter().any(|told| *told != found[0]) {
        bail!("the nodes say {found:?}");
    }
    Ok(found[0] == "committed")
}
