//! `cargo xtask sim` and `cargo xtask model`: the simulator and the model checker, optimised, with sensible amounts.

use anyhow::{Result, bail};

use crate::command;
use crate::extension::{PROFILE, cargo};

/// Nodes of a seed that is shown without a size.
const SHOWN_NODES: u32 = 3;

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum World {
    /// The members stay.
    Fixed,
    /// Members are lost, come back, and all that can go wrong does.
    Members,
    /// The same, and arbiters start again beside living sessions. Two nodes have a referee.
    Beside,
    /// Disks are lost for good, and copies take their place. Two nodes have a referee.
    Clones,
    /// Two nodes and a referee.
    Referee,
    /// Users' own prepared transactions.
    Users,
}

impl World {
    const ALL: [Self; 6] = [
        Self::Fixed,
        Self::Members,
        Self::Beside,
        Self::Clones,
        Self::Referee,
        Self::Users,
    ];

    /// The simulator's commands that run seeds and that show one.
    const fn commands(self) -> [&'static str; 2] {
        match self {
            Self::Fixed => ["seeds", "trace"],
            Self::Members => ["members", "trace-members"],
            Self::Beside => ["beside", "trace-beside"],
            Self::Clones => ["clones", "trace-clones"],
            Self::Referee => ["referee", "trace-referee"],
            Self::Users => ["users", "trace-users"],
        }
    }

    /// Sizes of cluster that are simulated when none is given: small, even, and with two and three failures to survive. Empty where there is no choice.
    const fn sizes(self) -> &'static [u32] {
        match self {
            Self::Fixed | Self::Members => &[3, 4, 5, 7],
            Self::Beside | Self::Clones => &[2, 3, 5, 7],
            Self::Referee | Self::Users => &[],
        }
    }

    /// Whether `nodes` is among what can be chosen.
    fn has_choice_of_nodes(self) -> bool {
        !self.sizes().is_empty()
    }
}

/// Which worlds, and how large.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choice {
    /// Every world when none is given.
    pub world: Option<World>,
    /// Several sizes when none is given.
    pub nodes: Option<u32>,
}

impl Choice {
    /// A number of nodes is refused where it would be ignored.
    fn check(self) -> Result<()> {
        match (self.world, self.nodes) {
            (Some(world), Some(_)) if !world.has_choice_of_nodes() => {
                bail!("--nodes has no meaning in the world {world:?}, whose size is fixed")
            }
            _ => Ok(()),
        }
    }
}

/// Shows one seed step by step, in the world with fixed members when none is chosen.
///
/// # Errors
/// When an invariant does not hold, or the choice makes no sense.
pub fn show(seed: u64, choice: Choice) -> Result<()> {
    choice.check()?;
    let world = choice.world.unwrap_or(World::Fixed);
    let [_, command] = world.commands();
    let mut arguments = vec![command.to_owned()];
    if world.has_choice_of_nodes() {
        arguments.push(choice.nodes.unwrap_or(SHOWN_NODES).to_string());
    }
    arguments.push(seed.to_string());
    sim(&arguments)
}

/// Runs `seeds` seeds of each world and size that was chosen.
///
/// # Errors
/// When an invariant does not hold, or the choice makes no sense.
pub fn storms(seeds: u64, choice: Choice) -> Result<()> {
    choice.check()?;
    let worlds = World::ALL
        .into_iter()
        .filter(|world| choice.world.is_none_or(|chosen| chosen == *world));
    for world in worlds {
        let [command, _] = world.commands();
        let range = ["0".to_owned(), seeds.to_string()];
        if !world.has_choice_of_nodes() {
            sim(&[vec![command.to_owned()], range.to_vec()].concat())?;
            continue;
        }
        let sizes = choice
            .nodes
            .map_or(world.sizes().to_vec(), |nodes| vec![nodes]);
        for nodes in sizes {
            sim(&[vec![command.to_owned(), nodes.to_string()], range.to_vec()].concat())?;
        }
    }
    Ok(())
}

/// Searches the interleavings of a few nodes and transactions; `steps` bounds the search.
///
/// # Errors
/// When an invariant does not hold.
pub fn interleavings(steps: Option<u64>) -> Result<()> {
    match steps {
        Some(steps) => sim(&["model".to_owned(), steps.to_string()]),
        None => sim(&["model".to_owned()]),
    }
}

/// Searches what can be searched to the end within a minute.
///
/// # Errors
/// When an invariant does not hold, or a search does not come to its end.
pub fn quick_interleavings() -> Result<()> {
    sim(&["quick".to_owned()])
}

fn sim(arguments: &[String]) -> Result<()> {
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
