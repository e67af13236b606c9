//! Judges what the servers said about themselves: may they become one cluster?
//!
//! Every check looks at facts only and reports every problem that it finds.

use super::error::Problem;
use super::facts::{Facts, Membership};
use super::member::{Member, node_name};
use super::preflight;

/// Everything that prevents a cluster of these servers; the first one is the server that runs `mtm.init_cluster`.
pub fn problems(members: &[Member], facts: &[Facts]) -> Vec<Problem> {
    let peers = u32::try_from(members.len() - 1).expect("a cluster has at most 16 nodes");
    let mut problems = Vec::new();
    for (member, own) in members.iter().zip(facts) {
        let causes = server_problems(own, peers)
            .into_iter()
            .chain(differences(&facts[0], own));
        problems.extend(causes.map(|cause| member.problem(cause)));
    }
    problems.extend(same_server(members, facts));
    problems.extend(same_arbiter(members, facts));
    problems
}

/// What is wrong with one server by itself.
fn server_problems(facts: &Facts, peers: u32) -> Vec<String> {
    let mut causes = Vec::new();
    if facts.in_recovery {
        causes.push("the server is in recovery: a standby cannot be a node".to_owned());
    }
    if let Membership::Active { cluster_id } = &facts.membership {
        causes.push(format!(
            "the server is already a node of cluster {cluster_id}"
        ));
    }
    for database in &facts.other_clusters {
        causes.push(format!(
            "its database \"{database}\" belongs to a cluster, and a server can hold one only"
        ));
    }
    if facts.prepared > 0 {
        causes.push(format!(
            "{} prepared transactions are open: commit or roll them back first",
            facts.prepared
        ));
    }
    causes.extend(collation_drift(facts));
    causes.extend(setting_problems(facts, peers));
    causes
}

fn collation_drift(facts: &Facts) -> Option<String> {
    let recorded = facts.recorded_collation_version.as_str();
    let (_, actual) = facts
        .collation
        .iter()
        .find(|(what, _)| *what == "collation version")?;
    (recorded != actual).then(|| {
        format!(
            "the database was made with collation version \"{recorded}\", the system now has \"{actual}\": \
             rebuild its indexes, then ALTER DATABASE {} REFRESH COLLATION VERSION",
            facts.database
        )
    })
}

fn setting_problems(facts: &Facts, peers: u32) -> Vec<String> {
    let libraries = facts
        .settings
        .get("shared_preload_libraries")
        .unwrap_or_default();
    let mut causes = Vec::new();
    if let Some(reason) = preflight::wrong_preload(libraries) {
        causes.push(reason.to_owned());
    }
    let wrong = preflight::wrong_settings(&facts.settings, peers);
    causes.extend(wrong.iter().map(preflight::WrongSetting::complaint));
    let slots = facts.settings.number("max_replication_slots");
    let slots_free = slots.saturating_sub(facts.slots);
    // A run that died left its slots, which the next one removes first.
    if slots >= peers && slots_free < peers && facts.membership != Membership::Forming {
        causes.push(format!(
            "{slots_free} of max_replication_slots = {slots} are free, needed: {peers}"
        ));
    }
    causes
}

/// In what a server differs from the first one.
fn differences(first: &Facts, other: &Facts) -> Vec<String> {
    let mut causes = Vec::new();
    if first.version_num / 10_000 != other.version_num / 10_000 {
        causes.push(format!(
            "PostgreSQL {}, but n1 runs {}: the major versions must be equal",
            other.version, first.version
        ));
    }
    let mut compare = |what: &str, first: &str, other: &str| {
        if first != other {
            causes.push(format!("{what} is \"{other}\", but \"{first}\" on n1"));
        }
    };
    compare("encoding", &first.encoding, &other.encoding);
    for ((what, first), (_, other)) in first.collation.iter().zip(&other.collation) {
        compare(what, first, other);
    }
    causes.extend(extension_problem(first, other));
    causes
}

fn extension_problem(first: &Facts, other: &Facts) -> Option<String> {
    let wanted = first.extension.as_deref()?;
    match (
        other.extension.as_deref(),
        other.available_extension.as_deref(),
    ) {
        (Some(version), _) if version == wanted => None,
        (Some(version), _) => Some(format!(
            "extension multimaster has version {version}, but {wanted} on n1"
        )),
        (None, Some(version)) if version == wanted => None,
        (None, Some(version)) => Some(format!(
            "the installed files are of multimaster {version}, but n1 runs {wanted}"
        )),
        (None, None) => Some("the files of extension multimaster are not installed".to_owned()),
    }
}

/// Two connection strings that lead to one server, and servers that are copies of each other.
fn same_server(members: &[Member], facts: &[Facts]) -> Vec<Problem> {
    let server = |facts: &Facts| {
        facts
            .who
            .rsplit_once('/')
            .map(|(server, _)| server.to_owned())
    };
    let mut problems = Vec::new();
    for (index, member) in members.iter().enumerate() {
        let own = &facts[index];
        let Some(earlier) = (0..index).find(|&earlier| facts[earlier].system_id == own.system_id)
        else {
            continue;
        };
        let name = node_name(members[earlier].id);
        let cause = if server(&facts[earlier]) == server(own) {
            format!("leads to the same server as {name}")
        } else {
            format!(
                "is a physical copy of {name} (equal system identifiers): make it with initdb instead"
            )
        };
        problems.push(member.problem(cause));
    }
    problems
}

/// Two arbiters that would need one port of one host.
fn same_arbiter(members: &[Member], facts: &[Facts]) -> Vec<Problem> {
    let addresses: Vec<_> = members
        .iter()
        .zip(facts)
        .map(|(member, facts)| (member.host(), facts.arbiter_port()))
        .collect();
    let mut problems = Vec::new();
    for (index, (host, port)) in addresses.iter().enumerate() {
        let Some(port) = port else { continue };
        let taken = |&earlier: &usize| addresses[earlier] == addresses[index];
        let other_server = |&earlier: &usize| facts[earlier].system_id != facts[index].system_id;
        if let Some(earlier) = (0..index).filter(other_server).find(taken) {
            problems.push(members[index].problem(format!(
                "multimaster.arbiter_port {port} on host {host} is that of {} too",
                node_name(members[earlier].id)
            )));
        }
    }
    problems
}
