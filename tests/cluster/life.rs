//! A real application's life: its dump is restored while others write, then it is migrated under load.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::checks;
use xtask::cluster::{Cluster, specs};
use xtask::command;
use xtask::installation::Installation;

pub fn cases() -> Vec<OwnCase> {
    cases![dump_is_restored_and_migrated_while_all_nodes_write]
}

/// Each statement is a transaction of its own, as migration tools do it.
const MIGRATION: [&str; 14] = [
    "ALTER TABLE app.t1 ADD COLUMN note text",
    "ALTER TABLE app.t1 ADD COLUMN rating int NOT NULL DEFAULT 3",
    "CREATE INDEX t1_rating ON app.t1 (rating)",
    "ALTER TABLE app.t2 RENAME COLUMN tags TO labels",
    "ALTER TABLE app.t2 ALTER COLUMN name TYPE text",
    "ALTER TABLE app.t3 DROP COLUMN extra",
    "CREATE TABLE app.audit (id serial PRIMARY KEY, t1_id int REFERENCES app.t1 ON DELETE CASCADE, what text)",
    "INSERT INTO app.audit (t1_id, what) SELECT id, 'migrated' FROM app.t1",
    "ALTER TABLE app.t4 ADD CONSTRAINT t4_ticket_positive CHECK (ticket > 0)",
    "DROP VIEW app.open_items",
    "CREATE VIEW app.open_items AS SELECT id, name, rating FROM app.t1 WHERE state = 'open'",
    "ALTER TYPE app.state ADD VALUE 'archived'",
    "ALTER TABLE app.t5 RENAME TO t5_old",
    "BEGIN; UPDATE app.t1 SET rating = 5 WHERE id % 2 = 0; ALTER TABLE app.t1 ALTER COLUMN rating SET DEFAULT 4; COMMIT",
];

/// A client gives up on one statement after this.
const PATIENCE: Duration = Duration::from_secs(60);

fn dump_is_restored_and_migrated_while_all_nodes_write(installation: &Installation) -> Result<()> {
    let dump = dump_of_application(installation)?;
    with_cluster(installation, 3, |cluster| {
        Session::new(cluster.connect(0)?)
            .run("CREATE TABLE public.busy (id serial PRIMARY KEY, node int, n int DEFAULT 0)")?;
        let written = under_load(cluster, &[1, 2], write_busy, || restore(cluster, &dump))?;
        let found = Session::new(cluster.connect(0)?).text("SELECT count(*) FROM public.busy")?;
        ensure!(
            found == written.to_string(),
            "{found} rows of {written} are there"
        );
        equal_nodes(cluster)?;
        let updated = under_load(cluster, &[0, 1, 2], use_application, || migrate(cluster))?;
        println!("  {written} transactions during the restore, {updated} during the migration");
        ensure!(updated > 0, "nobody could work during the migration");
        let migrated = Session::new(cluster.connect(2)?)
            .text("SELECT (SELECT count(*) FROM app.audit), count(*) FILTER (WHERE rating = 5) FROM app.t1 WHERE id <= 100")?;
        ensure!(migrated == "100|50", "{migrated}");
        equal_nodes(cluster)
    })
}

/// Makes the application on a stock server, and dumps it.
fn dump_of_application(installation: &Installation) -> Result<String> {
    let stock = Cluster::start_servers(installation, &specs(1))?;
    let server = &stock.nodes[0];
    let mut psql = server.client_program("psql");
    let script = xtask::host::checkout().join("tests/cluster/application.sql");
    command::capture(
        psql.args([
            "--no-psqlrc",
            "--quiet",
            "--set",
            "ON_ERROR_STOP=1",
            "--file",
        ])
        .arg(script),
    )?;
    command::capture(&mut server.client_program("pg_dump"))
}

fn restore(cluster: &Cluster, dump: &str) -> Result<()> {
    let file = std::env::temp_dir().join(format!("multimaster-dump-{}.sql", std::process::id()));
    fs::write(&file, dump).with_context(|| format!("cannot write {}", file.display()))?;
    let mut psql = cluster.nodes[0].client_program("psql");
    let outcome = command::capture(
        psql.args([
            "--no-psqlrc",
            "--quiet",
            "--set",
            "ON_ERROR_STOP=1",
            "--file",
        ])
        .arg(&file),
    );
    let _ = fs::remove_file(&file);
    outcome.map(drop).context("the dump cannot be restored")
}

fn migrate(cluster: &Cluster) -> Result<()> {
    let mut session = Session::new(cluster.connect(0)?);
    for statement in MIGRATION {
        persist(&mut session, statement)?;
    }
    Ok(())
}

/// Runs a transaction until it is committed.
fn persist(session: &mut Session, sql: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Err(error) = session.batch_execute(sql) else {
            return Ok(());
        };
        let code = error
            .code()
            .map(|code| code.code().to_owned())
            .unwrap_or_default();
        if !["40001", "40P01"].contains(&code.as_str()) {
            return Err(xtask::cluster::explain(error).context(format!("in {sql:?}")));
        }
        ensure!(
            Instant::now() < deadline,
            "{sql:?} found no gap in {} s",
            PATIENCE.as_secs()
        );
        session.batch_execute("ROLLBACK")?;
    }
}

/// Does `work` while `load` runs again and again on the nodes named; how often it ran.
fn under_load(
    cluster: &Cluster,
    nodes: &[usize],
    load: fn(&mut Session, usize) -> Result<()>,
    work: impl FnOnce() -> Result<()>,
) -> Result<usize> {
    let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let loads: Vec<_> = nodes
            .iter()
            .map(|&node| {
                let (done, rounds) = (&done, &rounds);
                scope.spawn(move || -> Result<()> {
                    let mut session = Session::new(cluster.connect(node)?);
                    while !done.load(Ordering::Relaxed) {
                        load(&mut session, node)
                            .with_context(|| format!("the load on node {}", node + 1))?;
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        for load in loads {
            load.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        outcome
    })?;
    Ok(rounds.into_inner())
}

fn write_busy(session: &mut Session, node: usize) -> Result<()> {
    persist(
        session,
        &format!("INSERT INTO public.busy (node) VALUES ({node})"),
    )
}

/// Touches tables that the migration changes.
fn use_application(session: &mut Session, node: usize) -> Result<()> {
    persist(
        session,
        &format!(
            "UPDATE app.t1 SET name = 'by {node}' WHERE id = (SELECT (random() * 99)::int + 1)"
        ),
    )?;
    persist(
        session,
        "INSERT INTO app.t2 (parent_id, state) VALUES (1, 'open')",
    )?;
    persist(
        session,
        "BEGIN; INSERT INTO app.t6 (parent_id, contact) VALUES (2, 'a@b'); DELETE FROM app.t6 WHERE id % 7 = 0; COMMIT",
    )
}

/// Rows and definitions are the same on all nodes.
fn equal_nodes(cluster: &Cluster) -> Result<()> {
    checks::whole(cluster, Duration::from_secs(30))?;
    let first = checks::schema(&cluster.nodes[0])?;
    for node in &cluster.nodes[1..] {
        let other = checks::schema(node)?;
        if let Some((ours, theirs)) = first
            .lines()
            .zip(other.lines())
            .find(|(ours, theirs)| ours != theirs)
        {
            bail!(
                "definitions differ: node1 has {ours:?}, {} has {theirs:?}",
                node.name
            );
        }
        ensure!(
            first == other,
            "one node has more definitions than the other"
        );
    }
    Ok(())
}
