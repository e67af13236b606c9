//! Transactions of different nodes that want the same rows: exactly one wins, quickly, and nobody waits for an idle one.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use multimaster_tests::{Rig, Session, SharedCase, cases};
use postgres::error::DbError;
use xtask::cluster::wait_for;

use crate::held::Held;

pub fn cases() -> Vec<SharedCase> {
    cases![
        simultaneous_updates_of_a_row_have_one_winner,
        loser_learns_node_table_and_key,
        three_nodes_fighting_for_a_row_make_progress,
        idle_transaction_stops_nobody,
        idle_transaction_on_other_rows_goes_on,
        running_transaction_yields_to_a_committing_one,
        deadlock_across_nodes_ends,
        deadlock_across_three_nodes_ends,
        table_lock_meets_a_remote_write,
        update_meets_remote_delete,
        select_for_update_does_not_stop_a_committing_peer,
        counter_incremented_everywhere_loses_nothing,
        second_attempt_keeps_its_age,
        younger_running_transaction_gives_way_at_once,
        older_running_transaction_may_still_commit,
    ]
}

/// Rounds of a race: enough to meet every order of events many times.
const ROUNDS: usize = 20;

/// After this a conflict has not been resolved by rule, but by some timeout.
const PROMPTLY: Duration = Duration::from_secs(5);

fn table(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, 0 FROM generate_series(1, 10) g")
}

/// What a COMMIT came to.
pub enum Outcome {
    Committed,
    Refused(Box<DbError>),
}

/// Both scripts run, then both COMMITs at the same moment.
pub fn fight(rig: &Rig, scripts: [(usize, &str); 2]) -> Result<[Outcome; 2]> {
    let start = Barrier::new(2);
    let run = |(node, script): (usize, &str)| -> Result<Outcome> {
        let mut session = rig.session(node)?;
        let opened = session.run(&format!("BEGIN; {script}"));
        start.wait();
        opened?;
        finish(&mut session, "COMMIT")
    };
    let outcomes = thread::scope(|scope| {
        let other = scope.spawn(|| run(scripts[1]));
        let mine = run(scripts[0]);
        [
            mine,
            other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        ]
    });
    let [one, two] = outcomes;
    Ok([one?, two?])
}

fn finish(session: &mut Session, sql: &str) -> Result<Outcome> {
    match session.batch_execute(sql) {
        Ok(()) => Ok(Outcome::Committed),
        Err(error) => match error.as_db_error() {
            Some(db) => Ok(Outcome::Refused(Box::new(db.clone()))),
            None => bail!("the session broke: {error}"),
        },
    }
}

fn is_retryable(error: &DbError) -> bool {
    ["40001", "40P01"].contains(&error.code().code())
}

fn simultaneous_updates_of_a_row_have_one_winner(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut slowest = Duration::ZERO;
    for round in 1..=ROUNDS {
        let started = Instant::now();
        let update = "UPDATE t SET v = v + 1 WHERE id = 1";
        match fight(rig, [(1, update), (2, update)])? {
            [Outcome::Committed, Outcome::Refused(error)]
            | [Outcome::Refused(error), Outcome::Committed] => {
                ensure!(error.code().code() == "40001", "{error:?}");
            }
            [Outcome::Committed, Outcome::Committed] => bail!("both were committed"),
            [Outcome::Refused(one), Outcome::Refused(two)] => {
                bail!("both were refused: {one:?} {two:?}")
            }
        }
        slowest = slowest.max(started.elapsed());
        rig.expect("SELECT v FROM t WHERE id = 1", &round.to_string())?;
    }
    ensure!(
        slowest < PROMPTLY,
        "the slowest of {ROUNDS} took {slowest:?}"
    );
    Ok(())
}

fn loser_learns_node_table_and_key(rig: &Rig) -> Result<()> {
    table(rig)?;
    let update = "UPDATE t SET v = v + 1 WHERE id = 7";
    let error = match fight(rig, [(1, update), (3, update)])? {
        [Outcome::Committed, Outcome::Refused(error)]
        | [Outcome::Refused(error), Outcome::Committed] => error,
        _ => bail!("not one winner"),
    };
    let detail = error.detail().unwrap_or_default();
    ensure!(detail.contains("node"), "DETAIL names no node: {error:?}");
    ensure!(
        detail.contains("\"t\"") || detail.contains(".t"),
        "DETAIL names no table: {error:?}"
    );
    ensure!(
        detail.contains("(id)=(7)"),
        "DETAIL names no key: {error:?}"
    );
    Ok(())
}

fn three_nodes_fighting_for_a_row_make_progress(rig: &Rig) -> Result<()> {
    table(rig)?;
    let each = 15;
    thread::scope(|scope| {
        let fighters: Vec<_> = (1..=3)
            .map(|node| scope.spawn(move || increment(rig, node, each)))
            .collect();
        fighters.into_iter().try_for_each(|fighter| {
            fighter
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    rig.expect("SELECT v FROM t WHERE id = 1", &(3 * each).to_string())
}

fn counter_incremented_everywhere_loses_nothing(rig: &Rig) -> Result<()> {
    table(rig)?;
    thread::scope(|scope| {
        let writers: Vec<_> = (1..=6)
            .map(|writer| scope.spawn(move || increment(rig, (writer - 1) % 3 + 1, 20)))
            .collect();
        writers.into_iter().try_for_each(|writer| {
            writer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    rig.expect("SELECT v FROM t WHERE id = 1", "120")
}

/// Increments row 1 `times` times, trying again after each lost conflict.
fn increment(rig: &Rig, node: usize, times: usize) -> Result<()> {
    let mut session = rig.session(node)?;
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut done = 0;
    while done < times {
        ensure!(
            Instant::now() < deadline,
            "node {node}: {done} of {times} increments in two minutes"
        );
        match finish(&mut session, "UPDATE t SET v = v + 1 WHERE id = 1")? {
            Outcome::Committed => done += 1,
            Outcome::Refused(error) if is_retryable(&error) => {}
            Outcome::Refused(error) => bail!("{error:?}"),
        }
    }
    Ok(())
}

fn idle_transaction_stops_nobody(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut idle = rig.session(2)?;
    idle.run("BEGIN; UPDATE t SET v = -1 WHERE id = 1")?;
    let started = Instant::now();
    rig.session(1)?.run("UPDATE t SET v = 5 WHERE id = 1")?;
    ensure!(
        started.elapsed() < PROMPTLY,
        "waited {:?} for an idle session",
        started.elapsed()
    );
    ensure!(
        idle.batch_execute("COMMIT").is_err(),
        "the idle session was not told"
    );
    rig.expect("SELECT v FROM t WHERE id = 1", "5")
}

fn idle_transaction_on_other_rows_goes_on(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut idle = rig.session(2)?;
    idle.run("BEGIN; UPDATE t SET v = -1 WHERE id = 2")?;
    rig.session(1)?.run("UPDATE t SET v = 5 WHERE id = 1")?;
    rig.session(3)?
        .run("INSERT INTO t VALUES (100, 1); DELETE FROM t WHERE id = 3")?;
    idle.run("COMMIT")?;
    rig.expect(
        "SELECT string_agg(v::text, ',' ORDER BY id) FROM t WHERE id <= 2",
        "5,-1",
    )
}

fn running_transaction_yields_to_a_committing_one(rig: &Rig) -> Result<()> {
    table(rig)?;
    let ready = Barrier::new(2);
    let outcome = thread::scope(|scope| {
        let runner = scope.spawn(|| -> Result<Outcome> {
            let mut session = rig.session(2)?;
            let opened = session.run("BEGIN; UPDATE t SET v = -1 WHERE id = 1");
            ready.wait();
            opened?;
            finish(&mut session, "SELECT pg_sleep(60)")
        });
        ready.wait();
        let started = Instant::now();
        rig.session(1)?.run("UPDATE t SET v = 5 WHERE id = 1")?;
        ensure!(
            started.elapsed() < PROMPTLY,
            "waited {:?} for a running transaction",
            started.elapsed()
        );
        runner
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    match outcome {
        Outcome::Refused(error) if error.code().code() == "40001" => {}
        Outcome::Refused(error) => bail!("the running transaction got {error:?}"),
        Outcome::Committed => bail!("the running transaction went on"),
    }
    rig.expect("SELECT v FROM t WHERE id = 1", "5")
}

fn deadlock_across_nodes_ends(rig: &Rig) -> Result<()> {
    table(rig)?;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let scripts = [
            "UPDATE t SET v = v + 1 WHERE id = 1; UPDATE t SET v = v + 1 WHERE id = 2",
            "UPDATE t SET v = v + 1 WHERE id = 2; UPDATE t SET v = v + 1 WHERE id = 1",
        ];
        let outcomes = fight(rig, [(1, scripts[0]), (2, scripts[1])])?;
        let committed = outcomes
            .iter()
            .filter(|outcome| matches!(outcome, Outcome::Committed))
            .count();
        ensure!(committed == 1, "{committed} of two were committed");
        ensure!(
            started.elapsed() < PROMPTLY,
            "it took {:?}",
            started.elapsed()
        );
    }
    rig.expect("SELECT sum(v) FROM t", &(2 * ROUNDS).to_string())
}

fn deadlock_across_three_nodes_ends(rig: &Rig) -> Result<()> {
    table(rig)?;
    let start = Barrier::new(3);
    let chain = |node: usize| -> Result<Outcome> {
        let mut session = rig.session(node)?;
        let opened = session.run(&format!(
            "BEGIN; UPDATE t SET v = v + 1 WHERE id IN ({node}, {})",
            node % 3 + 1
        ));
        start.wait();
        opened?;
        finish(&mut session, "COMMIT")
    };
    let started = Instant::now();
    let outcomes = thread::scope(|scope| {
        let chain = &chain;
        let runners: Vec<_> = (1..=3)
            .map(|node| scope.spawn(move || chain(node)))
            .collect();
        runners
            .into_iter()
            .map(|runner| {
                runner
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    ensure!(
        started.elapsed() < PROMPTLY,
        "it took {:?}",
        started.elapsed()
    );
    let mut committed = 0;
    for outcome in outcomes {
        match outcome {
            Outcome::Committed => committed += 1,
            Outcome::Refused(error) => ensure!(is_retryable(&error), "{error:?}"),
        }
    }
    ensure!(
        committed <= 1,
        "{committed} conflicting transactions were committed"
    );
    rig.expect("SELECT sum(v) FROM t", &(2 * committed).to_string())
}

fn table_lock_meets_a_remote_write(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut holder = rig.session(2)?;
    holder.run("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")?;
    let started = Instant::now();
    rig.session(1)?.run("UPDATE t SET v = 5 WHERE id = 1")?;
    ensure!(
        started.elapsed() < PROMPTLY,
        "waited {:?} for a table lock",
        started.elapsed()
    );
    drop(holder);
    rig.expect("SELECT v FROM t WHERE id = 1", "5")
}

fn update_meets_remote_delete(rig: &Rig) -> Result<()> {
    table(rig)?;
    for round in 1..=10 {
        let update = format!("UPDATE t SET v = 100 WHERE id = {round}");
        let delete = format!("DELETE FROM t WHERE id = {round}");
        let outcomes = fight(rig, [(1, &update), (2, &delete)])?;
        let committed = outcomes
            .iter()
            .filter(|outcome| matches!(outcome, Outcome::Committed))
            .count();
        ensure!(committed == 1, "{committed} of two were committed");
    }
    rig.expect("SELECT count(*) FILTER (WHERE v NOT IN (100)) FROM t", "0")
}

fn select_for_update_does_not_stop_a_committing_peer(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut holder = rig.session(3)?;
    holder.run("BEGIN; SELECT * FROM t WHERE id = 1 FOR UPDATE")?;
    let started = Instant::now();
    rig.session(1)?.run("UPDATE t SET v = 5 WHERE id = 1")?;
    ensure!(
        started.elapsed() < PROMPTLY,
        "waited {:?} for a row lock",
        started.elapsed()
    );
    drop(holder);
    rig.expect("SELECT v FROM t WHERE id = 1", "5")
}

/// How long a session or process may take to get where a case wants it.
const LIMIT: Duration = Duration::from_secs(20);

fn second_attempt_keeps_its_age(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(2)?;
    let start = |session: &mut Session| session.text("SELECT extract(epoch FROM now())");
    session.run("BEGIN; UPDATE t SET v = -1 WHERE id = 1")?;
    let first = start(&mut session)?;
    lose(&mut session, || {
        rig.session(1)?.run("UPDATE t SET v = 1 WHERE id = 1")
    })?;
    // What writes nothing in between changes nothing.
    session.run("SELECT 1")?;
    session.run("BEGIN; UPDATE t SET v = 2 WHERE id = 1")?;
    let shown = commit_and_look(rig, &mut session)?;
    ensure!(shown == first, "started {shown}, first attempt {first}");
    session.run("BEGIN; UPDATE t SET v = 3 WHERE id = 1")?;
    let own = start(&mut session)?;
    let shown = commit_and_look(rig, &mut session)?;
    ensure!(shown == own, "after a commit: started {shown}, not {own}");
    rig.expect("SELECT v FROM t WHERE id = 1", "3")
}

/// The session is in a statement when `winner` commits, and has to give way.
fn lose(session: &mut Session, winner: impl FnOnce() -> Result<()>) -> Result<()> {
    let error = thread::scope(|scope| {
        let loser = scope.spawn(|| session.refused_with("40001", "SELECT pg_sleep(60)"));
        let won = winner();
        let error = loser
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        won?;
        error
    })?;
    ensure!(
        error.message().contains("blocks a committing transaction"),
        "{error:?}"
    );
    session.run("ROLLBACK")
}

/// Commits what a session of node 2 has begun; when it started, as the cluster sees it.
fn commit_and_look(rig: &Rig, session: &mut Session) -> Result<String> {
    let mut held = Held::new(rig);
    held.hold(3, "apply-before-prepare")?;
    thread::scope(|scope| {
        let commit = scope.spawn(|| session.run("COMMIT"));
        let mut watcher = rig.session(2)?;
        let mut shown = String::new();
        let sql =
            "SELECT extract(epoch FROM started_at) FROM mtm.transactions WHERE state = 'voting'";
        let looked = wait_for("the transaction to be shown", LIMIT, || {
            shown = watcher.text(sql)?;
            Ok(!shown.is_empty())
        });
        held.release(3)?;
        commit
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        looked?;
        Ok(shown)
    })
}

/// A grace that no case lives to see.
fn with_long_grace(rig: &Rig, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let set = |value: &str| -> Result<()> {
        let mut session = rig.session(2)?;
        session.run(&format!(
            "ALTER SYSTEM SET multimaster.conflict_grace = {value}"
        ))?;
        session.run("SELECT pg_reload_conf()")?;
        wait_for("the setting to be in force", LIMIT, || {
            let shown = rig
                .session(2)?
                .text("SELECT setting = '60000' FROM pg_settings WHERE name = 'multimaster.conflict_grace'")?;
            Ok((shown == "t") == (value != "DEFAULT"))
        })
    };
    set("'60s'")?;
    let outcome = work();
    set("DEFAULT")?;
    outcome
}

fn younger_running_transaction_gives_way_at_once(rig: &Rig) -> Result<()> {
    table(rig)?;
    with_long_grace(rig, || {
        let mut older = rig.session(1)?;
        older.run("BEGIN; SELECT 1")?;
        let mut younger = rig.session(2)?;
        younger.run("BEGIN; UPDATE t SET v = -1 WHERE id = 1")?;
        older.run("UPDATE t SET v = 1 WHERE id = 1")?;
        let started = Instant::now();
        lose(&mut younger, || older.run("COMMIT"))?;
        ensure!(
            started.elapsed() < LIMIT,
            "it waited for the grace: {:?}",
            started.elapsed()
        );
        Ok(())
    })?;
    rig.expect("SELECT v FROM t WHERE id = 1", "1")
}

fn older_running_transaction_may_still_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    with_long_grace(rig, || {
        let mut older = rig.session(2)?;
        older.run("BEGIN; UPDATE t SET v = -1 WHERE id = 1")?;
        let mut younger = rig.session(1)?;
        let mut watcher = rig.session(2)?;
        thread::scope(|scope| {
            let commit =
                scope.spawn(|| younger.refused_with("40001", "UPDATE t SET v = 1 WHERE id = 1"));
            let waits = wait_for("apply to wait for the row", LIMIT, || {
                let sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE '%apply worker%' AND wait_event_type = 'Lock'";
                Ok(watcher.text(sql)? == "1")
            });
            older.run("COMMIT")?;
            waits?;
            commit
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                .map(drop)
        })
    })?;
    rig.expect("SELECT v FROM t WHERE id = 1", "-1")
}
