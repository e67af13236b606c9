//! Rows arrive on every node as they were written.

use std::thread;

use anyhow::{Result, ensure};
use multimaster_tests::{Rig, SharedCase, cases};

pub fn cases() -> Vec<SharedCase> {
    cases![
        builtin_types_arrive_unchanged,
        special_values_arrive_unchanged,
        user_types_arrive_by_name,
        arrays_of_user_types_arrive_by_name,
        changed_keys_find_their_row,
        table_without_a_key_takes_updates_and_deletes,
        one_of_two_equal_rows_can_be_deleted,
        replica_identity_index_finds_rows,
        rows_with_null_in_a_full_identity_are_found,
        unchanged_toast_values_survive_an_update,
        changed_toast_values_arrive,
        toast_values_in_a_table_without_a_key,
        generated_columns_are_computed,
        dropped_and_added_columns_do_not_shift_values,
        rows_move_between_partitions,
        partitions_of_several_levels_take_rows,
        inherited_tables_keep_their_own_rows,
        triggers_run_once,
        rules_and_updatable_views_run_once,
        truncate_reaches_every_node,
        truncate_of_several_tables_and_sequences,
        merge_reaches_every_node,
        upsert_reaches_every_node,
        serial_keys_never_collide,
        identity_keys_never_collide,
        rolled_back_subtransactions_stay_away,
        many_subtransactions_arrive_in_order,
        rows_of_many_tables_arrive_together,
        quoted_names_and_other_schemas,
        tables_with_equal_names_in_two_schemas,
        row_security_does_not_hide_rows_from_peers,
        session_settings_do_not_change_what_arrives,
        wide_rows_arrive,
    ]
}

fn builtin_types_arrive_unchanged(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, a smallint, b bigint, c numeric(20,5), d real, e double precision, f boolean,
            g char(5), h varchar(10), i text, j bytea, k date, l time, m timetz, n timestamp, o timestamptz, p interval,
            q uuid, r json, s jsonb, t1 int[], u text[][], v int4range, w tstzmultirange, x inet, y cidr, z macaddr,
            aa bit(4), ab varbit, ac point, ad box, ae polygon, af circle, ag tsvector, ah tsquery, ai money, aj name,
            ak \"char\", al xid8, am pg_lsn, an jsonpath)",
    )?;
    rig.session(2)?.run(
        r#"SET extra_float_digits = 0; SET datestyle = 'SQL, DMY'; SET bytea_output = 'escape'; SET intervalstyle = 'iso_8601';
        SET timezone = 'Asia/Tokyo';
        INSERT INTO t VALUES (1, -32768, 9223372036854775807, 123456789012345.67891, 0.1::real + 0.2::real, 0.1::float8 + 0.2::float8,
            true, 'ab', 'häßlich', E'tab\t quote '' back\\slash \u20ac', '\x00ff10', '2024-02-29', '23:59:59.999999',
            '12:00:00+05:30', '2024-02-29 12:34:56.789', '2024-06-30 23:00:00+00', '1 year 2 mons -3 days 04:05:06.7',
            'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{"b": 1,  "a": [1, 2]}', '{"b": 1, "a": [1, null]}', '[0:2]={1,NULL,3}',
            '{{a,"b c"},{"NULL",NULL}}', '[1,10)', '{[2024-01-01,2024-02-01),[2024-03-01,)}', '192.168.0.1/24', '10.0.0.0/8',
            '08:00:2b:01:02:03', '1010', '110', '(1.5,2.5)', '((0,0),(1,1))', '((0,0),(1,1),(2,0))', '<(0,0),3>', 'a:1 fat:2B',
            'fat & (rat | cat)', '12.34', 'somebody', 'x', '123456789012', '16/B374D848', '$.a[*] ? (@ > 1)')"#,
    )?;
    rig.expect(
        "SELECT a, b, c, d, e, g, h, j, k, o, p, r, t1, u, v, x, ag, an FROM t",
        concat!(
            "-32768|9223372036854775807|123456789012345.67891|0.3|0.30000000000000004|ab   |häßlich|\\x00ff10|2024-02-29|",
            "2024-06-30 23:00:00+00|1 year 2 mons -3 days +04:05:06.7|{\"b\": 1,  \"a\": [1, 2]}|[0:2]={1,NULL,3}|",
            "{{a,\"b c\"},{\"NULL\",NULL}}|[1,10)|192.168.0.1/24|'a':1 'fat':2B|$.\"a\"[*]?(@ > 1)"
        ),
    )
}

fn special_values_arrive_unchanged(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int PRIMARY KEY, a numeric, b float8, c date, d timestamptz, e text, f int[], g int4range, h jsonb)")?;
    rig.session(2)?.run(
        "INSERT INTO t VALUES (1, 'NaN', 'NaN', 'infinity', '-infinity', '', '{}', 'empty', 'null'),
            (2, 'Infinity', '-Infinity', '-infinity', 'infinity', NULL, NULL, NULL, NULL),
            (3, '-1e-20', '-0', '0044-03-15 BC', '0044-03-15 12:00:00+00 BC', ' ', '{NULL}', '(,)', '\"\"')",
    )?;
    rig.session(3)?
        .run("UPDATE t SET a = a, e = e || '!' WHERE id <> 2")?;
    rig.expect(
        "SELECT * FROM t ORDER BY id",
        "1|NaN|NaN|infinity|-infinity|!|{}|empty|null\n2|Infinity|-Infinity|-infinity|infinity||||\n\
         3|-0.00000000000000000001|-0|0044-03-15 BC|0044-03-15 12:00:00+00 BC| !|{NULL}|(,)|\"\"",
    )
}

fn user_types_arrive_by_name(rig: &Rig) -> Result<()> {
    // Makes the object identifiers of the nodes differ.
    for node in 1..=rig.len() {
        for _ in 0..node {
            rig.session(node)?
                .run("CREATE TEMP TABLE gap (id serial)")?;
        }
    }
    rig.session(1)?.run(
        "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
        CREATE TYPE pair AS (a int, m mood);
        CREATE DOMAIN positive AS int CHECK (VALUE > 0);
        CREATE TYPE span AS RANGE (subtype = float8);
        CREATE TABLE t (id positive PRIMARY KEY, m mood, p pair, s span)",
    )?;
    rig.session(2)?.run(
        "INSERT INTO t VALUES (1, 'ok', (7, 'sad'), '[1.5,2.5)'), (2, NULL, (NULL, NULL), NULL)",
    )?;
    rig.session(3)?
        .run("UPDATE t SET m = 'happy', p.m = 'ok' WHERE id = 1")?;
    rig.expect(
        "SELECT * FROM t ORDER BY id",
        "1|happy|(7,ok)|[1.5,2.5)\n2||(,)|",
    )
}

fn arrays_of_user_types_arrive_by_name(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE pair AS (a int, m mood[]); CREATE DOMAIN tag AS text;
        CREATE TABLE t (id int PRIMARY KEY, m mood[], p pair[], d tag[])",
    )?;
    rig.session(3)?.run("INSERT INTO t VALUES (1, '{sad,ok}', ARRAY[ROW(1, '{ok}')::pair, ROW(2, NULL)::pair], '{x,\"y z\"}')")?;
    rig.expect(
        "SELECT * FROM t",
        "1|{sad,ok}|{\"(1,{ok})\",\"(2,)\"}|{x,\"y z\"}",
    )
}

fn changed_keys_find_their_row(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (a int, b text, v int, PRIMARY KEY (b, a)); INSERT INTO t VALUES (1, 'x', 10), (2, 'x', 20)")?;
    rig.session(2)?.run("UPDATE t SET a = a + 10 WHERE a = 1")?;
    rig.session(3)?.run("UPDATE t SET b = 'y', v = v + 1")?;
    rig.session(1)?.run("BEGIN; DELETE FROM t WHERE a = 2; INSERT INTO t VALUES (2, 'y', 0); UPDATE t SET a = 3 WHERE a = 2; COMMIT")?;
    rig.expect("SELECT * FROM t ORDER BY a", "3|y|0\n11|y|11")
}

fn table_without_a_key_takes_updates_and_deletes(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (a int, b text); INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) g",
    )?;
    rig.session(2)?
        .run("UPDATE t SET b = 'even' WHERE a % 2 = 0")?;
    rig.session(3)?.run("DELETE FROM t WHERE a > 8")?;
    rig.expect(
        "SELECT count(*), sum(a), count(*) FILTER (WHERE b = 'even') FROM t",
        "8|36|4",
    )
}

fn one_of_two_equal_rows_can_be_deleted(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (a int, b text); INSERT INTO t VALUES (1, 'x'), (1, 'x'), (1, 'x')")?;
    rig.session(2)?
        .run("DELETE FROM t WHERE ctid = (SELECT min(ctid) FROM t)")?;
    rig.expect("SELECT count(*) FROM t", "2")?;
    rig.session(3)?
        .run("UPDATE t SET b = 'y' WHERE ctid = (SELECT max(ctid) FROM t)")?;
    rig.expect(
        "SELECT b, count(*) FROM t GROUP BY 1 ORDER BY 1",
        "x|1\ny|1",
    )
}

fn replica_identity_index_finds_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, code text NOT NULL, v int);
        CREATE UNIQUE INDEX t_code ON t (code);
        ALTER TABLE t REPLICA IDENTITY USING INDEX t_code;
        INSERT INTO t SELECT g, 'c' || g, 0 FROM generate_series(1, 5) g",
    )?;
    rig.session(2)?
        .run("UPDATE t SET v = id, code = code || '!' WHERE id < 4")?;
    rig.session(3)?.run("DELETE FROM t WHERE code = 'c5'")?;
    rig.expect(
        "SELECT string_agg(code || v, ',' ORDER BY id) FROM t",
        "c1!1,c2!2,c3!3,c40",
    )
}

fn rows_with_null_in_a_full_identity_are_found(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (a int, b text); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, NULL), (NULL, 'x'), (NULL, NULL)")?;
    rig.session(2)?
        .run("UPDATE t SET b = 'was null' WHERE b IS NULL AND a = 1")?;
    rig.session(3)?
        .run("DELETE FROM t WHERE a IS NULL AND b IS NULL")?;
    rig.expect("SELECT * FROM t ORDER BY a", "1|was null\n|x")
}

/// Text that does not compress below the size where values move out of line.
const LARGE: &str = "(SELECT string_agg(md5(g::text), '') FROM generate_series(1, 500) g)";

fn unchanged_toast_values_survive_an_update(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, big text, n int); INSERT INTO t VALUES (1, {LARGE}, 0)"
    ))?;
    rig.session(2)?.run("UPDATE t SET n = n + 1")?;
    rig.session(3)?
        .run("BEGIN; UPDATE t SET n = n + 1; UPDATE t SET id = 2; COMMIT")?;
    rig.expect(&format!("SELECT id, n, big = {LARGE} FROM t"), "2|2|t")
}

fn changed_toast_values_arrive(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, a text, b bytea, c jsonb)")?;
    rig.session(2)?.run(&format!(
        "INSERT INTO t VALUES (1, {LARGE}, {LARGE}::bytea, to_jsonb({LARGE}))"
    ))?;
    rig.session(3)?
        .run("UPDATE t SET a = reverse(a), c = c || to_jsonb(a)")?;
    rig.expect(
        &format!("SELECT a = reverse({LARGE}), b = {LARGE}::bytea, length(c ->> 1) = length(a), c ->> 0 = {LARGE} FROM t"),
        "t|t|t|t",
    )
}

fn toast_values_in_a_table_without_a_key(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(&format!(
        "CREATE TABLE t (big text, n int); INSERT INTO t VALUES ({LARGE}, 1), ({LARGE} || 'x', 2)"
    ))?;
    rig.session(2)?.run("UPDATE t SET n = n + 10")?;
    rig.session(3)?.run("DELETE FROM t WHERE n = 11")?;
    rig.expect(&format!("SELECT n, big = {LARGE} || 'x' FROM t"), "12|t")
}

fn generated_columns_are_computed(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) STORED, b text DEFAULT 'd')")?;
    rig.session(2)?
        .run("INSERT INTO t (id, a) VALUES (1, 5), (2, 6)")?;
    rig.session(3)?.run("UPDATE t SET a = a + 1 WHERE id = 1")?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|6|12|d\n2|6|12|d")
}

fn dropped_and_added_columns_do_not_shift_values(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (gone int, id int PRIMARY KEY, a text, also_gone text, b int); INSERT INTO t VALUES (0, 1, 'a', 'x', 10)")?;
    rig.session(2)?
        .run("ALTER TABLE t DROP COLUMN gone, DROP COLUMN also_gone")?;
    rig.session(3)?
        .run("INSERT INTO t VALUES (2, 'b', 20); UPDATE t SET b = b + 1")?;
    rig.session(1)?
        .run("ALTER TABLE t ADD COLUMN c text DEFAULT 'new', ADD COLUMN d int")?;
    rig.session(2)?.run("INSERT INTO t VALUES (3, 'c', 30, 'given', 3); UPDATE t SET d = id WHERE id < 3; DELETE FROM t WHERE id = 2")?;
    rig.expect(
        "SELECT * FROM t ORDER BY id",
        "1|a|11|new|1\n3|c|30|given|3",
    )
}

fn rows_move_between_partitions(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int, k int, v text, PRIMARY KEY (id, k)) PARTITION BY RANGE (k);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (0) TO (10);
        CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (10) TO (20);
        CREATE TABLE t_rest PARTITION OF t DEFAULT",
    )?;
    rig.session(2)?
        .run("INSERT INTO t SELECT g, g, 'x' FROM generate_series(0, 29) g")?;
    rig.session(3)?.run("UPDATE t SET k = k + 10 WHERE k < 5; DELETE FROM t WHERE k = 25; UPDATE t_high SET v = 'high'")?;
    rig.expect("SELECT (SELECT count(*) FROM t_low), (SELECT count(*) FROM t_high WHERE v = 'high'), (SELECT count(*) FROM t_rest)", "5|15|9")
}

fn partitions_of_several_levels_take_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (a text, b int, c text) PARTITION BY LIST (a);
        CREATE TABLE t_x PARTITION OF t FOR VALUES IN ('x') PARTITION BY HASH (b);
        CREATE TABLE t_x0 PARTITION OF t_x FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE t_x1 (c text, b int, a text);
        ALTER TABLE t_x ATTACH PARTITION t_x1 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE t_y PARTITION OF t FOR VALUES IN ('y')",
    )?;
    rig.session(2)?.run("INSERT INTO t SELECT CASE WHEN g % 3 = 0 THEN 'y' ELSE 'x' END, g, 'c' || g FROM generate_series(1, 30) g")?;
    rig.session(3)?
        .run("UPDATE t SET a = 'y' WHERE b <= 6; TRUNCATE t_x0")?;
    rig.session(1)?
        .run("ALTER TABLE t DETACH PARTITION t_y; INSERT INTO t_y VALUES ('free', 99, 'c99')")?;
    rig.expect("SELECT count(*), sum(b) FROM t_y", "15|276")
}

fn inherited_tables_keep_their_own_rows(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE kid (extra int, PRIMARY KEY (id)) INHERITS (t)")?;
    rig.session(2)?.run("INSERT INTO t VALUES (1, 'parent'); INSERT INTO kid VALUES (2, 'kid', 5); UPDATE t SET v = v || '!'")?;
    rig.expect("SELECT * FROM ONLY t", "1|parent!")?;
    rig.expect("SELECT * FROM kid", "2|kid!|5")
}

fn triggers_run_once(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE audit (id int, what text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO audit VALUES (coalesce(new.id, old.id), tg_op); RETURN new; END $$;
        CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION note();
        CREATE FUNCTION raise_v() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.v := new.v + 1; RETURN new; END $$;
        CREATE TRIGGER raise_v BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION raise_v()",
    )?;
    let schema = rig.schema();
    rig.session(1)?
        .run(&format!("ALTER FUNCTION note() SET search_path = {schema}"))?;
    rig.session(2)?.run("INSERT INTO t VALUES (1, 0), (2, 0); UPDATE t SET v = v + 10 WHERE id = 1; DELETE FROM t WHERE id = 2")?;
    rig.expect("SELECT * FROM t", "1|12")?;
    rig.expect(
        "SELECT what, count(*) FROM audit GROUP BY 1 ORDER BY 1",
        "DELETE|1\nINSERT|2\nUPDATE|1",
    )
}

fn rules_and_updatable_views_run_once(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE log (id int);
        CREATE RULE note AS ON INSERT TO t DO ALSO INSERT INTO log VALUES (new.id);
        CREATE VIEW shown AS SELECT id, v FROM t WHERE id < 100",
    )?;
    rig.session(3)?
        .run("INSERT INTO shown VALUES (1, 'a'); UPDATE shown SET v = 'b'")?;
    rig.expect(
        "SELECT (SELECT v FROM t), (SELECT count(*) FROM log)",
        "b|1",
    )
}

fn truncate_reaches_every_node(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id serial PRIMARY KEY, v int); INSERT INTO t (v) SELECT g FROM generate_series(1, 100) g")?;
    rig.session(2)?.run(
        "BEGIN; INSERT INTO t (v) VALUES (101); TRUNCATE t; INSERT INTO t (v) VALUES (7); COMMIT",
    )?;
    rig.expect("SELECT count(*), sum(v) FROM t", "1|7")
}

fn truncate_of_several_tables_and_sequences(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE parent (id serial PRIMARY KEY); CREATE TABLE child (p int REFERENCES parent); CREATE TABLE other (id int);
        INSERT INTO parent DEFAULT VALUES; INSERT INTO child SELECT id FROM parent; INSERT INTO other VALUES (1)",
    )?;
    rig.session(3)?
        .run("TRUNCATE parent, other RESTART IDENTITY CASCADE")?;
    rig.expect("SELECT (SELECT count(*) FROM parent) + (SELECT count(*) FROM child) + (SELECT count(*) FROM other)", "0")
}

fn merge_reaches_every_node(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)",
    )?;
    rig.session(2)?.run(
        "MERGE INTO t USING (VALUES (1, 10), (2, NULL), (4, 40)) s (id, v) ON t.id = s.id
        WHEN MATCHED AND s.v IS NULL THEN DELETE WHEN MATCHED THEN UPDATE SET v = s.v WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.v)",
    )?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|10\n3|3\n4|40")
}

fn upsert_reaches_every_node(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int)")?;
    for node in [1, 2, 3] {
        rig.session(node)?.run(
            "INSERT INTO t VALUES (1, 1), (2, 1) ON CONFLICT (id) DO UPDATE SET v = t.v + 1",
        )?;
    }
    rig.session(1)?
        .run("INSERT INTO t VALUES (1, 9) ON CONFLICT DO NOTHING")?;
    rig.expect("SELECT * FROM t ORDER BY id", "1|3\n2|3")
}

/// Inserts from all nodes at once; the keys come from the table's own sequence.
fn insert_everywhere(rig: &Rig, each: usize) -> Result<()> {
    thread::scope(|scope| {
        let writers: Vec<_> = (1..=3)
            .map(|node| {
                scope.spawn(move || -> Result<()> {
                    let mut session = rig.session(node)?;
                    for _ in 0..each {
                        session.run("INSERT INTO t (v) VALUES ('x')")?;
                    }
                    session.run("INSERT INTO t (v) SELECT 'bulk' FROM generate_series(1, 50)")
                })
            })
            .collect();
        for writer in writers {
            match writer.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })
}

fn serial_keys_never_collide(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id serial PRIMARY KEY, v text)")?;
    insert_everywhere(rig, 100)?;
    rig.expect("SELECT count(*), count(DISTINCT id) FROM t", "450|450")
}

fn identity_keys_never_collide(rig: &Rig) -> Result<()> {
    rig.session(1)?.run("CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY (START WITH 1000 CACHE 5) PRIMARY KEY, v text)")?;
    rig.session(2)?
        .run("INSERT INTO t (id, v) OVERRIDING SYSTEM VALUE VALUES (1, 'by hand')")?;
    insert_everywhere(rig, 50)?;
    rig.expect("SELECT count(*), count(DISTINCT id) FROM t", "301|301")
}

fn rolled_back_subtransactions_stay_away(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")?;
    let mut session = rig.session(1)?;
    session.run("BEGIN; INSERT INTO t VALUES (1, 'a'); SAVEPOINT s; UPDATE t SET v = 'lost'; INSERT INTO t VALUES (2, 'lost')")?;
    session.run(
        "SAVEPOINT inner_one; DELETE FROM t; ROLLBACK TO s; UPDATE t SET v = v || 'b'; COMMIT",
    )?;
    rig.expect("SELECT * FROM t", "1|ab")
}

fn many_subtransactions_arrive_in_order(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0)")?;
    rig.session(2)?.run(
        "DO $$ BEGIN FOR i IN 1..300 LOOP
            BEGIN
                UPDATE t SET v = v + 1 WHERE id = 1;
                INSERT INTO t VALUES (i + 1, i);
                IF i % 3 = 0 THEN RAISE EXCEPTION 'undo'; END IF;
            EXCEPTION WHEN raise_exception THEN NULL; END;
        END LOOP; END $$",
    )?;
    rig.expect(
        "SELECT (SELECT v FROM t WHERE id = 1), count(*) FROM t",
        "200|201",
    )
}

fn rows_of_many_tables_arrive_together(rig: &Rig) -> Result<()> {
    let tables = 40;
    let create: String = (0..tables)
        .map(|number| format!("CREATE TABLE t{number} (id int PRIMARY KEY, v int);"))
        .collect();
    rig.session(1)?.run(&create)?;
    let fill: String = (0..tables)
        .map(|number| format!("INSERT INTO t{number} SELECT g, g FROM generate_series(1, 20) g;"))
        .collect();
    rig.session(2)?.run(&format!("BEGIN; {fill} COMMIT"))?;
    let count: Vec<String> = (0..tables)
        .map(|number| format!("(SELECT sum(v) FROM t{number})"))
        .collect();
    rig.expect(
        &format!("SELECT {}", count.join("+")),
        &(210 * tables).to_string(),
    )
}

fn quoted_names_and_other_schemas(rig: &Rig) -> Result<()> {
    rig.session(1)?.run(r#"CREATE TABLE "Order; -- ""x""" ("Group" int PRIMARY KEY, "naïve col" text, "select" int)"#)?;
    rig.session(2)?.run(r#"INSERT INTO "Order; -- ""x""" VALUES (1, 'a', 2); UPDATE "Order; -- ""x""" SET "select" = 3, "Group" = 4"#)?;
    rig.expect(r#"SELECT * FROM "Order; -- ""x""""#, "4|a|3")
}

fn tables_with_equal_names_in_two_schemas(rig: &Rig) -> Result<()> {
    let schema = rig.schema();
    rig.session(1)?.run(&format!("CREATE SCHEMA {schema}_other; CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE {schema}_other.t (id int PRIMARY KEY, v text)"))?;
    rig.session(2)?.run(&format!(
        "INSERT INTO t VALUES (1); INSERT INTO {schema}_other.t VALUES (2, 'x')"
    ))?;
    rig.expect(
        &format!("SELECT t.id, o.id FROM t, {schema}_other.t o"),
        "1|2",
    )?;
    rig.session(3)?
        .run(&format!("DROP SCHEMA {schema}_other CASCADE"))
}

fn row_security_does_not_hide_rows_from_peers(rig: &Rig) -> Result<()> {
    let (schema, role) = (rig.schema(), format!("{}_app", rig.schema()));
    let mut session = rig.session(1)?;
    session.run(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, owner name); ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY own ON t USING (owner = current_user);
        CREATE ROLE {role}; GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT ALL ON t TO {role}"
    ))?;
    session.run(&format!(
        "SET ROLE {role}; INSERT INTO t VALUES (1, current_user); UPDATE t SET id = 2; RESET ROLE"
    ))?;
    session.run("INSERT INTO t VALUES (3, 'somebody else')")?;
    rig.expect("SELECT string_agg(id::text, ',' ORDER BY id) FROM t", "2,3")?;
    session.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
}

fn session_settings_do_not_change_what_arrives(rig: &Rig) -> Result<()> {
    rig.session(1)?
        .run("CREATE TABLE t (id int PRIMARY KEY, at timestamptz, note text, f float8)")?;
    let mut session = rig.session(2)?;
    session.run("SET timezone = 'America/New_York'; SET datestyle = 'German'; SET extra_float_digits = -5; SET standard_conforming_strings = off; SET client_encoding = 'LATIN1'; SET lc_monetary = 'C'; SET default_transaction_isolation = 'serializable'")?;
    session.run("INSERT INTO t VALUES (1, '2024-07-01 12:00', 'a''b', 1.0/3)")?;
    session.run("UPDATE t SET note = note || '!'")?;
    rig.expect(
        "SELECT id, at AT TIME ZONE 'UTC', note, f = 1.0/3::float8 FROM t",
        "1|2024-07-01 16:00:00|a'b!|t",
    )
}

fn wide_rows_arrive(rig: &Rig) -> Result<()> {
    let columns: Vec<String> = (1..=400).map(|number| format!("c{number} text")).collect();
    rig.session(1)?.run(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, {})",
        columns.join(", ")
    ))?;
    let values: Vec<String> = (1..=400)
        .map(|number| format!("'value {number}'"))
        .collect();
    let mut session = rig.session(2)?;
    session.run(&format!("INSERT INTO t VALUES (1, {})", values.join(", ")))?;
    session.run("UPDATE t SET c200 = repeat('x', 1000000)")?;
    let found = "SELECT c1, length(c200), c400 FROM t";
    rig.expect(found, "value 1|1000000|value 400")?;
    ensure!(
        session.text(found)? == "value 1|1000000|value 400",
        "the writer's own view"
    );
    Ok(())
}
