//! `mtm.transaction_status`: how a transaction ended, asked on any node.
//!
//! The coordinator's pg_xact knows for as long as PostgreSQL keeps it; the protocol core of any node knows while the transaction is remembered
//! anywhere in the cluster. Whoever is asked looks at home first and then asks the coordinator and the other nodes.

use crate::arbiter::event::{Fate, LocalEvent, Question, submit};
use crate::cluster::Identity;
use crate::pg::remote::Connection;
use crate::pg::shared::shared;
use crate::pg::{board, outcome};
use crate::views::TransactionStatus;
use pgrx::prelude::*;
use protocol::{ClusterTag, Decision, GenerationNum, Gid, NodeId, NodeSet};
use std::time::Duration;

/// How long another node is given to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The fate of a transaction named by `mtm.current_gid()` or by its whole gid.
///
/// # Errors
/// 22023 for a text that is no name of a transaction of this cluster; 57P03 when this node's arbiter does not answer and no other node knows.
pub fn of(text: &str) -> TransactionStatus {
    let gid = match parse(text) {
        Some((tag, gid)) if tag == shared().cluster_tag() => gid,
        Some(_) => refuse(text, "It belongs to another cluster."),
        None => refuse(
            text,
            "A name looks like mtm-1a2b3c4d-1-1234; mtm.current_gid() gives it.",
        ),
    };
    let here = at_home(gid);
    if let Some(known) = here.filter(|status| *status != TransactionStatus::Unknown) {
        return known;
    }
    match (elsewhere(text, gid.coordinator), here) {
        (Some(known), _) => known,
        (None, Some(unknown)) => unknown,
        (None, None) => cannot_tell(),
    }
}

/// "Unknown" would say that nobody has heard of the transaction.
fn cannot_tell() -> ! {
    crate::pg::report::raise(
        crate::pg::report::ErrorReport::new(
            PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW,
            "the multimaster arbiter of this node does not answer",
            function_name!(),
        )
        .set_hint("It may just be starting: ask again, or ask another node."),
    )
}

fn refuse(text: &str, detail: &str) -> ! {
    crate::pg::report::raise(
        crate::pg::report::ErrorReport::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("\"{text}\" does not name a transaction of this cluster"),
            function_name!(),
        )
        .set_detail(detail),
    )
}

/// Reads a whole gid, or the part of it that is known before COMMIT.
fn parse(text: &str) -> Option<(ClusterTag, Gid)> {
    if let Some(whole) = Gid::parse(text) {
        return Some(whole);
    }
    let mut parts = text.strip_prefix("mtm-")?.split('-');
    let tag = u32::from_str_radix(parts.next()?, 16).ok()?;
    let coordinator = NodeId::new(parts.next()?.parse().ok()?)?;
    let xid = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(())?;
    Some((
        ClusterTag(tag),
        Gid {
            coordinator,
            xid,
            generation: GenerationNum(0),
            members: NodeSet::EMPTY,
            started_at: 0,
        },
    ))
}

/// What this node knows; none when its arbiter does not answer.
fn at_home(gid: Gid) -> Option<TransactionStatus> {
    let own = shared().node_id() == Some(gid.coordinator);
    if own {
        match outcome::of_own_transaction(gid.xid) {
            Some(Decision::Commit) => return Some(TransactionStatus::Committed),
            Some(Decision::Abort) => return Some(TransactionStatus::Aborted),
            None => {}
        }
    }
    let fate = board::ask_arbiter(|number| {
        submit(&LocalEvent::Ask {
            number,
            question: Question::Fate { gid },
        })
    });
    match fate {
        Some(Fate::Decided(Decision::Commit)) => Some(TransactionStatus::Committed),
        Some(Fate::Decided(Decision::Abort)) => Some(TransactionStatus::Aborted),
        Some(Fate::InFlight) => Some(TransactionStatus::InProgress),
        Some(Fate::Unknown) | None if own && outcome::is_running(gid.xid) => {
            Some(TransactionStatus::InProgress)
        }
        Some(Fate::Unknown) => Some(TransactionStatus::Unknown),
        None => None,
    }
}

/// What the others know, the coordinator first; none when nobody does. Nodes that cannot be reached are left out.
fn elsewhere(text: &str, coordinator: NodeId) -> Option<TransactionStatus> {
    let identity = Identity::load().ok().flatten()?;
    let mut nodes: Vec<_> = identity.peers().collect();
    nodes.sort_by_key(|node| node.id != coordinator);
    nodes
        .into_iter()
        .filter_map(|node| ask(&node.conninfo, text))
        .find(|status| *status != TransactionStatus::Unknown)
}

/// Asks one node what it knows itself.
fn ask(conninfo: &str, text: &str) -> Option<TransactionStatus> {
    let remote = Connection::open(conninfo, "multimaster transaction_status", PATIENCE).ok()?;
    // Only digits, letters and dashes got through parse().
    let rows = remote
        .query(&format!("SELECT mtm.local_transaction_status('{text}')"), 1)
        .ok()?;
    let word = rows.first()?.first()?.clone()?;
    [
        TransactionStatus::Committed,
        TransactionStatus::Aborted,
        TransactionStatus::InProgress,
    ]
    .into_iter()
    .find(|status| status.as_str() == word)
}

/// What this node alone knows of a transaction; asked by other nodes.
#[pg_extern]
fn local_transaction_status(gid: &str) -> String {
    let status = match parse(gid) {
        Some((tag, gid)) if tag == shared().cluster_tag() => at_home(gid),
        _ => Some(TransactionStatus::Unknown),
    };
    status.unwrap_or_else(|| cannot_tell()).as_str().to_owned()
}
