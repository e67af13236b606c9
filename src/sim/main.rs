//! Runs seeds of a simulated world, or shows one step by step; searches interleavings.
//!
//! | world | seeds | one of them |
//! |---|---|---|
//! | fixed members | `sim seeds <nodes> <first> <last>` | `sim trace <nodes> <seed>` |
//! | members that change | `sim members <nodes> <first> <last>` | `sim trace-members <nodes> <seed>` |
//! | the same, and arbiters that start again | `sim beside <nodes> <first> <last>` | `sim trace-beside <nodes> <seed>` |
//! | the same, and disks that are lost for good | `sim clones <nodes> <first> <last>` | `sim trace-clones <nodes> <seed>` |
//! | two nodes and a referee | `sim referee <first> <last>` | `sim trace-referee <seed>` |
//! | users' prepared transactions | `sim users <first> <last>` | `sim trace-users <seed>` |
//!
//! `<last>` is not run. `sim quick` and `sim model [<steps>]` search.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::process::ExitCode;

use sim::model::{Findings, Scope, search};
use sim::{ChangeScope, search_changes};

const USAGE: &str = "usage:
  sim seeds | members | beside | clones <nodes> <first> <last>
  sim trace | trace-members | trace-beside | trace-clones <nodes> <seed>
  sim referee | users <first> <last>
  sim trace-referee | trace-users <seed>
  sim quick
  sim model [<steps>]";

/// Steps that a search takes when none are given: more than any scope has.
const MODEL_STEPS: usize = 100_000_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Option<Vec<u64>> = arguments
        .iter()
        .skip(1)
        .map(|argument| argument.parse().ok())
        .collect();
    let holds = match (arguments.first().map(String::as_str), numbers.as_deref()) {
        (Some("seeds"), Some([nodes, first, last])) => seeds(*nodes as u8, *first, *last),
        (Some("members"), Some([nodes, first, last])) => {
            storms(*nodes as u8, *first..*last, "members", &|seed, nodes| {
                sim::run_harsh_seed(seed, nodes, None)
            })
        }
        (Some("trace-members"), Some([nodes, seed])) => {
            shown(sim::trace_harsh_seed(*seed, *nodes as u8))
        }
        (Some("beside"), Some([nodes, first, last])) => {
            storms(*nodes as u8, *first..*last, "beside", &|seed, nodes| {
                sim::run_beside_seed(seed, nodes)
            })
        }
        (Some("trace-beside"), Some([nodes, seed])) => {
            shown(sim::trace_beside_seed(*seed, *nodes as u8))
        }
        (Some("clones"), Some([nodes, first, last])) => {
            storms(*nodes as u8, *first..*last, "clones", &|seed, nodes| {
                sim::run_cloning_seed(seed, nodes, None)
            })
        }
        (Some("trace-clones"), Some([nodes, seed])) => {
            shown(sim::trace_cloning_seed(*seed, *nodes as u8))
        }
        (Some("referee"), Some([first, last])) => refereed(*first, *last),
        (Some("trace-referee"), Some([seed])) => shown(sim::trace_refereed_seed(*seed)),
        (Some("users"), Some([first, last])) => users(*first..*last),
        (Some("trace-users"), Some([seed])) => shown(sim::trace_users_seed(*seed)),
        (Some("trace"), Some([nodes, seed])) => trace(*nodes as u8, *seed),
        (Some("quick"), Some([])) => quick(),
        (Some("model"), Some([])) => model(MODEL_STEPS),
        (Some("model"), Some([steps])) => model(*steps as usize),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn seeds(nodes: u8, first: u64, last: u64) -> bool {
    match sim::run_seeds(first..last, nodes) {
        Ok(summary) => {
            println!(
                "{} seeds with {nodes} nodes: {} committed, {} aborted, {} unknown; all invariants hold",
                summary.seeds, summary.committed, summary.aborted, summary.unknown
            );
            true
        }
        Err(failure) => {
            println!(
                "{failure}\nrepeat it with: sim trace {nodes} {}",
                failure.seed
            );
            false
        }
    }
}

type Storm = dyn Fn(u64, u8) -> Result<sim::Report, sim::SeedFailure>;

/// Storms in which members change; `name` is that of the command which traces one.
fn storms(nodes: u8, seeds: std::ops::Range<u64>, name: &str, storm: &Storm) -> bool {
    let count = seeds.end.saturating_sub(seeds.start);
    let (mut committed, mut generations, mut recovered) = (0, 0, 0);
    for seed in seeds {
        match storm(seed, nodes) {
            Ok(report) => {
                committed += report.committed;
                generations += report.generations;
                recovered += report.recovered;
            }
            Err(failure) => {
                println!("{failure}\nrepeat it with: sim trace-{name} {nodes} {seed}");
                return false;
            }
        }
    }
    println!(
        "{} seeds with {nodes} nodes: {committed} committed in {generations} generations, {recovered} recovered; all invariants hold",
        count
    );
    true
}

fn refereed(first: u64, last: u64) -> bool {
    let (mut committed, mut alone, mut recovered) = (0, 0, 0);
    for seed in first..last {
        match sim::run_refereed_seed(seed, None, None) {
            Ok(report) => {
                committed += report.committed;
                alone += report.alone;
                recovered += report.recovered;
            }
            Err(failure) => {
                println!("{failure}\nrepeat it with: sim trace-referee {seed}");
                return false;
            }
        }
    }
    println!(
        "{} seeds with two nodes and a referee: {committed} committed, {alone} of them alone, {recovered} recovered; all invariants hold",
        last - first
    );
    true
}

fn users(seeds: std::ops::Range<u64>) -> bool {
    for seed in seeds.clone() {
        if let Err(broken) = sim::run_users_seed(seed, None) {
            println!("{broken}\nrepeat it with: sim trace-users {seed}");
            return false;
        }
    }
    println!("{seeds:?} of users' prepared transactions: all rules hold");
    true
}

fn trace(nodes: u8, seed: u64) -> bool {
    shown(sim::trace_seed(seed, nodes))
}

fn shown<R: Debug, E: Debug>((lines, result): (Vec<String>, Result<R, E>)) -> bool {
    for line in lines {
        println!("{line}");
    }
    println!("{result:?}");
    result.is_ok()
}

/// Scopes that must be searched to the end.
fn quick() -> bool {
    let complete = |findings: &Findings| findings.broken.is_empty() && findings.complete;
    Scope::quick()
        .into_iter()
        .all(|scope| complete(&told(scope, search(scope))))
        && ChangeScope::quick()
            .into_iter()
            .all(|scope| complete(&told(scope, search_changes(scope))))
}

fn model(states_max: usize) -> bool {
    quick()
        && Scope::large(states_max)
            .into_iter()
            .all(|scope| told(scope, search(scope)).broken.is_empty())
        && ChangeScope::large(states_max)
            .into_iter()
            .all(|scope| told(scope, search_changes(scope)).broken.is_empty())
}

fn told(scope: impl std::fmt::Display, findings: Findings) -> Findings {
    println!("{scope}: {findings}");
    findings
}
