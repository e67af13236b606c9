//! Running other programs: every failure says what was run and how it ended.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of a failed program's output that an error message repeats.
const TAIL_LINES: usize = 25;

/// Runs `command` silently and returns what it wrote to its standard output.
///
/// # Errors
/// When it cannot be started or fails; the message ends with the last lines of its output.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({})\n{}",
            describe(command),
            output.status,
            tail(&joined(&output), TAIL_LINES)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` silently, whatever its exit status.
///
/// # Errors
/// When it cannot be started.
pub fn run(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{}`", describe(command)))
}

/// Runs `command` with its output on this terminal.
///
/// # Errors
/// When it cannot be started or fails.
pub fn show(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run `{}`", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", describe(command));
    }
    Ok(())
}

/// The command line, as one would type it.
pub fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Standard output followed by standard error.
pub fn joined(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    text
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
