//! `cargo xtask sim` and `cargo xtask model`: the simulator and the model checker, optimised, with sensible amounts.

use anyhow::Result;

use crate::command;
use crate::extension::{PROFILE, cargo};

/// Sizes of cluster that are simulated when none is given: small, even, and with two failures to survive.
const SIZES: [u32; 4] = [3, 4, 5, 7];

/// Shows one seed step by step, or runs `seeds` seeds, with fixed and with changing members, on clusters of `nodes` nodes (or of several sizes).
///
/// # Errors
/// When an invariant does not hold.
pub fn storms(seed: Option<u64>, nodes: Option<u32>, seeds: u64) -> Result<()> {
    if let Some(seed) = seed {
        return sim(&[
            "trace",
            &nodes.unwrap_or(SIZES[0]).to_string(),
            &seed.to_string(),
        ]);
    }
    let sizes = nodes.map_or(SIZES.to_vec(), |nodes| vec![nodes]);
    let (sizes, seeds) = (sizes.iter().map(u32::to_string), seeds.to_string());
    sizes.into_iter().try_for_each(|nodes| {
        sim(&["seeds", &nodes, "0", &seeds])?;
        sim(&["members", &nodes, "0", &seeds])
    })
}

/// Searches the interleavings of a few nodes and transactions; `steps` bounds the search.
///
/// # Errors
/// When an invariant does not hold.
pub fn interleavings(steps: Option<u64>) -> Result<()> {
    match steps {
        Some(steps) => sim(&["model", &steps.to_string()]),
        None => sim(&["model"]),
    }
}

/// Searches what can be searched to the end within a minute.
///
/// # Errors
/// When an invariant does not hold, or a search does not come to its end.
pub fn quick_interleavings() -> Result<()> {
    sim(&["quick"])
}

fn sim(arguments: &[&str]) -> Result<()> {
    let mut run = cargo();
    run.args([
        "run",
        "--quiet",
        "--package",
        "multimaster-sim",
        "--bin",
        "sim",
        "--profile",
        PROFILE,
        "--",
    ]);
    command::show(run.args(arguments))
}
