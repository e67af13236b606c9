//! `cargo xtask test`: everything that must hold, in order of how quickly it tells.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::extension::{self, cargo};
use crate::installation::{MAJOR, SOURCE_VARIABLE, Source};
use crate::tally::Tally;
use crate::{assert_build, command, screen, setup, simulate};

/// Tells the tests how much time they may take: `ci`, `full` or `long`.
pub const SIZE_VARIABLE: &str = "MULTIMASTER_TEST_SIZE";

/// How thorough a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Minutes on two cores.
    Ci,
    /// The sizes that the requirements name.
    Full,
    /// As long as it takes to find rare things.
    Long,
}

impl Size {
    /// As the environment says.
    pub fn chosen() -> Size {
        match std::env::var(SIZE_VARIABLE).as_deref() {
            Ok("long") => Size::Long,
            Ok("full") => Size::Full,
            _ => Size::Ci,
        }
    }

    /// Seeds of each simulated world and size of cluster.
    pub const fn seeds(self) -> u64 {
        match self {
            Size::Ci => 200,
            Size::Full => 2_000,
            Size::Long => 10_000,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Size::Ci => "ci",
            Size::Full => "full",
            Size::Long => "long",
        }
    }
}

/// What `cargo xtask test` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub size: Size,
    /// Run the server tests on a PostgreSQL with assertions instead.
    pub with_assertions: bool,
}

/// Results of the parts, in order.
#[derive(Default)]
struct Report {
    parts: Vec<(String, Tally, Duration)>,
}

/// Runs the tests.
///
/// # Errors
/// When set-up fails, or any test does.
pub fn run(options: &Options) -> Result<()> {
    screen::heading("Getting ready");
    setup::run(MAJOR)?;
    let mut report = Report::default();
    if options.with_assertions {
        assertions(&mut report, options.size)?;
    } else {
        everything(&mut report, options.size);
    }
    report.conclude()
}

/// Runs the cluster tests whose name contains `filter`.
///
/// # Errors
/// When set-up fails, or any test does.
pub fn run_cluster_tests(filter: Option<&str>, size: Size) -> Result<()> {
    setup::run(MAJOR)?;
    let mut report = Report::default();
    report.part("cluster", || {
        server_tests("cluster", &Source::packaged()?, size, filter)
    });
    report.conclude()
}

fn everything(report: &mut Report, size: Size) {
    report.part("format", || {
        check(
            "fmt",
            &["fmt", "--all", "--", "--check", "--files-with-diff"],
        )
    });
    report.part("lint", lint);
    report.part("unit", unit_tests);
    report.part("model", || {
        match size {
            Size::Ci | Size::Full => simulate::quick_interleavings()?,
            Size::Long => simulate::interleavings(None)?,
        }
        Ok(Tally::PASSED)
    });
    report.part("simulator", || {
        simulate::storms(size.seeds(), simulate::Choice::default())?;
        Ok(Tally::PASSED)
    });
    let built = report.part("build", || {
        extension::build(&Source::packaged()?)?;
        Ok(Tally::PASSED)
    });
    if !built.is_good() {
        return;
    }
    report.part("extension", extension_tests);
    for program in ["server", "cluster"] {
        report.part(program, || {
            server_tests(program, &Source::packaged()?, size, None)
        });
    }
}

fn assertions(report: &mut Report, size: Size) -> Result<()> {
    let source = assert_build::prepare()?;
    report.part("server, with assertions", || {
        server_tests("server", &source, size, None)
    });
    Ok(())
}

/// A check by a component of Rust that may not be installed.
fn check(component: &str, arguments: &[&str]) -> Result<Tally> {
    if !has_cargo_command(component) {
        screen::say(format!(
            "cargo {component} is not installed, so this is left out"
        ));
        return Ok(Tally::PASSED);
    }
    command::show(cargo().args(arguments))?;
    Ok(Tally::PASSED)
}

fn has_cargo_command(name: &str) -> bool {
    command::run(cargo().args([name, "--version"])).is_ok_and(|output| output.status.success())
}

fn lint() -> Result<Tally> {
    if !has_cargo_command("clippy") {
        screen::say("cargo clippy is not installed, so this is left out");
        return Ok(Tally::PASSED);
    }
    let source = Source::packaged()?;
    let denied = ["--", "--deny", "warnings"];
    command::show(
        cargo()
            .args([
                "clippy",
                "--quiet",
                "--all-targets",
                "--workspace",
                "--exclude",
                "multimaster",
            ])
            .args(denied),
    )?;
    let mut extension = cargo();
    extension
        .args(["clippy", "--quiet", "--all-targets"])
        .args(extension::test_build_arguments())
        .env("PGRX_PG_CONFIG_PATH", &source.pg_config);
    command::show(extension.args(denied))?;
    Ok(Tally::PASSED)
}

fn unit_tests() -> Result<Tally> {
    let mut tests = cargo();
    if has_cargo_command("nextest") {
        tests.args([
            "nextest",
            "run",
            "--no-fail-fast",
            "--show-progress",
            "none",
            "--cargo-quiet",
            "--status-level",
            "fail",
        ]);
    } else {
        tests.args(["test", "--quiet", "--no-fail-fast"]);
    }
    counted(&mut tests)
}

/// Runs the unit tests inside the extension, which need no server.
fn extension_tests() -> Result<Tally> {
    let mut tests = cargo();
    tests
        .args(["test", "--quiet", "--lib"])
        .args(extension::test_build_arguments())
        .env("PGRX_PG_CONFIG_PATH", Source::packaged()?.pg_config);
    counted(&mut tests)
}

/// Runs one program of tests/ on servers built from `source`.
fn server_tests(program: &str, source: &Source, size: Size, filter: Option<&str>) -> Result<Tally> {
    let mut tests = cargo();
    tests
        .args([
            "test",
            "--quiet",
            "--package",
            "multimaster-tests",
            "--test",
            program,
        ])
        .env(SIZE_VARIABLE, size.name())
        .env(
            SOURCE_VARIABLE,
            format!("{}={}", source.name, source.pg_config.display()),
        );
    if let Some(filter) = filter {
        tests.args(["--", filter]);
    }
    counted(&mut tests)
}

/// Runs tests with their output on the terminal, and counts them.
fn counted(tests: &mut Command) -> Result<Tally> {
    let (text, succeeded) = tee(tests)?;
    let mut tally = Tally::read(&text);
    if !succeeded && tally.failed == 0 {
        // It did not get as far as a summary: a compiler's error, say.
        tally.failed = 1;
    }
    Ok(tally)
}

/// Shows what `command` writes, and returns it; also whether it succeeded.
fn tee(command: &mut Command) -> Result<(String, bool)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", command::describe(command)))?;
    let text = Arc::new(Mutex::new(String::new()));
    let copies: Vec<_> = [
        child.stdout.take().map(boxed),
        child.stderr.take().map(boxed),
    ]
    .into_iter()
    .flatten()
    .map(|stream| copy_lines(stream, Arc::clone(&text)))
    .collect();
    for copy in copies {
        if copy.join().is_err() {
            bail!("cannot read the output of `{}`", command::describe(command));
        }
    }
    let succeeded = child.wait().context("cannot wait for a program")?.success();
    let text = text.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok((text, succeeded))
}

fn boxed(stream: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(stream)
}

fn copy_lines(stream: Box<dyn Read + Send>, text: Arc<Mutex<String>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            println!("  {line}");
            let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(&line);
            text.push('\n');
        }
    })
}

impl Report {
    /// Runs a part; an error counts as one failed test, and so does a part without tests.
    fn part(&mut self, name: &str, run: impl FnOnce() -> Result<Tally>) -> Tally {
        screen::heading(name);
        let started = Instant::now();
        let mut tally = run().unwrap_or_else(|error| {
            screen::bad(format!("{error:#}"));
            Tally::FAILED
        });
        if tally == Tally::default() {
            screen::bad("no test was run");
            tally = Tally::FAILED;
        }
        self.parts.push((name.to_owned(), tally, started.elapsed()));
        tally
    }

    /// Prints the summary; the closing line stands alone.
    fn conclude(&self) -> Result<()> {
        let mut total = Tally::default();
        screen::heading("Summary");
        screen::table(
            &["part", "passed", "failed", "time"],
            self.parts.iter().map(|(name, tally, time)| {
                total += *tally;
                vec![
                    name.clone(),
                    tally.passed.to_string(),
                    tally.failed.to_string(),
                    screen::seconds(*time),
                ]
            }),
        );
        println!("\n{} passed, {} failed", total.passed, total.failed);
        if total.is_good() {
            Ok(())
        } else {
            bail!("tests failed")
        }
    }
}
