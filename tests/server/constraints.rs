//! Constraints hold across nodes, whatever the nodes do at the same moment.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use multimaster_tests::{Rig, Session, SharedCase, cases, plain};
use xtask::checks;

pub fn cases() -> Vec<SharedCase> {
    let mut cases: Vec<SharedCase> = cases![
        foreign_keys_cascade_once,
        foreign_key_set_null_and_restrict,
        deferred_unique_swap_commits,
        deferred_foreign_key_circle_commits,
        self_reference_and_composite_keys,
        exclusion_constraint_holds,
        check_constraints_hold_on_every_node,
    ];
    if !plain() {
        cases.extend::<Vec<SharedCase>>(cases![
            child_and_deleted_parent_never_both_commit,
            deferred_child_and_deleted_parent_never_both_commit,
            equal_keys_from_two_nodes_never_both_commit,
            equal_deferrable_keys_from_two_nodes_never_both_commit,
            overlapping_bookings_from_two_nodes_never_both_commit,
        ]);
    }
    cases
}

/// Rounds of a race: enough to meet both orders many times.
const ROUNDS: usize = 15;

fn foreign_keys_cascade_once(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
        CREATE TABLE grandchild (c int REFERENCES child ON DELETE CASCADE, note text);
        INSERT INTO parent VALUES (1), (2); INSERT INTO child VALUES (10, 1), (20, 2), (21, 2); INSERT INTO grandchild VALUES (10, 'a'), (20, 'b')",
    )?;
    rig.session(2)?
        .run("UPDATE parent SET id = 5 WHERE id = 2")?;
    rig.session(3)?.run("DELETE FROM parent WHERE id = 1")?;
    rig.expect("SELECT id, p FROM child ORDER BY id", "20|5\n21|5")?;
    rig.expect("SELECT * FROM grandchild", "20|b")
}

fn foreign_key_set_null_and_restrict(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE soft (id int PRIMARY KEY, p int REFERENCES parent ON DELETE SET NULL);
        CREATE TABLE hard (id int PRIMARY KEY, p int REFERENCES parent ON DELETE RESTRICT);
        INSERT INTO parent VALUES (1), (2); INSERT INTO soft VALUES (1, 1); INSERT INTO hard VALUES (2, 2)",
    )?;
    rig.session(2)?.run("DELETE FROM parent WHERE id = 1")?;
    rig.session(3)?
        .refused_with("23503", "DELETE FROM parent WHERE id = 2")?;
    rig.session(3)?
        .refused_with("23503", "INSERT INTO soft VALUES (3, 77)")?;
    rig.expect("SELECT id, p IS NULL FROM soft", "1|t")
}

fn deferred_unique_swap_commits(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int PRIMARY KEY, pos int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO t VALUES (1, 1), (2, 2)")?;
    rig.session(2)?.run(
        "BEGIN; UPDATE t SET pos = 2 WHERE id = 1; UPDATE t SET pos = 1 WHERE id = 2; COMMIT",
    )?;
    rig.session(3)?.run("UPDATE t SET pos = 3 - pos")?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|1\n2|2")
}

fn deferred_foreign_key_circle_commits(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE a (id int PRIMARY KEY, b int); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a DEFERRABLE INITIALLY DEFERRED);
        ALTER TABLE a ADD FOREIGN KEY (b) REFERENCES b DEFERRABLE INITIALLY IMMEDIATE",
    )?;
    rig.session(2)?.run("BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO a VALUES (1, 1); INSERT INTO b VALUES (1, 1); COMMIT")?;
    rig.expect("SELECT count(*) FROM a JOIN b ON a.b = b.id", "1")
}

fn self_reference_and_composite_keys(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (a int, b text, up_a int, up_b text, PRIMARY KEY (a, b), FOREIGN KEY (up_a, up_b) REFERENCES t MATCH FULL)")?;
    rig.session(2)?
        .run("INSERT INTO t VALUES (1, 'x', 1, 'x'), (2, 'y', 1, 'x'), (3, 'z', NULL, NULL)")?;
    rig.session(3)?
        .refused_with("23503", "DELETE FROM t WHERE a = 1")?;
    rig.session(3)?.run("DELETE FROM t WHERE a IN (1, 2)")?;
    rig.expect("SELECT a FROM t", "3")
}

fn exclusion_constraint_holds(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (during int4range, EXCLUDE USING gist (during WITH &&)); INSERT INTO t VALUES ('[1,5)')")?;
    rig.session(2)?
        .refused_with("23P01", "INSERT INTO t VALUES ('[4,6)')")?;
    rig.session(3)?.run("INSERT INTO t VALUES ('[5,6)')")?;
    rig.expect("SELECT count(*) FROM t", "2")
}

fn check_constraints_hold_on_every_node(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY CHECK (id > 0), v text NOT NULL)")?;
    for node in [1, 2, 3] {
        rig.session(node)?
            .refused_with("23514", "INSERT INTO t VALUES (0, 'x')")?;
        rig.session(node)?
            .refused_with("23502", "INSERT INTO t VALUES (1, NULL)")?;
    }
    rig.expect("SELECT count(*) FROM t", "0")
}

/// Runs one script on node 1 and another on node 2, both COMMITs at the same moment; says which were committed. One
/// that was not must have got one of `allowed`.
pub fn race(rig: &Rig, scripts: [&str; 2], allowed: &[&str]) -> Result<[bool; 2]> {
    let start = Barrier::new(2);
    let run = |node: usize, script: &str| -> Result<bool> {
        let mut session = rig.session(node)?;
        let prepared = session.run(&format!("BEGIN; {script}"));
        start.wait();
        prepared?;
        commit(&mut session, allowed)
    };
    let outcomes = thread::scope(|scope| {
        let other = scope.spawn(|| run(2, scripts[1]));
        let mine = run(1, scripts[0]);
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

fn commit(session: &mut Session, allowed: &[&str]) -> Result<bool> {
    match session.batch_execute("COMMIT") {
        Ok(()) => Ok(true),
        Err(error) => match error.code() {
            Some(code) if allowed.contains(&code.code()) => Ok(false),
            _ => bail!("a loser of the race got {error:?}"),
        },
    }
}

/// Runs a race many times; after each, `violations` must be 0 everywhere and somebody must have won.
fn never_both(
    rig: &Rig,
    reset: &str,
    scripts: [&str; 2],
    allowed: &[&str],
    violations: &str,
) -> Result<()> {
    for _ in 0..ROUNDS {
        rig.session(1)?.run(reset)?;
        let won = race(rig, scripts, allowed)?;
        ensure!(won != [true, true], "both were committed");
        ensure!(won != [false, false], "neither was committed");
        checks::whole(&rig.cluster, Duration::from_secs(10))?;
        rig.expect(violations, "0")?;
    }
    Ok(())
}

const ORPHANS: &str = "SELECT count(*) FROM child WHERE p NOT IN (SELECT id FROM parent)";

fn child_and_deleted_parent_never_both_commit(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent)")?;
    never_both(
        rig,
        "TRUNCATE parent, child; INSERT INTO parent VALUES (1)",
        [
            "INSERT INTO child VALUES (1, 1)",
            "DELETE FROM parent WHERE id = 1",
        ],
        &["40001", "23503"],
        ORPHANS,
    )
}

fn deferred_child_and_deleted_parent_never_both_commit(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
    )?;
    never_both(
        rig,
        "TRUNCATE parent, child; INSERT INTO parent VALUES (1)",
        [
            "INSERT INTO child VALUES (1, 1)",
            "DELETE FROM parent WHERE id = 1",
        ],
        &["40001", "23503"],
        ORPHANS,
    )
}

const DUPLICATES: &str = "SELECT count(*) - count(DISTINCT id) FROM t";

fn equal_keys_from_two_nodes_never_both_commit(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, node int)")?;
    never_both(
        rig,
        "TRUNCATE t",
        ["INSERT INTO t VALUES (1, 1)", "INSERT INTO t VALUES (1, 2)"],
        &["40001", "23505"],
        DUPLICATES,
    )
}

fn equal_deferrable_keys_from_two_nodes_never_both_commit(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int UNIQUE DEFERRABLE INITIALLY DEFERRED, node int)")?;
    never_both(
        rig,
        "TRUNCATE t",
        ["INSERT INTO t VALUES (1, 1)", "INSERT INTO t VALUES (1, 2)"],
        &["40001", "23505"],
        DUPLICATES,
    )
}

fn overlapping_bookings_from_two_nodes_never_both_commit(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (during int4range, node int, EXCLUDE USING gist (during WITH &&))")?;
    never_both(
        rig,
        "TRUNCATE t",
        [
            "INSERT INTO t VALUES ('[1,5)', 1)",
            "INSERT INTO t VALUES ('[4,9)', 2)",
        ],
        &["40001", "23P01"],
        "SELECT count(*) FROM t a JOIN t b ON a.during && b.during AND a.node < b.node",
    )
}
