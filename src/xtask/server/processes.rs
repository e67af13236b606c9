//! Processes of servers, seen from outside.

use crate::command;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// Process ids of the servers that run, for [`kill_all`].
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Stops every server at once; for a signal handler, when there is no time for destructors.
pub fn kill_all() {
    for &pid in running().iter() {
        for child in descendants_of(pid.cast_unsigned()) {
            let _ = kill(child, Signal::SIGKILL);
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Kills the server of a data directory that an earlier run of ours made and left. A process that merely has the same
/// number as that server had is left alone: PostgreSQL's working directory is its data directory.
pub fn end_abandoned(data: &Path) {
    let pid = fs::read_to_string(data.join("postmaster.pid"))
        .ok()
        .and_then(|text| {
            text.lines()
                .next()
                .and_then(|line| line.trim().parse::<u32>().ok())
        });
    if let Some(pid) = pid
        && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|directory| directory == data)
    {
        let children = descendants_of(pid);
        let postmaster = Pid::from_raw(pid.cast_signed());
        for process in std::iter::once(postmaster).chain(children) {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let place = data.to_string_lossy();
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(&*place))
    {
        let _ = command::run(Command::new("umount").arg("--lazy").arg(data));
    }
}

/// Processes with this working directory, which is what every process of a server has as its data directory.
pub(super) fn working_in(data: &Path) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|directory| directory == data)
        })
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

/// What processes are and wait for, one line each: for the message about one that does not end.
pub(super) fn describe(processes: &[Pid]) -> String {
    let tell = |pid: &Pid| {
        let read = |file: &str| {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            text.replace('\0', " ").trim().to_owned()
        };
        let state = read("status");
        let state = state
            .lines()
            .find_map(|line| line.strip_prefix("State:"))
            .unwrap_or_default();
        format!(
            "{pid} {} {} {}",
            read("cmdline"),
            state.trim(),
            read("wchan")
        )
    };
    processes.iter().map(tell).collect::<Vec<_>>().join("\n")
}

pub(super) fn running() -> std::sync::MutexGuard<'static, BTreeSet<i32>> {
    RUNNING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Children of a postmaster; they have none of their own.
pub fn descendants_of(parent: u32) -> Vec<Pid> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<i32>>()
        })
        .map(Pid::from_raw)
        .collect()
}
