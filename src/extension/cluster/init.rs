//! `mtm.init_cluster`: makes servers a cluster, all of them or none.
//!
//! 1. The arguments are looked at, then every server, without changing anything; all problems are reported together.
//! 2. The extension is made where it is missing, and every server tries to reach every other one the way it will later.
//! 3. Identity (state `forming`) and slots are written on every node.
//! 4. The state becomes `active` everywhere, the arbiters are woken, and all nodes come online.
//!
//! A failure in 2 or 3, or while the state changes, takes everything back on every node. What a run that died could not take back is in state
//! `forming`, and the next run clears it. Nothing is written through this session: its own transaction must not hold up its slots.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use pgrx::prelude::*;
use pgrx::spi::quote_literal;
use protocol::{ClusterTag, MAX_NODES, NodeId};

use super::error::{InitError, Problem};
use super::facts::{Facts, Membership};
use super::identity::first_row;
use super::member::{self, Member, WHO_SQL, node_name};
use super::setup::{self, Made, Plan, PlannedNode};
use super::{checks, data};
use crate::guc;
use crate::pg::remote;
use crate::pg::report::{self, CaughtError, ErrorReport};
use crate::pg::settings;

/// Time between two looks at whether the nodes are online.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes of the secret that the arbiters prove to each other.
const SECRET_BYTES: usize = 32;

/// What was done on the nodes so far, so that a failure takes exactly that back.
#[derive(Default)]
struct Progress {
    step: &'static str,
    extensions: Vec<(NodeId, Made)>,
    written: bool,
}

#[pg_extern]
fn init_cluster(my_conninfo: Option<&str>, peers_conninfo: Option<Array<&str>>) {
    super::require_superuser();
    let peers =
        peers_conninfo.map(|peers| peers.iter().map(|peer| peer.map(str::to_owned)).collect());
    if let Err(error) = run(my_conninfo, peers) {
        error.raise();
    }
}

/// Which database of which server `conninfo` leads to from here; the nodes ask each other.
#[pg_extern]
fn node_identify(conninfo: &str) -> String {
    super::require_superuser();
    let timeout = member::connect_timeout(conninfo);
    let answer = remote::Connection::open(conninfo, "multimaster init", timeout)
        .and_then(|connection| connection.query(WHO_SQL, 1));
    match answer {
        Ok(rows) => rows
            .into_iter()
            .flatten()
            .flatten()
            .next()
            .unwrap_or_default(),
        Err(error) => report::raise(ErrorReport::new(
            PgSqlErrorCode::ERRCODE_SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION,
            error.to_string(),
            function_name!(),
        )),
    }
}

fn run(my: Option<&str>, peers: Option<Vec<Option<String>>>) -> Result<(), InitError> {
    if settings::in_transaction_block() || settings::has_transaction_id() {
        return Err(InitError::InTransactionBlock);
    }
    let conninfos = arguments(my, peers)?;
    let timeout = guc::init_timeout();
    let members = connect(&conninfos, timeout)?;
    lock(&members)?;
    let facts = look(&members)?;
    let members = form(members, &facts, timeout)?;
    wait_online(&members, timeout)
}

/// The connection strings of all nodes, this one's first.
fn arguments(
    my: Option<&str>,
    peers: Option<Vec<Option<String>>>,
) -> Result<Vec<String>, InitError> {
    let argument = |text: String| Err(InitError::Argument(text));
    let Some(my) = my else {
        return argument("my_conninfo must not be null".into());
    };
    let Some(peers) = peers else {
        return argument("peers_conninfo must not be null".into());
    };
    if peers.is_empty() || peers.len() >= usize::from(MAX_NODES) {
        return argument(format!(
            "peers_conninfo has {} elements; a cluster has 1 to {} peers",
            peers.len(),
            MAX_NODES - 1
        ));
    }
    let mut conninfos = vec![my.to_owned()];
    for (index, peer) in peers.into_iter().enumerate() {
        let Some(peer) = peer else {
            return argument(format!("peers_conninfo[{}] must not be null", index + 1));
        };
        conninfos.push(peer);
    }
    for (index, conninfo) in conninfos.iter().enumerate() {
        let name = argument_name(index);
        if conninfo.trim().is_empty() {
            return argument(format!("{name} is empty"));
        }
        if let Err(error) = remote::check_conninfo(conninfo) {
            return argument(format!("{name}: {error}"));
        }
        if let Some(earlier) = conninfos[..index]
            .iter()
            .position(|earlier| earlier == conninfo)
        {
            return argument(format!("{name} is the same as {}", argument_name(earlier)));
        }
    }
    Ok(conninfos)
}

fn argument_name(index: usize) -> String {
    match index {
        0 => "my_conninfo".to_owned(),
        index => format!("peers_conninfo[{index}]"),
    }
}

fn connect(conninfos: &[String], timeout: Duration) -> Result<Vec<Member>, InitError> {
    let ids = (1..=MAX_NODES).filter_map(NodeId::new);
    collect(
        ids.zip(conninfos)
            .map(|(id, conninfo)| Member::connect(id, conninfo, timeout)),
    )
}

/// All results, or all problems.
fn collect<T>(results: impl Iterator<Item = Result<T, Problem>>) -> Result<Vec<T>, InitError> {
    let (mut values, mut problems) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(problem) => problems.push(problem),
        }
    }
    none(problems).map(|()| values)
}

fn none(problems: Vec<Problem>) -> Result<(), InitError> {
    if problems.is_empty() {
        Ok(())
    } else {
        Err(InitError::Unsuitable(problems))
    }
}

fn lock(members: &[Member]) -> Result<(), InitError> {
    let locks = members.iter().map(|member| match member.lock()? {
        true => Ok(()),
        // A server that was named twice finds its own lock taken; what is wrong is found later.
        false if leads_elsewhere(member, members)? => {
            Err(member.problem("another mtm.init_cluster is at work there"))
        }
        false => Ok(()),
    });
    collect(locks).map(drop)
}

/// Whether no earlier member is the same database.
fn leads_elsewhere(member: &Member, members: &[Member]) -> Result<bool, Problem> {
    let who = member.value(WHO_SQL)?;
    for earlier in members.iter().take_while(|earlier| earlier.id != member.id) {
        if earlier.value(WHO_SQL)? == who {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Looks at every server and at what the databases hold. Changes nothing.
fn look(members: &[Member]) -> Result<Vec<Facts>, InitError> {
    let facts = collect(members.iter().map(Facts::collect))?;
    if let Membership::Active { cluster_id } = &facts[0].membership {
        return Err(InitError::AlreadyMember(cluster_id.clone()));
    }
    if facts[0].who != own_identity()? {
        return Err(InitError::Argument(
            "my_conninfo leads to another server or database than the one that runs mtm.init_cluster".into(),
        ));
    }
    let mut problems = checks::problems(members, &facts);
    if problems.is_empty() {
        problems = data::differences(members).unwrap_or_else(|problem| vec![problem]);
    }
    none(problems)?;
    Ok(facts)
}

/// What `WHO_SQL` says in this session.
fn own_identity() -> Result<String, InitError> {
    match first_row(WHO_SQL, |row| row.get::<String>(1)) {
        Ok(Some(Some(who))) => Ok(who),
        _ => Err(InitError::Argument(
            "this server does not know its own identity".into(),
        )),
    }
}

/// Why the nodes were not written.
enum Failure {
    Node(Problem),
    Unsuitable(Vec<Problem>),
    /// The statement was cancelled, or raised in another way.
    Raised(Box<CaughtError>),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Failure {
        Failure::Node(problem)
    }
}

/// Steps 2 to 4 up to the change of state, taken back if any of them fails or is cancelled.
fn form(
    members: Vec<Member>,
    facts: &[Facts],
    timeout: Duration,
) -> Result<Vec<Member>, InitError> {
    let mut progress = Progress::default();
    let outcome = PgTryBuilder::new(AssertUnwindSafe(|| write(&members, facts, &mut progress)))
        .catch_others(|cause| Err(Failure::Raised(Box::new(cause))))
        .execute();
    let Err(failure) = outcome else {
        return Ok(members);
    };
    let leftovers = undo(members, &progress, timeout);
    match failure {
        Failure::Node(problem) => Err(InitError::Step {
            step: progress.step,
            problem,
            leftovers,
        }),
        Failure::Unsuitable(problems) if leftovers.is_empty() => {
            Err(InitError::Unsuitable(problems))
        }
        Failure::Unsuitable(mut problems) => Err(InitError::Step {
            step: progress.step,
            problem: problems.swap_remove(0),
            leftovers,
        }),
        Failure::Raised(cause) => cause.rethrow(),
    }
}

/// What is done on one node.
type Action = fn(&Member, &Plan) -> Result<(), Problem>;

fn write(members: &[Member], facts: &[Facts], progress: &mut Progress) -> Result<(), Failure> {
    progress.step = "creating the extension";
    for member in members {
        let made = setup::create_extension(member)?;
        progress
            .extensions
            .extend(made.map(|made| (member.id, made)));
    }
    progress.step = "reaching the other nodes";
    let problems = reach(members, facts);
    if !problems.is_empty() {
        return Err(Failure::Unsuitable(problems));
    }
    let plan = plan(members, facts)?;
    progress.written = true;
    let steps: [(&'static str, Action); 4] = [
        ("clearing an unfinished attempt", |member, _| {
            setup::clear(member)
        }),
        ("writing the node's identity", setup::write_identity),
        ("creating replication slots", setup::create_slots),
        ("activating the node", |member, _| setup::activate(member)),
    ];
    for (step, action) in steps {
        progress.step = step;
        for member in members {
            action(member, &plan)?;
        }
    }
    Ok(())
}

/// Lets every node try every other node's connection string: it must lead there from everywhere.
fn reach(members: &[Member], facts: &[Facts]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for from in members {
        for (to, facts) in members.iter().zip(facts).filter(|(to, _)| to.id != from.id) {
            let name = node_name(to.id);
            let sql = format!("SELECT mtm.node_identify({})", quote_literal(&to.conninfo));
            let cause = match from.value(&sql) {
                Ok(Some(who)) if who == facts.who => continue,
                Ok(_) => {
                    format!("the connection string of {name} leads to another server from here")
                }
                Err(problem) => format!("cannot reach {name}: {}", problem.cause),
            };
            problems.push(from.problem(cause));
        }
    }
    problems
}

fn plan(members: &[Member], facts: &[Facts]) -> Result<Plan, Problem> {
    let mut random = [0; 16 + SECRET_BYTES];
    if !settings::strong_random(&mut random) {
        return Err(members[0].problem("the system has no strong random numbers"));
    }
    let (cluster_id, secret) = random.split_at(16);
    let tag = ClusterTag(
        cluster_id
            .iter()
            .take(4)
            .fold(0, |tag, &byte| tag << 8 | u32::from(byte)),
    );
    let node = |(member, facts): (&Member, &Facts)| {
        let arbiter_port = facts.arbiter_port();
        let arbiter_port =
            arbiter_port.ok_or_else(|| member.problem("the library is not loaded"))?;
        Ok(PlannedNode {
            id: member.id,
            conninfo: member.conninfo.clone(),
            arbiter_host: member.host(),
            arbiter_port,
        })
    };
    Ok(Plan {
        cluster_id: hex(cluster_id),
        tag,
        secret: hex(secret),
        nodes: members
            .iter()
            .zip(facts)
            .map(node)
            .collect::<Result<_, Problem>>()?,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Takes back what was done, on every node that can be reached; says where that did not succeed.
fn undo(members: Vec<Member>, progress: &Progress, timeout: Duration) -> Vec<Problem> {
    let mut leftovers = Vec::new();
    for member in members {
        let id = member.id;
        let undone = member.reconnect(timeout).and_then(|member| {
            if progress.written {
                setup::clear(&member)?;
            }
            if let Some(&(_, made)) = progress.extensions.iter().find(|(node, _)| *node == id) {
                setup::drop_extension(&member, made)?;
            }
            Ok(())
        });
        leftovers.extend(undone.err());
    }
    leftovers
}

/// Wakes the arbiters and waits until every node says that it is online.
fn wait_online(members: &[Member], timeout: Duration) -> Result<(), InitError> {
    let deadline = Instant::now() + timeout;
    let mut woken = vec![false; members.len()];
    loop {
        let mut problems = Vec::new();
        for (member, woken) in members.iter().zip(&mut woken) {
            if !*woken {
                *woken = setup::wake_arbiter(member).is_ok();
            }
            problems.extend(not_online(member));
        }
        if problems.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(InitError::NotOnline {
                seconds: timeout.as_secs(),
                problems,
            });
        }
        remote::pause(POLL_INTERVAL);
    }
}

/// Why the node cannot be used yet, if it cannot.
fn not_online(member: &Member) -> Option<Problem> {
    let sql = "SELECT status, coalesce(array_to_string(connected, ', '), '') FROM mtm.status()";
    let mut row = match member.query(sql, 2) {
        Ok(rows) => rows
            .into_iter()
            .next()
            .unwrap_or_default()
            .into_iter()
            .flatten(),
        Err(problem) => return Some(problem),
    };
    let (status, connected) = (
        row.next().unwrap_or_default(),
        row.next().unwrap_or_default(),
    );
    (status != "online").then(|| {
        member.problem(format!(
            "status {status}, connected to nodes: [{connected}]"
        ))
    })
}
