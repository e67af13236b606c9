//! Two nodes and a referee, each on a host of its own: whatever fails, one node at most goes on alone, and the other one comes back.

use anyhow::{Context, Result, bail, ensure};
use multimaster_tests::{OwnCase, Session, cases};
use xtask::checks;
use xtask::cluster::{Cluster, member_settings, specs, wait_for};
use xtask::extension;
use xtask::installation::Installation;
use xtask::network::Network;
use xtask::server::settings;
use xtask::suite::Size;

use crate::clone::{Kept, copy, succeed};
use crate::cut_off::{Scene, cut_off_at_many};
use crate::hosts::{Hosts, PATIENCE, network_is_missing};
use crate::stuck::{SLOW_MS, set_on};

pub fn cases() -> Vec<OwnCase> {
    cases![
        either_node_of_two_goes_on_alone,
        of_two_nodes_without_a_link_one_goes_on,
        nobody_goes_on_alone_without_the_referee,
        who_missed_something_does_not_go_on_alone,
        a_lost_disk_of_two_is_replaced_by_a_copy,
        what_a_lost_node_decided_is_kept_alone,
        of_two_nodes_the_one_that_gets_on_goes_on,
        a_wrong_referee_is_found_before_it_is_needed,
    ]
}

/// Where the referee is (from 0), behind the two nodes.
pub const REFEREE: usize = 2;
const CANNOT_CONNECT_NOW: &str = "57P03";

/// Makes two nodes and a referee and does `work` with them; keeps the logs when that fails.
///
/// # Errors
/// As `with_hosts`.
pub fn with_referee(
    installation: &Installation,
    work: impl FnOnce(&mut Hosts) -> Result<()>,
) -> Result<()> {
    if network_is_missing()? {
        return Ok(());
    }
    let network = Network::create(3)?;
    let conninfo = format!(
        "host={} port=5432 user=mtm dbname=postgres connect_timeout=2",
        network.address(REFEREE)
    );
    let mut specs = specs(3);
    for (number, spec) in specs.iter_mut().enumerate() {
        spec.address = network.address(number);
        spec.namespace = Some(network.namespace(number));
        if number != REFEREE {
            spec.settings.extend(member_settings(2));
            spec.settings
                .extend(settings(&[("multimaster.referee_connstring", &conninfo)]));
        }
    }
    let cluster = Cluster::start_servers(installation, &specs)?;
    let mut hosts = Hosts { cluster, network };
    let outcome = form_cluster(&hosts).and_then(|()| work(&mut hosts));
    outcome.map_err(|error| {
        hosts.cluster.keep_logs();
        anyhow::anyhow!("{error:#}\n{}", hosts.cluster.log_tails(25))
    })
}

fn form_cluster(hosts: &Hosts) -> Result<()> {
    let mut referee = hosts.session(REFEREE)?;
    referee.run("CREATE ROLE mtm LOGIN REPLICATION")?;
    make_referee(&mut referee)?;
    let mut first = hosts.session(0)?;
    first.run("CREATE EXTENSION multimaster")?;
    let [one, other] = [0, 1].map(|node| hosts.cluster.nodes[node].conninfo());
    first.text(&format!(
        "SELECT mtm.init_cluster('{one}', ARRAY['{other}'])"
    ))?;
    first.run("CREATE TABLE line (n serial PRIMARY KEY, node int)")?;
    await_both(hosts)
}

/// As docs/operations.md says.
fn make_referee(session: &mut Session) -> Result<()> {
    session.run(
        "CREATE EXTENSION multimaster_referee; GRANT USAGE ON SCHEMA mtm_referee TO mtm; \
         GRANT EXECUTE ON FUNCTION mtm_referee.ask TO mtm",
    )
}

/// Waits until the node (from 0) is the only member, and commits on it.
fn await_alone(hosts: &Hosts, node: usize) -> Result<()> {
    await_members(hosts, node, &format!("{{{}}}", node + 1))?;
    write(hosts, node)
}

fn await_members(hosts: &Hosts, node: usize, members: &str) -> Result<()> {
    let expected = format!("{members}|online");
    wait_for(
        &format!("{expected} on node {}", node + 1),
        PATIENCE,
        || {
            let found = hosts.session(node).and_then(|mut session| {
                session.text("SELECT gen_members, status FROM mtm.status()")
            });
            Ok(found.is_ok_and(|found| found == expected))
        },
    )
}

/// Both are members, hold the same, and write.
fn await_both(hosts: &Hosts) -> Result<()> {
    for node in [0, 1] {
        await_members(hosts, node, "{1,2}")?;
    }
    for node in [0, 1] {
        wait_for("a commit", PATIENCE, || Ok(write(hosts, node).is_ok()))?;
    }
    wait_for("equal nodes", PATIENCE, || {
        let [one, other] = [0, 1].map(|node| -> Result<_> {
            let mut client = hosts.cluster.connect(node)?;
            let left = checks::prepared_left(&mut client)?;
            Ok((checks::checksums(&mut client)?, left))
        });
        let ((one, one_left), (other, other_left)) = (one?, other?);
        Ok(checks::differences(&one, &other).is_empty()
            && one_left.is_empty()
            && other_left.is_empty())
    })
}

fn write(hosts: &Hosts, node: usize) -> Result<()> {
    hosts
        .session(node)?
        .run(&format!("INSERT INTO line (node) VALUES ({node})"))
}

fn rows(hosts: &Hosts, node: usize) -> Result<String> {
    hosts.session(node)?.text("SELECT count(*) FROM line")
}

/// The node (from 0) serves nothing for a while in which it could have gone on alone.
fn stays_out(hosts: &Hosts, node: usize) -> Result<()> {
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(6) {
        let error = hosts.session(node)?.refused("SELECT * FROM line")?;
        ensure!(error.code().code() == CANNOT_CONNECT_NOW, "{error:?}");
    }
    Ok(())
}

fn either_node_of_two_goes_on_alone(installation: &Installation) -> Result<()> {
    with_referee(installation, |hosts| {
        for (lost, left) in [(1, 0), (0, 1), (0, 1), (1, 0)] {
            hosts.cluster.nodes[lost].kill()?;
            await_alone(hosts, left)?;
            // Nothing of it depends on the referee once it was granted.
            hosts.cluster.nodes[REFEREE].stop_immediately()?;
            write(hosts, left)?;
            hosts.cluster.nodes[lost].start()?;
            await_both(hosts).with_context(|| format!("after the loss of node {}", lost + 1))?;
            hosts.cluster.nodes[REFEREE].start()?;
        }
        let granted = hosts
            .session(REFEREE)?
            .text("SELECT node FROM mtm_referee.grants")?;
        ensure!(granted == "1", "{granted}");
        Ok(())
    })
}

fn of_two_nodes_without_a_link_one_goes_on(installation: &Installation) -> Result<()> {
    let rounds = match Size::chosen() {
        Size::Ci => 1,
        Size::Full | Size::Long => 3,
    };
    with_referee(installation, |hosts| {
        for round in 0..rounds {
            hosts.network.cut(0, 1)?;
            let mut winner = None;
            wait_for("one node to go on", PATIENCE, || {
                winner = [0, 1].into_iter().find(|node| write(hosts, *node).is_ok());
                Ok(winner.is_some())
            })?;
            let Some(winner) = winner else {
                bail!("nobody has won")
            };
            await_alone(hosts, winner)?;
            stays_out(hosts, 1 - winner).with_context(|| format!("round {round}"))?;
            hosts.network.heal()?;
            await_both(hosts)?;
        }
        Ok(())
    })
}

fn nobody_goes_on_alone_without_the_referee(installation: &Installation) -> Result<()> {
    with_referee(installation, |hosts| {
        hosts.cluster.nodes[REFEREE].stop_immediately()?;
        // While both are there it is not needed.
        await_both(hosts)?;
        hosts.cluster.nodes[1].kill()?;
        wait_for("node 1 to be without a lease", PATIENCE, || {
            Ok(hosts.session(0)?.refused("SELECT * FROM line").is_ok())
        })?;
        stays_out(hosts, 0)?;
        hosts.cluster.nodes[REFEREE].start()?;
        await_alone(hosts, 0)?;
        hosts.cluster.nodes[1].start()?;
        await_both(hosts)
    })
}

fn who_missed_something_does_not_go_on_alone(installation: &Installation) -> Result<()> {
    with_referee(installation, |hosts| {
        hosts.cluster.nodes[1].kill()?;
        await_alone(hosts, 0)?;
        let written = rows(hosts, 0)?;
        hosts.cluster.nodes[0].kill()?;
        hosts.cluster.nodes[1].start()?;
        stays_out(hosts, 1)?;
        // Who was alone needs nobody to go on after that.
        hosts.cluster.nodes[1].kill()?;
        hosts.cluster.nodes[REFEREE].stop_immediately()?;
        hosts.cluster.nodes[0].start()?;
        await_alone(hosts, 0)?;
        let kept = rows(hosts, 0)?;
        ensure!(
            kept.parse::<u64>()? == written.parse::<u64>()? + 1,
            "{kept} rows after {written}"
        );
        hosts.cluster.nodes[1].start()?;
        await_both(hosts)
    })
}

/// The copy needs the node that it was copied from until both have been online, also if the referee has forgotten who was alone.
fn a_lost_disk_of_two_is_replaced_by_a_copy(installation: &Installation) -> Result<()> {
    let mtm = extension::build_command_line(installation)?;
    with_referee(installation, |hosts| {
        let keep = Kept::new()?;
        hosts.cluster.nodes[1].kill()?;
        hosts.cluster.nodes[1].lose_data(&keep.0)?;
        await_alone(hosts, 0)?;
        succeed(&copy(&hosts.cluster, &mtm, 1, Some(&keep.0))?)?;
        write(hosts, 0)?;
        hosts.cluster.nodes[0].kill()?;
        hosts
            .session(REFEREE)?
            .run("DELETE FROM mtm_referee.grants")?;
        hosts.cluster.nodes[1].start()?;
        stays_out(hosts, 1)?;
        hosts.cluster.nodes[0].start()?;
        await_both(hosts)?;
        hosts.cluster.nodes[0].kill()?;
        await_alone(hosts, 1)?;
        hosts.cluster.nodes[0].start()?;
        await_both(hosts)
    })
}

/// The coordinator of a commit is cut off at each of its steps; the other node goes on alone and decides what it was left with as the coordinator did,
/// or would have.
fn what_a_lost_node_decided_is_kept_alone(installation: &Installation) -> Result<()> {
    with_referee(installation, |hosts| {
        let scene = Scene {
            coordinator: 1,
            survivors: "{1}",
        };
        cut_off_at_many(hosts, &scene)?;
        await_both(hosts)
    })
}

/// Its arbiter is heard and asks the referee as well as the other's could.
fn of_two_nodes_the_one_that_gets_on_goes_on(installation: &Installation) -> Result<()> {
    with_referee(installation, |hosts| {
        for node in [0, 1] {
            set_on(
                &hosts.cluster,
                node,
                "multimaster.slow_node_timeout",
                SLOW_MS,
            )?;
        }
        for (stuck, other) in [(1, 0), (0, 1)] {
            let worker = hosts.session(stuck)?.text(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'multimaster apply worker 1'",
            )?;
            let worker = worker.parse().context("no such process")?;
            hosts.cluster.nodes[stuck].freeze_process(worker)?;
            let mut waiting = hosts.session(other)?;
            let waits =
                std::thread::spawn(move || waiting.run("INSERT INTO line (node) VALUES (9)"));
            let alone = await_alone(hosts, other);
            let refused = hosts
                .session(stuck)?
                .refused("SELECT * FROM line")
                .map(drop);
            hosts.cluster.nodes[stuck].thaw_process(worker)?;
            alone.and(refused)?;
            ensure!(waits.join().is_ok(), "the client that waited panicked");
            await_both(hosts)?;
        }
        Ok(())
    })
}

/// Strings for `multimaster.referee_connstring` of the first node (`{n}` is the address of server n), and what it says of them.
const WRONG: [(&str, &str); 5] = [
    (
        "host={0} user=mtm dbname=second",
        "leads to a node of this cluster",
    ),
    (
        "host={2} user=mtm dbname=second",
        "leads to another referee on the other node",
    ),
    ("host={2} user=nobody dbname=postgres", "\"nobody\""),
    ("host={2} user=mtm dbname=template1", "mtm_referee"),
    ("host={2} port=1 user=mtm dbname=postgres", "refused"),
];

fn a_wrong_referee_is_found_before_it_is_needed(installation: &Installation) -> Result<()> {
    with_referee(installation, |hosts| {
        for server in [0, REFEREE] {
            hosts.session(server)?.run("CREATE DATABASE second")?;
            let client = hosts.cluster.nodes[server].connect_to("second")?;
            let mut second = Session::new(client);
            if server == 0 {
                second.run("CREATE ROLE mtm LOGIN REPLICATION")?;
            }
            make_referee(&mut second)?;
        }
        let right = hosts
            .session(0)?
            .text("SHOW multimaster.referee_connstring")?;
        let tried = match Size::chosen() {
            Size::Ci => &WRONG[..2],
            Size::Full | Size::Long => &WRONG[..],
        };
        for (wrong, said) in tried {
            let mut wrong = (*wrong).to_owned();
            for server in [0, REFEREE] {
                let address = hosts.network.address(server).to_string();
                wrong = wrong.replace(&format!("{{{server}}}"), &address);
            }
            use_referee(hosts, &wrong)?;
            await_said(hosts, 0, said).with_context(|| wrong.clone())?;
            await_both(hosts)?;
            if said.contains("another referee") {
                await_said(hosts, 1, said)?;
                hosts.network.cut(0, 1)?;
                stays_out_soon(hosts, 0)?;
                stays_out_soon(hosts, 1)?;
                hosts.network.heal()?;
                await_both(hosts)?;
            }
        }
        use_referee(hosts, &right)?;
        await_both(hosts)?;
        await_said(hosts, 1, "the referee can be asked")?;
        hosts.cluster.nodes[1].kill()?;
        await_alone(hosts, 0)?;
        hosts.cluster.nodes[1].start()?;
        await_both(hosts)
    })
}

/// Starts the first node again with another referee.
fn use_referee(hosts: &mut Hosts, conninfo: &str) -> Result<()> {
    let setting = settings(&[("multimaster.referee_connstring", conninfo)]);
    hosts.cluster.nodes[0].configure(&setting)?;
    hosts.cluster.nodes[0].stop()?;
    hosts.cluster.nodes[0].start()
}

/// Waits until the last that the node (from 0) has said of its referee contains the text.
fn await_said(hosts: &Hosts, node: usize, text: &str) -> Result<()> {
    wait_for(&format!("{text:?} on node {}", node + 1), PATIENCE, || {
        let said = hosts.session(node)?.text(
            "SELECT reason FROM mtm.events WHERE event = 'referee' ORDER BY happened_at DESC LIMIT 1",
        )?;
        Ok(said.contains(text))
    })
}

/// The node's lease ends, and nothing follows.
fn stays_out_soon(hosts: &Hosts, node: usize) -> Result<()> {
    wait_for("reads to be refused", PATIENCE, || {
        Ok(hosts.session(node)?.refused("SELECT * FROM line").is_ok())
    })?;
    stays_out(hosts, node)
}
