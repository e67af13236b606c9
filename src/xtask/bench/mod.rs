//! `cargo xtask bench`: the cluster beside a PostgreSQL with two synchronous standbys, in one run.
//!
//! Both promise the same after COMMIT: the change is applied on three servers. For workloads that only read there is a plain PostgreSQL too.
//! All servers run throughout; each repetition of a workload measures one system right after the other and the next repetition does so in
//! the opposite order, so that a noisy machine is noisy for all of them. Ratios are taken pair by pair; what counts is their median.

mod figures;
mod measure;
mod plot;
mod report;
mod system;
mod usage;
mod workload;

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::cluster::stop_servers_on_signal;
use crate::extension::{self, Build};
use crate::installation::{MAJOR, Source};
use crate::{screen, setup};
use figures::Figures;
use measure::Scripts;
use system::{Bench, System};
use workload::{WORKLOADS, Workload};

/// What is measured, and for how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Length of one measurement, in seconds.
    pub seconds: u32,
    /// Measurements of each workload on each system.
    pub repetitions: u32,
    /// Scale factor of pgbench.
    pub scale: u32,
    /// Only workloads with this in their name.
    pub only: Option<String>,
    /// Write the result into `docs/`.
    pub document: bool,
}

impl Options {
    /// Enough to see that everything works and roughly where it stands.
    #[must_use]
    pub fn quick(self) -> Options {
        Options {
            seconds: 3,
            repetitions: 1,
            scale: 5,
            document: false,
            ..self
        }
    }
}

/// The figures of all repetitions, by workload and system, in the order of the repetitions.
type Results = BTreeMap<(&'static str, System), Vec<Figures>>;

/// Measures, prints a table and, if that is wanted, writes it down.
///
/// # Errors
/// When a server or pgbench fails, or no workload has the wanted name.
pub fn run(options: &Options) -> Result<()> {
    let chosen: Vec<&Workload> = WORKLOADS
        .iter()
        .filter(|workload| {
            options
                .only
                .as_ref()
                .is_none_or(|only| workload.name.contains(only))
        })
        .collect();
    ensure!(!chosen.is_empty(), "no workload has that in its name");
    stop_servers_on_signal()?;
    screen::heading("Getting ready");
    setup::run(MAJOR)?;
    let machine = report::Machine::read()?;
    let installation = screen::step("building the extension", || {
        extension::build_as(&Source::packaged()?, Build::Release)
    })?;
    let scripts = Scripts::write()?;
    let bench = Bench::start(&installation, options.scale, &chosen)?;
    let mut results = Results::new();
    for workload in &chosen {
        screen::heading(workload.name);
        for repetition in 0..options.repetitions {
            for system in order(workload, repetition) {
                let figures = measure::once(&bench, system, workload, options, &scripts)?;
                screen::say(format!("{system}: {figures}"));
                results
                    .entry((workload.name, system))
                    .or_default()
                    .push(figures);
            }
        }
    }
    let report = report::Report::new(&results, &chosen, options, machine);
    report.show();
    if options.document {
        report.write()?;
    }
    Ok(())
}

/// The systems of a workload, in another order in each repetition.
fn order(workload: &Workload, repetition: u32) -> Vec<System> {
    let mut systems = workload.systems();
    if repetition % 2 == 1 {
        systems.reverse();
    }
    systems
}
