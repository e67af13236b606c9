//! `cargo xtask`: everything that a developer does with this project, as commands.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use xtask::{demo, installation, setup};

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
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Task::Setup => setup::run(installation::MAJOR),
        Task::Demo => demo::run(),
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
