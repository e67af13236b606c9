//! A node that has lost its disk is replaced by a copy of another one while the others work.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::{command, extension, host};

use crate::failover::{LOAD, Load, PATIENCE, await_online, check_rows, create};

pub fn cases() -> Vec<OwnCase> {
    cases![
        a_lost_disk_is_replaced_by_a_copy,
        an_old_directory_that_comes_back_is_refused,
        an_interrupted_copy_is_made_again,
        two_lost_disks_of_five_wait_for_one_of_them
    ]
}

/// Node (from 0) that loses its disk, and the one that it is copied from.
const LOST: usize = 2;
const DONOR: usize = 0;

fn a_lost_disk_is_replaced_by_a_copy(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let old = committed_by_lost(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        std::thread::sleep(LOAD);
        refuse_a_living_node(cluster, &mtm)?;
        refuse_mistakes(cluster, &mtm)?;
        let tablespace = Tablespace::new(cluster)?;
        let encrypted = serve_tls(cluster)?;
        // What its session alone may read is in the backup's catalogs.
        let mut temporary = Session::new(cluster.connect(DONOR)?);
        temporary.run("CREATE TEMPORARY TABLE own (id serial)")?;
        cluster.nodes[LOST].kill()?;
        let keep = Kept::new()?;
        cluster.nodes[LOST].lose_data(&keep.0)?;
        await_members(cluster, "{1,2}")?;
        refuse_a_full_directory(cluster, &mtm)?;
        interrupt(cluster)?;
        let mut program = clone_command(cluster, &mtm, LOST, Some(&keep.0), &encrypted)?;
        succeed(&command::run(program.args(tablespace.mapping()))?)?;
        cluster.nodes[LOST].start()?;
        let online = await_online(cluster, LOST);
        std::thread::sleep(LOAD);
        let commits = load.stop()?;
        online?;
        drop(temporary);
        check_rows(cluster, &commits)?;
        tablespace.check(cluster)?;
        check_old_name(cluster, &old)?;
        check_sequences(cluster)?;
        go_on_without_the_donor(cluster)?;
        check_rows(cluster, &commits)
    })
}

/// Somebody starts what the copy has replaced.
fn an_old_directory_that_comes_back_is_refused(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        std::thread::sleep(LOAD);
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        let keep = Kept::new()?;
        let old = replace_by_a_copy(cluster, &mtm, &keep)?;
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        std::thread::sleep(LOAD);
        cluster.nodes[LOST].stop()?;
        cluster.nodes[LOST].exchange_data(&old.0)?;
        cluster.nodes[LOST].start()?;
        wait_for("the old directory to be refused", PATIENCE, || {
            Ok(cluster.nodes[LOST]
                .log_text()
                .contains("an old copy of its node"))
        })?;
        std::thread::sleep(LOAD);
        let mut stranger = Session::new(cluster.connect(LOST)?);
        stranger.refused_with("57P03", "SELECT count(*) FROM line")?;
        await_members(cluster, "{1,2}")?;
        cluster.nodes[LOST].stop()?;
        cluster.nodes[LOST].exchange_data(&old.0)?;
        cluster.nodes[LOST].start()?;
        let online = await_online(cluster, LOST);
        let commits = load.stop()?;
        online?;
        check_rows(cluster, &commits)
    })
}

/// What a run says at each step that can be interrupted.
const STEPS: [&str; 5] = [
    "looking at the other nodes",
    "making slots",
    "copying node",
    "replaying what",
    "making it node",
];

/// The command line is killed at each step; what it has started may go on for a while.
fn an_interrupted_copy_is_made_again(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[0, 1]);
        std::thread::sleep(LOAD);
        cluster.nodes[LOST].kill()?;
        let keep = Kept::new()?;
        cluster.nodes[LOST].lose_data(&keep.0)?;
        await_members(cluster, "{1,2}")?;
        refuse_a_second_run(cluster, &mtm)?;
        for step in STEPS {
            println!("  killed at {step:?}");
            kill_at(cluster, &mtm, step)?;
            await_unlocked(cluster)?;
        }
        succeed(&clone(cluster, &mtm, Some(&keep.0))?)?;
        cluster.nodes[LOST].start()?;
        let online = await_online(cluster, LOST);
        let commits = load.stop()?;
        online?;
        check_rows(cluster, &commits)
    })
}

/// Each of the others has to say that nothing depends on the lost node; one that is lost, too, says nothing.
fn two_lost_disks_of_five_wait_for_one_of_them(installation: &Installation) -> Result<()> {
    const FOURTH: usize = 3;
    const FIFTH: usize = 4;
    let mtm = extension::build_command_line(installation)?;
    with_cluster(installation, 5, |cluster| {
        create(cluster)?;
        cluster.nodes[FOURTH].kill()?;
        cluster.nodes[FIFTH].kill()?;
        await_members(cluster, "{1,2,3}")?;
        let keep = Kept::new()?;
        cluster.nodes[FIFTH].lose_data(&keep.0)?;
        let refused = copy(cluster, &mtm, FIFTH, Some(&keep.0))?;
        fail_with(
            &refused,
            "node 4 (all nodes but the lost one have to be there)",
        )?;
        cluster.nodes[FOURTH].start()?;
        await_online(cluster, FOURTH)?;
        await_members(cluster, "{1,2,3,4}")?;
        succeed(&copy(cluster, &mtm, FIFTH, Some(&keep.0))?)?;
        cluster.nodes[FIFTH].start()?;
        await_online(cluster, FIFTH)?;
        xtask::checks::whole(cluster, PATIENCE)
    })
}

/// A run holds a lock on every node for as long as it works; here a session holds it on one.
fn refuse_a_second_run(cluster: &Cluster, mtm: &Path) -> Result<()> {
    let mut first = Session::new(cluster.connect(DONOR)?);
    first.run("SELECT pg_advisory_lock(hashtext('multimaster clone'), 3)")?;
    let second = clone(cluster, mtm, None)?;
    fail_with(&second, "another mtm clone of node 3 is at work")
}

/// Kills a run when it says that it begins the step.
fn kill_at(cluster: &Cluster, mtm: &Path, step: &str) -> Result<()> {
    let mut program = clone_command(cluster, mtm, LOST, None, "")?;
    program.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut run = program.spawn()?;
    let output = run.stdout.take().context("a run without output")?;
    let mut lines = BufReader::new(output).lines();
    let reached = lines.any(|line| line.is_ok_and(|line| line.contains(step)));
    run.kill()?;
    run.wait()?;
    ensure!(reached, "a run ended before {step:?}");
    Ok(())
}

/// The sessions of a run end with it, those that make a slot when they have made it.
pub fn await_unlocked(cluster: &Cluster) -> Result<()> {
    wait_for("the lock of the interrupted run", PATIENCE, || {
        for node in [0, 1] {
            let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
            if Session::new(cluster.connect(node)?).text(locks)? != "0" {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// Moves the directory of the lost node, which is stopped, away, as its operator would, and makes a copy in its place. Returns where the old one is.
pub fn replace_by_a_copy(cluster: &Cluster, mtm: &Path, keep: &Kept) -> Result<Kept> {
    let node = &cluster.nodes[LOST];
    let old = Kept(node.data_dir().with_extension("old"));
    for name in ["postgresql.conf", "pg_hba.conf"] {
        let kept = keep.0.join(name);
        std::fs::copy(node.data_dir().join(name), &kept)?;
        host::give_to_server(&kept)?;
    }
    node.exchange_data(&old.0)?;
    succeed(&clone(cluster, mtm, Some(&keep.0))?)?;
    Ok(old)
}

/// A directory that is gone when dropped: where the configuration of the lost node is kept.
pub struct Kept(pub PathBuf);

impl Kept {
    pub fn new() -> Result<Kept> {
        let directory = host::work_dir()?.join(format!("configuration-{}", std::process::id()));
        host::create_dir(&directory)?;
        Ok(Kept(directory))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs `mtm clone` as an operator would on the lost node's machine.
fn clone(cluster: &Cluster, mtm: &Path, configuration: Option<&Path>) -> Result<Output> {
    copy(cluster, mtm, LOST, configuration)
}

/// Makes the node (from 0) a copy of the first one.
pub fn copy(
    cluster: &Cluster,
    mtm: &Path,
    lost: usize,
    configuration: Option<&Path>,
) -> Result<Output> {
    // Whatever libpq knows may be in a connection string.
    let options = "passfile=/nowhere sslmode=prefer";
    command::run(&mut clone_command(
        cluster,
        mtm,
        lost,
        configuration,
        options,
    )?)
}

fn clone_command(
    cluster: &Cluster,
    mtm: &Path,
    lost: usize,
    configuration: Option<&Path>,
    options: &str,
) -> Result<Command> {
    let mut program = host::server_command(mtm)?;
    let from = format!("{} {options}", cluster.nodes[DONOR].conninfo());
    program
        .args(["clone", "--node", &(lost + 1).to_string()])
        .args(["--from", &from, "--pgdata"])
        .arg(cluster.nodes[lost].data_dir())
        .arg("--bindir")
        .arg(mtm.parent().context("a program lies in a directory")?);
    if let Some(directory) = configuration {
        program.arg("--config").arg(directory);
    }
    Ok(program)
}

pub fn succeed(output: &Output) -> Result<()> {
    let said = command::joined(output);
    println!("{}", said.replace('\r', "\n"));
    ensure!(output.status.success(), "mtm clone failed\n{said}");
    Ok(())
}

pub fn fail_with(output: &Output, words: &str) -> Result<()> {
    let said = command::joined(output);
    ensure!(!output.status.success(), "mtm clone succeeded\n{said}");
    ensure!(said.contains(words), "it did not say {words:?}:\n{said}");
    Ok(())
}

/// A node that runs is not replaced, whatever directory is named.
fn refuse_a_living_node(cluster: &Cluster, mtm: &Path) -> Result<()> {
    let elsewhere = format!("{}-elsewhere", cluster.nodes[LOST].data_dir().display());
    let mut program = host::server_command(mtm)?;
    program
        .args(["clone", "--node", "3", "--pgdata", &elsewhere, "--from"])
        .arg(cluster.nodes[DONOR].conninfo());
    fail_with(&command::run(&mut program)?, "node 3 is connected")
}

/// What an operator may get wrong; nothing is changed by it, here or there.
fn refuse_mistakes(cluster: &Cluster, mtm: &Path) -> Result<()> {
    let elsewhere = format!("{}-elsewhere", cluster.nodes[LOST].data_dir().display());
    let from = cluster.nodes[DONOR].conninfo();
    let refused = |node: &str, from: &str, words: &str| {
        let mut program = host::server_command(mtm)?;
        program.args([
            "clone", "--pgdata", &elsewhere, "--node", node, "--from", from,
        ]);
        fail_with(&command::run(&mut program)?, words)
            .with_context(|| format!("node {node} from {from}"))
    };
    refused("9", &from, "the cluster has no node 9")?;
    refused("1", &from, "node 1 cannot be copied from itself")?;
    refused("3", &format!("{from} port=1"), "port 1 failed")?;
    refused("3", &format!("{from} nonsense=1"), "nonsense")?;
    let other = from.replace("dbname=postgres", "dbname=template1");
    refused("3", &other, "does not say which node it is")?;
    ensure!(!Path::new(&elsewhere).exists(), "{elsewhere} was made");
    let mut program = host::server_command(mtm)?;
    let output = command::run(program.args(["clone", "--nonsense"]))?;
    ensure!(output.status.code() == Some(2), "{}", output.status);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE NOT active";
    let idle = Session::new(cluster.connect(DONOR)?).text(slots)?;
    ensure!(idle == "0", "{idle} slots were left");
    Ok(())
}

/// Gives the donor a certificate; returns what a connection string says to demand it.
fn serve_tls(cluster: &Cluster) -> Result<String> {
    let node = &cluster.nodes[DONOR];
    let certificate = node.data_dir().join("server.crt");
    let mut openssl = host::server_command(Path::new("openssl"))?;
    openssl
        .args(["req", "-new", "-x509", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=donor", "-addext"])
        .arg(format!("subjectAltName=IP:{}", node.address))
        .arg("-keyout")
        .arg(node.data_dir().join("server.key"))
        .arg("-out")
        .arg(&certificate);
    command::capture(&mut openssl)?;
    let demand = format!("sslmode=verify-full sslrootcert={}", certificate.display());
    let mut session = Session::new(node.connect()?);
    session.run("ALTER SYSTEM SET ssl = on")?;
    session.run("SELECT pg_reload_conf()")?;
    let conninfo = format!("{} {demand}", node.conninfo());
    wait_for("the donor to serve TLS", PATIENCE, || {
        let mut psql = node.client_program("psql");
        let output = command::run(psql.args(["-X", "-c", "SELECT 1", &conninfo]))?;
        Ok(output.status.success())
    })?;
    Ok(demand)
}

/// A tablespace of the donor that cannot lie at the same place on the lost node, since both are on one machine here.
struct Tablespace {
    donors: Kept,
    copys: Kept,
}

impl Tablespace {
    fn new(cluster: &Cluster) -> Result<Tablespace> {
        let place = |node: usize| Kept(cluster.nodes[node].data_dir().with_extension("space"));
        let tablespace = Tablespace {
            donors: place(DONOR),
            copys: place(LOST),
        };
        for directory in [&tablespace.donors.0, &tablespace.copys.0] {
            host::create_dir(directory)?;
            host::give_to_server(directory)?;
        }
        let place = tablespace.donors.0.display();
        Session::new(cluster.connect(DONOR)?)
            .run(&format!("CREATE TABLESPACE apart LOCATION '{place}'"))?;
        Ok(tablespace)
    }

    fn mapping(&self) -> [String; 2] {
        let (from, to) = (self.donors.0.display(), self.copys.0.display());
        ["--tablespace-mapping".to_owned(), format!("{from}={to}")]
    }

    fn check(&self, cluster: &Cluster) -> Result<()> {
        let place = Session::new(cluster.connect(LOST)?).text(
            "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'apart'",
        )?;
        ensure!(
            Path::new(&place) == self.copys.0,
            "the tablespace lies at {place}"
        );
        Ok(())
    }
}

/// Somebody's files are not touched.
fn refuse_a_full_directory(cluster: &Cluster, mtm: &Path) -> Result<()> {
    let file = cluster.nodes[LOST].data_dir().join("something");
    std::fs::write(&file, "precious")?;
    fail_with(&clone(cluster, mtm, None)?, "is not empty")?;
    std::fs::remove_file(&file).context("the file is gone")
}

/// What a run leaves that was interrupted in the middle.
fn interrupt(cluster: &Cluster) -> Result<()> {
    let half = cluster.nodes[LOST].data_dir().join("multimaster-copy");
    std::fs::create_dir(&half)?;
    std::fs::write(half.join("PG_VERSION"), "15\n")?;
    host::give_to_server(&half)
}

pub fn await_members(cluster: &Cluster, members: &str) -> Result<()> {
    wait_for(&format!("members {members}"), PATIENCE, || {
        let found =
            Session::new(cluster.connect(DONOR)?).text("SELECT gen_members FROM mtm.status()");
        Ok(found.is_ok_and(|found| found == members))
    })
}

/// Name of a transaction that the lost node ran.
fn committed_by_lost(cluster: &Cluster) -> Result<String> {
    let mut session = Session::new(cluster.connect(LOST)?);
    session.run("CREATE TABLE numbered (id serial PRIMARY KEY, node int)")?;
    session.run("CREATE SEQUENCE drawn")?;
    session.run(
        "CREATE TABLE by_default (id bigint PRIMARY KEY DEFAULT nextval('drawn'), node int)",
    )?;
    for _ in 0..3 {
        session.run("INSERT INTO by_default (node) VALUES (3)")?;
    }
    session.run("BEGIN; INSERT INTO numbered (node) VALUES (3)")?;
    let gid = session.text("SELECT mtm.current_gid()")?;
    session.run("COMMIT")?;
    Ok(gid)
}

/// The copy has another history of transaction ids: it must not tell the fate of a stranger.
fn check_old_name(cluster: &Cluster, gid: &str) -> Result<()> {
    for node in 0..3 {
        let status = Session::new(cluster.connect(node)?)
            .text(&format!("SELECT mtm.transaction_status('{gid}')"))?;
        ensure!(
            status == "unknown" || status == "committed",
            "node {} says that {gid} is {status}",
            node + 1
        );
    }
    Ok(())
}

/// The copy counts in its own share.
fn check_sequences(cluster: &Cluster) -> Result<()> {
    for node in 0..3 {
        let mut session = Session::new(cluster.connect(node)?);
        for _ in 0..3 {
            session.run(&format!(
                "INSERT INTO numbered (node) VALUES ({})",
                node + 1
            ))?;
            session.run(&format!(
                "INSERT INTO by_default (node) VALUES ({})",
                node + 1
            ))?;
        }
    }
    let rows = Session::new(cluster.connect(0)?).text("SELECT count(*) FROM numbered")?;
    ensure!(rows == "10", "{rows} rows instead of 10");
    Ok(())
}

/// The copy counts in majorities, and in what comes after.
fn go_on_without_the_donor(cluster: &mut Cluster) -> Result<()> {
    cluster.nodes[DONOR].kill()?;
    wait_for("a commit on the copy", PATIENCE, || {
        let written = cluster
            .connect(LOST)
            .and_then(|client| Session::new(client).run("INSERT INTO numbered (node) VALUES (3)"));
        Ok(written.is_ok())
    })?;
    cluster.nodes[DONOR].start()?;
    await_online(cluster, DONOR)
}
