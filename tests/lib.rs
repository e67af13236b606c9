//! The harness of the tests on real servers.
//!
//! A case is a function whose name states the rule. Cases of one program share a cluster and run one after the other;
//! after each, all nodes must hold the same rows and nothing may be left prepared. A case that fails, or takes too long,
//! costs its cluster: the next one gets a fresh one, so that one failure does not hide or cause others.

#![forbid(unsafe_code)]

mod rig;
mod session;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libtest_mimic::{Arguments, Failed, Trial};
use xtask::cluster::{Cluster, patience, stop_servers_on_signal};
use xtask::installation::{Installation, Source};
use xtask::server::kill_all;
use xtask::suite::Size;
use xtask::{checks, extension};

pub use rig::Rig;
pub use session::Session;

/// After this a case on the shared cluster has hung.
const SHARED_CASE_LIMIT: Duration = Duration::from_secs(60);

/// The same for a case with servers of its own, by the size of the run.
const OWN_CASE_LIMIT: [(Size, Duration); 3] = [
    (Size::Ci, Duration::from_secs(240)),
    (Size::Full, Duration::from_secs(600)),
    (Size::Long, Duration::from_secs(3600)),
];

/// After this the shared cluster has not started.
const START_LIMIT: Duration = Duration::from_secs(90);

/// How long the nodes may take to become equal after a case.
const WHOLE_LIMIT: Duration = Duration::from_secs(20);

/// Set by hand: see [`plain`].
pub const PLAIN: &str = "MULTIMASTER_TEST_PLAIN";

/// One test.
#[derive(Clone)]
pub struct Case<F> {
    pub name: &'static str,
    pub run: F,
}

/// A case on the shared cluster.
pub type SharedCase = Case<fn(&Rig) -> Result<()>>;

/// A case that makes the servers it needs.
pub type OwnCase = Case<fn(&Installation) -> Result<()>>;

/// Lists the functions of a module as cases.
#[macro_export]
macro_rules! cases {
    ($($function:ident),* $(,)?) => {
        vec![$($crate::Case { name: concat!(module_path!(), "::", stringify!($function)), run: $function }),*]
    };
}

/// Are the cases to run on one stock server instead? That proves the expectations themselves: what a single PostgreSQL
/// does is what a cluster must look like.
pub fn plain() -> bool {
    std::env::var_os(PLAIN).is_some()
}

fn own_case_limit() -> Duration {
    let limit = OWN_CASE_LIMIT
        .iter()
        .find(|(size, _)| *size == Size::chosen());
    limit.map_or(SHARED_CASE_LIMIT, |(_, limit)| *limit)
}

/// Runs `cases` on shared clusters of `nodes` nodes.
pub fn run_shared(nodes: usize, cases: Vec<SharedCase>) -> ExitCode {
    conclude(|installation| {
        let stage = Arc::new(Stage {
            installation,
            nodes,
            rig: Mutex::new(None),
        });
        let trials = cases
            .into_iter()
            .map(|case| {
                let stage = Arc::clone(&stage);
                Trial::test(display_name(case.name), move || {
                    stage.perform(&case).map_err(failed)
                })
            })
            .collect();
        (trials, Some(stage))
    })
}

/// Runs `cases`, each with servers of its own.
pub fn run_own(cases: Vec<OwnCase>) -> ExitCode {
    let times = Times::default();
    let outcome = conclude(|installation| {
        let trials = cases
            .into_iter()
            .map(|case| {
                let (installation, times) = (installation.clone(), times.clone());
                let name = display_name(case.name);
                Trial::test(name, move || {
                    let (run, began) = (case.run, Instant::now());
                    let outcome = attend(own_case_limit(), move || run(&installation));
                    times.add(name, began.elapsed());
                    outcome.map_err(failed)
                })
            })
            .collect();
        (trials, None)
    });
    times.print_longest();
    outcome
}

/// How long each case took. Never compared with anything: it shows where a run spends its time.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<Vec<(Duration, &'static str)>>>);

/// Cases whose times are shown.
const LONGEST: usize = 15;

impl Times {
    fn add(&self, name: &'static str, took: Duration) {
        self.all().push((took, name));
    }

    fn print_longest(&self) {
        let mut all = self.all();
        all.sort_by(|one, other| other.cmp(one));
        if all.len() < 2 {
            return;
        }
        println!("longest cases:");
        for (took, name) in all.iter().take(LONGEST) {
            println!("  {:6.1} s  {name}", took.as_secs_f64());
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<(Duration, &'static str)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn conclude(prepare: impl FnOnce(Installation) -> (Vec<Trial>, Option<Arc<Stage>>)) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let installation = if arguments.list { None } else { Some(ready()) };
    match installation.transpose() {
        Ok(Some(installation)) => {
            let (trials, stage) = prepare(installation);
            let conclusion = libtest_mimic::run(&arguments, trials);
            drop(stage);
            conclusion.exit_code()
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds what the servers load; quick when `cargo xtask test` has just done so.
fn ready() -> Result<Installation> {
    stop_servers_on_signal()?;
    let source = Source::chosen()?;
    if plain() {
        Installation::prepare(&source)
    } else {
        extension::build(&source)
    }
}

/// Makes a cluster, does `work` on it, and keeps its logs when that fails.
///
/// # Errors
/// Those of the set-up and of `work`, with the ends of the logs.
pub fn with_cluster(
    installation: &Installation,
    nodes: usize,
    work: impl FnOnce(&mut Cluster) -> Result<()>,
) -> Result<()> {
    let mut cluster = Cluster::start(installation, nodes)?;
    let outcome = cluster.init_cluster().and_then(|()| work(&mut cluster));
    outcome.map_err(|error| {
        cluster.keep_logs();
        anyhow!("{error:#}\n{}", cluster.log_tails(15))
    })
}

/// `module::function`, without the name of the test program.
fn display_name(path: &'static str) -> &'static str {
    path.split_once("::").map_or(path, |(_, rest)| rest)
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}

/// Where shared cases are performed.
struct Stage {
    installation: Installation,
    nodes: usize,
    rig: Mutex<Option<Arc<Rig>>>,
}

impl Stage {
    fn perform(&self, case: &SharedCase) -> Result<()> {
        let mut slot = self.rig.lock().unwrap_or_else(PoisonError::into_inner);
        let rig = match slot.take() {
            Some(rig) => rig,
            None => self.fresh_rig()?,
        };
        let (theirs, name, run) = (Arc::clone(&rig), display_name(case.name), case.run);
        match attend(SHARED_CASE_LIMIT * patience(), move || {
            perform_on(&theirs, name, run)
        }) {
            Ok(()) => {
                *slot = Some(rig);
                Ok(())
            }
            Err(error) => {
                rig.cluster.keep_logs();
                Err(anyhow!("{error:#}\n{}", rig.cluster.log_tails(15)))
            }
        }
    }

    fn fresh_rig(&self) -> Result<Arc<Rig>> {
        let (installation, nodes) = (self.installation.clone(), self.nodes);
        attend(START_LIMIT * patience(), move || {
            Rig::start(&installation, nodes)
        })
        .map(Arc::new)
    }
}

fn perform_on(rig: &Rig, name: &str, run: fn(&Rig) -> Result<()>) -> Result<()> {
    rig.begin_case(name)?;
    run(rig)?;
    checks::whole(&rig.cluster, WHOLE_LIMIT * patience())?;
    rig.end_case().context("cannot clean up after the case")
}

/// Runs `case` on a thread of its own, since a hung server must not hang the whole run.
fn attend<T: Send + 'static>(
    limit: Duration,
    case: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, outcome) = mpsc::channel();
    std::thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(case));
        // Nobody listens any more when the case took too long.
        let _ = done.send(result);
    });
    match outcome.recv_timeout(limit) {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => bail!("{}", panic_text(&*panic)),
        Err(RecvTimeoutError::Timeout) => {
            kill_all();
            bail!("took longer than {} s", limit.as_secs())
        }
        Err(RecvTimeoutError::Disconnected) => bail!("the case vanished"),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "the case panicked".to_owned())
}
