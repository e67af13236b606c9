//! A user's own prepared transactions, and a node that goes and returns.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::server::settings;
use xtask::suite::Size;

use crate::crash::{arm, dice, with_quick_cluster};
use crate::failover::{LOST, PATIENCE, await_online, create};
use crate::kill::{process, signal_kill};
use crate::ledger::Dice;
use crate::stuck::{await_members, set_everywhere};

pub fn cases() -> Vec<OwnCase> {
    let mut cases: Vec<OwnCase> = cases![
        a_receiver_that_starts_anew_after_a_recovery_takes_nothing_twice,
        a_finish_waits_for_a_stream_that_may_bring_its_prepare_again,
        a_finish_by_another_node_is_not_undone_by_a_crash,
        a_finish_that_is_read_before_its_prepare_is_recovered_is_not_lost,
        a_receiver_that_starts_anew_right_behind_a_marker_votes,
        a_name_in_use_in_another_database_stops_no_stream,
        a_finish_waits_until_the_prepare_is_answered,
        users_prepared_transactions_are_finished_once_whatever_starts_anew,
    ];
    if Size::chosen() != Size::Ci {
        let more: Vec<OwnCase> = cases![of_many_finishes_read_before_a_recovery_none_is_lost];
        cases.extend(more);
    }
    cases
}

/// The mark behind what was read is about to be stored.
const MARK: &str = "mark-before-store";

/// What was prepared and committed while the node was away came through a donor. A receiver that starts at a mark from before must know that: only
/// markers that lie before the mark tell the generation of what it reads.
fn a_receiver_that_starts_anew_after_a_recovery_takes_nothing_twice(
    installation: &Installation,
) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        for node in [0, 1] {
            await_online(cluster, node)?;
            let mut session = Session::new(cluster.connect(node)?);
            prepare(&mut session, &format!("kept on {node}"), node, 0)?;
            prepare(&mut session, &format!("done on {node}"), node, 1)?;
            session.run(&format!("COMMIT PREPARED 'done on {node}'"))?;
        }
        cluster.nodes[LOST].configure(&settings(&[(
            "multimaster.failpoint",
            "mark-before-store=hold",
        )]))?;
        cluster.nodes[LOST].start()?;
        await_online(cluster, LOST)?;
        wait_for("receivers to store their marks", PATIENCE, || {
            Ok(log_counts(cluster, &format!("failpoint {MARK}: held")) == 2)
        })?;
        // Whichever it is.
        arm(&cluster.nodes[LOST], &format!("{MARK}=error"))?;
        wait_for("a receiver to start anew", PATIENCE, || {
            Ok(log_counts(cluster, "failpoint MarkBeforeStore") > 0)
        })?;
        for node in [0, 1] {
            let sql = format!("COMMIT PREPARED 'kept on {node}'");
            Session::new(cluster.connect(LOST)?).run(&sql)?;
        }
        Session::new(cluster.connect(0)?).run("INSERT INTO line VALUES (2, 2)")?;
        xtask::checks::whole(cluster, PATIENCE)?;
        let rows = Session::new(cluster.connect(LOST)?)
            .text("SELECT client, n FROM line ORDER BY client, n")?;
        ensure!(rows == "0|0\n0|1\n1|0\n1|1\n2|2", "{rows}");
        recovered_at_once(cluster)
    })
}

fn prepare(session: &mut Session, name: &str, client: usize, n: u64) -> Result<()> {
    session.run(&format!(
        "BEGIN; INSERT INTO line VALUES ({client}, {n}); PREPARE TRANSACTION '{name}'"
    ))
}

/// How often something is in the log of the node that was lost.
fn log_counts(cluster: &Cluster, what: &str) -> usize {
    cluster.nodes[LOST].log_text().matches(what).count()
}

/// Nothing of it had to be tried again, and PostgreSQL was surprised by nothing.
fn recovered_at_once(cluster: &Cluster) -> Result<()> {
    for what in [
        "unexpected state",
        "could not apply a transaction",
        "there is no transaction in progress",
    ] {
        ensure!(log_counts(cluster, what) == 0, "the log says {what:?}");
    }
    Ok(())
}

/// Node 3 has not voted, so it may refuse yet; another session of node 1 sees the transaction prepared already.
fn a_finish_waits_until_the_prepare_is_answered(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        arm(&cluster.nodes[LOST], "before-vote=hold")?;
        let (mut preparing, mut other) = (
            Session::new(cluster.connect(0)?),
            Session::new(cluster.connect(0)?),
        );
        let answer = std::thread::spawn(move || prepare(&mut preparing, "early", 0, 0));
        let mut still_there = || -> Result<bool> {
            let sql = "SELECT count(*) FROM pg_prepared_xacts WHERE gid = 'early'";
            Ok(other.text(sql)? == "1")
        };
        wait_for("the transaction to be prepared", PATIENCE, &mut still_there)?;
        for finish in ["COMMIT", "ROLLBACK"] {
            let mut impatient = Session::new(cluster.connect(0)?);
            impatient.run("SET statement_timeout = '200ms'")?;
            impatient.refused_with("57014", &format!("{finish} PREPARED 'early'"))?;
            ensure!(still_there()?, "{finish} PREPARED has ended it");
        }
        arm(&cluster.nodes[LOST], "")?;
        answer
            .join()
            .map_err(|_| anyhow::anyhow!("the session panicked"))??;
        Session::new(cluster.connect(0)?).run("COMMIT PREPARED 'early'")?;
        xtask::checks::whole(cluster, PATIENCE)
    })
}

/// The walsender is about to send a PREPARE.
const DECODE: &str = "decode-prepare";

/// Node 3 has prepared what the stream of node 1 brings once more, which is held. A finish that comes by the stream of node 2, or in a session, must not be done before that: the
/// next receiver would not know the transaction any more.
fn a_finish_waits_for_a_stream_that_may_bring_its_prepare_again(
    installation: &Installation,
) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        set_everywhere(cluster, "multimaster.slow_node_timeout", "0")?;
        let mut second = Session::new(cluster.connect(1)?);
        let mut third = Session::new(cluster.connect(LOST)?);
        let [by_stream, by_session] = hold_what_comes_again(cluster)?;
        second.run("SET multimaster.wait_peer_commits = off")?;
        second.run(&format!("COMMIT PREPARED '{by_stream}'"))?;
        second.run("RESET multimaster.wait_peer_commits")?;
        // The stream is not held: what follows is applied.
        second.run("INSERT INTO line VALUES (1, 0)")?;
        let left = third.text(&format!(
            "SELECT count(*) FROM pg_prepared_xacts WHERE gid = '{by_stream}'"
        ))?;
        ensure!(left == "1", "finished too early");
        third.run("SET statement_timeout = '1s'")?;
        third.refused_with("57014", &format!("COMMIT PREPARED '{by_session}'"))?;
        third.run("RESET statement_timeout")?;
        terminate_receiver(cluster, 0)?;
        arm(&cluster.nodes[0], "")?;
        third.run(&format!("COMMIT PREPARED '{by_session}'"))?;
        settle(cluster)?;
        let rows = third.text("SELECT count(*), count(DISTINCT (client, n)) FROM line")?;
        let names = third.text("SELECT count(*) FROM line WHERE client = 0")?;
        ensure!(
            rows == format!("{0}|{0}", names.parse::<u64>()? + 1),
            "{rows}"
        );
        Ok(())
    })
}

/// Leaves two transactions of node 1 prepared whose PREPARE node 3 is about to read again, and keeps it from that; their names.
fn hold_what_comes_again(cluster: &Cluster) -> Result<[String; 2]> {
    let mut first = Session::new(cluster.connect(0)?);
    for attempt in 0..20 {
        let names = [0, 1].map(|which| format!("attempt {attempt}, {which}"));
        for (name, which) in names.iter().zip(0..) {
            prepare(&mut first, name, 0, 2 * attempt + which)?;
        }
        let behind = first.text("SELECT pg_current_wal_insert_lsn()")?;
        arm(&cluster.nodes[0], &format!("{DECODE}=hold"))?;
        terminate_receiver(cluster, 0)?;
        if is_held_before(cluster, &mut first, &behind)? {
            return Ok(names);
        }
        // Its mark was stored too soon.
        arm(&cluster.nodes[0], "")?;
        for name in names {
            first.run(&format!("COMMIT PREPARED '{name}'"))?;
        }
    }
    bail!("no PREPARE came again")
}

/// Whether a walsender of node 1 is held before a PREPARE; false when node 3 has confirmed more than that.
fn is_held_before(cluster: &Cluster, first: &mut Session, behind: &str) -> Result<bool> {
    let held = || {
        cluster.nodes[0]
            .log_text()
            .contains(&format!("failpoint {DECODE}: held"))
    };
    let mut confirmed = false;
    wait_for("the stream to come again", PATIENCE, || {
        confirmed = first.text(&format!(
            "SELECT confirmed_flush_lsn >= '{behind}' FROM pg_replication_slots WHERE slot_name LIKE '%n3'"
        ))? == "t";
        Ok(confirmed || held())
    })?;
    Ok(held())
}

/// Ends node 3's receiver of a node (from 0); the next one follows.
fn terminate_receiver(cluster: &Cluster, of: usize) -> Result<()> {
    let mut session = Session::new(cluster.connect(LOST)?);
    let pid = receiver(&mut session, of)?;
    session.run(&format!("SELECT pg_terminate_backend({pid})"))
}

/// The process.
fn receiver(session: &mut Session, of: usize) -> Result<i32> {
    let mut pid = None;
    wait_for("a receiver", PATIENCE, || {
        let found = session.text(&format!(
            "SELECT receiver_pid FROM mtm.get_nodes_state() WHERE id = {}",
            of + 1
        ))?;
        pid = found.parse().ok().filter(|pid| *pid > 0);
        Ok(pid.is_some())
    })?;
    pid.context("no receiver")
}

/// Everybody is online, and the nodes are equal with nothing prepared.
fn settle(cluster: &Cluster) -> Result<()> {
    for node in 0..cluster.nodes.len() {
        await_online(cluster, node)?;
    }
    xtask::checks::whole(cluster, PATIENCE)
}

/// Crashes that must come before node 3 has stored the mark behind the PREPARE.
fn crashes_wanted() -> u64 {
    match Size::chosen() {
        Size::Ci => 1,
        Size::Full | Size::Long => 3,
    }
}

/// The PREPARE comes by the stream of node 1, the COMMIT PREPARED by that of node 2, and then node 3 crashes.
fn a_finish_by_another_node_is_not_undone_by_a_crash(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let (mut crashes, mut n) = (0, 0);
        while crashes < crashes_wanted() {
            ensure!(n < 30, "the mark was always stored before");
            let mut first = Session::new(cluster.connect(0)?);
            let mut third = Session::new(cluster.connect(LOST)?);
            let pid = receiver(&mut third, 0)?;
            prepare(&mut first, &format!("crash {n}"), 0, n)?;
            let behind = first.text("SELECT pg_current_wal_insert_lsn()")?;
            Session::new(cluster.connect(1)?).run(&format!("COMMIT PREPARED 'crash {n}'"))?;
            let is_early = first.text(&format!(
                "SELECT confirmed_flush_lsn < '{behind}' FROM pg_replication_slots WHERE slot_name LIKE '%n3'"
            ))? == "t";
            n += 1;
            if is_early {
                crashes += 1;
                signal_kill(&pid.to_string())?;
                await_online(cluster, LOST)?;
            }
        }
        settle(cluster)?;
        let rows = Session::new(cluster.connect(LOST)?)
            .text("SELECT count(*), count(DISTINCT n) FROM line")?;
        ensure!(rows == format!("{n}|{n}"), "{rows}");
        Ok(())
    })
}

/// More than a receiver of the library with failpoints remembers.
const MANY: u64 = 60;

fn a_finish_that_is_read_before_its_prepare_is_recovered_is_not_lost(
    installation: &Installation,
) -> Result<()> {
    finish_before_recovery(installation, 0)
}

fn of_many_finishes_read_before_a_recovery_none_is_lost(installation: &Installation) -> Result<()> {
    finish_before_recovery(installation, MANY)
}

/// Node 3 recovers from node 1, which is late with what node 2 has finished, and has not done so before its marker. So that comes by the stream of node 2 only, and there, behind
/// so many others, before the recovery has brought the PREPARE.
fn finish_before_recovery(installation: &Installation, others: u64) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        set_everywhere(cluster, "multimaster.slow_node_timeout", "0")?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        for node in [0, 1] {
            await_online(cluster, node)?;
        }
        let mut first = Session::new(cluster.connect(0)?);
        let mut second = Session::new(cluster.connect(1)?);
        for n in 0..others {
            let name = format!("other {n}");
            prepare(&mut first, &name, 1, n)?;
            second.run(&format!("COMMIT PREPARED '{name}'"))?;
        }
        prepare(&mut first, "late", 0, 0)?;
        prepare(&mut first, "undone late", 0, 1)?;
        let late = receiver(&mut first, 1)?;
        cluster.nodes[0].freeze_process(late)?;
        second.run("SET multimaster.wait_peer_commits = off")?;
        second.run("COMMIT PREPARED 'late'")?;
        second.run("ROLLBACK PREPARED 'undone late'")?;
        let finished = second.text("SELECT pg_current_wal_insert_lsn()")?;
        arm(&cluster.nodes[0], &format!("{DECODE}=hold"))?;
        start_with_donor(cluster)?;
        wait_for(
            "the recovery to be held, and the finish to be sent",
            PATIENCE,
            || {
                let sent = second.text(&format!(
                "SELECT sent_lsn >= '{finished}' FROM pg_stat_replication WHERE application_name = 'multimaster node 3'"
            ))?;
                let held = cluster.nodes[0]
                    .log_text()
                    .matches("decode-prepare: held")
                    .count();
                Ok(sent == "t" && held > 1)
            },
        )?;
        arm(&cluster.nodes[0], "")?;
        let online = await_online(cluster, LOST);
        cluster.nodes[0].thaw_process(late)?;
        online?;
        settle(cluster)?;
        let rows = Session::new(cluster.connect(LOST)?)
            .text("SELECT client, count(*) FROM line GROUP BY client ORDER BY client")?;
        let expected = if others > 0 {
            format!("0|1\n1|{others}")
        } else {
            "0|1".to_owned()
        };
        ensure!(rows == expected, "{rows}");
        let again = log_counts(cluster, "finished while this node was away");
        ensure!(
            (again > 0) == (others > 0),
            "the stream was read again {again} times"
        );
        Ok(())
    })
}

/// Starts node 3, which recovers from the first node that it is connected with: from node 1.
fn start_with_donor(cluster: &mut Cluster) -> Result<()> {
    let arbiter = process(cluster, 1, "multimaster arbiter")?;
    cluster.nodes[1].freeze_process(arbiter)?;
    let chosen = cluster.nodes[LOST].start().and_then(|()| {
        wait_for("a recovery from node 1", PATIENCE, || {
            Ok(log_counts(cluster, "recovers: from node 1") > 0)
        })
    });
    cluster.nodes[1].thaw_process(arbiter)?;
    chosen
}

/// Node 3 is back and nothing has happened since, so that its mark is right behind the marker of the generation. A receiver that starts there does not read the marker, and has
/// to know its generation all the same.
fn a_receiver_that_starts_anew_right_behind_a_marker_votes(
    installation: &Installation,
) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        create(cluster)?;
        cluster.nodes[LOST].kill()?;
        await_members(cluster, "{1,2}")?;
        cluster.nodes[LOST].start()?;
        for node in 0..cluster.nodes.len() {
            await_online(cluster, node)?;
        }
        for (round, node) in [0, 1].into_iter().enumerate() {
            let mut session = Session::new(cluster.connect(node)?);
            session.run("SET statement_timeout = '20s'")?;
            terminate_receiver(cluster, node)?;
            let name = format!("behind the marker {round}");
            prepare(&mut session, &name, 0, node as u64)?;
            session.run(&format!("COMMIT PREPARED '{name}'"))?;
        }
        settle(cluster)
    })
}

/// Names of prepared transactions are the server's, not the database's. Node 3 refuses what has the name of one in a database of its own, and must get over the ROLLBACK PREPARED that
/// follows in the stream, which PostgreSQL refuses there with an error.
fn a_name_in_use_in_another_database_stops_no_stream(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        set_everywhere(cluster, "multimaster.slow_node_timeout", "0")?;
        let mut other = Session::new(cluster.nodes[LOST].connect_to("template1")?);
        other.run("BEGIN; SELECT txid_current(); PREPARE TRANSACTION 'same'")?;
        let mut first = Session::new(cluster.connect(0)?);
        first.run("BEGIN; INSERT INTO line VALUES (0, 0)")?;
        first.refused_with("42710", "PREPARE TRANSACTION 'same'")?;
        let behind = first.text("SELECT pg_current_wal_insert_lsn()")?;
        wait_for("node 3 to confirm what was rolled back", PATIENCE, || {
            let confirmed = first.text(&format!(
                "SELECT confirmed_flush_lsn >= '{behind}' FROM pg_replication_slots WHERE slot_name LIKE '%n3'"
            ))?;
            Ok(confirmed == "t")
        })?;
        first.run("INSERT INTO line VALUES (0, 1)")?;
        other.run("ROLLBACK PREPARED 'same'")?;
        settle(cluster)
    })
}

/// Transactions that are prepared and finished in the storm, and how often something starts anew.
fn storm() -> (u64, u64) {
    match Size::chosen() {
        Size::Ci => (60, 4),
        Size::Full => (1_000, 50),
        Size::Long => (10_000, 500),
    }
}

/// Clients prepare and finish on nodes 1 and 2, each on either, while the receivers of node 3 start anew, and the whole server, which is away for so long sometimes that it recovers.
fn users_prepared_transactions_are_finished_once_whatever_starts_anew(
    installation: &Installation,
) -> Result<()> {
    with_quick_cluster(installation, |cluster| {
        create(cluster)?;
        let mut dice = dice();
        let (transactions, disturbances) = storm();
        let mut open = BTreeMap::new();
        let mut committed = 0;
        for n in 0..transactions {
            if dice.below(transactions) < disturbances {
                disturb(cluster, &mut dice)?;
            }
            let mut session = session_on(cluster, &mut dice)?;
            let name = format!("storm {n}");
            // A generation may end meanwhile: then it was rolled back.
            if prepare(&mut session, &name, 0, n).is_ok() {
                open.insert(n, name);
            }
            while open.len() > 6 || !open.is_empty() && dice.below(3) == 0 {
                committed += finish_any(cluster, &mut open, &mut dice)?;
            }
        }
        while !open.is_empty() {
            committed += finish_any(cluster, &mut open, &mut dice)?;
        }
        if !cluster.nodes[LOST].is_running() {
            cluster.nodes[LOST].start()?;
        }
        settle(cluster)?;
        for node in &cluster.nodes {
            let taken_for_old = node.log_text().contains("old copy of its node");
            ensure!(!taken_for_old, "{} lacks WAL", node.name);
        }
        let rows = Session::new(cluster.connect(LOST)?)
            .text("SELECT count(*), count(DISTINCT n) FROM line")?;
        println!("  {committed} of {transactions} committed");
        ensure!(rows == format!("{committed}|{committed}"), "{rows}");
        Ok(())
    })
}

/// A session on one of the nodes that stay.
fn session_on(cluster: &Cluster, dice: &mut Dice) -> Result<Session> {
    let mut session = Session::new(cluster.connect(dice.below(2) as usize)?);
    session.run("SET multimaster.wait_peer_commits = off")?;
    Ok(session)
}

/// Commits one of them, or rolls it back; how many were committed.
fn finish_any(cluster: &Cluster, open: &mut BTreeMap<u64, String>, dice: &mut Dice) -> Result<u64> {
    let place = dice.below(open.len() as u64) as usize;
    let Some(n) = open.keys().nth(place).copied() else {
        return Ok(0);
    };
    let name = open.remove(&n).unwrap_or_default();
    let commit = dice.below(4) > 0;
    let command = if commit { "COMMIT" } else { "ROLLBACK" };
    let sql = format!("{command} PREPARED '{name}'");
    // A node that comes online in another generation does not serve for a moment.
    wait_for("a finish", PATIENCE, || {
        Ok(session_on(cluster, dice)?.run(&sql).is_ok())
    })?;
    Ok(u64::from(commit))
}

/// Starts something on node 3 anew.
fn disturb(cluster: &mut Cluster, dice: &mut Dice) -> Result<()> {
    if !cluster.nodes[LOST].is_running() {
        return cluster.nodes[LOST].start();
    }
    if dice.below(6) == 0 {
        return cluster.nodes[LOST].kill();
    }
    // It may be starting.
    let Ok(client) = cluster.connect(LOST) else {
        return Ok(());
    };
    let of = dice.below(2) + 1;
    let mut session = Session::new(client);
    let Ok(pid) = session.text(&format!(
        "SELECT receiver_pid FROM mtm.get_nodes_state() WHERE id = {of}"
    )) else {
        return Ok(());
    };
    match (pid.is_empty() || pid == "0", dice.below(3)) {
        (true, _) => Ok(()),
        (false, 0) => signal_kill(&pid),
        _ => session.run(&format!("SELECT pg_terminate_backend({pid})")),
    }
}
