//! `cargo xtask`: everything that a developer does with this project, as commands.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use xtask::simulate::{Choice, World};
use xtask::suite::{self, Options, Size};
use xtask::{bench, demo, installation, profile, setup, simulate, trace};

/// Set-up, demonstration, tests and benchmarks of multimaster.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that building and testing need
    Setup,
    /// Show a cluster of three nodes at work
    Demo,
    /// Show the course of one transaction through three servers
    Trace,
    /// Run all tests
    Test {
        /// Smaller sizes, for continuous integration
        #[arg(long)]
        ci: bool,
        /// As long as it takes to find rare things: many hours
        #[arg(long, conflicts_with = "ci")]
        long: bool,
        /// Run the server tests on a PostgreSQL with assertions, built from Debian's source package
        #[arg(long)]
        assert: bool,
    },
    /// Run the cluster tests, or those with NAME in their name
    Cluster {
        name: Option<String>,
        /// Run as long as it takes to find rare things
        #[arg(long)]
        long: bool,
    },
    /// Simulate clusters through failures; with SEED, show that one step by step
    Sim {
        seed: Option<u64>,
        /// What is simulated: all of these when not given; of SEED, the fixed members
        #[arg(long)]
        world: Option<World>,
        /// Nodes of the cluster, where the world has a choice; several sizes when not given, three of SEED
        #[arg(long)]
        nodes: Option<u32>,
        /// Seeds to run for each world and size; 2,000 when not given
        #[arg(long, conflicts_with = "seed")]
        seeds: Option<u64>,
        /// Run as many seeds as the long test does: 10,000
        #[arg(long, conflicts_with_all = ["seed", "seeds"])]
        long: bool,
    },
    /// Search the interleavings of the protocol
    Model {
        /// Steps of the search; some minutes' worth when not given
        steps: Option<u64>,
    },
    /// Compare the speed with a plain PostgreSQL that has two synchronous standbys
    Bench {
        /// Length of one measurement
        #[arg(long, default_value_t = 10)]
        seconds: u32,
        /// Measurements of each workload
        #[arg(long, default_value_t = 3)]
        repetitions: u32,
        /// Scale factor of pgbench
        #[arg(long, default_value_t = 20)]
        scale: u32,
        /// One short repetition on little data, to see that everything works
        #[arg(long)]
        quick: bool,
        /// Only workloads with NAME in their name; nothing is written into docs/
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
    },
    /// Draw a flame graph of each kind of process of a loaded cluster, with perf
    Profile {
        /// Clients of pgbench's simple update
        #[arg(long, default_value_t = 8)]
        clients: u32,
        /// How long samples are taken
        #[arg(long, default_value_t = 10)]
        seconds: u32,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Task::Setup => setup::run(installation::MAJOR),
        Task::Demo => demo::run(),
        Task::Trace => trace::run(),
        Task::Test { ci, long, assert } => suite::run(&Options {
            size: match (ci, long) {
                (true, _) => Size::Ci,
                (_, true) => Size::Long,
                _ => Size::Full,
            },
            with_assertions: assert,
        }),
        Task::Cluster { name, long } => {
            suite::run_cluster_tests(name.as_deref(), if long { Size::Long } else { Size::Full })
        }
        Task::Sim {
            seed,
            world,
            nodes,
            seeds,
            long,
        } => {
            let choice = Choice { world, nodes };
            let size = if long { Size::Long } else { Size::Full };
            seed.map_or_else(
                || simulate::storms(seeds.unwrap_or(size.seeds()), choice),
                |seed| simulate::show(seed, choice),
            )
        }
        Task::Model { steps } => simulate::interleavings(steps),
        Task::Bench {
            seconds,
            repetitions,
            scale,
            quick,
            only,
        } => {
            let options = bench::Options {
                seconds,
                repetitions,
                scale,
                document: only.is_none(),
                only,
            };
            bench::run(&if quick { options.quick() } else { options })
        }
        Task::Profile { clients, seconds } => profile::run(profile::Options { clients, seconds }),
    };
    exit_code(result)
}

fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
