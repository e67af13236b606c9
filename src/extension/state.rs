//! What the views show, out of shared memory.

use crate::arbiter::event::{Conflict, Ended, InFlight, LocalEvent, MemberEvent, Question, submit};
use crate::decode::Environment;
use crate::fate;
use crate::latency::{Phase, Summary};
use crate::pg::report::{self, ErrorReport};
use crate::pg::shared::{NODES, NodeStatus, shared};
use crate::pg::{board, commit, locks};
use crate::views::{
    ConflictRow, CounterRow, EventRow, LatencyRow, NodeStateRow, RecoveryRow, Source, StatusRow,
    TransactionRow, TransactionStatus,
};
use pgrx::prelude::*;
use protocol::{Csn, NodeId, membership};
use serde::de::DeserializeOwned;
use std::sync::atomic::{AtomicU64, Ordering};

/// The source of the views.
pub static SOURCE: SharedSource = SharedSource;

pub struct SharedSource;

/// Makes the arbiter look at the catalog again.
pub fn wake_arbiter() {
    if let Some(database) = locks::my_database() {
        shared().database.store(database, Ordering::Release);
    }
    shared().identity_changed.store(true, Ordering::Release);
    shared().arbiter.wake();
}

/// What the output plugin has to know.
pub fn decode_environment() -> Environment {
    Environment {
        node: || shared().node_id(),
        generation: || shared().current(),
        visible: |deps| {
            // Before the numbers: in a generation that is seen, those of nodes outside of it have been replaced.
            let standing = shared().standing.get();
            let counts = |node: &NodeId| {
                standing.phase != membership::Phase::Online
                    || standing.current.members.contains(*node)
            };
            deps.extend(node_ids().filter(counts).filter_map(|node| {
                let csn = Csn(shared().node(node).visible.load(Ordering::Acquire));
                (csn != Csn::ZERO).then_some((node, csn))
            }));
        },
        is_local: |_, _| false,
    }
}

fn node_ids() -> impl Iterator<Item = NodeId> {
    (1..NODES as u8)
        .filter_map(NodeId::new)
        .filter(|node| shared().node(*node).configured.load(Ordering::Acquire))
}

fn cluster_id() -> u128 {
    let [upper, lower] = &shared().cluster_id;
    u128::from(upper.load(Ordering::Acquire)) << 64 | u128::from(lower.load(Ordering::Acquire))
}

fn is_connected(node: NodeId) -> bool {
    let state = shared().node(node);
    shared().node_id() == Some(node)
        || (state.linked.load(Ordering::Acquire) && state.receiving.load(Ordering::Acquire))
}

impl Source for SharedSource {
    fn status(&self) -> StatusRow {
        let shared = shared();
        let all: Vec<i32> = node_ids().map(|node| i32::from(node.get())).collect();
        let connected: Vec<i32> = node_ids()
            .filter(|node| is_connected(*node))
            .map(|node| i32::from(node.get()))
            .collect();
        let node = shared.node_id();
        let members: Vec<i32> = node_ids()
            .filter(|id| shared.current().members.contains(*id))
            .map(|id| i32::from(id.get()))
            .collect();
        StatusRow {
            node_id: node.map(|node| i32::from(node.get())),
            name: node.map(|node| format!("n{}", node.get())),
            status: shared.status().name().to_owned(),
            members_online: if shared.status() == NodeStatus::Online {
                members.clone()
            } else {
                members
                    .iter()
                    .copied()
                    .filter(|id| connected.contains(id))
                    .collect()
            },
            connected,
            generation: node.map(|_| i64::from(shared.generation().0)),
            members,
            configured: all,
            cluster_id: node.map(|_| cluster_id()),
        }
    }

    fn nodes(&self) -> Vec<NodeStateRow> {
        node_ids().map(node_row).collect()
    }

    fn transactions(&self) -> Vec<TransactionRow> {
        let rows: Vec<InFlight> = ask(Question::Transactions);
        rows.into_iter().map(transaction_row).collect()
    }

    fn recovery(&self) -> Option<RecoveryRow> {
        let progress = &shared().recovery_progress;
        let read = |cell: &AtomicU64| cell.load(Ordering::Relaxed).cast_signed();
        let donor = progress.donor.load(Ordering::Acquire);
        let failed = shared().status() == NodeStatus::Failed;
        (donor != 0 || failed).then(|| RecoveryRow {
            donor: Some(donor.cast_signed()).filter(|donor| *donor != 0),
            began_at: Some(progress.began_us.load(Ordering::Relaxed)).filter(|at| *at != 0),
            bytes_done: read(&progress.applied) - read(&progress.from),
            bytes_left: progress.left().cast_signed(),
            transactions: read(&progress.transactions),
            rate: read(&progress.rate),
            retries: read(&progress.retries),
            error: progress.error.get(),
        })
    }

    fn conflicts(&self) -> Vec<ConflictRow> {
        shared()
            .conflicts
            .all::<Conflict>()
            .into_iter()
            .map(conflict_row)
            .collect()
    }

    fn events(&self) -> Vec<EventRow> {
        let events = shared().member_events.all::<MemberEvent>().into_iter();
        events
            .map(|event| EventRow {
                happened_at: event.happened_at,
                node_id: i32::from(event.node.get()),
                event: event.event,
                reason: event.reason,
                generation: i64::from(event.generation),
                lasted_ms: event.lasted_ms.map(|ms| ms as i64),
            })
            .collect()
    }

    fn counters(&self) -> Vec<CounterRow> {
        let decided: Vec<Ended> = ask(Question::Counters);
        let counters = &shared().counters;
        let local = [
            ("in doubt", "the client was told 08007", &counters.unknown),
            (
                "applied",
                "prepared here for another node",
                &counters.applied,
            ),
            (
                "not applied",
                "refused here for another node",
                &counters.refused,
            ),
            (
                "not applied",
                "waited for an older committing transaction",
                &counters.conflicts_committing,
            ),
            (
                "cancelled",
                "blocked a committing transaction",
                &counters.conflicts_running,
            ),
        ];
        let local = local
            .into_iter()
            .map(|(outcome, reason, counter)| CounterRow {
                outcome: outcome.to_owned(),
                reason: Some(reason.to_owned()),
                transactions: counter.load(Ordering::Relaxed) as i64,
            });
        decided.into_iter().map(ended_row).chain(local).collect()
    }

    fn latencies(&self) -> Vec<LatencyRow> {
        let peers = node_ids().filter(|node| shared().node_id() != Some(*node));
        let peers: Vec<NodeId> = peers.collect();
        shared()
            .latencies
            .all(peers.iter().copied())
            .map(latency_row)
            .collect()
    }

    fn reset_latencies(&self) {
        shared().latencies.reset();
    }

    fn transaction_status(&self, gid: &str) -> TransactionStatus {
        fate::of(gid)
    }

    fn current_gid(&self) -> Option<String> {
        commit::identifying_text()
    }
}

/// Asks the arbiter for rows; there are none in a server that belongs to no cluster.
///
/// Raises 57P03 when it does not answer: an empty view would say that there is nothing.
fn ask<T: DeserializeOwned>(question: Question) -> Vec<T> {
    if shared().node_id().is_none() {
        return Vec::new();
    }
    let rows = board::ask_arbiter(|number| submit(&LocalEvent::Ask { number, question }));
    rows.unwrap_or_else(|| {
        report::raise(
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW,
                "the multimaster arbiter of this node does not answer",
                function_name!(),
            )
            .set_hint("It may just be starting; see mtm.status() for this node's state."),
        )
    })
}

fn transaction_row(row: InFlight) -> TransactionRow {
    let me = shared().node_id();
    let role = match () {
        () if row.resolving => "resolver",
        () if Some(row.gid.coordinator) == me => "coordinator",
        () => "participant",
    };
    TransactionRow {
        gid: row.gid.text(shared().cluster_tag()),
        coordinator: i32::from(row.gid.coordinator.get()),
        role: role.to_owned(),
        state: row.state,
        ballot: row.ballot,
        started_at: Some(row.gid.started_at),
        missing: row
            .missing
            .iter()
            .map(|node| i32::from(node.get()))
            .collect(),
    }
}

fn ended_row(ended: Ended) -> CounterRow {
    CounterRow {
        outcome: ended.outcome,
        reason: Some(ended.reason),
        transactions: ended.count as i64,
    }
}

/// `s.t` out of `table "s.t"`.
fn relation_name(target: &str) -> Option<String> {
    let name = target.strip_prefix("table \"")?.strip_suffix('"')?;
    Some(name.to_owned())
}

fn latency_row((phase, peer, summary): (Phase, Option<NodeId>, Summary)) -> LatencyRow {
    let ms = |us: f64| (summary.count > 0).then_some(us / 1000.0);
    let [p50, p95, p99] = summary.percentiles_us.map(ms);
    LatencyRow {
        phase: phase.name().to_owned(),
        peer: peer.map(|peer| i32::from(peer.get())),
        count: summary.count as i64,
        p50_ms: p50,
        p95_ms: p95,
        p99_ms: p99,
        max_ms: ms(summary.max_us as f64),
    }
}

fn conflict_row(row: Conflict) -> ConflictRow {
    let tag = shared().cluster_tag();
    let (relation, key) = match row.target.split_once(", key ") {
        Some((relation, key)) => (relation, Some(key.to_owned())),
        None => (row.target.as_str(), None),
    };
    ConflictRow {
        happened_at: row.happened_at,
        kind: row.kind,
        node_id: i32::from(row.node.get()),
        relation: relation_name(relation),
        key,
        loser: row.loser.map(|gid| gid.text(tag)),
        winner: row.winner.map(|gid| gid.text(tag)),
    }
}

fn node_row(node: NodeId) -> NodeStateRow {
    let state = shared().node(node);
    let votes = shared().latencies.votes_of(node);
    let is_self = shared().node_id() == Some(node);
    let heard = state.heartbeats.load(Ordering::Relaxed);
    let all: u32 = node_ids().map(|id| 1u32 << (id.get() - 1)).sum();
    let recovery_lag = if is_self {
        let recovers = matches!(
            shared().status(),
            NodeStatus::Recovery | NodeStatus::Catchup
        );
        recovers.then(|| shared().recovery_progress.left())
    } else {
        state.recovery_lag()
    };
    let held = state.held.load(Ordering::Relaxed);
    NodeStateRow {
        id: i32::from(node.get()),
        enabled: shared().current().members.contains(node),
        connected: is_connected(node),
        stopped: shared().needs_copy().contains(node),
        catch_up: recovery_lag.is_some(),
        avg_trans_delay_us: (votes.count > 0).then_some(votes.mean_us as i64),
        last_status_change: Some(state.last_change_us.load(Ordering::Relaxed))
            .filter(|at| *at != 0),
        receiver_pid: Some(state.receiver.pid()).filter(|pid| *pid != 0),
        connectivity_mask: (heard > 0 && !is_self)
            .then(|| i64::from(all & !state.connectivity.load(Ordering::Relaxed))),
        heartbeats: heard as i64,
        recovery_lag: recovery_lag.map(u64::cast_signed),
        confirmed: Some(held.cast_signed()).filter(|lsn| *lsn != 0),
    }
}
