//! Transactions that are sent, and applied, while they run.

mod storm;

use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::checks;
use xtask::cluster::{Cluster, member_settings, specs, wait_for};
use xtask::installation::Installation;
use xtask::server::settings;

use self::storm::large_and_small_transactions_of_all_nodes_leave_equal_rows;

pub fn cases() -> Vec<OwnCase> {
    cases![
        large_transaction_is_applied_while_it_runs,
        savepoints_of_a_large_transaction_are_rolled_back_everywhere,
        ddl_within_a_large_transaction_blocks_nobody_before_the_commit,
        large_transaction_that_is_rolled_back_leaves_nothing,
        nobody_waits_for_a_large_transaction_of_another_node,
        two_large_transactions_of_two_nodes_commit_or_conflict,
        large_transactions_outlive_a_walsender_and_end_with_their_node,
        large_transaction_of_a_users_own_prepare_outlives_a_walsender,
        large_transactions_need_no_free_worker,
        large_transactions_can_be_kept_whole,
        large_and_small_transactions_of_all_nodes_leave_equal_rows,
    ]
}

const PATIENCE: Duration = Duration::from_secs(30);
const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL, pad text NOT NULL DEFAULT repeat('x', 100));";
/// More than a piece of a transaction, with the settings of these clusters.
const PIECE_ROWS: u32 = 3000;

/// Three nodes that send a transaction when it exceeds 64 kB.
fn with_nodes(
    installation: &Installation,
    more: &[(&str, &str)],
    work: impl FnOnce(&mut Cluster) -> Result<()>,
) -> Result<()> {
    let mut nodes = specs(3);
    for node in &mut nodes {
        node.settings.extend(member_settings(3));
        node.settings
            .extend(settings(&[("logical_decoding_work_mem", "64kB")]));
        node.settings.extend(settings(more));
    }
    let mut cluster = Cluster::start_servers(installation, &nodes)?;
    let outcome = cluster.init_cluster().and_then(|()| {
        session(&cluster, 0)?.run(TABLE)?;
        work(&mut cluster)?;
        checks::whole(&cluster, PATIENCE)
    });
    outcome.map_err(|error| {
        cluster.keep_logs();
        anyhow!("{error:#}\n{}", cluster.log_tails(15))
    })
}

fn session(cluster: &Cluster, node: usize) -> Result<Session> {
    Ok(Session::new(cluster.connect(node)?))
}

fn insert(first: u32, v: u32) -> String {
    let last = first + PIECE_ROWS - 1;
    format!("INSERT INTO t SELECT g, {v} FROM generate_series({first}, {last}) g;")
}

/// How many apply workers of a node have written to the table in a transaction that is open.
fn workers_ahead(cluster: &Cluster, node: usize) -> Result<i64> {
    let row = cluster.connect(node)?.query_one(
        "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
          WHERE a.backend_type LIKE 'multimaster apply worker%' AND l.relation = 't'::regclass AND l.mode = 'RowExclusiveLock'",
        &[],
    )?;
    Ok(row.get(0))
}

fn wait_until_ahead(cluster: &Cluster, nodes: &[usize], workers: i64) -> Result<()> {
    for &node in nodes {
        let what = format!("{workers} transactions applied ahead on node {}", node + 1);
        wait_for(&what, PATIENCE, || {
            Ok(workers_ahead(cluster, node)? == workers)
        })?;
    }
    Ok(())
}

fn expect(cluster: &Cluster, node: usize, sql: &str, expected: &str) -> Result<()> {
    let found = session(cluster, node)?.text(sql)?;
    ensure!(
        found == expected,
        "node {}: {sql}: {found} instead of {expected}",
        node + 1
    );
    Ok(())
}

fn expect_everywhere(cluster: &Cluster, sql: &str, expected: &str) -> Result<()> {
    (0..cluster.nodes.len()).try_for_each(|node| expect(cluster, node, sql, expected))
}

fn large_transaction_is_applied_while_it_runs(installation: &Installation) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut writer = session(cluster, 0)?;
        writer.run(&format!("BEGIN; {}", insert(1, 1)))?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        expect(cluster, 1, "SELECT count(*) FROM t", "0")?;
        // What it sees of others while it runs is there before it.
        session(cluster, 1)?
            .run("CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (7)")?;
        writer.run("CREATE TABLE child (id int REFERENCES other); INSERT INTO child VALUES (7)")?;
        writer.run(&insert(PIECE_ROWS + 1, 2))?;
        writer.run(
            "UPDATE t SET v = v + 10 WHERE id % 2 = 0; DELETE FROM t WHERE id % 5 = 0; COMMIT",
        )?;
        let sums = format!("{}|{}", PIECE_ROWS * 2 * 4 / 5, {
            let kept = |id: &u32| !id.is_multiple_of(5);
            let value = |id: u32| {
                u32::from(id > PIECE_ROWS) + 1 + if id.is_multiple_of(2) { 10 } else { 0 }
            };
            (1..=2 * PIECE_ROWS).filter(kept).map(value).sum::<u32>()
        });
        expect_everywhere(cluster, "SELECT count(*), sum(v) FROM t", &sums)?;
        wait_until_ahead(cluster, &[1, 2], 0)
    })
}

fn savepoints_of_a_large_transaction_are_rolled_back_everywhere(
    installation: &Installation,
) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut writer = session(cluster, 0)?;
        writer.run(&format!("BEGIN; {}", insert(1, 1)))?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        let lost = insert(PIECE_ROWS + 1, 2);
        writer.run(&format!(
            "SAVEPOINT outer_one; {lost} SAVEPOINT inner_one; UPDATE t SET v = 99; CREATE TABLE lost (id int); RELEASE inner_one;
             DELETE FROM t WHERE id % 2 = 0; ROLLBACK TO outer_one;"
        ))?;
        writer.run(&insert(2 * PIECE_ROWS + 1, 3))?;
        writer.run(&format!(
            "SAVEPOINT kept; CREATE TABLE kept (id int PRIMARY KEY); {} RELEASE kept; INSERT INTO kept VALUES (1); COMMIT",
            insert(3 * PIECE_ROWS + 1, 4)
        ))?;
        let sums = format!("{}|{}", 3 * PIECE_ROWS, PIECE_ROWS * (1 + 3 + 4));
        expect_everywhere(cluster, "SELECT count(*), sum(v) FROM t", &sums)?;
        expect_everywhere(
            cluster,
            "SELECT to_regclass('lost') IS NULL, (SELECT count(*) FROM kept)",
            "t|1",
        )
    })
}

fn ddl_within_a_large_transaction_blocks_nobody_before_the_commit(
    installation: &Installation,
) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut writer = session(cluster, 0)?;
        writer.run(&format!("BEGIN; {}", insert(1, 1)))?;
        writer.run("CREATE TABLE u (id serial PRIMARY KEY, n int); INSERT INTO u (n) SELECT g FROM generate_series(1, 5000) g")?;
        writer.run("ALTER TABLE t ADD COLUMN w text DEFAULT 'new'; UPDATE t SET w = repeat('w', 100) WHERE id < 2000")?;
        writer.run("TRUNCATE u; INSERT INTO u VALUES (1, 1)")?;
        writer.run(&insert(PIECE_ROWS + 1, 2))?;
        for node in [1, 2] {
            let mut reader = session(cluster, node)?;
            reader.run("SET lock_timeout = '10s'")?;
            ensure!(reader.text("SELECT count(*), to_regclass('u') IS NULL FROM t")? == "0|t");
        }
        writer.run("COMMIT")?;
        let sums = format!(
            "{}|{}|1",
            2 * PIECE_ROWS,
            1999 * 100 + (2 * PIECE_ROWS - 1999) * 3
        );
        expect_everywhere(
            cluster,
            "SELECT count(*), sum(length(w)), (SELECT count(*) FROM u) FROM t",
            &sums,
        )
    })
}

fn large_transaction_that_is_rolled_back_leaves_nothing(installation: &Installation) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut writer = session(cluster, 2)?;
        for end in ["ROLLBACK", "SELECT 1 / 0"] {
            writer.run(&format!("BEGIN; {}", insert(1, 1)))?;
            wait_until_ahead(cluster, &[0, 1], 1)?;
            let _ = writer.run(end);
            wait_until_ahead(cluster, &[0, 1], 0)?;
            let _ = writer.run("ROLLBACK");
        }
        expect_everywhere(cluster, "SELECT count(*) FROM t", "0")?;
        writer.run(&insert(1, 1))
    })
}

fn nobody_waits_for_a_large_transaction_of_another_node(installation: &Installation) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        session(cluster, 0)?.run(&insert(1, 1))?;
        let mut large = session(cluster, 0)?;
        let mut other = session(cluster, 1)?;
        other.run("SET statement_timeout = '20s'")?;
        // Whoever needs a row there gets it; that alone decides nothing.
        large.run("BEGIN; UPDATE t SET v = 2")?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        other.run("BEGIN; UPDATE t SET v = 3 WHERE id = 5; ROLLBACK")?;
        wait_until_ahead(cluster, &[1], 0)?;
        large.run("COMMIT")?;
        expect_everywhere(cluster, "SELECT min(v), max(v) FROM t", "2|2")?;
        // Who commits first wins.
        large.run("BEGIN; UPDATE t SET v = 4")?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        other.run("UPDATE t SET v = 5 WHERE id = 7")?;
        let error = large.refused("COMMIT")?;
        ensure!(error.code().code() == "40001", "{error:?}");
        expect_everywhere(cluster, "SELECT min(v), max(v) FROM t", "2|5")?;
        // Nor does a command that needs the whole table wait. The loser's session may have been ended.
        let mut large = session(cluster, 0)?;
        large.run("BEGIN; UPDATE t SET v = 6")?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        other.run("BEGIN; LOCK TABLE t; ROLLBACK")?;
        large.run("COMMIT")?;
        expect_everywhere(cluster, "SELECT min(v), max(v) FROM t", "6|6")
    })
}

fn two_large_transactions_of_two_nodes_commit_or_conflict(
    installation: &Installation,
) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut first = session(cluster, 0)?;
        let mut second = session(cluster, 1)?;
        first.run(&format!("BEGIN; {}", insert(1, 1)))?;
        second.run(&format!("BEGIN; {}", insert(PIECE_ROWS + 1, 2)))?;
        wait_until_ahead(cluster, &[2], 2)?;
        let commits = thread::scope(|scope| {
            let other = scope.spawn(|| second.run("COMMIT"));
            let mine = first.run("COMMIT");
            [
                mine,
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            ]
        });
        commits.into_iter().collect::<Result<Vec<()>>>()?;
        let sums = format!("{}|{}", 2 * PIECE_ROWS, 3 * PIECE_ROWS);
        expect_everywhere(cluster, "SELECT count(*), sum(v) FROM t", &sums)?;
        // The same rows: one of them.
        first.run("BEGIN; UPDATE t SET v = 3")?;
        second.run("BEGIN; UPDATE t SET v = 4")?;
        let commits = thread::scope(|scope| {
            let other = scope.spawn(|| second.run("COMMIT"));
            let mine = first.run("COMMIT");
            [
                mine,
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            ]
        });
        for error in commits.iter().filter_map(|commit| commit.as_ref().err()) {
            ensure!(format!("{error:#}").contains("40001"), "{error:#}");
        }
        let winner = match [commits[0].is_ok(), commits[1].is_ok()] {
            [true, false] => 3,
            [false, true] => 4,
            [false, false] => return Ok(()),
            [true, true] => anyhow::bail!("both have changed the same rows"),
        };
        expect_everywhere(
            cluster,
            "SELECT min(v), max(v) FROM t",
            &format!("{winner}|{winner}"),
        )
    })
}

fn large_transactions_outlive_a_walsender_and_end_with_their_node(
    installation: &Installation,
) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut writer = session(cluster, 0)?;
        writer.run(&format!("BEGIN; {}", insert(1, 1)))?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        session(cluster, 0)?.run(
            "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE active",
        )?;
        writer.run(&insert(PIECE_ROWS + 1, 1))?;
        writer.run("COMMIT")?;
        let rows = (2 * PIECE_ROWS).to_string();
        expect_everywhere(cluster, "SELECT count(*) FROM t", &rows)?;
        // A worker that dies costs the stream its place, not the transaction.
        writer.run(&format!("BEGIN; {}", insert(2 * PIECE_ROWS + 1, 1)))?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        session(cluster, 1)?.run(
            "SELECT pg_terminate_backend(l.pid, 10000) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
              WHERE a.backend_type LIKE 'multimaster apply worker%' AND l.relation = 't'::regclass",
        )?;
        writer.run("COMMIT")?;
        let rows = (3 * PIECE_ROWS).to_string();
        expect_everywhere(cluster, "SELECT count(*) FROM t", &rows)?;
        writer.run("BEGIN; UPDATE t SET v = 7")?;
        wait_until_ahead(cluster, &[1, 2], 1)?;
        cluster.nodes[0].kill()?;
        wait_until_ahead(cluster, &[1, 2], 0)?;
        cluster.nodes[0].start()?;
        wait_for("node 1", PATIENCE, || {
            Ok(session(cluster, 0)
                .and_then(|mut back| back.run("UPDATE t SET v = 8 WHERE id = 1"))
                .is_ok())
        })?;
        expect_everywhere(cluster, "SELECT min(v), max(v) FROM t", "1|8")
    })
}

fn large_transaction_of_a_users_own_prepare_outlives_a_walsender(
    installation: &Installation,
) -> Result<()> {
    with_nodes(installation, &[], |cluster| {
        let mut writer = session(cluster, 0)?;
        writer.run(&format!(
            "BEGIN; {} PREPARE TRANSACTION 'large'",
            insert(1, 1)
        ))?;
        session(cluster, 0)?.run(
            "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE active",
        )?;
        // A second one makes the new walsenders send what they have gathered of both.
        writer.run(&format!("BEGIN; {} COMMIT", insert(PIECE_ROWS + 1, 2)))?;
        writer.run("COMMIT PREPARED 'large'")?;
        let sums = format!("{}|{}", 2 * PIECE_ROWS, 3 * PIECE_ROWS);
        expect_everywhere(cluster, "SELECT count(*), sum(v) FROM t", &sums)?;
        wait_until_ahead(cluster, &[1, 2], 0)
    })
}

fn large_transactions_need_no_free_worker(installation: &Installation) -> Result<()> {
    with_nodes(
        installation,
        &[("multimaster.max_workers", "2")],
        |cluster| {
            let mut writers = Vec::new();
            for node in [0, 0, 1, 1] {
                let mut writer = session(cluster, node)?;
                let first = 1 + PIECE_ROWS * writers.len() as u32;
                writer.run(&format!("BEGIN; {}", insert(first, 1)))?;
                writers.push(writer);
            }
            ensure!(workers_ahead(cluster, 2)? == 0, "no worker is to spare");
            // The others are not held up.
            session(cluster, 0)?.run("INSERT INTO t VALUES (0, 0)")?;
            for writer in &mut writers {
                writer.run("COMMIT")?;
            }
            let rows = (4 * PIECE_ROWS + 1).to_string();
            expect_everywhere(cluster, "SELECT count(*) FROM t", &rows)
        },
    )
}

fn large_transactions_can_be_kept_whole(installation: &Installation) -> Result<()> {
    with_nodes(
        installation,
        &[("multimaster.stream_in_progress", "off")],
        |cluster| {
            let mut writer = session(cluster, 0)?;
            writer.run(&format!("BEGIN; {}", insert(1, 1)))?;
            // Something small that comes later overtakes it: by then it would have been sent.
            session(cluster, 0)?.run("INSERT INTO t VALUES (0, 0)")?;
            ensure!(workers_ahead(cluster, 1)? == 0);
            let sent = session(cluster, 0)?
                .text("SELECT coalesce(sum(stream_count), 0) FROM pg_stat_replication_slots")?;
            ensure!(sent == "0", "{sent} pieces were sent");
            writer.run("COMMIT")?;
            expect_everywhere(
                cluster,
                "SELECT count(*) FROM t",
                &(PIECE_ROWS + 1).to_string(),
            )
        },
    )
}
