//! What is open on a node when it loses its majority, and every other way to a row that does not begin with a plain statement.

use anyhow::{Result, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use postgres::{Client, NoTls};
use xtask::cluster::wait_for;
use xtask::command;
use xtask::installation::Installation;

use crate::hosts::{Hosts, PATIENCE, with_hosts};

pub fn cases() -> Vec<OwnCase> {
    cases![
        open_sessions_get_nothing_from_a_minority,
        a_minority_is_dumped_knowingly_only,
        a_walsender_is_a_session_like_any_other,
    ]
}

/// Nothing is served there: drivers reconnect on it.
const CANNOT_CONNECT_NOW: &str = "57P03";
/// The node (from 0) that is cut off.
const CUT_OFF: usize = 2;

const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, n int);
    INSERT INTO t SELECT i, i FROM generate_series(1, 100) i;
    CREATE VIEW seen AS SELECT * FROM t;
    CREATE VIEW no_data AS SELECT oid FROM pg_class;
    CREATE SEQUENCE s;
    CREATE PROCEDURE read_t() LANGUAGE plpgsql AS 'BEGIN PERFORM * FROM t; END';
    CREATE FUNCTION stable_t() RETURNS bigint LANGUAGE plpgsql STABLE AS 'BEGIN RETURN (SELECT count(*) FROM t); END'";

/// Reads with the simple protocol; a list that is refused has to be refused whole.
const REFUSED: &[&str] = &[
    "EXECUTE plan",
    "EXPLAIN ANALYZE SELECT * FROM t",
    "EXPLAIN ANALYZE EXECUTE plan",
    "SELECT stable_t()",
    "CALL read_t()",
    "DO $$ BEGIN FOR i IN 1..2 LOOP PERFORM n FROM t; END LOOP; END $$",
    "DO $$ BEGIN EXECUTE 'TABLE t'; END $$",
    "SELECT * FROM seen",
    "SELECT last_value FROM s",
    "SELECT 1 WHERE EXISTS (SELECT FROM t)",
    "SELECT count(*) FROM (SELECT FROM t OFFSET 0) x",
    "WITH w AS MATERIALIZED (SELECT * FROM t) SELECT 1 FROM w",
    "SELECT query_to_xml('SELECT * FROM t', false, false, '')",
    "COPY (SELECT * FROM seen) TO PROGRAM 'cat > /dev/null'",
    "COPY (DELETE FROM t RETURNING n) TO PROGRAM 'cat > /dev/null'",
    "COPY t FROM STDIN",
    "LOCK TABLE t IN ACCESS SHARE MODE",
    "INSERT INTO mine SELECT n FROM t",
    "CREATE TEMP TABLE more AS SELECT * FROM t",
    "EXPLAIN ANALYZE CREATE TABLE more AS SELECT 1",
    "CREATE INDEX ON t (n)",
    "DROP TABLE t",
    "GRANT SELECT ON t TO public",
    "COMMENT ON TABLE t IS 'x'",
    "REFRESH MATERIALIZED VIEW no_view",
    "BEGIN; INSERT INTO mine VALUES (2); SELECT * FROM mine, t",
    "BEGIN; SELECT 1; SAVEPOINT a; SELECT * FROM t",
    "COMMIT PREPARED 'kept'",
    "ROLLBACK PREPARED 'kept'",
];

/// Needs nothing of what others may have changed.
const SERVED: &[&str] = &[
    "SELECT 1",
    "SELECT * FROM mine",
    "INSERT INTO mine VALUES (1)",
    "SELECT * FROM no_data",
    "EXPLAIN SELECT * FROM t",
    "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'",
    "COPY (SELECT * FROM mtm.status()) TO PROGRAM 'cat > /dev/null'",
    "COPY mine TO PROGRAM 'cat > /dev/null'",
    "FETCH 5 FROM of_catalog",
    "PREPARE later AS SELECT * FROM t",
    "BEGIN; SELECT 1; SAVEPOINT a; ROLLBACK TO a; COMMIT",
    "SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",
    "LISTEN l",
    "SHOW default_transaction_read_only",
];

fn open_sessions_get_nothing_from_a_minority(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts.session(CUT_OFF)?.run(TABLES)?;
        let mut idle = hosts.session(CUT_OFF)?;
        idle.run(
            "CREATE TEMP TABLE mine (n int);
             PREPARE plan AS SELECT * FROM t;
             DECLARE of_catalog CURSOR WITH HOLD FOR SELECT oid FROM pg_class",
        )?;
        hosts
            .session(CUT_OFF)?
            .run("BEGIN; UPDATE t SET n = 0 WHERE id = 100; PREPARE TRANSACTION 'kept'")?;
        let mut extended = Extended::open(hosts)?;
        let open = open_transactions(hosts)?;
        let mut reader = Client::connect(&hosts.cluster.nodes[CUT_OFF].conninfo(), NoTls)?;
        let mut transaction = reader.transaction()?;
        let portal = transaction.bind("SELECT n FROM t", &[])?;
        ensure!(transaction.query_portal(&portal, 10)?.len() == 10);
        hosts.network.isolate(CUT_OFF)?;
        wait_for("reads to be refused", PATIENCE, || {
            Ok(hosts.session(CUT_OFF)?.refused("SELECT * FROM t").is_ok())
        })?;
        for sql in REFUSED {
            idle.refused_with(CANNOT_CONNECT_NOW, sql)?;
            idle.run("ROLLBACK")?;
        }
        for sql in SERVED {
            idle.text(sql)?;
        }
        for (mut session, next) in open {
            session.refused_with(CANNOT_CONNECT_NOW, next)?;
        }
        extended.check()?;
        refused(transaction.query_portal(&portal, 10).map(drop))?;
        hosts.network.heal()?;
        hosts.await_status(CUT_OFF, "online")?;
        idle.run("COMMIT PREPARED 'kept'")?;
        idle.run("EXECUTE plan; UPDATE t SET n = n + 1")?;
        xtask::checks::whole(&hosts.cluster, PATIENCE)
    })
}

/// Transactions that began while all was well, each with its next statement.
fn open_transactions(hosts: &Hosts) -> Result<Vec<(Session, &'static str)>> {
    [
        ("BEGIN", "SELECT * FROM t"),
        (
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM t",
            "SELECT * FROM t",
        ),
        (
            "BEGIN; DECLARE c CURSOR FOR SELECT * FROM t; FETCH 1 FROM c",
            "FETCH 1 FROM c",
        ),
        ("BEGIN; DECLARE c CURSOR FOR SELECT * FROM t", "MOVE 1 IN c"),
        (
            "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT * FROM t",
            "COMMIT",
        ),
        ("BEGIN; UPDATE t SET n = 0 WHERE id = 1", "COMMIT"),
        ("BEGIN; UPDATE t SET n = 0 WHERE id = 2", "COMMIT AND CHAIN"),
        (
            "BEGIN; UPDATE t SET n = 0 WHERE id = 3",
            "PREPARE TRANSACTION 'never'",
        ),
        ("BEGIN; CREATE TABLE never (n int)", "COMMIT"),
        ("BEGIN; SELECT nextval('s')", "SELECT last_value FROM s"),
        (
            "BEGIN; DECLARE c CURSOR FOR SELECT * FROM t WHERE id = 50 FOR UPDATE; FETCH c",
            "UPDATE t SET n = 0 WHERE CURRENT OF c",
        ),
    ]
    .into_iter()
    .map(|(begin, next)| {
        let mut session = hosts.session(CUT_OFF)?;
        session.run(begin)?;
        Ok((session, next))
    })
    .collect()
}

/// A session of the extended protocol with a plan.
struct Extended {
    planned: Client,
    plan: postgres::Statement,
}

impl Extended {
    fn open(hosts: &Hosts) -> Result<Extended> {
        let mut planned = hosts.cluster.connect(CUT_OFF)?;
        let plan = planned.prepare("SELECT n FROM t WHERE id = $1")?;
        ensure!(planned.query(&plan, &[&1])?.len() == 1);
        Ok(Extended { planned, plan })
    }

    fn check(&mut self) -> Result<()> {
        refused(self.planned.query(&self.plan, &[&1]).map(drop))?;
        refused(self.planned.query("SELECT n FROM t", &[]).map(drop))?;
        refused(self.planned.execute("DELETE FROM t", &[]).map(drop))?;
        refused(self.planned.copy_out("COPY t TO STDOUT").map(drop))?;

        self.planned.query("SELECT $1::int", &[&1])?;
        Ok(())
    }
}

fn refused(outcome: Result<(), postgres::Error>) -> Result<()> {
    let code = outcome.as_ref().err().and_then(|error| error.code());
    ensure!(
        code.is_some_and(|code| code.code() == CANNOT_CONNECT_NOW),
        "must be refused with {CANNOT_CONNECT_NOW}, but: {outcome:?}"
    );
    Ok(())
}

fn a_minority_is_dumped_knowingly_only(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts.session(CUT_OFF)?.run(TABLES)?;
        hosts.network.isolate(CUT_OFF)?;
        wait_for("reads to be refused", PATIENCE, || {
            Ok(hosts.session(CUT_OFF)?.refused("SELECT * FROM t").is_ok())
        })?;
        let dump = |options: &str| {
            let mut program = hosts.cluster.nodes[CUT_OFF].client_program("pg_dump");
            program.env("PGOPTIONS", options);
            command::capture(program.args(["--dbname", "postgres", "--schema", "public"]))
        };
        let refusal = dump("").err().map(|error| format!("{error:#}"));
        ensure!(
            refusal
                .as_ref()
                .is_some_and(|text| text.contains("takes no reads or writes")),
            "{refusal:?}"
        );
        let text = dump("-c multimaster.minority_reads=on")?;
        ensure!(
            text.contains("100\t100") && text.contains("setval"),
            "{text}"
        );
        Ok(())
    })
}

/// Statements over a connection for replication are seen by the same rules; what they write reaches the other nodes.
fn a_walsender_is_a_session_like_any_other(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        hosts.session(CUT_OFF)?.run(TABLES)?;
        let say = |sql: &str| {
            let conninfo = format!(
                "{} replication=database",
                hosts.cluster.nodes[CUT_OFF].conninfo()
            );
            let mut psql = hosts.cluster.nodes[CUT_OFF].client_program("psql");
            psql.args(["--no-psqlrc", "--set", "VERBOSITY=verbose", "--dbname"]);
            command::capture(psql.arg(conninfo).args(["--command", sql]))
        };
        say("INSERT INTO t VALUES (1000, 7)")?;
        xtask::checks::whole(&hosts.cluster, PATIENCE)?;
        let found = hosts.session(0)?.text("SELECT n FROM t WHERE id = 1000")?;
        ensure!(found == "7", "another node has {found:?}");
        hosts.network.isolate(CUT_OFF)?;
        wait_for("reads to be refused", PATIENCE, || {
            Ok(hosts.session(CUT_OFF)?.refused("SELECT * FROM t").is_ok())
        })?;
        for sql in ["SELECT * FROM t", "DELETE FROM t"] {
            let said = say(sql).err().map(|error| format!("{error:#}"));
            ensure!(
                said.as_ref()
                    .is_some_and(|text| text.contains(CANNOT_CONNECT_NOW)),
                "{sql} over a connection for replication: {said:?}"
            );
        }
        say("IDENTIFY_SYSTEM")?;
        say("SELECT status FROM mtm.status()").map(drop)
    })
}
