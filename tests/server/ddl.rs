//! Changes of the schema are part of the transaction, on all nodes, in order with the rows.

use anyhow::{Context, Result, ensure};
use multimaster_tests::{Rig, SharedCase, cases};

pub fn cases() -> Vec<SharedCase> {
    cases![
        tables_and_rows_of_one_transaction_arrive_together,
        rolled_back_ddl_leaves_nothing,
        ddl_undone_by_a_savepoint_stays_away,
        search_path_of_the_session_counts,
        alter_table_in_its_many_forms,
        indexes_of_every_kind,
        views_and_materialized_views,
        functions_and_their_bodies,
        types_enums_and_domains,
        sequences_and_their_changes,
        schemas_renames_and_comments,
        create_table_as_ships_its_rows,
        volatile_default_gives_equal_rows,
        ddl_inside_functions_and_do_blocks,
        ddl_in_autocommit_of_the_extended_protocol,
        grants_and_ownership,
        drops_cascade,
        triggers_and_rules,
        extensions_are_created_everywhere,
        concurrent_index_is_whole_or_refused,
        errors_in_ddl_leave_nothing,
        pgbench_initialises_and_runs,
    ]
}

/// Every node describes the schema alike.
const SHAPE: &str = "
    SELECT c.relname, c.relkind, coalesce(string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
        || CASE WHEN a.attnotnull THEN '!' ELSE '' END, ',' ORDER BY a.attname), '')
    FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relnamespace = current_schema()::regnamespace
    GROUP BY 1, 2 ORDER BY 1, 2";

fn same_shape(rig: &Rig) -> Result<()> {
    let expected = rig.session(1)?.text(SHAPE)?;
    rig.expect(SHAPE, &expected)
}

fn tables_and_rows_of_one_transaction_arrive_together(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "BEGIN;
        CREATE TABLE t (id int PRIMARY KEY, v text);
        INSERT INTO t VALUES (1, 'a'), (2, 'b');
        ALTER TABLE t ADD COLUMN n int NOT NULL DEFAULT 5;
        UPDATE t SET n = 6 WHERE id = 1;
        ALTER TABLE t RENAME COLUMN v TO label;
        INSERT INTO t VALUES (3, 'c', 7);
        ALTER TABLE t DROP COLUMN label;
        CREATE INDEX ON t (n);
        DELETE FROM t WHERE id = 2;
        ALTER TABLE t RENAME TO u;
        INSERT INTO u VALUES (4, 8);
        COMMIT",
    )?;
    rig.expect("SELECT * FROM u ORDER BY id", "1|6\n3|7\n4|8")?;
    same_shape(rig)
}

fn rolled_back_ddl_leaves_nothing(rig: &Rig) -> Result<()> {
    rig.session(2)?
        .run("BEGIN; CREATE TABLE t (id int); INSERT INTO t VALUES (1); ROLLBACK")?;
    rig.expect("SELECT to_regclass('t')", "")
}

fn ddl_undone_by_a_savepoint_stays_away(rig: &Rig) -> Result<()> {
    let mut session = rig.session(1)?;
    session.run("BEGIN; CREATE TABLE t (id int); SAVEPOINT s; ALTER TABLE t ADD COLUMN gone int; CREATE TABLE gone (id int)")?;
    session.run(
        "ROLLBACK TO s; ALTER TABLE t ADD COLUMN kept int; INSERT INTO t VALUES (1, 2); COMMIT",
    )?;
    rig.expect("SELECT kept FROM t", "2")?;
    rig.expect("SELECT to_regclass('gone')", "")
}

fn search_path_of_the_session_counts(rig: &Rig) -> Result<()> {
    let other = format!("{}_b", rig.schema());
    let mut session = rig.session(3)?;
    session.run(&format!("CREATE SCHEMA {other}; SET search_path = {other}"))?;
    session.run("CREATE TABLE t (id int); CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'; CREATE VIEW v AS SELECT one() + count(*) AS n FROM t")?;
    session
        .run("BEGIN; SET LOCAL search_path = public; CREATE TEMP TABLE mine (id int); COMMIT")?;
    rig.expect(&format!("SELECT n FROM {other}.v"), "1")?;
    session.run(&format!("DROP SCHEMA {other} CASCADE"))
}

fn alter_table_in_its_many_forms(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int, a text DEFAULT 'x', b int); INSERT INTO t SELECT g, g::text, g FROM generate_series(1, 10) g")?;
    let steps = [
        "ALTER TABLE t ADD PRIMARY KEY (id)",
        "ALTER TABLE t ALTER COLUMN a TYPE int USING a::int * 2, ALTER COLUMN a DROP DEFAULT",
        "ALTER TABLE t ALTER COLUMN b SET NOT NULL, ALTER COLUMN b SET DEFAULT 3",
        "ALTER TABLE t ADD COLUMN c bigint GENERATED ALWAYS AS (b * 2) STORED",
        "ALTER TABLE t ADD COLUMN d int DEFAULT 9",
        "ALTER TABLE t ADD CONSTRAINT positive CHECK (b > 0) NOT VALID",
        "ALTER TABLE t VALIDATE CONSTRAINT positive",
        "ALTER TABLE t ADD CONSTRAINT uniq UNIQUE (a)",
        "ALTER TABLE t RENAME CONSTRAINT uniq TO once",
        "ALTER TABLE t ALTER COLUMN a SET STATISTICS 500, ALTER COLUMN a SET STORAGE PLAIN",
        "ALTER TABLE t SET (fillfactor = 70)",
        "ALTER TABLE t DROP CONSTRAINT positive",
    ];
    for (number, step) in steps.iter().enumerate() {
        let node = number % 3 + 1;
        rig.session(node)?.run(step)?;
        rig.session(node % 3 + 1)?.run(&format!(
            "INSERT INTO t (id, a, b) VALUES ({0}, '{0}', 1)",
            100 + number
        ))?;
    }
    rig.expect(
        "SELECT count(*), sum(a), sum(c), sum(d) FROM t",
        "22|1476|134|198",
    )?;
    same_shape(rig)
}

fn indexes_of_every_kind(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int, a text, b int[], c tsvector, d int4range); INSERT INTO t VALUES (1, 'Abc', '{1,2}', 'x y', '[1,5)')")?;
    rig.session(2)?.run(
        "CREATE UNIQUE INDEX u ON t (lower(a)) INCLUDE (id) WHERE id > 0; CREATE INDEX g ON t USING gin (b, c);
        CREATE INDEX h ON t USING hash (a); CREATE INDEX s ON t USING gist (d); CREATE INDEX r ON t USING brin (id);
        CREATE INDEX o ON t (id DESC NULLS LAST, a COLLATE \"C\" text_pattern_ops)",
    )?;
    rig.session(3)?
        .refused_with("23505", "INSERT INTO t VALUES (2, 'aBC')")?;
    rig.session(3)?.run("ALTER INDEX u RENAME TO u2; DROP INDEX h; INSERT INTO t VALUES (2, 'other', '{3}', 'z', '[7,8)')")?;
    rig.expect("SELECT string_agg(indexname, ',' ORDER BY indexname) FROM pg_indexes WHERE schemaname = current_schema()", "g,o,r,s,u2")
}

fn views_and_materialized_views(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE VIEW v AS SELECT id * 2 AS twice FROM t",
    )?;
    rig.session(2)?.run("INSERT INTO t VALUES (1), (2); CREATE OR REPLACE VIEW v AS SELECT id * 2 AS twice, id FROM t")?;
    rig.session(3)?.run("CREATE RECURSIVE VIEW n (k) AS VALUES (1) UNION ALL SELECT k + 1 FROM n WHERE k < 3; ALTER VIEW v RENAME TO w")?;
    rig.expect(
        "SELECT sum(twice), sum(id), (SELECT sum(k) FROM n) FROM w",
        "6|3|6",
    )?;
    rig.session(1)?
        .run("CREATE MATERIALIZED VIEW m AS SELECT count(*) AS c FROM t")?;
    rig.session(2)?.run("INSERT INTO t VALUES (3)")?;
    rig.session(2)?.run("REFRESH MATERIALIZED VIEW m")?;
    ensure!(
        rig.session(2)?.text("SELECT c FROM m")? == "3",
        "the node that refreshed"
    );
    rig.session(3)?.run("DROP MATERIALIZED VIEW m; DROP VIEW w")
}

fn functions_and_their_bodies(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE FUNCTION f(a int, b int DEFAULT 2) RETURNS int LANGUAGE sql IMMUTABLE AS $body$ SELECT a * b -- '; \"\n $body$")?;
    rig.session(2)?.run(
        "CREATE FUNCTION g(int) RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT f($1) + 1; END",
    )?;
    rig.session(3)?.run("CREATE OR REPLACE FUNCTION f(a int, b int DEFAULT 3) RETURNS int LANGUAGE plpgsql SET work_mem = '5MB' AS 'BEGIN RETURN a * b; END'")?;
    rig.session(1)?.run("CREATE AGGREGATE total (int) (sfunc = int4pl, stype = int, initcond = '0'); CREATE OPERATOR |+| (leftarg = int, rightarg = int, function = f)")?;
    rig.expect(
        "SELECT f(5), g(5), total(x) FROM generate_series(1, 3) x",
        "15|16|6",
    )
}

fn types_enums_and_domains(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN small AS int CHECK (VALUE < 10); CREATE TYPE pair AS (a int, b text)")?;
    rig.session(2)?
        .run("ALTER TYPE mood ADD VALUE 'ok' BEFORE 'happy'")?;
    rig.session(3)?.run("CREATE TABLE t (m mood PRIMARY KEY, s small, p pair); INSERT INTO t VALUES ('ok', 3, (1, 'x'))")?;
    rig.session(1)?.run("ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'; ALTER DOMAIN small DROP CONSTRAINT small_check; ALTER TYPE pair ADD ATTRIBUTE c int CASCADE")?;
    rig.session(2)?
        .run("INSERT INTO t VALUES ('sad', 100, (2, 'y', 3))")?;
    rig.expect(
        "SELECT * FROM t ORDER BY m",
        "sad|100|(2,y,3)\nfine|3|(1,x,)",
    )
}

fn sequences_and_their_changes(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE SEQUENCE s START 100; CREATE TABLE t (id bigint DEFAULT nextval('s') PRIMARY KEY, node int)")?;
    for node in [1, 2, 3] {
        rig.session(node)?.run(&format!(
            "INSERT INTO t (node) SELECT {node} FROM generate_series(1, 20)"
        ))?;
    }
    rig.expect("SELECT count(DISTINCT id), min(id) >= 100 FROM t", "60|t")?;
    rig.session(2)?
        .run("ALTER SEQUENCE s RENAME TO s2; ALTER SEQUENCE s2 OWNED BY t.id")?;
    rig.session(3)?
        .run("INSERT INTO t (node) VALUES (3); DROP TABLE t")?;
    rig.expect("SELECT to_regclass('s2')", "")
}

fn schemas_renames_and_comments(rig: &Rig) -> Result<()> {
    let schema = rig.schema();
    rig.session(1)?.run(&format!("CREATE SCHEMA {schema}_a CREATE TABLE t (id int) CREATE VIEW v AS SELECT * FROM t; COMMENT ON TABLE {schema}_a.t IS 'it''s ours'"))?;
    rig.session(2)?.run(&format!("ALTER SCHEMA {schema}_a RENAME TO {schema}_b; CREATE TABLE moved (id int); ALTER TABLE moved SET SCHEMA {schema}_b"))?;
    rig.expect(&format!("SELECT obj_description('{schema}_b.t'::regclass), to_regclass('{schema}_b.moved') IS NOT NULL"), "it's ours|t")?;
    rig.session(3)?
        .run(&format!("DROP SCHEMA {schema}_b CASCADE"))
}

fn create_table_as_ships_its_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t AS SELECT g AS id, random() AS r, clock_timestamp() AS at, 'text ' || g AS v FROM generate_series(1, 50) g")?;
    rig.session(2)?
        .run("SELECT id, gen_random_uuid() AS u INTO t2 FROM t WHERE id <= 10")?;
    rig.session(3)?
        .run("CREATE TABLE t3 AS TABLE t WITH NO DATA; CREATE TABLE IF NOT EXISTS t AS SELECT 1")?;
    rig.expect("SELECT (SELECT count(*) FROM t), (SELECT count(DISTINCT u) FROM t2), (SELECT count(*) FROM t3)", "50|10|0")
}

fn volatile_default_gives_equal_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 20)")?;
    // It may be refused; what it may not do is give every node rows of its own (checked after each case).
    let mut session = rig.session(2)?;
    let outcome = session.run("ALTER TABLE t ADD COLUMN r float8 DEFAULT random()");
    let added = session.text(
        "SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass AND attname = 'r'",
    )?;
    ensure!(
        added == if outcome.is_ok() { "1" } else { "0" },
        "{outcome:?}, but {added} columns"
    );
    rig.expect("SELECT count(*) FROM t", "20")
}

fn ddl_inside_functions_and_do_blocks(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE FUNCTION make(name text) RETURNS void LANGUAGE plpgsql AS
            $$ BEGIN EXECUTE format('CREATE TABLE %I (id int PRIMARY KEY)', name); EXECUTE format('INSERT INTO %I VALUES (1)', name); END $$",
    )?;
    rig.session(2)?.run("SELECT make('made by a function')")?;
    rig.session(3)?
        .run("DO $$ BEGIN FOR i IN 1..3 LOOP PERFORM make('t' || i); COMMIT; END LOOP; END $$")?;
    rig.expect("SELECT (SELECT count(*) FROM \"made by a function\") + (SELECT count(*) FROM t1) + (SELECT count(*) FROM t3)", "3")?;
    same_shape(rig)
}

fn ddl_in_autocommit_of_the_extended_protocol(rig: &Rig) -> Result<()> {
    let mut session = rig.session(2)?;
    session.execute("CREATE TABLE t (id int PRIMARY KEY, v text)", &[])?;
    session.execute("INSERT INTO t VALUES ($1, $2)", &[&1, &"a"])?;
    session.execute("ALTER TABLE t ADD COLUMN w int DEFAULT 4", &[])?;
    rig.expect("SELECT * FROM t", "1|a|4")
}

fn grants_and_ownership(rig: &Rig) -> Result<()> {
    let (schema, role) = (rig.schema(), format!("{}_owner", rig.schema()));
    rig.session(1)?.run(&format!(
        "CREATE ROLE {role} LOGIN; GRANT ALL ON SCHEMA {schema} TO {role}"
    ))?;
    let mut session = rig.session(2)?;
    session.run(&format!(
        "SET ROLE {role}; CREATE TABLE t (id int); GRANT SELECT (id) ON t TO PUBLIC; RESET ROLE"
    ))?;
    rig.session(3)?.run(&format!("ALTER DEFAULT PRIVILEGES FOR ROLE {role} IN SCHEMA {schema} GRANT SELECT ON TABLES TO PUBLIC"))?;
    rig.expect(&format!("SELECT tableowner = '{role}' FROM pg_tables WHERE tablename = 't' AND schemaname = '{schema}'"), "t")?;
    rig.session(1)?.run("ALTER TABLE t OWNER TO postgres")?;
    session.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))?;
    rig.expect(
        &format!("SELECT count(*) FROM pg_roles WHERE rolname = '{role}'"),
        "0",
    )
}

fn drops_cascade(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE kid (t int REFERENCES t); CREATE VIEW v AS SELECT * FROM t; INSERT INTO t VALUES (1); INSERT INTO kid VALUES (1)")?;
    rig.session(2)?.refused_with("2BP01", "DROP TABLE t")?;
    rig.session(2)?
        .run("DROP TABLE t CASCADE; DROP TABLE IF EXISTS nothing")?;
    rig.session(3)?.run("INSERT INTO kid VALUES (99)")?;
    rig.expect("SELECT count(*), to_regclass('v') IS NULL FROM kid", "2|t")
}

fn triggers_and_rules(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int); CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'MM002'; END $$")?;
    rig.session(2)?
        .run("CREATE TRIGGER no BEFORE INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION no()")?;
    rig.session(3)?
        .refused_with("MM002", "INSERT INTO t VALUES (1)")?;
    rig.session(3)?.run("ALTER TABLE t DISABLE TRIGGER no")?;
    rig.session(1)?
        .run("INSERT INTO t VALUES (1); DROP TRIGGER no ON t")?;
    rig.expect("SELECT count(*) FROM t", "1")
}

fn extensions_are_created_everywhere(rig: &Rig) -> Result<()> {
    let schema = rig.schema();
    rig.session(2)?
        .run(&format!("CREATE EXTENSION hstore SCHEMA {schema}"))?;
    rig.session(3)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, h hstore); INSERT INTO t VALUES (1, 'a=>1,b=>NULL')",
    )?;
    rig.expect("SELECT h -> 'a', h FROM t", "1|\"a\"=>\"1\", \"b\"=>NULL")?;
    rig.session(1)?.run("DROP EXTENSION hstore CASCADE")
}

/// Several transactions in one statement cannot be one commit on all nodes: done on all of them, or refused.
fn concurrent_index_is_whole_or_refused(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int, v int); INSERT INTO t SELECT g, g FROM generate_series(1, 100) g",
    )?;
    let mut session = rig.session(2)?;
    match session.batch_execute("CREATE INDEX CONCURRENTLY late ON t (v)") {
        Ok(()) => rig.expect("SELECT to_regclass('late')", "late")?,
        Err(error) => {
            let db = error.as_db_error().context("the session broke")?;
            ensure!(db.code().code() == "0A000" && db.hint().is_some(), "{db:?}");
            rig.expect("SELECT to_regclass('late')", "")?;
        }
    }
    rig.session(3)?.run("INSERT INTO t VALUES (101, 101)")?;
    rig.expect("SELECT count(*) FROM pg_index WHERE NOT indisvalid", "0")
}

fn errors_in_ddl_leave_nothing(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int); INSERT INTO t VALUES (1), (1)")?;
    rig.session(2)?
        .refused_with("23505", "CREATE UNIQUE INDEX u ON t (id)")?;
    rig.session(2)?
        .refused_with("42P07", "CREATE TABLE t (id int)")?;
    rig.session(3)?.refused_with("23505", "BEGIN; CREATE TABLE other (id int); INSERT INTO t VALUES (2); ALTER TABLE t ADD PRIMARY KEY (id); COMMIT")?;
    rig.expect(
        "SELECT count(*), to_regclass('other') IS NULL FROM t",
        "2|t",
    )?;
    same_shape(rig)
}

fn pgbench_initialises_and_runs(rig: &Rig) -> Result<()> {
    let options = format!("-c search_path={}", rig.schema());
    let mut initialise = rig.server(1).client_program("pgbench");
    xtask::command::capture(initialise.env("PGOPTIONS", &options).args([
        "--initialize",
        "--quiet",
        "--scale=1",
        "--foreign-keys",
    ]))?;
    let mut run = rig.server(2).client_program("pgbench");
    xtask::command::capture(run.env("PGOPTIONS", &options).args([
        "--no-vacuum",
        "--client=2",
        "--transactions=50",
        "--max-tries=100",
    ]))?;
    rig.expect("SELECT count(*) FROM pgbench_history", "100")?;
    rig.expect("SELECT count(*) FROM pgbench_accounts", "100000")
}
