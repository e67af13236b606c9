//! The result: on the terminal, and in `docs/performance.md`.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::figures::{Figures, median_ratio, short};
use super::system::System;
use super::workload::{Kind, Workload};
use super::{Options, Results, plot};
use crate::command;
use crate::host;
use crate::installation::Source;
use crate::screen;

/// The measured part of the document lies between these.
const BEGIN: &str = "<!-- begin of what `cargo xtask bench` writes -->";
const END: &str = "<!-- end of what `cargo xtask bench` writes -->";

const HEADER: [&str; 10] = [
    "workload",
    "system",
    "tps",
    "ratio (min–max)",
    "target",
    "p50 / p95 / p99 / max ms",
    "CPU s",
    "fdatasyncs",
    "switches",
    "retries",
];

/// Where the measuring took place.
pub struct Machine {
    processor: String,
    cores: usize,
    memory_gib: u64,
    kernel: String,
    server: String,
    load: String,
    /// The commit that is measured.
    revision: String,
}

impl Machine {
    /// Reads `/proc` and asks git; to be called before the servers start, for the load.
    ///
    /// # Errors
    /// When PostgreSQL is not installed.
    pub fn read() -> Result<Machine> {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        let kilobytes: u64 = field(&read("/proc/meminfo"), "MemTotal")
            .split_whitespace()
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        Ok(Machine {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: kilobytes / 1024 / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            server: Source::packaged()?.ask("--version")?,
            load: load(),
            revision: revision(),
        })
    }
}

/// The load averages of the last 1, 5 and 15 minutes.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Everything that was measured.
pub struct Report<'a> {
    results: &'a Results,
    workloads: &'a [&'a Workload],
    options: &'a Options,
    machine: Machine,
}

impl<'a> Report<'a> {
    pub fn new(
        results: &'a Results,
        workloads: &'a [&'a Workload],
        options: &'a Options,
        machine: Machine,
    ) -> Report<'a> {
        Report {
            results,
            workloads,
            options,
            machine,
        }
    }

    /// On the terminal.
    pub fn show(&self) {
        screen::heading("Medians");
        screen::table(&HEADER, self.rows());
        for line in self.conditions().lines() {
            screen::say(line);
        }
    }

    /// Into `docs/`: the table, the plot, and where it was measured.
    ///
    /// # Errors
    /// When the document lacks its marks or cannot be written.
    pub fn write(&self) -> Result<()> {
        let (document, picture) = (docs("performance.md"), docs("performance.svg"));
        let text = fs::read_to_string(&document)
            .with_context(|| format!("cannot read {}", document.display()))?;
        let text = replaced(&text, &self.markdown()).with_context(|| {
            format!("{} has no place for what was measured", document.display())
        })?;
        fs::write(&document, text)
            .with_context(|| format!("cannot write {}", document.display()))?;
        plot::draw(&picture, &self.bars())?;
        screen::good(format!(
            "written: {} and {}",
            document.display(),
            picture.display()
        ));
        Ok(())
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        text.push_str(&line(&HEADER.map(String::from)));
        text.push_str(&line(&HEADER.map(|_| "---".to_owned())));
        for row in self.rows() {
            text.push_str(&line(&row));
        }
        let _ = write!(
            text,
            "\n{}\n![throughput of multimaster as a share of streaming's](performance.svg)\n",
            self.conditions()
        );
        text
    }

    /// How and where, in sentences.
    fn conditions(&self) -> String {
        let Options {
            seconds,
            repetitions,
            scale,
            ..
        } = self.options;
        let machine = &self.machine;
        format!(
            "Command: `cargo xtask bench --seconds {seconds} --repetitions {repetitions} --scale {scale}` ({}).\n\
             Machine: {} cores of {}, {} GiB, Linux {}; load average {} before and {} after; servers, clients and data (in memory, where there is room) on this one machine, {}.\n",
            machine.revision,
            machine.cores,
            machine.processor,
            machine.memory_gib,
            machine.kernel,
            machine.load,
            load(),
            machine.server,
        )
    }

    fn rows(&self) -> Vec<Vec<String>> {
        self.workloads
            .iter()
            .flat_map(|workload| {
                workload
                    .systems()
                    .into_iter()
                    .filter_map(|system| self.row(workload, system))
            })
            .collect()
    }

    fn row(&self, workload: &Workload, system: System) -> Option<Vec<String>> {
        let all = self.results.get(&(workload.name, system))?;
        let medians = Figures::medians(all);
        let throughput = match workload.kind {
            Kind::Bulk(_) => format!("{} s", short(1.0 / medians.tps)),
            _ => short(medians.tps),
        };
        let [median, most, nearly_all, longest] = medians.latency_ms.map(short);
        Some(vec![
            workload.name.to_owned(),
            system.to_string(),
            throughput,
            self.ratio(workload, system),
            Report::target(workload, system),
            format!("{median} / {most} / {nearly_all} / {longest}"),
            short(medians.cpu_s),
            medians.flushes.map_or("-".to_owned(), short),
            short(medians.switches),
            short(medians.retries),
        ])
    }

    /// Our figure by that of what the workload is compared with, with the least and the greatest pair; for bulk loads of times, else of throughputs.
    fn ratio(&self, workload: &Workload, system: System) -> String {
        if workload.kind == Kind::Idle || system != System::Multimaster {
            return String::new();
        }
        let beside = match workload.beside {
            Some(other) => vec![(other, System::Multimaster)],
            None => workload
                .systems()
                .into_iter()
                .filter(|other| *other != system)
                .map(|other| (workload.name, other))
                .collect(),
        };
        let texts = beside.into_iter().filter_map(|(name, other)| {
            let ours = self.results.get(&(workload.name, system))?;
            let theirs = self.results.get(&(name, other))?;
            let of = |figures: &Figures| match workload.kind {
                Kind::Bulk(_) => 1.0 / figures.tps,
                _ => figures.tps,
            };
            let pairs: Vec<f64> = ours
                .iter()
                .zip(theirs)
                .map(|(a, b)| of(a) / of(b))
                .collect();
            let least = pairs.iter().copied().fold(f64::INFINITY, f64::min);
            let greatest = pairs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let whom = if other == System::Multimaster {
                name.to_owned()
            } else {
                other.to_string()
            };
            Some(format!(
                "{:.2} ({least:.2}–{greatest:.2}) of {whom}",
                median_ratio(ours, theirs, of)
            ))
        });
        texts.collect::<Vec<_>>().join(", ")
    }

    fn target(workload: &Workload, system: System) -> String {
        workload
            .target
            .filter(|_| system == System::Multimaster)
            .unwrap_or_default()
            .to_owned()
    }

    /// Throughput by that of streaming.
    fn bars(&self) -> Vec<plot::Bar> {
        self.workloads
            .iter()
            .filter(|workload| workload.kind != Kind::Idle)
            .filter_map(|workload| {
                let ours = self.results.get(&(workload.name, System::Multimaster))?;
                let theirs = self.results.get(&(workload.name, System::Streaming))?;
                Some(plot::Bar {
                    name: workload.name.to_owned(),
                    ratio: median_ratio(ours, theirs, |figures| figures.tps),
                })
            })
            .collect()
    }
}

fn docs(name: &str) -> PathBuf {
    host::checkout().join("docs").join(name)
}

/// The commit that was measured.
fn revision() -> String {
    let mut git = std::process::Command::new("git");
    git.current_dir(host::checkout())
        .args(["describe", "--always", "--dirty"]);
    match command::capture(&mut git) {
        Ok(name) => format!("commit {}", name.trim()),
        Err(_) => "commit unknown".to_owned(),
    }
}

/// The document with another measured part.
fn replaced(document: &str, part: &str) -> Option<String> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{part}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::{BEGIN, END, replaced};

    #[test]
    fn only_the_measured_part_is_replaced() {
        let document = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let expected = format!("before\n{BEGIN}\nnew\n{END}\nafter\n");
        assert_eq!(replaced(&document, "new\n"), Some(expected));
        assert_eq!(replaced("no marks", "new"), None);
    }
}
