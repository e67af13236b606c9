//! Every way to commit is one commit on all nodes, and looks to the client as it always did.

use std::io::Write;

use anyhow::{Result, ensure};
use multimaster_tests::{Rig, SharedCase, cases};

pub fn cases() -> Vec<SharedCase> {
    cases![
        explicit_block_reaches_every_node,
        every_node_takes_writes,
        autocommit_of_the_simple_protocol,
        autocommit_of_the_extended_protocol,
        prepared_statement_commits_each_time,
        pipeline_commits_at_its_sync,
        statements_of_a_pipeline_in_a_block_commit_together,
        copy_in_commits,
        returning_answers_and_commits,
        data_modifying_cte_commits,
        cursor_with_hold_outlives_the_commit,
        statements_of_one_message_commit_together,
        failing_message_leaves_nothing,
        commit_in_the_middle_of_a_message,
        chained_transactions_keep_their_characteristics,
        chain_in_an_implicit_block_stays_an_error,
        savepoints_keep_what_was_released,
        commit_with_savepoints_still_open,
        chain_with_savepoints_still_open,
        subtransactions_in_functions,
        procedure_commits_where_it_says,
        do_block_commits_where_it_says,
        commit_in_a_loop_over_a_query,
        procedure_rolls_back_where_it_says,
        failed_block_answers_rollback,
        rolled_back_block_leaves_nothing,
        commit_outside_a_block_warns,
        serializable_block_commits,
        set_local_role_does_not_stand_in_the_way,
        commits_of_ordinary_users,
        denied_access_is_an_error_like_any_other,
        vacuum_and_analyze_stay_local,
    ]
}

fn table(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
}

fn explicit_block_reaches_every_node(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?
        .run("BEGIN; INSERT INTO t VALUES (1, 'a'); UPDATE t SET v = 'b'; COMMIT")?;
    let mut session = rig.session(1)?;
    session.run("BEGIN")?;
    session.run("INSERT INTO t VALUES (2, 'c')")?;
    session.run("COMMIT")?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|b\n2|c")
}

fn every_node_takes_writes(rig: &Rig) -> Result<()> {
    table(rig)?;
    for node in 1..=rig.len() {
        rig.session(node)?
            .run(&format!("INSERT INTO t VALUES ({node}, 'from {node}')"))?;
        rig.expect("SELECT count(*) FROM t", &node.to_string())?;
    }
    Ok(())
}

fn autocommit_of_the_simple_protocol(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(2)?;
    session.run("INSERT INTO t VALUES (1, 'a')")?;
    session.run("UPDATE t SET v = 'b'")?;
    rig.expect("SELECT * FROM t", "1|b")?;
    session.run("DELETE FROM t")?;
    rig.expect("SELECT * FROM t", "")
}

fn autocommit_of_the_extended_protocol(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(2)?;
    let changed = session.execute("INSERT INTO t VALUES ($1, $2), ($1 + 1, $2)", &[&1, &"x"])?;
    ensure!(changed == 2, "{changed} rows");
    rig.expect("SELECT * FROM t ORDER BY id", "1|x\n2|x")
}

fn prepared_statement_commits_each_time(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    let insert = session.prepare("INSERT INTO t VALUES ($1, 'p')")?;
    for id in 1..=8 {
        session.execute(&insert, &[&id])?;
        rig.expect("SELECT count(*) FROM t", &id.to_string())?;
    }
    Ok(())
}

fn pipeline_commits_at_its_sync(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id serial PRIMARY KEY, v int)")?;
    let script = "\\startpipeline\nINSERT INTO t (v) VALUES (1);\nINSERT INTO t (v) VALUES (2);\n\\endpipeline\n";
    rig.pgbench(1, script, "extended", 10)?;
    rig.pgbench(2, script, "prepared", 10)?;
    rig.expect("SELECT count(*), sum(v) FROM t", "40|60")
}

fn statements_of_a_pipeline_in_a_block_commit_together(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id serial PRIMARY KEY, v int)")?;
    let script = "\\startpipeline\nBEGIN;\nINSERT INTO t (v) VALUES (1);\nINSERT INTO t (v) VALUES (2);\nCOMMIT;\n\\endpipeline\n";
    rig.pgbench(3, script, "extended", 10)?;
    rig.expect("SELECT count(*), sum(v) FROM t", "20|30")
}

fn copy_in_commits(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(3)?;
    let mut copy = session.copy_in("COPY t FROM STDIN")?;
    for id in 1..=5000 {
        writeln!(copy, "{id}\trow {id}")?;
    }
    let rows = copy.finish()?;
    ensure!(rows == 5000, "{rows} rows");
    rig.expect("SELECT count(*), sum(id) FROM t", "5000|12502500")
}

fn returning_answers_and_commits(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    let inserted = session.text("INSERT INTO t VALUES (1, 'a') RETURNING id, v")?;
    ensure!(inserted == "1|a", "{inserted}");
    let row = session.query_one("UPDATE t SET v = $1 RETURNING v", &[&"b"])?;
    ensure!(
        row.get::<_, String>(0) == "b",
        "the answer of UPDATE RETURNING"
    );
    rig.expect("SELECT * FROM t", "1|b")?;
    let deleted = session.text("DELETE FROM t RETURNING id")?;
    ensure!(deleted == "1", "{deleted}");
    rig.expect("SELECT * FROM t", "")
}

fn data_modifying_cte_commits(rig: &Rig) -> Result<()> {
    table(rig)?;
    let answer = rig.session(2)?.text(
        "WITH added AS (INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3) g RETURNING id) SELECT sum(id) FROM added",
    )?;
    ensure!(answer == "6", "{answer}");
    rig.expect("SELECT count(*) FROM t", "3")
}

fn cursor_with_hold_outlives_the_commit(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 3) g; FETCH 1 FROM c")?;
    session.run("INSERT INTO t VALUES (1, 'a')")?;
    session.run("COMMIT")?;
    let rest = session.text("FETCH ALL FROM c")?;
    ensure!(rest == "2\n3", "{rest}");
    session.run("CLOSE c")?;
    rig.expect("SELECT * FROM t", "1|a")
}

fn statements_of_one_message_commit_together(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(2)?.run(
        "INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES (2, 'b'); UPDATE t SET v = v || v",
    )?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|aa\n2|bb")
}

fn failing_message_leaves_nothing(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(2)?
        .refused_with("22012", "INSERT INTO t VALUES (1, 'a'); SELECT 1 / 0")?;
    rig.expect("SELECT count(*) FROM t", "0")
}

fn commit_in_the_middle_of_a_message(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.refused_with(
        "22012",
        "INSERT INTO t VALUES (1, 'a'); COMMIT; INSERT INTO t VALUES (2, 'b'); SELECT 1 / 0",
    )?;
    rig.expect("SELECT * FROM t", "1|a")
}

fn chained_transactions_keep_their_characteristics(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; INSERT INTO t VALUES (1, 'a')")?;
    session.run("COMMIT AND CHAIN")?;
    rig.expect("SELECT count(*) FROM t", "1")?;
    let level = session.text("SHOW transaction_isolation")?;
    ensure!(level == "repeatable read", "{level}");
    session.run("INSERT INTO t VALUES (2, 'b')")?;
    session.run("COMMIT")?;
    rig.expect("SELECT count(*) FROM t", "2")
}

fn chain_in_an_implicit_block_stays_an_error(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?
        .refused_with("25P01", "INSERT INTO t VALUES (1, 'a'); COMMIT AND CHAIN")?;
    rig.expect("SELECT count(*) FROM t", "0")
}

fn savepoints_keep_what_was_released(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; SAVEPOINT a; INSERT INTO t VALUES (1, 'kept'); RELEASE a")?;
    session.run("SAVEPOINT b; INSERT INTO t VALUES (2, 'lost'); ROLLBACK TO b")?;
    session.run("INSERT INTO t VALUES (3, 'kept'); COMMIT")?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|kept\n3|kept")
}

fn commit_with_savepoints_still_open(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    for round in 0..3 {
        session.run(&format!(
            "BEGIN; INSERT INTO t VALUES ({round}0, 'top'); SAVEPOINT a"
        ))?;
        session.run(&format!(
            "INSERT INTO t VALUES ({round}1, 'a'); SAVEPOINT b"
        ))?;
        session.execute(&format!("INSERT INTO t VALUES ({round}2, 'b')"), &[])?;
        session.execute("COMMIT", &[])?;
    }
    rig.expect("SELECT count(*) FROM t", "9")
}

fn chain_with_savepoints_still_open(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(2)?;
    session.run("BEGIN; SAVEPOINT a; INSERT INTO t VALUES (1, 'a'); SAVEPOINT b; INSERT INTO t VALUES (2, 'b')")?;
    session.run("COMMIT AND CHAIN")?;
    session.run("SAVEPOINT a; INSERT INTO t VALUES (3, 'c')")?;
    session.run("COMMIT AND CHAIN")?;
    session.run("ROLLBACK")?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|a\n2|b\n3|c")
}

fn subtransactions_in_functions(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?.run(
        "DO $$ BEGIN
            FOR i IN 1..50 LOOP
                BEGIN
                    INSERT INTO t VALUES (i % 10, 'round ' || i);
                EXCEPTION WHEN unique_violation THEN
                    UPDATE t SET v = v || '+' WHERE id = i % 10;
                END;
            END LOOP;
        END $$",
    )?;
    rig.expect("SELECT count(*), sum(length(v)) FROM t", "10|111")
}

fn procedure_commits_where_it_says(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run(
        "CREATE PROCEDURE fill() LANGUAGE plpgsql AS $$ BEGIN
            FOR i IN 1..5 LOOP
                INSERT INTO t VALUES (i, 'p');
                IF i % 2 = 1 THEN COMMIT; END IF;
            END LOOP;
            PERFORM 1 / 0;
        END $$",
    )?;
    session.refused_with("22012", "CALL fill()")?;
    rig.expect(
        "SELECT string_agg(id::text, ',' ORDER BY id) FROM t",
        "1,2,3,4,5",
    )
}

fn do_block_commits_where_it_says(rig: &Rig) -> Result<()> {
    table(rig)?;
    let script = "DO $$ BEGIN INSERT INTO t VALUES (1, 'a'); COMMIT; INSERT INTO t VALUES (2, 'b'); PERFORM 1 / 0; END $$";
    rig.session(3)?.refused_with("22012", script)?;
    rig.expect("SELECT * FROM t", "1|a")
}

fn commit_in_a_loop_over_a_query(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?
        .run("INSERT INTO t SELECT g, 'old' FROM generate_series(1, 20) g")?;
    rig.session(1)?.run(
        "DO $$ DECLARE r record; BEGIN
            FOR r IN SELECT id FROM t ORDER BY id LOOP
                UPDATE t SET v = 'new' WHERE id = r.id;
                COMMIT;
            END LOOP;
        END $$",
    )?;
    rig.expect("SELECT count(*) FROM t WHERE v = 'new'", "20")
}

fn procedure_rolls_back_where_it_says(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(2)?.run(
        "DO $$ BEGIN
            FOR i IN 1..10 LOOP
                INSERT INTO t VALUES (i, 'x');
                IF i % 2 = 0 THEN COMMIT; ELSE ROLLBACK; END IF;
            END LOOP;
        END $$",
    )?;
    rig.expect(
        "SELECT string_agg(id::text, ',' ORDER BY id) FROM t",
        "2,4,6,8,10",
    )
}

fn failed_block_answers_rollback(rig: &Rig) -> Result<()> {
    table(rig)?;
    let output = rig.psql(
        1,
        "BEGIN;\nINSERT INTO t VALUES (1, 'a');\nSELECT 1 / 0;\nCOMMIT;\n",
    )?;
    ensure!(output.contains("BEGIN\nINSERT 0 1\nROLLBACK\n"), "{output}");
    rig.expect("SELECT count(*) FROM t", "0")
}

fn rolled_back_block_leaves_nothing(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?
        .run("BEGIN; INSERT INTO t VALUES (1, 'a'); ROLLBACK")?;
    rig.expect("SELECT count(*) FROM t", "0")
}

fn commit_outside_a_block_warns(rig: &Rig) -> Result<()> {
    let output = rig.psql(1, "COMMIT;\n")?;
    ensure!(
        output.contains("there is no transaction in progress"),
        "{output}"
    );
    ensure!(output.contains("COMMIT"), "{output}");
    Ok(())
}

fn serializable_block_commits(rig: &Rig) -> Result<()> {
    table(rig)?;
    rig.session(1)?.run("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT * FROM t; INSERT INTO t VALUES (1, 'a'); COMMIT")?;
    rig.expect("SELECT * FROM t", "1|a")
}

fn set_local_role_does_not_stand_in_the_way(rig: &Rig) -> Result<()> {
    table(rig)?;
    let schema = rig.schema();
    let mut session = rig.session(1)?;
    session.run(&format!("CREATE ROLE {schema}_app; GRANT USAGE ON SCHEMA {schema} TO {schema}_app; GRANT ALL ON t TO {schema}_app"))?;
    session.run(&format!(
        "BEGIN; SET LOCAL ROLE {schema}_app; INSERT INTO t VALUES (1, 'a'); COMMIT"
    ))?;
    rig.expect("SELECT * FROM t", "1|a")?;
    let role = session.text("SELECT current_user")?;
    ensure!(role == "postgres", "{role}");
    session.run(&format!(
        "DROP OWNED BY {schema}_app; DROP ROLE {schema}_app"
    ))
}

fn commits_of_ordinary_users(rig: &Rig) -> Result<()> {
    table(rig)?;
    let schema = rig.schema();
    let mut session = rig.session(1)?;
    session.run(&format!("CREATE ROLE {schema}_app; GRANT USAGE ON SCHEMA {schema} TO {schema}_app; GRANT ALL ON t TO {schema}_app"))?;
    session.run(&format!("SET SESSION AUTHORIZATION {schema}_app"))?;
    session.run("BEGIN; INSERT INTO t VALUES (1, 'block'); COMMIT")?;
    session.run("INSERT INTO t VALUES (2, 'autocommit')")?;
    session.run("RESET SESSION AUTHORIZATION")?;
    rig.expect("SELECT count(*) FROM t", "2")?;
    session.run(&format!(
        "DROP OWNED BY {schema}_app; DROP ROLE {schema}_app"
    ))
}

fn denied_access_is_an_error_like_any_other(rig: &Rig) -> Result<()> {
    table(rig)?;
    let role = format!("{}_app", rig.schema());
    let mut session = rig.session(1)?;
    session.run(&format!(
        "CREATE ROLE {role}; GRANT USAGE ON SCHEMA {} TO {role}; SET ROLE {role}",
        rig.schema()
    ))?;
    session.refused_with("42501", "SELECT * FROM t")?;
    session.refused_with("42501", "INSERT INTO t VALUES (1, 'x')")?;
    session.refused_with("42501", "SELECT pg_read_file('postgresql.conf')")?;
    session.run(&format!(
        "RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}"
    ))?;
    rig.expect("SELECT count(*) FROM t", "0")
}

fn vacuum_and_analyze_stay_local(rig: &Rig) -> Result<()> {
    table(rig)?;
    let mut session = rig.session(1)?;
    session.run("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g")?;
    session.run("DELETE FROM t WHERE id % 2 = 0")?;
    for command in [
        "VACUUM t",
        "ANALYZE t",
        "VACUUM (FULL, ANALYZE) t",
        "REINDEX TABLE t",
        "CLUSTER t USING t_pkey",
        "CHECKPOINT",
    ] {
        session.run(command)?;
    }
    rig.expect("SELECT count(*) FROM t", "50")
}
