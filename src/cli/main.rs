//! `mtm`: what an operator does to a cluster from outside of its servers.

#![forbid(unsafe_code)]

mod clone;
mod nodes;
mod server;
mod session;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "mtm", version, about = "Looks after a multimaster cluster")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Replaces a lost node by a copy of another one, while the others work.
    ///
    /// Run it on the lost node's machine, as the account that runs the server, with the server stopped. The other nodes must all be online. When it was
    /// interrupted, run it again. Afterwards start the server as usual: it fetches what it has missed since, and comes online by itself.
    Clone(CloneOptions),
}

/// What to copy, and where to.
#[derive(Args)]
pub struct CloneOptions {
    /// Number of the lost node.
    #[arg(long)]
    node: i32,
    /// How to reach the node to copy from, as a superuser, in the cluster's database.
    #[arg(long, value_name = "CONNINFO")]
    from: String,
    /// The lost node's data directory: empty, or not there.
    #[arg(long, value_name = "DIR")]
    pgdata: PathBuf,
    /// Where postgresql.conf and the like of the lost node are kept; they replace those of the node that is copied from.
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
    /// Another place for a tablespace, which otherwise comes to lie where it does on the node that is copied from. As often as needed.
    #[arg(long, value_name = "OLDDIR=NEWDIR")]
    tablespace_mapping: Vec<String>,
    /// Where PostgreSQL's programs are; otherwise `pg_config` is asked.
    #[arg(long, value_name = "DIR")]
    bindir: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Command::Clone(options) = Options::parse().command;
    match clone::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mtm: {error:#}");
            ExitCode::FAILURE
        }
    }
}
