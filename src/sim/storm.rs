//! One simulation from a seed: a storm, then calm, then the reckoning.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use protocol::{Decision, Fault, Millis, Source};

use crate::checker::Violation;
use crate::clones::CloneFault;
use crate::event::Event;
use crate::referee::RefereeHost;
use crate::world::World;
use protocol::membership::MembershipFault;

const STORM_MS: Millis = 3_000;
/// How long a healed cluster may take to end and forget everything.
const CALM_MS: Millis = 8_000;

/// What a simulation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Equal for equal runs.
    pub digest: u64,
    pub committed: u64,
    pub aborted: u64,
    /// Clients that were told that the outcome is unknown.
    pub unknown: u64,
    /// Commits of the coordinators by how they came to know them.
    pub committed_by: BTreeMap<Source, u64>,
    /// Generations in which somebody came online after a start of the cluster.
    pub generations: u64,
    /// Transactions that came through a donor.
    pub recovered: u64,
    /// Commits of a node that was alone.
    pub alone: u64,
    /// Copies of nodes that were made, and times that an old disk was started.
    pub copies: u64,
    pub old_disks: u64,
}

/// A seed whose run broke an invariant. The same seed and number of nodes repeat the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedFailure {
    pub seed: u64,
    pub nodes: u8,
    pub violation: Violation,
}

impl fmt::Display for SeedFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            nodes,
            violation,
        } = self;
        write!(
            f,
            "seed {seed} with {nodes} nodes breaks {}: {}",
            violation.invariant, violation.detail
        )
    }
}

/// Totals of many seeds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub seeds: u64,
    pub committed: u64,
    pub aborted: u64,
    pub unknown: u64,
    pub committed_by: BTreeMap<Source, u64>,
}

/// Runs a range of seeds; stops at the first that breaks an invariant.
pub fn run_seeds(seeds: Range<u64>, nodes: u8) -> Result<Summary, SeedFailure> {
    let mut summary = Summary::default();
    for seed in seeds {
        let report = run_seed(seed, nodes)?;
        summary.seeds += 1;
        summary.committed += report.committed;
        summary.aborted += report.aborted;
        summary.unknown += report.unknown;
        for (source, count) in report.committed_by {
            *summary.committed_by.entry(source).or_default() += count;
        }
    }
    Ok(summary)
}

/// Runs one seed.
pub fn run_seed(seed: u64, nodes: u8) -> Result<Report, SeedFailure> {
    run_seed_with(seed, nodes, None)
}

/// Runs one seed with a rule broken on purpose.
pub fn run_seed_with(seed: u64, nodes: u8, fault: Option<Fault>) -> Result<Report, SeedFailure> {
    run(&mut World::new(seed, nodes, fault, false)).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    })
}

/// Runs one seed and returns every event and effect, one a line, with the result.
pub fn trace_seed(seed: u64, nodes: u8) -> (Vec<String>, Result<Report, SeedFailure>) {
    let mut world = World::new(seed, nodes, None, true);
    let result = run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    });
    (world.log.unwrap_or_default(), result)
}

/// Runs one seed in which members change: who is lost is left out, who comes back recovers and is taken in.
pub fn run_changing_seed(
    seed: u64,
    nodes: u8,
    fault: Option<MembershipFault>,
) -> Result<Report, SeedFailure> {
    run(&mut changing(seed, nodes, fault, false)).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    })
}

/// Like [`trace_seed`], with members that change.
pub fn trace_changing_seed(seed: u64, nodes: u8) -> (Vec<String>, Result<Report, SeedFailure>) {
    let mut world = changing(seed, nodes, None, true);
    let result = run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    });
    (world.log.unwrap_or_default(), result)
}

/// Two nodes and a referee: as [`run_changing_seed`], and with a rule of the commit protocol broken.
pub fn run_refereed_seed(
    seed: u64,
    fault: Option<MembershipFault>,
    of_commit: Option<Fault>,
) -> Result<Report, SeedFailure> {
    let mut world = refereed(seed, fault, false);
    world.fault = of_commit;
    run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes: 2,
        violation,
    })
}

/// Two nodes and a referee, with all that can go wrong: see [`run_harsh_seed`].
pub fn run_harsh_refereed_seed(seed: u64) -> Result<Report, SeedFailure> {
    let mut world = refereed(seed, None, false);
    world.plan_hazards(seed, STORM_MS);
    run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes: 2,
        violation,
    })
}

/// Like [`trace_seed`], with two nodes and a referee.
pub fn trace_refereed_seed(seed: u64) -> (Vec<String>, Result<Report, SeedFailure>) {
    let mut world = refereed(seed, None, true);
    let result = run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes: 2,
        violation,
    });
    (world.log.unwrap_or_default(), result)
}

/// Like [`run_changing_seed`], with more that can go wrong: links that work one way, splits, nodes that stand still, leave, or do not vote,
/// clocks of different speed, slow disks, recovered transactions that a crash takes back.
pub fn run_harsh_seed(
    seed: u64,
    nodes: u8,
    fault: Option<MembershipFault>,
) -> Result<Report, SeedFailure> {
    harsh(seed, nodes, fault, false).1
}

/// Like [`trace_seed`], with all that can go wrong.
pub fn trace_harsh_seed(seed: u64, nodes: u8) -> (Vec<String>, Result<Report, SeedFailure>) {
    harsh(seed, nodes, None, true)
}

/// Like [`run_harsh_seed`], with arbiters that start again beside living sessions. Two nodes have a referee.
pub fn run_beside_seed(seed: u64, nodes: u8) -> Result<Report, SeedFailure> {
    beside(seed, nodes, false).1
}

/// Like [`trace_seed`], with all that can go wrong, and arbiters that start again beside living sessions.
pub fn trace_beside_seed(seed: u64, nodes: u8) -> (Vec<String>, Result<Report, SeedFailure>) {
    beside(seed, nodes, true)
}

/// Like [`run_harsh_seed`], with disks that are lost for good, copies of other nodes in their place, and old disks that are started once more. Two nodes have a referee.
pub fn run_cloning_seed(
    seed: u64,
    nodes: u8,
    fault: Option<CloneFault>,
) -> Result<Report, SeedFailure> {
    cloning(seed, nodes, fault, false).1
}

/// Like [`trace_seed`], with all that can go wrong, and lost disks.
pub fn trace_cloning_seed(seed: u64, nodes: u8) -> (Vec<String>, Result<Report, SeedFailure>) {
    cloning(seed, nodes, None, true)
}

fn cloning(
    seed: u64,
    nodes: u8,
    fault: Option<CloneFault>,
    log: bool,
) -> (Vec<String>, Result<Report, SeedFailure>) {
    let mut world = if nodes == 2 {
        refereed(seed, None, log)
    } else {
        changing(seed, nodes, None, log)
    };
    world.plan_hazards(seed, STORM_MS);
    world.plan_clones(seed, STORM_MS, fault);
    let result = run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    });
    (world.log.unwrap_or_default(), result)
}

fn beside(seed: u64, nodes: u8, log: bool) -> (Vec<String>, Result<Report, SeedFailure>) {
    let mut world = if nodes == 2 {
        refereed(seed, None, log)
    } else {
        changing(seed, nodes, None, log)
    };
    world.plan_hazards(seed, STORM_MS);
    world.plan_arbiters(seed, STORM_MS);
    let result = run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    });
    (world.log.unwrap_or_default(), result)
}

fn harsh(
    seed: u64,
    nodes: u8,
    fault: Option<MembershipFault>,
    log: bool,
) -> (Vec<String>, Result<Report, SeedFailure>) {
    let mut world = changing(seed, nodes, fault, log);
    world.plan_hazards(seed, STORM_MS);
    let result = run(&mut world).map_err(|violation| SeedFailure {
        seed,
        nodes,
        violation,
    });
    (world.log.unwrap_or_default(), result)
}

fn refereed(seed: u64, fault: Option<MembershipFault>, log: bool) -> World {
    let mut world = changing(seed, 2, fault, log);
    world.referee = Some(RefereeHost::default());
    world
}

fn changing(seed: u64, nodes: u8, fault: Option<MembershipFault>, log: bool) -> World {
    let mut world = World::new(seed, nodes, None, log);
    world.changing = true;
    world.members_fault = fault;
    world
}

fn run(world: &mut World) -> Result<Report, Violation> {
    world.plan_storm(STORM_MS);
    world.run_until(world.now + STORM_MS);
    world.heal();
    world.run_until(world.now + CALM_MS);
    demand_end(world);
    world.demand_all_online();
    world.checker.demand_one_order();
    demand_progress(world);
    world.checker.demand_truth();
    match world.checker.violation() {
        Some(violation) => Err(violation.clone()),
        None => Ok(report(world)),
    }
}

/// I10: nothing in doubt, nothing remembered, all databases equal.
fn demand_end(world: &mut World) {
    let World {
        servers,
        checker,
        now,
        ..
    } = world;
    let mut commits = servers.values().map(|server| {
        let committed = server
            .disk
            .finished
            .iter()
            .filter(|(_, decision)| **decision == Decision::Commit);
        committed.map(|(gid, _)| *gid).collect::<Vec<_>>()
    });
    let first = commits.next();
    checker.demand(
        commits.all(|other| Some(&other) == first.as_ref()),
        "I10",
        || "databases differ".into(),
    );
    for (node, server) in servers.iter() {
        let prepared = &server.disk.prepared;
        checker.demand(prepared.is_empty(), "I10", || {
            format!("{node} still holds {prepared:?}")
        });
        let Some(memory) = &server.memory else {
            continue;
        };
        let open: Vec<_> = memory.core.transactions(*now).collect();
        checker.demand(open.is_empty(), "I10", || {
            format!("{node} does not forget {open:?}")
        });
        let records = &server.disk.records;
        let freed = records
            .keys()
            .all(|gid| server.written_record(*gid).is_none());
        checker.demand(freed, "I10", || format!("{node} keeps records {records:?}"));
        let applying = &memory.applying;
        checker.demand(applying.is_empty(), "I10", || {
            format!("{node} still applies {applying:?}")
        });
        let sessions = &memory.sessions;
        checker.demand(sessions.is_empty(), "I10", || {
            format!("{node} leaves clients waiting: {sessions:?}")
        });
    }
}

/// The healed cluster commits on every node.
fn demand_progress(world: &mut World) {
    for node in world.configured.iter() {
        let (before, told) = (world.xids, world.checker.told.len());
        world.agenda.plan(world.now, Event::Client { node });
        world.run_until(world.now + 1_000);
        let committed = world.checker.told.iter().any(|(gid, outcome)| {
            gid.xid > before && gid.coordinator == node && *outcome == Some(Decision::Commit)
        });
        let answered = world.checker.told.len() - told;
        world.checker.demand(committed, "I10", || {
            format!("no commit on {node} after healing, {answered} answers")
        });
    }
}

fn report(world: &World) -> Report {
    let count = |wanted: Option<Decision>| {
        let told = world.checker.told.values();
        told.filter(|outcome| **outcome == wanted).count() as u64
    };
    Report {
        digest: world.digest(),
        committed: count(Some(Decision::Commit)),
        aborted: count(Some(Decision::Abort)),
        unknown: count(None),
        committed_by: world.committed_by.clone(),
        generations: world.generations.len() as u64,
        recovered: world.recovered,
        copies: world.clones.made,
        old_disks: world.clones.returns,
        alone: world
            .checker
            .told
            .iter()
            .filter(|(gid, outcome)| gid.members.len() == 1 && **outcome == Some(Decision::Commit))
            .count() as u64,
    }
}
