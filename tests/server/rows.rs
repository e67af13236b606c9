//! What applying a transaction finds out, and what it must not take amiss.

use anyhow::{Result, bail, ensure};
use multimaster_tests::{Rig, SharedCase, cases};
use postgres::error::DbError;

pub fn cases() -> Vec<SharedCase> {
    cases![
        row_missing_on_a_node_refuses_the_update_and_is_named,
        row_missing_on_a_node_refuses_the_delete,
        restricted_parent_may_be_replaced_within_a_transaction,
        child_may_come_before_its_parent_within_a_statement,
        row_changed_many_times_arrives_as_it_ended,
        keys_of_user_types_find_rows,
        triggers_for_replicas_run_where_rows_are_applied,
        rows_between_schema_changes_arrive,
        keys_moved_onto_each_other_arrive,
    ]
}

/// Removes a row behind the back of the server, on one node only. The case has to drop the table.
fn lose_row(rig: &Rig, node: usize, table: &str, condition: &str) -> Result<()> {
    rig.session(1)?.run("CREATE EXTENSION pg_surgery")?;
    rig.session(node)?.run(&format!(
        "SELECT heap_force_kill('{table}'::regclass, ARRAY(SELECT ctid FROM {table} WHERE {condition}))"
    ))
}

/// Runs `sql` on a node and demands that it is refused.
fn refused(rig: &Rig, node: usize, sql: &str) -> Result<DbError> {
    match rig.session(node)?.batch_execute(sql) {
        Ok(()) => bail!("not refused: {sql}"),
        Err(error) => match error.as_db_error() {
            Some(error) => Ok(error.clone()),
            None => bail!("the session broke: {error}"),
        },
    }
}

fn three_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, 0 FROM generate_series(1, 3) g",
    )
}

fn row_missing_on_a_node_refuses_the_update_and_is_named(rig: &Rig) -> Result<()> {
    three_rows(rig)?;
    lose_row(rig, 2, "t", "id = 2")?;
    let error = refused(rig, 1, "UPDATE t SET v = 1 WHERE id = 2")?;
    ensure!(error.code().code() == "XX001", "{error:?}");
    let detail = error.detail().unwrap_or_default();
    ensure!(
        detail.contains("node 2") && detail.contains("(id)=(2)"),
        "{error:?}"
    );
    // The others go on.
    rig.session(1)?.run("UPDATE t SET v = 5 WHERE id = 1")?;
    rig.expect("SELECT v FROM t WHERE id = 1", "5")?;
    rig.session(1)?.run("DROP TABLE t")
}

fn row_missing_on_a_node_refuses_the_delete(rig: &Rig) -> Result<()> {
    three_rows(rig)?;
    lose_row(rig, 3, "t", "id = 1")?;
    let error = refused(rig, 2, "DELETE FROM t WHERE id = 1")?;
    ensure!(error.code().code() == "XX001", "{error:?}");
    ensure!(
        rig.session(2)?.text("SELECT count(*) FROM t")? == "3",
        "the refused delete took effect"
    );
    rig.session(1)?.run("DROP TABLE t")
}

fn restricted_parent_may_be_replaced_within_a_transaction(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id int PRIMARY KEY, v int);
        CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent ON DELETE RESTRICT ON UPDATE RESTRICT);
        INSERT INTO parent VALUES (1, 1)",
    )?;
    rig.session(2)?.run(
        "BEGIN; DELETE FROM parent; INSERT INTO parent VALUES (1, 2); INSERT INTO child VALUES (1, 1); COMMIT",
    )?;
    rig.session(3)?.run(
        "BEGIN; DELETE FROM child; UPDATE parent SET id = 2; UPDATE parent SET id = 1; INSERT INTO child VALUES (2, 1); COMMIT",
    )?;
    rig.expect("SELECT * FROM parent, child", "1|2|2|1")
}

fn child_may_come_before_its_parent_within_a_statement(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (p int PRIMARY KEY REFERENCES parent);
        CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree)",
    )?;
    rig.session(2)?
        .run("WITH c AS (INSERT INTO child VALUES (7)) INSERT INTO parent VALUES (7)")?;
    rig.session(3)?.run(
        "INSERT INTO tree SELECT g, CASE WHEN g < 5 THEN g + 1 END FROM generate_series(1, 5) g; DELETE FROM tree WHERE id < 4",
    )?;
    rig.expect("SELECT p, (SELECT count(*) FROM tree) FROM child", "7|2")
}

fn row_changed_many_times_arrives_as_it_ended(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int, w text); CREATE INDEX ON t (v)")?;
    rig.session(2)?.run(
        "BEGIN;
        INSERT INTO t VALUES (1, 0, 'a'); UPDATE t SET v = v + 1; UPDATE t SET v = v + 1; DELETE FROM t;
        INSERT INTO t VALUES (1, 5, 'b'); UPDATE t SET id = 2; UPDATE t SET id = 1; UPDATE t SET v = 9, w = 'c';
        SAVEPOINT s; DELETE FROM t; INSERT INTO t VALUES (1, 7, 'undone'); ROLLBACK TO s;
        INSERT INTO t VALUES (2, 2, 'd'); UPDATE t SET id = id + 10; UPDATE t SET id = id - 9;
        COMMIT",
    )?;
    rig.expect("SELECT * FROM t ORDER BY id", "2|9|c\n3|2|d")
}

fn keys_of_user_types_find_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy'); CREATE DOMAIN code AS text CHECK (value <> '');
        CREATE TABLE t (m mood, c code, v int, PRIMARY KEY (m, c));
        INSERT INTO t VALUES ('sad', 'x', 1), ('ok', 'x', 2), ('ok', 'y', 3)",
    )?;
    rig.session(2)?.run("UPDATE t SET v = 10 WHERE c = 'x'")?;
    rig.session(3)?
        .run("UPDATE t SET m = 'happy' WHERE m = 'sad'; DELETE FROM t WHERE c = 'y'")?;
    rig.expect("SELECT * FROM t ORDER BY m", "ok|x|10\nhappy|x|10")
}

fn triggers_for_replicas_run_where_rows_are_applied(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, v int, seen text);
        CREATE FUNCTION mark() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.seen := 'applied'; RETURN new; END $$;
        CREATE TRIGGER mark BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION mark();
        ALTER TABLE t ENABLE REPLICA TRIGGER mark",
    )?;
    rig.session(1)?.run(
        "BEGIN; INSERT INTO t VALUES (1, 1), (2, 2); UPDATE t SET v = 3 WHERE id = 1; COMMIT",
    )?;
    for (node, seen) in [(1, ""), (2, "applied"), (3, "applied")] {
        let found = rig
            .session(node)?
            .text("SELECT v, seen FROM t WHERE id = 1")?;
        ensure!(found == format!("3|{seen}"), "node {node}: {found}");
    }
    // The nodes differ, as the trigger wants; a case must leave them equal.
    rig.session(1)?
        .run("ALTER TABLE t DISABLE TRIGGER mark; UPDATE t SET seen = NULL")
}

fn rows_between_schema_changes_arrive(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t VALUES (1, 1)")?;
    rig.session(2)?.run(
        "BEGIN;
        INSERT INTO t VALUES (2, 2); ALTER TABLE t ADD COLUMN b text DEFAULT 'new'; INSERT INTO t VALUES (3, 3, 'x');
        UPDATE t SET b = 'changed' WHERE id = 1; ALTER TABLE t DROP COLUMN a; UPDATE t SET b = 'again' WHERE id = 2;
        ALTER TABLE t RENAME COLUMN b TO c; INSERT INTO t VALUES (4, 'y'); ALTER TABLE t ALTER COLUMN id TYPE bigint;
        INSERT INTO t VALUES (5000000000, 'z'); ALTER TABLE t RENAME TO u; CREATE TABLE t (other text PRIMARY KEY);
        INSERT INTO t VALUES ('other table'); DELETE FROM u WHERE id = 3;
        COMMIT",
    )?;
    rig.expect(
        "SELECT * FROM u ORDER BY id",
        "1|changed\n2|again\n4|y\n5000000000|z",
    )?;
    rig.expect("SELECT * FROM t", "other table")
}

fn keys_moved_onto_each_other_arrive(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, k int UNIQUE DEFERRABLE INITIALLY DEFERRED,
            during int4range, EXCLUDE USING gist (during WITH &&) DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO t SELECT g, g, int4range(10 * g, 10 * g + 10) FROM generate_series(1, 4) g",
    )?;
    rig.session(2)?
        .run("UPDATE t SET k = 5 - k, during = int4range(50 - 10 * id, 60 - 10 * id)")?;
    rig.expect(
        "SELECT sum(id * k), max(lower(during)) FILTER (WHERE id = 1) FROM t",
        "20|40",
    )
}
