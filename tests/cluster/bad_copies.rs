//! What an operator, a network or a full disk makes of `mtm clone`: it says what is wrong, leaves nothing behind that hurts, and can be run again.

use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::suite::Size;
use xtask::{command, extension, host};

use crate::clone::{Kept, await_members, await_unlocked, fail_with, succeed};
use crate::failover::{LOAD, Load, PATIENCE, await_online, check_rows, create};

pub fn cases() -> Vec<OwnCase> {
    if Size::chosen() == Size::Ci {
        return cases![what_hinders_a_copy_is_said_before_anything_is_changed];
    }
    // The others take twenty seconds each.
    cases![
        what_hinders_a_copy_is_said_before_anything_is_changed,
        a_copy_that_ends_early_is_made_again,
        an_old_directory_beside_its_copy_has_no_say
    ]
}

/// Node (from 0) that is replaced, and the one that it is copied from.
const LOST: usize = 2;
const DONOR: usize = 0;
const OTHERS: [usize; 2] = [0, 1];
/// Longer than the pause after which a refused receiver tries again.
const TRIES: Duration = Duration::from_secs(7);
/// An address that nobody else uses.
const ELSEWHERE: &str = "127.0.0.77";
/// The programs that a run uses.
const PROGRAMS: [&str; 4] = ["psql", "postgres", "pg_basebackup", "pg_resetwal"];

fn what_hinders_a_copy_is_said_before_anything_is_changed(
    installation: &Installation,
) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let run = Run::new(cluster, &mtm)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        for program in ["postgres", "pg_basebackup", "pg_resetwal"] {
            run.replace(program, &format!("echo '{program} (PostgreSQL) 14.9'"))?;
            run.fails(cluster, "are of another release")?;
            fs::remove_file(run.programs.0.join(program))?;
            run.fails(cluster, &format!("cannot run {program}"))?;
            run.restore(program)?;
        }
        no_connections_for_replication(cluster, &run)?;
        not_a_superuser(cluster, &run)?;
        not_the_node_that_it_should_be(cluster, &run)?;
        not_writable(cluster, &run)?;
        // The same without any of that.
        succeed(&command::run(&mut run.program(cluster, "")?)?)
    })
}

fn no_connections_for_replication(cluster: &Cluster, run: &Run) -> Result<()> {
    let file = cluster.nodes[DONOR].data_dir().join("pg_hba.conf");
    let before = fs::read_to_string(&file)?;
    let mut donor = Session::new(cluster.connect(DONOR)?);
    let change = |donor: &mut Session, text: &str| -> Result<()> {
        fs::write(&file, text)?;
        donor.run("SELECT pg_reload_conf()")
    };
    change(
        &mut donor,
        &format!("host replication all all reject\n{before}"),
    )?;
    let rules = "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'reject'";
    ensure!(donor.text(rules)? == "1", "the rule is not in force");
    // The postmaster reads the file when it comes to it.
    wait_for("a refusal", PATIENCE, || {
        let output = command::run(&mut run.program(cluster, "")?)?;
        let said = command::joined(&output);
        ensure!(!output.status.success(), "it succeeded:\n{said}");
        Ok(said.contains("A base backup needs connections for replication"))
    })?;
    run.is_without_trace(cluster)?;
    change(&mut donor, &before)
}

fn not_a_superuser(cluster: &Cluster, run: &Run) -> Result<()> {
    Session::new(cluster.connect(DONOR)?).run("CREATE ROLE plain LOGIN REPLICATION")?;
    let output = command::run(&mut run.program(cluster, "user=plain")?)?;
    fail_with(&output, "a superuser of the cluster's database is needed")?;
    run.is_without_trace(cluster)
}

/// As if the second node's address were somebody else's now, or `--from` led to one node and then to another.
fn not_the_node_that_it_should_be(cluster: &Cluster, run: &Run) -> Result<()> {
    let lead_to = |node: usize| {
        let conninfo = cluster.nodes[node].conninfo();
        Session::new(cluster.connect(DONOR)?).run(&format!(
            "UPDATE mtm.cluster_nodes SET conninfo = '{conninfo}' WHERE node_id = 2"
        ))
    };
    lead_to(DONOR)?;
    run.fails(
        cluster,
        "the connection string of node 2 leads to node 1 of cluster",
    )?;
    lead_to(1)
}

fn not_writable(cluster: &Cluster, run: &Run) -> Result<()> {
    let locked = run.target.with_extension("locked");
    fs::create_dir_all(&locked)?;
    let locked = Kept(locked);
    host::give_to_server(&locked.0)?;
    fs::set_permissions(&locked.0, Permissions::from_mode(0o500))?;
    let mut program = run.program_into(cluster, "", &locked.0.join("within"))?;
    fail_with(&command::run(&mut program)?, "Permission denied")?;
    run.is_without_trace(cluster)
}

fn a_copy_that_ends_early_is_made_again(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &OTHERS);
        std::thread::sleep(LOAD);
        let run = Run::new(cluster, &mtm)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        println!("  no room");
        // Kilobytes a file may have; the error is that of a disk without room but for its number.
        run.replace(
            "pg_basebackup",
            &format!("trap '' XFSZ; ulimit -f 100; {}", run.real("pg_basebackup")),
        )?;
        let output = command::run(&mut run.program(cluster, "")?)?;
        fail_with(&output, "File too large")?;
        fail_with(&output, "run mtm clone again")?;
        run.has_left_one_slot(cluster)?;
        println!("  Ctrl-C");
        let mut held = run.hold_after_the_backup(cluster)?;
        held.interrupt()?;
        await_unlocked(cluster)?;
        run.has_left_one_slot(cluster)?;
        println!("  the old server comes back");
        let held = run.hold_after_the_backup(cluster)?;
        cluster.nodes[LOST].start()?;
        // What it has missed lies before the slots that the run has made.
        await_old(cluster)?;
        await_told(cluster)?;
        Session::new(cluster.connect(LOST)?).refused_with("57P03", "SELECT count(*) FROM line")?;
        succeed(&held.go_on()?)?;
        cluster.nodes[LOST].stop()?;
        command::capture(Command::new("find").arg(&run.target).args([
            "-mindepth",
            "1",
            "-delete",
        ]))?;
        println!("  at last");
        run.replace(
            "pg_basebackup",
            &format!("{} && sleep 2", run.real("pg_basebackup")),
        )?;
        let impatient = "options='-c idle_session_timeout=1s'";
        succeed(&command::run(&mut run.program(cluster, impatient)?)?)?;
        cluster.nodes[LOST].exchange_data(&run.target)?;
        cluster.nodes[LOST].start()?;
        let online = await_online(cluster, LOST);
        let commits = load.stop()?;
        online?;
        check_rows(cluster, &commits)
    })
}

/// Two servers in the name of one node, at once: the copy, and the old one on other ports.
fn an_old_directory_beside_its_copy_has_no_say(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &OTHERS);
        let run = Run::new(cluster, &mtm)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        succeed(&command::run(&mut run.program(cluster, "")?)?)?;
        cluster.nodes[LOST].exchange_data(&run.target)?;
        println!("  the old one first");
        let old = OldServer::start(cluster, &run.target)?;
        old.await_refusal()?;
        println!("  the copy beside it");
        cluster.nodes[LOST].start()?;
        let online = await_online(cluster, LOST);
        await_members(cluster, "{1,2,3}")?;
        println!("  the old one again");
        drop(old);
        let old = OldServer::start(cluster, &run.target)?;
        old.await_refusal()?;
        let streams = streams(cluster)?;
        std::thread::sleep(TRIES);
        ensure!(
            streams == self::streams(cluster)?,
            "the old one has ended streams of its copy"
        );
        await_members(cluster, "{1,2,3}")?;
        let commits = load.stop()?;
        online?;
        drop(old);
        check_rows(cluster, &commits)
    })
}

/// Processes that send to the third node, on both others.
fn streams(cluster: &Cluster) -> Result<Vec<String>> {
    let sender = "SELECT string_agg(active_pid::text, ' ') FROM pg_replication_slots WHERE slot_name LIKE '%\\_n3'";
    let ask = |node: usize| Session::new(cluster.connect(node)?).text(sender);
    OTHERS.into_iter().map(ask).collect()
}

/// Runs of `mtm clone` with programs that can be replaced.
struct Run {
    mtm: PathBuf,
    /// Links to the programs, or scripts in their place.
    programs: Kept,
    target: PathBuf,
    /// Goes with the directory that the copies are made in.
    _removed: Kept,
    configuration: Kept,
}

impl Run {
    fn new(cluster: &Cluster, mtm: &Path) -> Result<Run> {
        let place = |what: &str| -> Result<PathBuf> {
            let name = format!("{what}-of-bad-copies-{}", std::process::id());
            let directory = host::work_dir()?.join(name);
            let _ = fs::remove_dir_all(&directory);
            host::create_dir(&directory)?;
            Ok(directory)
        };
        let data = cluster.nodes[LOST].data_dir();
        let target = data.with_extension("elsewhere");
        let run = Run {
            mtm: mtm.to_owned(),
            programs: Kept(place("programs")?),
            _removed: Kept(target.clone()),
            target,
            configuration: Kept(place("configuration")?),
        };
        for program in PROGRAMS {
            symlink(run.real(program), run.programs.0.join(program))?;
        }
        for name in ["postgresql.conf", "pg_hba.conf"] {
            let kept = run.configuration.0.join(name);
            fs::copy(data.join(name), &kept)?;
            host::give_to_server(&kept)?;
        }
        fs::create_dir_all(&run.target)?;
        host::give_to_server(&run.target)?;
        // Where a script says that it has come, and waits.
        host::give_to_server(&run.programs.0)?;
        Ok(run)
    }

    fn real(&self, program: &str) -> String {
        let directory = self.mtm.parent().unwrap_or(Path::new("/"));
        directory.join(program).display().to_string()
    }

    /// Puts a script in the place of a program. A program's name in it is followed by what the script is given.
    fn replace(&self, program: &str, script: &str) -> Result<()> {
        let place = self.programs.0.join(program);
        let _ = fs::remove_file(&place);
        let real = self.real(program);
        // Asked for its release it is the real one.
        let script = script.replace(&real, &format!("{real} \"$@\""));
        let asked = match script.contains(&real) {
            true => format!("[ \"$1\" = --version ] && exec {real} --version\n"),
            false => String::new(),
        };
        fs::write(&place, format!("#!/bin/sh\n{asked}{script}\n"))?;
        fs::set_permissions(&place, Permissions::from_mode(0o755))
            .with_context(|| format!("cannot run {}", place.display()))
    }

    fn restore(&self, program: &str) -> Result<()> {
        let place = self.programs.0.join(program);
        let _ = fs::remove_file(&place);
        symlink(self.real(program), place).context("cannot link a program")
    }

    /// A run; the options are added to the donor's connection string.
    fn program(&self, cluster: &Cluster, options: &str) -> Result<Command> {
        self.program_into(cluster, options, &self.target)
    }

    fn program_into(&self, cluster: &Cluster, options: &str, target: &Path) -> Result<Command> {
        let mut program = host::server_command(&self.mtm)?;
        program
            .args(["clone", "--node", &(LOST + 1).to_string(), "--from"])
            .arg(format!("{} {options}", cluster.nodes[DONOR].conninfo()))
            .arg("--bindir")
            .arg(&self.programs.0)
            .arg("--config")
            .arg(&self.configuration.0)
            .arg("--pgdata")
            .arg(target);
        Ok(program)
    }

    /// A run fails with these words before it has changed anything.
    fn fails(&self, cluster: &Cluster, words: &str) -> Result<()> {
        fail_with(&command::run(&mut self.program(cluster, "")?)?, words)?;
        self.is_without_trace(cluster)
    }

    /// No copy was begun.
    fn is_without_trace(&self, cluster: &Cluster) -> Result<()> {
        for node in OTHERS {
            let begun =
                Session::new(cluster.connect(node)?).text("SELECT count(*) FROM mtm.copies")?;
            ensure!(begun == "0", "node {} has noted a copy", node + 1);
        }
        Ok(())
    }

    /// A run that failed has left the lost node's slot on each node, as a node that is away has one, and nothing else.
    fn has_left_one_slot(&self, cluster: &Cluster) -> Result<()> {
        for node in OTHERS {
            let slots = "SELECT string_agg(right(slot_name, 3), ' ') FROM pg_replication_slots WHERE NOT active";
            wait_for("one slot", PATIENCE, || {
                Ok(Session::new(cluster.connect(node)?).text(slots)? == "_n3")
            })?;
        }
        Ok(())
    }

    /// Starts a run that stops when its backup is there.
    fn hold_after_the_backup(&self, cluster: &Cluster) -> Result<Held> {
        let [there, on] = ["there", "on"].map(|name| self.programs.0.join(name));
        for file in [&there, &on] {
            let _ = fs::remove_file(file);
        }
        self.replace(
            "pg_basebackup",
            &format!(
                "{} || exit 1\ntouch {}\nuntil [ -e {} ]; do sleep 0.05; done",
                self.real("pg_basebackup"),
                there.display(),
                on.display()
            ),
        )?;
        let mut program = self.program(cluster, "")?;
        // As at a terminal: Ctrl-C reaches all of them.
        program
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let process = program.spawn()?;
        wait_for("the backup", PATIENCE, || Ok(there.exists()))?;
        Ok(Held { process, on })
    }
}

/// A run that waits.
struct Held {
    process: Child,
    /// It goes on when this file is there.
    on: PathBuf,
}

impl Held {
    fn go_on(self) -> Result<Output> {
        File::create(&self.on)?;
        self.process
            .wait_with_output()
            .context("a run without an end")
    }

    /// Ctrl-C.
    fn interrupt(&mut self) -> Result<()> {
        let group = format!("-{}", self.process.id());
        command::capture(Command::new("kill").args(["-INT", "--", &group]))?;
        let status = self.process.wait()?;
        ensure!(!status.success(), "the run succeeded");
        Ok(())
    }
}

/// The directory that a copy has replaced, served on ports of its own.
struct OldServer {
    process: Child,
    log: PathBuf,
}

impl OldServer {
    fn start(cluster: &Cluster, data: &Path) -> Result<OldServer> {
        let log = data.with_extension("log");
        let output = File::create(&log)?;
        let node = &cluster.nodes[LOST];
        let port = TcpListener::bind((ELSEWHERE, 0))?.local_addr()?.port();
        let mut postgres = host::server_command(node.program("postgres"))?;
        postgres
            .arg("-D")
            .arg(data)
            .args(["-c", &format!("listen_addresses={ELSEWHERE}")])
            .args([
                "-c",
                &format!("multimaster.arbiter_listen_addresses={ELSEWHERE}"),
            ])
            // The copy's arbiter listens on all addresses.
            .args(["-c", &format!("multimaster.arbiter_port={port}")]);
        let process = postgres
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()?;
        Ok(OldServer { process, log })
    }

    fn await_refusal(&self) -> Result<()> {
        let refused = wait_for("the old directory to be refused", PATIENCE, || {
            Ok(fs::read_to_string(&self.log)?.contains("an old copy of its node"))
        });
        refused.with_context(|| fs::read_to_string(&self.log).unwrap_or_default())
    }
}

impl Drop for OldServer {
    fn drop(&mut self) {
        // An immediate shutdown: whoever was killed alone leaves processes that keep the directory.
        let quit = ["-QUIT", "--", &self.process.id().to_string()];
        let _ = command::run(Command::new("kill").args(quit));
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.log);
    }
}

fn await_told(cluster: &Cluster) -> Result<()> {
    wait_for("the donor to tell of the old copy", PATIENCE, || {
        let told = "SELECT count(*) FROM mtm.events WHERE node_id = 3 AND event = 'old copy'";
        Ok(Session::new(cluster.connect(DONOR)?).text(told)? != "0")
    })
}

/// The third node has found out that it was replaced.
fn await_old(cluster: &Cluster) -> Result<()> {
    wait_for("the old directory to be refused", PATIENCE, || {
        let log = cluster.nodes[LOST].log_text();
        Ok(log.contains("an old copy of its node"))
    })
}
