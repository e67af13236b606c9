//! What the servers of a system used: CPU, context switches, flushes.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::cluster::Cluster;
use crate::server::descendants_of;

/// What all processes of a system's servers have used since they started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// User and system time, seconds; those of processes that ended included.
    pub cpu_s: f64,
    /// Voluntary and involuntary; of the processes that live.
    pub switches: u64,
}

impl Usage {
    /// Reads `/proc`.
    ///
    /// # Errors
    /// When a server does not run.
    pub fn of(cluster: &Cluster) -> Result<Usage> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the system knows no clock tick")? as f64;
        let mut usage = Usage::default();
        for node in &cluster.nodes {
            let postmaster = node.postmaster().context("a server does not run")?;
            // The postmaster's reaped children count among its own times.
            usage.cpu_s += ticks_of(postmaster, 4) / ticks;
            usage.switches += switches_of(postmaster);
            for child in descendants_of(postmaster) {
                let child = child.as_raw().cast_unsigned();
                usage.cpu_s += ticks_of(child, 2) / ticks;
                usage.switches += switches_of(child);
            }
        }
        Ok(usage)
    }

    /// What was used between an earlier reading and this one.
    pub fn since(self, earlier: Usage) -> Usage {
        Usage {
            cpu_s: self.cpu_s - earlier.cpu_s,
            switches: self.switches.saturating_sub(earlier.switches),
        }
    }
}

/// The sum of the first `fields` of utime, stime, cutime and cstime in `/proc/<pid>/stat`; 0 for a process that has ended.
fn ticks_of(pid: u32, fields: usize) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold blanks; utime is the twelfth field behind it.
    let Some((_, rest)) = text.rsplit_once(')') else {
        return 0.0;
    };
    rest.split_whitespace()
        .skip(11)
        .take(fields)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum()
}

fn switches_of(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok())
        .map(|text| {
            text.lines()
                .filter(|line| line.contains("ctxt_switches"))
                .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
                .sum::<u64>()
        })
        .sum()
}

/// Counts the calls of `fdatasync` of a system's servers while it lives, through `perf stat`. Without perf, or without the right to use it, nothing
/// is counted.
pub struct FlushCounter(Option<Child>);

impl FlushCounter {
    pub fn start(cluster: &Cluster) -> FlushCounter {
        let mut pids = Vec::new();
        for postmaster in cluster.nodes.iter().filter_map(|node| node.postmaster()) {
            // Children that start later are followed through their parent.
            pids.push(postmaster.to_string());
            pids.extend(
                descendants_of(postmaster)
                    .iter()
                    .map(|pid| pid.as_raw().to_string()),
            );
        }
        let child = std::process::Command::new("perf")
            .args([
                "stat",
                "--field-separator=,",
                "--event=syscalls:sys_enter_fdatasync",
            ])
            .arg(format!("--pid={}", pids.join(",")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        if child.is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
        FlushCounter(child.ok())
    }

    /// How many there were.
    pub fn stop(mut self) -> Option<u64> {
        let child = self.0.take()?;
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT);
        let output = child.wait_with_output().ok()?;
        count_in(&String::from_utf8_lossy(&output.stderr))
    }
}

impl Drop for FlushCounter {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The first field of the line that has the event's name.
fn count_in(text: &str) -> Option<u64> {
    text.lines()
        .find(|line| line.contains("fdatasync"))?
        .split(',')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::count_in;

    #[test]
    fn count_of_perf_is_read() {
        assert_eq!(
            count_in("18,,syscalls:sys_enter_fdatasync,203000,100.00,,\n"),
            Some(18)
        );
        assert_eq!(
            count_in("<not supported>,,syscalls:sys_enter_fdatasync,0\n"),
            None
        );
        assert_eq!(count_in("perf: command not found"), None);
    }
}
