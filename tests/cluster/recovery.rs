//! A node fetches what it has missed, whatever happens meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::cluster::{Cluster, wait_for};
use xtask::installation::Installation;
use xtask::pgbench::Report;
use xtask::server::{Disk, Server, settings};
use xtask::suite::Size;
use xtask::{checks, command, host};

use crate::crash::arm;
use crate::generations::SEND;
use crate::hosts::{DISK_BYTES, with_hosts_and_disks};
use crate::line::{Load, PATIENCE, await_commit, await_online, check_rows, create};
use crate::stuck::set_on;

pub fn cases() -> Vec<OwnCase> {
    cases![
        recovery_outruns_the_load,
        a_donor_dies_during_recovery,
        idle_transactions_delay_no_recovery,
        what_cannot_be_replayed_stops_the_node,
        a_full_disk_only_delays_a_recovery,
        a_node_asks_in_when_it_lags_no_more_than_is_set,
        a_node_that_gave_up_tries_again_when_told,
    ]
}

/// Node (from 0) that is away.
const AWAY: usize = 2;
/// How often it is looked how far it is.
const LOOK: Duration = Duration::from_millis(20);

fn absence() -> Duration {
    Duration::from_secs(match Size::chosen() {
        Size::Ci => 8,
        Size::Full | Size::Long => 60,
    })
}

/// Eight clients of simple updates on the first node.
fn updates(cluster: &Cluster, lasts: Duration) -> Result<Report> {
    let mut pgbench = cluster.nodes[0].client_program("pgbench");
    let text = command::capture(
        pgbench
            .args(["--no-vacuum", "--max-tries=10000", "-N", "-c", "8", "-T"])
            .arg(lasts.as_secs().to_string()),
    )?;
    Report::read(&text).with_context(|| format!("cannot read pgbench's report\n{text}"))
}

/// What the view said last while the node recovered, and how long that took.
struct Seen {
    transactions: i64,
    bytes: i64,
    took: Duration,
}

/// Watches the recovery until the node is online.
fn watch(cluster: &Cluster) -> Result<Seen> {
    let mut session = Session::new(cluster.connect(AWAY)?);
    let deadline = Instant::now() + 10 * PATIENCE;
    let (mut first, mut last) = (None, None);
    while Instant::now() < deadline {
        let rows = session.query(
            "SELECT s.status, r.transactions, r.bytes_done, r.estimate::text FROM mtm.status() s LEFT JOIN mtm.recovery r ON true",
            &[],
        )?;
        let Some(row) = rows.first() else { continue };
        let done: Option<i64> = row.get(1);
        if let Some(transactions) = done.filter(|done| *done > 0) {
            first.get_or_insert_with(Instant::now);
            last = Some((transactions, row.get::<_, i64>(2), Instant::now()));
        }
        if row.get::<_, String>(0) == "online" {
            break;
        }
        std::thread::sleep(LOOK);
    }
    let (Some(first), Some((transactions, bytes, last))) = (first, last) else {
        bail!("no recovery was seen")
    };
    Ok(Seen {
        transactions,
        bytes,
        took: last - first,
    })
}

/// How many times as fast as eight clients produce a node has to replay, where it is measured for long enough to say so.
const AT_LEAST_AS_FAST: f64 = 3.0;

/// How fast a node replays what others have produced with eight clients. One comes after the other, so that both have the whole machine.
fn recovery_outruns_the_load(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        command::capture(
            cluster.nodes[0]
                .client_program("pgbench")
                .args(["-i", "-q", "-s", "10"]),
        )?;
        cluster.nodes[AWAY].kill()?;
        let produced = updates(cluster, absence())?;
        cluster.nodes[AWAY].start()?;
        let seen = watch(cluster)?;
        await_online(cluster, AWAY)?;
        let replayed = seen.transactions as f64 / seen.took.as_secs_f64().max(0.001);
        println!(
            "  {} transactions produced at {:.0} a second; {} replayed in {} ms at {replayed:.0} a second ({} kB of WAL): {:.1} times as fast",
            produced.transactions,
            produced.tps,
            seen.transactions,
            seen.took.as_millis(),
            seen.bytes / 1024,
            replayed / produced.tps.max(1.0)
        );
        if Size::chosen() != Size::Ci {
            ensure!(
                replayed >= AT_LEAST_AS_FAST * produced.tps,
                "{replayed:.0} a second were replayed of what was produced at {:.0}",
                produced.tps
            );
        }
        let waited = Session::new(cluster.connect(AWAY)?).text(
            "SELECT lasted FROM mtm.events WHERE event = 'online' AND lasted IS NOT NULL ORDER BY happened_at DESC LIMIT 1",
        )?;
        println!("  the others waited for {waited} of it");
        checks::whole(cluster, PATIENCE)
    })
}

/// Starts a node whose recovery waits, until it is told otherwise, before it has applied anything.
pub fn start_and_hold_recovery(server: &mut Server) -> Result<()> {
    server.configure(&settings(&[(
        "multimaster.failpoint",
        "recovery-applies=hold",
    )]))?;
    server.start()?;
    wait_for("a recovery", PATIENCE, || {
        Ok(server
            .log_text()
            .contains("failpoint recovery-applies: held"))
    })
}

/// The donor is killed when the first transaction has come from it and is not applied yet; others are enough to go on.
fn a_donor_dies_during_recovery(installation: &Installation) -> Result<()> {
    with_cluster(installation, 5, |cluster| {
        create(cluster)?;
        let load = Load::start(cluster, &[2, 3]);
        cluster.nodes[4].kill()?;
        load.await_commits()?;
        start_and_hold_recovery(&mut cluster.nodes[4])?;
        let mut session = Session::new(cluster.connect(4)?);
        let donor = session.text("SELECT donor FROM mtm.recovery")?;
        let dead = donor.parse::<usize>().context("no donor")? - 1;
        cluster.nodes[dead].kill()?;
        arm(&cluster.nodes[4], "")?;
        await_online(cluster, 4)?;
        let donors = donors(cluster, 4)?;
        println!("  it recovered from {donors:?}");
        let lost = donors.iter().position(|one| *one == donor);
        ensure!(
            lost.is_some_and(|lost| donors[lost..].iter().any(|one| *one != donor)),
            "node {donor} died while it was recovered from, and the donors were {donors:?}"
        );
        cluster.nodes[dead].start()?;
        await_online(cluster, dead)?;
        let commits = load.stop()?;
        check_rows(cluster, &commits)
    })
}

/// Whom the node (from 0) says that it has recovered from, one after the other.
fn donors(cluster: &Cluster, node: usize) -> Result<Vec<String>> {
    let said = Session::new(cluster.connect(node)?).text(
        "SELECT string_agg(substring(reason FROM '[0-9]+'), ' ' ORDER BY happened_at) FROM mtm.events WHERE event = 'recovers'",
    )?;
    Ok(said.split(' ').map(str::to_owned).collect())
}

/// Sessions that have written and wait, on the donor and elsewhere.
fn idle_transactions_delay_no_recovery(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let mut idle = Vec::new();
        cluster.nodes[AWAY].kill()?;
        await_commit(cluster, 0, "INSERT INTO line VALUES (9, 0)")?;
        for node in [0, 1] {
            let mut session = Session::new(cluster.connect(node)?);
            session.run("BEGIN; INSERT INTO line VALUES (9, 1)")?;
            idle.push(session);
        }
        cluster.nodes[AWAY].start()?;
        await_online(cluster, AWAY)?;
        for mut session in idle {
            // It was begun in another generation, and says so if that matters.
            let _ = session.run("COMMIT");
        }
        checks::whole(cluster, PATIENCE)
    })
}

/// A row that only this node has is in the way of one that the others have committed.
fn what_cannot_be_replayed_stops_the_node(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        Session::new(cluster.connect(0)?).run("CREATE TABLE once (id int PRIMARY KEY)")?;
        cluster.nodes[AWAY].kill()?;
        alone(cluster, "INSERT INTO once VALUES (7)")?;
        await_commit(cluster, 0, "INSERT INTO once VALUES (7)")?;
        let generation = |cluster: &Cluster| {
            Session::new(cluster.connect(0)?).text("SELECT gen_num::text FROM mtm.status()")
        };
        let before = generation(cluster)?;
        cluster.nodes[AWAY].start()?;
        await_failed(cluster)?;
        // A member that retries would be waited for.
        ensure!(
            generation(cluster)? == before,
            "the node became a member although it could not apply what it had missed"
        );
        let said = "SELECT retries, error FROM mtm.recovery";
        let error = Session::new(cluster.connect(AWAY)?).text(said)?;
        ensure!(
            error.starts_with("5|") && error.contains("once_pkey"),
            "the status says {error}"
        );
        println!("  {error}");
        push_out_events(cluster)?;
        let later = Session::new(cluster.connect(AWAY)?).text(said)?;
        ensure!(later == error, "later, the status says {later}");
        Session::new(cluster.connect(0)?).run("INSERT INTO once VALUES (8)")?;
        cluster.nodes[AWAY].stop()?;
        alone(cluster, "DELETE FROM once WHERE id = 7")?;
        cluster.nodes[AWAY].start()?;
        await_online(cluster, AWAY)?;
        checks::whole(cluster, PATIENCE)
    })
}

/// So many events come that the oldest ones are gone, among them why the node has failed.
fn push_out_events(cluster: &Cluster) -> Result<()> {
    // Longer than the silence allowed: each reload is told as an event.
    set_on(cluster, AWAY, SEND, "60s")?;
    let mut session = Session::new(cluster.connect(AWAY)?);
    wait_for("many events", PATIENCE, || {
        session.run("SELECT pg_reload_conf(), pg_sleep(0.01) FROM generate_series(1, 10)")?;
        let sql = "SELECT count(*) FROM mtm.events WHERE event = 'failed'";
        Ok(session.text(sql)? == "0")
    })?;
    session.run(&format!("ALTER SYSTEM RESET {SEND}"))?;
    session.run("SELECT pg_reload_conf()")
}

/// Enough for a table to need room on the disk.
const MANY: &str = "INSERT INTO many SELECT generate_series(1, 20000)";
/// More attempts than are made at what cannot be applied.
const ATTEMPTS: &str = "6";

/// A disk that stays full for longer than anything else is tried: the node waits for room, and comes back without help.
fn a_full_disk_only_delays_a_recovery(installation: &Installation) -> Result<()> {
    with_hosts_and_disks(installation, 3, DISK_BYTES, |hosts| {
        let cluster = &mut hosts.cluster;
        Session::new(cluster.connect(0)?).run("CREATE TABLE many (n int)")?;
        cluster.nodes[AWAY].kill()?;
        await_commit(cluster, 0, MANY)?;
        let server = &mut cluster.nodes[AWAY];
        start_and_hold_recovery(server)?;
        server.fill_disk(Disk::Data)?;
        arm(server, "")?;
        let sql = format!("SELECT status, error FROM mtm.recovery WHERE retries >= {ATTEMPTS}");
        let mut said = String::new();
        wait_for("attempts on a full disk", PATIENCE, || {
            said = Session::new(server.connect()?).text(&sql)?;
            Ok(!said.is_empty())
        })?;
        println!("  {said}");
        ensure!(
            said.starts_with("catchup|") && said.contains("No space left on device"),
            "the status says {said}"
        );
        server.free_disk(Disk::Data)?;
        await_online(cluster, AWAY)?;
        checks::whole(cluster, PATIENCE)
    })
}

/// What an index calls reads a file, which this node has no more: somebody puts it back, and says so, while the server runs.
fn a_node_that_gave_up_tries_again_when_told(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        for node in &cluster.nodes {
            let file = node.data_dir().join(CAUSE);
            std::fs::write(&file, "here")?;
            host::give_to_server(&file)?;
        }
        let mut first = Session::new(cluster.connect(0)?);
        first.run(&format!(
            "CREATE FUNCTION needs_a_file(id int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
             $$ BEGIN RETURN id + length(pg_catalog.pg_read_file('{CAUSE}')); END $$; \
             CREATE TABLE indexed (id int); CREATE INDEX ON indexed (needs_a_file(id))"
        ))?;
        let said = first.text("SELECT mtm.rejoin()")?;
        ensure!(
            said == "this node is online: there is nothing to do",
            "{said}"
        );
        cluster.nodes[AWAY].kill()?;
        let file = cluster.nodes[AWAY].data_dir().join(CAUSE);
        std::fs::remove_file(&file)?;
        await_commit(cluster, 0, "INSERT INTO indexed VALUES (7)")?;
        cluster.nodes[AWAY].start()?;
        for _ in 0..2 {
            await_failed(cluster)?;
            let mut away = Session::new(cluster.connect(AWAY)?);
            let error = away.text("SELECT error FROM mtm.recovery")?;
            ensure!(error.contains(CAUSE), "the error is {error}");
            // The first time too early: the cause is still there.
            let said = away.text("SELECT mtm.rejoin()")?;
            ensure!(said.contains("recovers again"), "{said}");
        }
        await_failed(cluster)?;
        std::fs::write(&file, "here")?;
        host::give_to_server(&file)?;
        let mut away = Session::new(cluster.connect(AWAY)?);
        away.text("SELECT mtm.rejoin()")?;
        await_online(cluster, AWAY)?;
        // In the session that has said so.
        let rows = away.text("SELECT count(*) FROM indexed WHERE needs_a_file(id) = 11")?;
        ensure!(rows != "0", "the row has not come");
        checks::whole(cluster, PATIENCE)
    })
}

/// A file of a data directory.
const CAUSE: &str = "something_needed";

fn await_failed(cluster: &Cluster) -> Result<()> {
    wait_for("the node to give up", PATIENCE, || {
        let status = "SELECT status FROM mtm.status()";
        Ok(Session::new(cluster.connect(AWAY)?).text(status)? == "failed")
    })
}

/// Runs a statement on the node while it is no part of the cluster: its server does not load the extension.
fn alone(cluster: &mut Cluster, sql: &str) -> Result<()> {
    let node = &mut cluster.nodes[AWAY];
    let conf = node.data_dir().join("postgresql.conf");
    let before = std::fs::read(&conf)?;
    node.configure(&settings(&[("shared_preload_libraries", "")]))?;
    node.start()?;
    Session::new(node.connect()?).run(sql)?;
    node.stop()?;
    std::fs::write(&conf, before).context("the configuration cannot be put back")
}

/// Makes node 3 wait at rows of table `gate` until a file of the row's name is in its data directory.
const GATES: &str = "
    CREATE TABLE gate (name text);
    CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        WHILE (SELECT my_node_id FROM mtm.status()) = 3 AND pg_stat_file(new.name, true) IS NULL LOOP
            PERFORM set_config('application_name', new.name, false), pg_sleep(0.02);
        END LOOP; RETURN new; END $$;
    CREATE TRIGGER gate BEFORE INSERT ON gate FOR EACH ROW EXECUTE FUNCTION gate();
    ALTER TABLE gate ENABLE ALWAYS TRIGGER gate";
/// Rows and transactions behind each gate, more than a kilobyte of WAL.
const BEHIND: usize = 20;

fn add_gate(session: &mut Session, name: &str) -> Result<()> {
    session.run(&format!("INSERT INTO gate VALUES ('{name}')"))?;
    (0..BEHIND).try_for_each(|row| session.run(&format!("INSERT INTO line VALUES (0, {row})")))
}

/// Waits until the recovery stands at a gate.
fn await_gate(cluster: &Cluster, name: &str) -> Result<()> {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}' AND backend_type = 'multimaster recovery'"
    );
    wait_for(
        &format!("the recovery to stand at {name}"),
        PATIENCE,
        || Ok(Session::new(cluster.connect(AWAY)?).text(&sql)? == "1"),
    )
}

/// A heartbeat tells of its server's WAL what the last look has found, a fifth of a second ago at most; and some follow each other at once.
const HEARTBEATS: i64 = 12;

/// Waits until the node has heard from both others how far their WAL goes now.
pub fn await_heartbeats(cluster: &Cluster) -> Result<()> {
    let mut session = Session::new(cluster.connect(AWAY)?);
    let mut heard = || -> Result<i64> {
        let sql = "SELECT min(n_heartbeats) FROM mtm.get_nodes_state() WHERE id <> 3";
        Ok(session.text(sql)?.parse()?)
    };
    let enough = heard()? + HEARTBEATS;
    wait_for("heartbeats", PATIENCE, || Ok(heard()? >= enough))
}

fn open_gate(cluster: &Cluster, name: &str) -> Result<()> {
    Ok(std::fs::write(
        cluster.nodes[AWAY].data_dir().join(name),
        "",
    )?)
}

/// Behind everything that was there when it began, a node stays outside while it lags more than `multimaster.min_recovery_lag` allows, and asks in when that allows it.
fn a_node_asks_in_when_it_lags_no_more_than_is_set(installation: &Installation) -> Result<()> {
    let place = |cluster: &Cluster| {
        let status =
            Session::new(cluster.connect(AWAY)?).text("SELECT status FROM mtm.status()")?;
        let members =
            Session::new(cluster.connect(0)?).text("SELECT gen_members FROM mtm.status()")?;
        anyhow::Ok((status, members))
    };
    with_cluster(installation, 3, |cluster| {
        create(cluster)?;
        let mut first = Session::new(cluster.connect(0)?);
        first.run(GATES)?;
        set_on(cluster, AWAY, "multimaster.min_recovery_lag", "0")?;
        cluster.nodes[AWAY].kill()?;
        await_commit(cluster, 0, "INSERT INTO line VALUES (9, 0)")?;
        add_gate(&mut first, "before")?;
        cluster.nodes[AWAY].start()?;
        await_gate(cluster, "before")?;
        for gate in ["little", "much"] {
            add_gate(&mut first, gate)?;
        }
        await_heartbeats(cluster)?;
        open_gate(cluster, "before")?;
        await_gate(cluster, "little")?;
        // Long enough for it to be let in, if it had asked.
        await_heartbeats(cluster)?;
        let (status, members) = place(cluster)?;
        ensure!(
            (status.as_str(), members.as_str()) == ("catchup", "{1,2}"),
            "with much left the node is {status}, the members are {members}"
        );
        set_on(cluster, AWAY, "multimaster.min_recovery_lag", "1GB")?;
        open_gate(cluster, "little")?;
        await_gate(cluster, "much")?;
        let mut last = (String::new(), String::new());
        let admitted = wait_for("the node to ask in", PATIENCE, || {
            last = place(cluster)?;
            Ok(last == ("recovery".to_owned(), "{1,2,3}".to_owned()))
        });
        open_gate(cluster, "much")?;
        admitted.with_context(|| format!("{last:?}"))?;
        await_online(cluster, AWAY)?;
        checks::whole(cluster, PATIENCE)
    })
}
