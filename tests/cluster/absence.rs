//! Sessions that stay open on a node while it is excluded and comes back. Whatever they hear is an answer that the documentation names.

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use postgres::fallible_iterator::FallibleIterator;
use xtask::cluster::wait_for;
use xtask::installation::Installation;

use crate::crash::arm;
use crate::hosts::{Hosts, PATIENCE, with_hosts};

pub fn cases() -> Vec<OwnCase> {
    cases![
        what_a_session_holds_outlives_an_absence,
        open_transactions_do_not_keep_their_node_away,
        copy_across_an_exclusion_is_whole_or_nothing,
        a_client_that_vanishes_in_commit_leaves_nothing,
    ]
}

/// Nothing has happened: run it elsewhere, run it again; or: ask how it ended.
const DOCUMENTED: [&str; 3] = ["57P03", "40001", "08007"];
/// The node (from 0) that is cut off.
const CUT_OFF: usize = 2;
/// Enough that some are on their way before the last comes.
const ROWS_OF_COPY: usize = 5_000;

/// Cuts the node off until the others go on without it and it refuses to read.
fn exclude(hosts: &mut Hosts) -> Result<()> {
    hosts.network.isolate(CUT_OFF)?;
    wait_for("a generation without the node", PATIENCE, || {
        let members = hosts
            .session(0)?
            .text("SELECT gen_members FROM mtm.status()")?;
        Ok(members == "{1,2}")
    })?;
    wait_for("reads to be refused", PATIENCE, || {
        let mut session = hosts.session(CUT_OFF)?;
        Ok(session.refused("SELECT * FROM t").is_ok())
    })
}

fn take_back(hosts: &mut Hosts) -> Result<()> {
    hosts.network.heal()?;
    hosts.await_status(CUT_OFF, "online")
}

/// True when it went well, false when it was refused as documented.
fn documented(what: &str, outcome: Result<(), postgres::Error>) -> Result<bool> {
    let Err(error) = outcome else {
        return Ok(true);
    };
    let code = error.code().map(|code| code.code().to_owned());
    ensure!(
        code.as_ref()
            .is_some_and(|code| DOCUMENTED.contains(&code.as_str())),
        "{what}: {error:?}"
    );
    println!("  {what}: {}", code.unwrap_or_default());
    Ok(false)
}

fn create(hosts: &Hosts) -> Result<()> {
    hosts.session(0)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, n int);
         CREATE TABLE apart (n int);
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 100) i",
    )
}

fn what_a_session_holds_outlives_an_absence(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        let mut listener = hosts.session(CUT_OFF)?;
        listener.run("LISTEN news")?;
        let mut locker = hosts.session(CUT_OFF)?;
        locker.run("SELECT pg_advisory_lock(7)")?;
        let mut holder = hosts.session(CUT_OFF)?;
        holder.run(
            "CREATE TEMP TABLE mine AS SELECT * FROM t;
             BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id; COMMIT;
             FETCH 10 FROM held",
        )?;
        let mut planned = hosts.cluster.connect(CUT_OFF)?;
        let plan = planned.prepare("SELECT n FROM t WHERE id = $1")?;
        planned.query(&plan, &[&1])?;
        exclude(hosts)?;
        ensure!(holder.text("FETCH 1 FROM held")? == "11");
        ensure!(holder.text("SELECT count(*) FROM mine")? == "100");
        let refused = planned.query(&plan, &[&1]).map(drop);
        ensure!(!documented("a plan on the excluded node", refused)?);
        hosts.session(CUT_OFF)?.run("NOTIFY news, 'meanwhile'")?;
        hosts.session(0)?.run("UPDATE t SET n = 7")?;
        take_back(hosts)?;
        let seen: i32 = planned.query_one(&plan, &[&1])?.get(0);
        ensure!(seen == 7, "a plan of before reads {seen}");
        ensure!(holder.text("FETCH 1 FROM held")? == "12");
        holder.run("INSERT INTO mine VALUES (0, 0)")?;
        let free = "SELECT pg_try_advisory_lock(7)";
        ensure!(hosts.session(CUT_OFF)?.text(free)? == "f");
        hosts.session(CUT_OFF)?.run("NOTIFY news, 'afterwards'")?;
        let mut heard = Vec::new();
        let mut notifications = listener.notifications();
        let mut news = notifications.timeout_iter(Duration::from_secs(20));
        while heard.len() < 2
            && let Some(one) = news.next()?
        {
            heard.push(one.payload().to_owned());
        }
        ensure!(heard == ["meanwhile", "afterwards"], "{heard:?}");
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

/// What the others have changed meanwhile has to get past the locks of transactions that sleep.
fn open_transactions_do_not_keep_their_node_away(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        let open = |sql: &str| {
            let mut session = hosts.session(CUT_OFF)?;
            session.run(sql)?;
            anyhow::Ok(session)
        };
        let mut reads = open("BEGIN; SELECT * FROM t")?;
        let mut wrote = open("BEGIN; UPDATE t SET n = 1 WHERE id = 1")?;
        let mut locked = open("BEGIN; SELECT * FROM t WHERE id = 2 FOR UPDATE")?;
        let mut alone = open("BEGIN; INSERT INTO t VALUES (1000, 0)")?;
        let mut apart = open("BEGIN; INSERT INTO apart VALUES (1)")?;
        let mut table = open("BEGIN; LOCK TABLE t IN ROW EXCLUSIVE MODE")?;
        exclude(hosts)?;
        hosts.session(0)?.run("UPDATE t SET n = n + 10")?;
        hosts.session(1)?.run("ALTER TABLE t ADD COLUMN more int")?;
        take_back(hosts)?;
        for (name, session, statement) in [
            ("a reader", &mut reads, "SELECT * FROM t; COMMIT"),
            ("a writer", &mut wrote, "COMMIT"),
            (
                "a row lock",
                &mut locked,
                "UPDATE t SET n = 0 WHERE id = 2; COMMIT",
            ),
            ("an insert", &mut alone, "COMMIT"),
            ("a table lock", &mut table, "SELECT * FROM t; COMMIT"),
        ] {
            // Whoever stood in the way and slept was ended, as by the conflict rule.
            match session.batch_execute(statement) {
                Err(error) if error.is_closed() => println!("  {name}: the session was ended"),
                outcome => drop(documented(name, outcome)?),
            }
        }
        // In nobody's way.
        apart.run("INSERT INTO apart VALUES (2); COMMIT")?;
        let mut session = hosts.session(CUT_OFF)?;
        let found = session.text("SELECT min(n), max(n) FROM t WHERE id BETWEEN 1 AND 100")?;
        println!("  rows hold {found}");
        ensure!(
            found.ends_with("|10"),
            "what was committed meanwhile is lost: {found}"
        );
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

fn copy_across_an_exclusion_is_whole_or_nothing(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        let during = Copying::begin(hosts, 10_000)?;
        let across = Copying::begin(hosts, 50_000)?;
        wait_for("both to be on their way", PATIENCE, || {
            let sql = "SELECT count(*) FROM pg_stat_progress_copy WHERE tuples_processed > 0";
            Ok(hosts.session(CUT_OFF)?.text(sql)? == "2")
        })?;
        exclude(hosts)?;
        ensure!(!during.end()?, "COPY ends well on a node that is excluded");
        take_back(hosts)?;
        let expected = if across.end()? { ROWS_OF_COPY } else { 0 };
        xtask::checks::whole(&hosts.cluster, PATIENCE)?;
        let found = hosts
            .session(0)?
            .text("SELECT count(*) FROM t WHERE id >= 10000")?;
        ensure!(
            found == expected.to_string(),
            "{found} rows instead of {expected}"
        );
        Ok(())
    })
}

/// psql in the middle of COPY FROM STDIN.
struct Copying(Child);

impl Copying {
    fn begin(hosts: &Hosts, first: usize) -> Result<Copying> {
        let mut psql = hosts.cluster.nodes[CUT_OFF]
            .client_program("psql")
            .args(["--no-psqlrc", "--set", "VERBOSITY=verbose", "--command"])
            .arg("COPY t (id, n) FROM STDIN")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let input = psql.stdin.as_mut().context("no input")?;
        for id in first..first + ROWS_OF_COPY {
            writeln!(input, "{id}\t1")?;
        }
        input.flush()?;
        Ok(Copying(psql))
    }

    /// True when it went well, false when it was refused as documented.
    fn end(mut self) -> Result<bool> {
        drop(self.0.stdin.take());
        let ended = self.0.wait_with_output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        if !ended.status.success() {
            let code = DOCUMENTED.iter().find(|code| said.contains(**code));
            println!("  COPY: {}", code.with_context(|| said.to_string())?);
        }
        Ok(ended.status.success())
    }
}

/// The client is gone before its node is: nobody waits for an answer, and the transaction ends the same way everywhere.
fn a_client_that_vanishes_in_commit_leaves_nothing(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        for (number, point) in [
            "backend-before-prepare",
            "backend-after-prepare",
            "backend-before-commit",
        ]
        .into_iter()
        .enumerate()
        {
            vanish(hosts, point, number).with_context(|| point.to_owned())?;
        }
        Ok(())
    })
}

fn vanish(hosts: &mut Hosts, point: &str, number: usize) -> Result<()> {
    let id = 1000 + number;
    let line = format!("failpoint {point}: held");
    let before = hosts.cluster.nodes[CUT_OFF]
        .log_text()
        .matches(&line)
        .count();
    arm(&hosts.cluster.nodes[CUT_OFF], &format!("{point}=hold"))?;
    let mut client = hosts.cluster.nodes[CUT_OFF]
        .client_program("psql")
        .args(["--no-psqlrc", "--command"])
        .arg(format!("INSERT INTO t VALUES ({id}, 0)"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let held = wait_for("the failpoint to be passed", PATIENCE, || {
        Ok(hosts.cluster.nodes[CUT_OFF]
            .log_text()
            .matches(&line)
            .count()
            > before)
    });
    client.kill()?;
    client.wait()?;
    held?;
    exclude(hosts)?;
    arm(&hosts.cluster.nodes[CUT_OFF], "")?;
    take_back(hosts)?;
    xtask::checks::whole(&hosts.cluster, PATIENCE)?;
    let found = hosts
        .session(0)?
        .text(&format!("SELECT count(*) FROM t WHERE id = {id}"))?;
    println!("  {point}: {found} rows");
    let mut session: Session = hosts.session(CUT_OFF)?;
    session.run(&format!("DELETE FROM t WHERE id = {id}"))
}
