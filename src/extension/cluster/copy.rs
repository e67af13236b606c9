//! A node that is lost for good is replaced by a copy of another one (`mtm clone`): what the nodes say and note about it, and what the copy knows of itself.
//!
//! The rules are in `docs/membership.md`, "A copy of a node".

#![expect(
    clippy::type_complexity,
    reason = "pgrx reads the columns of a result from the function's signature"
)]

use pgrx::prelude::*;
use protocol::membership::MembershipRecord;
use protocol::{GenerationNum, Gid, NodeId, NodeSet};

use crate::arbiter::{MARK_ROWS, number_in, read_membership};
use crate::pg::records::DurableTable;
use crate::pg::report::{self, ErrorReport};
use crate::pg::shared::{NodeStatus, shared};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// Where this server comes from, if it is a copy.
#[derive(Clone, Copy, Debug)]
pub struct Copied {
    pub donor: NodeId,
    /// The generation of the moment when the copy began.
    pub generation: GenerationNum,
    /// It has not been started as a node yet.
    pub is_fresh: bool,
}

/// What the copy's maker has written. Runs in a transaction.
pub fn load() -> Option<Copied> {
    let found = Spi::connect(|client| {
        let rows = client.select(
            "SELECT donor, generation, is_fresh FROM mtm.copied",
            Some(1),
            &[],
        )?;
        let found = rows
            .map(|row| Ok((row.get::<i32>(1)?, row.get::<i64>(2)?, row.get::<bool>(3)?)))
            .next();
        found.transpose()
    });
    let row: Result<_, pgrx::spi::Error> = found;
    match row {
        Ok(Some((Some(donor), Some(generation), Some(is_fresh)))) => Some(Copied {
            donor: NodeId::new(u8::try_from(donor).ok()?)?,
            generation: GenerationNum(u32::try_from(generation).ok()?),
            is_fresh,
        }),
        Ok(_) => None,
        Err(error) => pgrx::error!("multimaster cannot read mtm.copied: {error}"),
    }
}

/// Notes that the copy has been started as a node. Runs in a transaction.
pub fn settle() {
    if let Err(error) = Spi::run("UPDATE mtm.copied SET is_fresh = false") {
        pgrx::error!("multimaster cannot write mtm.copied: {error}");
    }
}

/// Numbers of the last copies of nodes that were replaced. Runs in a transaction.
pub fn last_numbers() -> BTreeMap<NodeId, u32> {
    let found = Spi::connect(|client| {
        let rows = client.select("SELECT node_id, number FROM mtm.copies", None, &[])?;
        let rows = rows.map(|row| Ok((row.get::<i32>(1)?, row.get::<i64>(2)?)));
        rows.collect::<Result<Vec<_>, pgrx::spi::Error>>()
    });
    match found {
        Ok(rows) => rows
            .into_iter()
            .filter_map(|(node, number)| Some((node_of(node?)?, u32::try_from(number?).ok()?)))
            .collect(),
        Err(error) => pgrx::error!("multimaster cannot read mtm.copies: {error}"),
    }
}

/// One row: generation, the membership record that a copy begins with, the mark of the lost node's stream, and why it may not be copied now.
#[pg_extern]
fn copy_state(
    node_id: i32,
) -> TableIterator<
    'static,
    (
        name!(generation, Option<i64>),
        name!(record, Option<Vec<u8>>),
        name!(mark, Option<i64>),
        name!(obstacle, Option<String>),
    ),
> {
    super::require_superuser();
    let row = match state_for(node_id) {
        Ok((record, mark)) => (
            Some(i64::from(record.num().0)),
            Some(record.to_bytes().to_vec()),
            i64::try_from(mark).ok(),
            None,
        ),
        Err(obstacle) => (None, None, None, Some(obstacle)),
    };
    TableIterator::once(row)
}

/// What the copy begins with, or the obstacle.
fn state_for(node_id: i32) -> Result<(MembershipRecord, u64), String> {
    let shared = shared();
    let (Some(own), Some(node)) = (shared.node_id(), node_of(node_id)) else {
        return Err(format!("there is no node {node_id} to be replaced"));
    };
    let configured = shared.configured_nodes();
    if node == own || !configured.contains(node) {
        return Err(format!("there is no other node {node_id} in the cluster"));
    }
    let marks = DurableTable::open(c"marks", MARK_ROWS).read_all();
    let record = read_membership().unwrap_or(MembershipRecord::first(configured));
    let current = record.current.generation;
    let others = configured.without(node);
    if shared.node(node).linked.load(Ordering::Acquire) {
        return Err(format!(
            "node {node_id} is connected; only a node that does not run can be replaced"
        ));
    }
    if current.members != others {
        return Err(format!(
            "the members are {}; every node but the one to be replaced has to be one, and nobody else",
            numbers(current.members)
        ));
    }
    if shared.status() != NodeStatus::Online || record.online_in != current.num {
        return Err(format!("this node is {}", shared.status().name()));
    }
    if record.last_vote.num != current.num {
        return Err("an election is under way".to_owned());
    }
    if holds_older(current.num) {
        return Err("transactions of an earlier generation have not ended yet".to_owned());
    }
    let first = MembershipRecord {
        online_in: GenerationNum(0),
        recovered_to: GenerationNum(0),
        ..record
    };
    Ok((first, number_in(&marks[usize::from(node.get())])))
}

/// Whether a transaction of an older generation is prepared here; users' own do not count. Runs in a transaction.
fn holds_older(num: GenerationNum) -> bool {
    let older = Spi::connect(|client| {
        let rows = client.select("SELECT gid FROM pg_catalog.pg_prepared_xacts", None, &[])?;
        let mut gids = rows.map(|row| row.get::<String>(1));
        gids.try_fold(false, |older, gid| {
            let gid = gid?.and_then(|name| Gid::parse(&name));
            Ok::<_, pgrx::spi::Error>(older || gid.is_some_and(|(_, gid)| gid.generation < num))
        })
    });
    older.unwrap_or_else(|error| {
        pgrx::error!("multimaster cannot list prepared transactions: {error}")
    })
}

/// The copy is about to be taken: its WAL is going to be kept again, and the node that it replaces is not heard from now on. Returns the number of the copy, higher than that
/// of any earlier one, and than the epoch of any arbiter that was heard.
///
/// # Errors
/// 42501 unless the user is a superuser; 22023 when there is no such other node; 55000 while the node is connected.
#[pg_extern]
fn begin_copy(node_id: i32) -> i64 {
    super::require_superuser();
    let node = replaceable(node_id);
    let forgotten = Spi::run_with_args(
        "DELETE FROM mtm.needs_copy WHERE node_id = $1",
        &[node_id.into()],
    );
    let newest = &shared().node(node).newest_epoch;
    let heard = i64::from(newest.load(Ordering::Acquire));
    // Minutes, so that the number also exceeds those that this node has not heard of. Far above that of an earlier copy, whose epochs follow it, should that have been given up.
    let number = Spi::get_one_with_args::<i64>(
        "INSERT INTO mtm.copies VALUES ($1, greatest($2 + 1, extract(epoch FROM pg_catalog.now() - '2020-01-01 00:00Z'::pg_catalog.timestamptz)::pg_catalog.int8 / 60)) \
         ON CONFLICT (node_id) DO UPDATE SET number = greatest(mtm.copies.number + 65536, excluded.number) RETURNING number",
        &[node_id.into(), heard.into()],
    );
    match (forgotten, number) {
        (Ok(()), Ok(Some(number))) => {
            shared().forget_copy_need(node);
            newest.fetch_max(number as u32, Ordering::AcqRel);
            number
        }
        (Err(error), _) | (_, Err(error)) => {
            pgrx::error!("multimaster cannot note the copy: {error}")
        }
        _ => pgrx::error!("multimaster cannot note the copy"),
    }
}

/// The node that is about to be replaced. One that is connected would not come back after its next lost connection.
fn replaceable(node_id: i32) -> NodeId {
    let shared = shared();
    let others = shared
        .node_id()
        .map_or(NodeSet::EMPTY, |own| shared.configured_nodes().without(own));
    let Some(node) = node_of(node_id).filter(|node| others.contains(*node)) else {
        report::raise(ErrorReport::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("there is no other node {node_id} to be replaced"),
            function_name!(),
        ))
    };
    if shared.node(node).linked.load(Ordering::Acquire) {
        report::raise(ErrorReport::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("node {node_id} is connected; only a node that does not run can be replaced"),
            function_name!(),
        ))
    }
    node
}

fn node_of(id: i32) -> Option<NodeId> {
    NodeId::new(u8::try_from(id).ok()?)
}

fn numbers(nodes: NodeSet) -> String {
    let numbers: Vec<String> = nodes.iter().map(|node| node.get().to_string()).collect();
    numbers.join(", ")
}
