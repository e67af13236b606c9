//! What is measured.

use super::system::System;

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// pgbench with these arguments.
    Pgbench(&'static [&'static str]),
    /// pgbench with a script of ours.
    Script(&'static str),
    /// One transaction of so many rows.
    Bulk(u32),
    /// Nobody does anything.
    Idle,
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub name: &'static str,
    pub kind: Kind,
    pub clients: usize,
    /// On all nodes at once instead of the first; only a cluster can do that.
    pub spread: bool,
    /// The same on one node, for the ratio of a spread workload.
    pub beside: Option<&'static str>,
    /// What the ratio should be.
    pub target: Option<&'static str>,
}

/// Of so many transactions one is written to pgbench's log, where more would disturb what is measured.
pub const LOGGED_READS: u32 = 50;

/// A row of its own for each client would not be contention.
pub const HOT_ROW: &str = "UPDATE bench_hot SET n = n + 1 WHERE id = 1;\n";
pub const INSERT: &str = "\\set a random(1, 1000000)\nINSERT INTO bench_insert (a, b) VALUES (:a, 'abcdefghijklmnopqrstuvwxyz');\n";

const SIMPLE: Kind = Kind::Pgbench(&["--skip-some-updates"]);
const TPC_B: Kind = Kind::Pgbench(&[]);
const SELECT: Kind = Kind::Pgbench(&["--select-only"]);

/// Everything that is measured, in this order.
pub const WORKLOADS: [Workload; 16] = [
    on_one("simple-1", SIMPLE, 1, Some("≥ 0.33")),
    on_one("simple-8", SIMPLE, 8, Some("≥ 0.45")),
    on_one("simple-32", SIMPLE, 32, Some("≥ 0.45")),
    on_all("simple-spread-8", SIMPLE, 8, "simple-8", None),
    on_all("simple-spread-32", SIMPLE, 32, "simple-32", None),
    on_one("tpcb-1", TPC_B, 1, None),
    on_one("tpcb-8", TPC_B, 8, None),
    on_one("tpcb-32", TPC_B, 32, None),
    on_all("tpcb-spread-8", TPC_B, 8, "tpcb-8", Some("≥ 0.6")),
    on_all("tpcb-spread-32", TPC_B, 32, "tpcb-32", Some("≥ 0.6")),
    on_one("insert-1", Kind::Script(INSERT), 1, None),
    on_one("hot-row-8", Kind::Script(HOT_ROW), 8, None),
    on_all(
        "hot-row-spread-8",
        Kind::Script(HOT_ROW),
        8,
        "hot-row-8",
        None,
    ),
    on_one("bulk", Kind::Bulk(1_000_000), 1, Some("≤ 1.6")),
    on_one("select-8", SELECT, 8, Some("≥ 0.98 of plain")),
    on_one("idle", Kind::Idle, 0, None),
];

const fn on_one(
    name: &'static str,
    kind: Kind,
    clients: usize,
    target: Option<&'static str>,
) -> Workload {
    Workload {
        name,
        kind,
        clients,
        spread: false,
        beside: None,
        target,
    }
}

const fn on_all(
    name: &'static str,
    kind: Kind,
    clients: usize,
    beside: &'static str,
    target: Option<&'static str>,
) -> Workload {
    Workload {
        name,
        kind,
        clients,
        spread: true,
        beside: Some(beside),
        target,
    }
}

impl Workload {
    /// Where it is measured.
    pub fn systems(&self) -> Vec<System> {
        if self.spread {
            vec![System::Multimaster]
        } else if self.reads_only() {
            vec![System::Multimaster, System::Streaming, System::Plain]
        } else {
            vec![System::Multimaster, System::Streaming]
        }
    }

    /// Whether nothing is written.
    pub fn reads_only(&self) -> bool {
        self.kind == SELECT
    }

    /// Clients of each node, as even as can be.
    pub fn clients_of(&self, node: usize, nodes: usize) -> usize {
        self.clients / nodes + usize::from(node < self.clients % nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_spread_evenly_and_none_is_lost() {
        for workload in WORKLOADS {
            let each: Vec<usize> = (0..3).map(|node| workload.clients_of(node, 3)).collect();
            assert_eq!(each.iter().sum::<usize>(), workload.clients);
            assert!(each[0] - each[2] <= 1);
        }
    }

    #[test]
    fn what_a_spread_workload_is_compared_with_is_measured_before() {
        for (place, workload) in WORKLOADS.iter().enumerate() {
            if let Some(beside) = workload.beside {
                assert!(WORKLOADS[..place].iter().any(|other| other.name == beside));
            }
        }
    }
}
