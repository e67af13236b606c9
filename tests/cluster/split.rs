//! Networks that break in parts: the largest set of nodes that all see each other goes on, and nobody else.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, cases};
use xtask::cluster::wait_for;
use xtask::installation::Installation;
use xtask::suite::Size;

use crate::failover::why_excluded;
use crate::hosts::{Hosts, PATIENCE, with_hosts};

pub fn cases() -> Vec<OwnCase> {
    cases![
        five_nodes_split_in_two_and_three_leave_the_three,
        three_nodes_with_one_link_cut_leave_two,
        a_link_that_works_one_way_does_not_count,
        a_node_cut_off_silently_is_missed_for_a_moment
    ]
}

/// For how long a node that is cut off silently may hold up the others: the default of `multimaster.heartbeat_recv_timeout` and a second.
const MISSED_FOR: Duration = Duration::from_millis(2000 + 1000);

fn create(hosts: &Hosts) -> Result<()> {
    hosts
        .session(0)?
        .run("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0)")
}

/// The nodes named (from 1) are the members, and each of them writes.
fn await_members(hosts: &Hosts, members: &[usize]) -> Result<()> {
    let numbers: Vec<String> = members.iter().map(usize::to_string).collect();
    let expected = format!("{{{}}}", numbers.join(","));
    for member in members {
        let node = member - 1;
        wait_for(&format!("{expected} on node {member}"), PATIENCE, || {
            let found = hosts
                .session(node)
                .and_then(|mut session| session.text("SELECT gen_members FROM mtm.status()"));
            Ok(found.is_ok_and(|found| found == expected))
        })?;
        wait_for(&format!("a commit on node {member}"), PATIENCE, || {
            let written = hosts
                .session(node)
                .and_then(|mut session| session.run("UPDATE t SET n = n + 1"));
            Ok(written.is_ok())
        })?;
    }
    Ok(())
}

fn heal(hosts: &mut Hosts, nodes: usize) -> Result<()> {
    hosts.network.heal()?;
    let all: Vec<usize> = (1..=nodes).collect();
    await_members(hosts, &all)?;
    (0..nodes).try_for_each(|node| hosts.await_status(node, "online"))?;
    xtask::checks::whole(&hosts.cluster, PATIENCE)
}

fn five_nodes_split_in_two_and_three_leave_the_three(installation: &Installation) -> Result<()> {
    with_hosts(installation, 5, |hosts| {
        create(hosts)?;
        hosts.network.split(&[0, 1])?;
        await_members(hosts, &[3, 4, 5])?;
        for node in [0, 1] {
            hosts
                .session(node)?
                .refused_with("57P03", "SELECT * FROM t")?;
        }
        names_itself(hosts, 0, "2")?;
        names_itself(hosts, 1, "1")?;
        heal(hosts, 5)
    })
}

/// What a node (from 0) outside of the majority answers: what it is, and with whom (from 1) it is connected.
fn names_itself(hosts: &Hosts, node: usize, connected: &str) -> Result<()> {
    let message = format!("node {} is degraded and takes no reads or writes", node + 1);
    let detail = format!("Nodes it is connected with: {connected}.");
    let mut said = String::new();
    let named = wait_for("the node to name itself and the others", PATIENCE, || {
        let error = hosts
            .session(node)?
            .refused_with("57P03", "SELECT * FROM t")?;
        said = format!("{}\n{}", error.message(), error.detail().unwrap_or(""));
        Ok(error.message() == message && error.detail() == Some(&detail))
    });
    named.with_context(|| format!("it says: {said}"))
}

/// One direction that is cut takes the link with it, whichever it is: of the two pairs that remain, the one with the lowest node goes on.
///
/// Connections need both directions, so that both ends soon hear nothing: what the rule makes of a matrix that is not symmetric is tested beside it.
fn a_link_that_works_one_way_does_not_count(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        let directions = match Size::chosen() {
            Size::Ci => &[(0, 1)][..],
            Size::Full | Size::Long => &[(0, 1), (1, 0)],
        };
        for &(from, to) in directions {
            hosts.network.cut_one_way(from, to)?;
            await_members(hosts, &[1, 3])?;
            hosts.session(1)?.refused_with("57P03", "SELECT * FROM t")?;
            heal(hosts, 3)?;
        }
        Ok(())
    })
}

fn three_nodes_with_one_link_cut_leave_two(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        hosts.network.cut(1, 2)?;
        await_members(hosts, &[1, 2])?;
        hosts.session(2)?.refused_with("57P03", "SELECT * FROM t")?;
        heal(hosts, 3)
    })
}

fn a_node_cut_off_silently_is_missed_for_a_moment(installation: &Installation) -> Result<()> {
    with_hosts(installation, 3, |hosts| {
        create(hosts)?;
        let mut session = hosts.session(0)?;
        hosts.network.isolate(2)?;
        let cut = Instant::now();
        wait_for("a commit without the node", PATIENCE, || {
            Ok(session.run("UPDATE t SET n = n + 1").is_ok())
        })?;
        let took = cut.elapsed();
        println!("  first commit {} ms after the cut", took.as_millis());
        if Size::chosen() != Size::Ci {
            ensure!(took < 5 * MISSED_FOR, "{took:?} without a commit");
        }
        await_members(hosts, &[1, 2])?;
        // Who votes for the other one's set may not have missed it yet.
        let causes = [0, 1].map(|node| why_excluded(&hosts.cluster, node, 2));
        let causes = causes.into_iter().collect::<Result<Vec<String>>>()?;
        ensure!(
            causes.iter().any(|it| it.contains("nothing was heard")),
            "the causes are {causes:?}"
        );
        let status = hosts.session(2)?.text("SELECT status FROM mtm.status()")?;
        ensure!(
            status != "online",
            "the node that was cut off says {status}"
        );
        heal(hosts, 3)
    })
}
