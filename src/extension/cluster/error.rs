//! What `mtm.init_cluster` tells its caller when it refuses or fails.

use pgrx::prelude::*;

use crate::pg::report::{self, ErrorReport};

/// Something about one node, or about an argument, that prevents the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Node and address, as in `n2 (host=b port=5432)`.
    pub node: String,
    pub cause: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Texts of libpq and of other servers may have several lines.
        let cause = self.cause.replace('\n', "\n    ");
        write!(f, "{}: {cause}", self.node)
    }
}

/// Why no cluster came into being, or why it is not online.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("permission denied: only a superuser can form a cluster")]
    NotSuperuser,
    #[error("mtm.init_cluster cannot run inside a transaction block")]
    InTransactionBlock,
    #[error("{0}")]
    Argument(String),
    #[error("this server is already a node of cluster {0}")]
    AlreadyMember(String),
    #[error("cannot form the cluster: {} found", count(.0.len(), "problem"))]
    Unsuitable(Vec<Problem>),
    #[error("could not form the cluster: {step} failed on {}", .problem.node)]
    Step {
        step: &'static str,
        problem: Problem,
        leftovers: Vec<Problem>,
    },
    #[error("the cluster is formed, but {} not come online within {seconds} s", count_have(.problems.len()))]
    NotOnline {
        seconds: u64,
        problems: Vec<Problem>,
    },
}

fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

fn count_have(nodes: usize) -> String {
    let verb = if nodes == 1 { "has" } else { "have" };
    format!("{} {verb}", count(nodes, "node"))
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

impl InitError {
    fn code(&self) -> PgSqlErrorCode {
        match self {
            InitError::NotSuperuser => PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            InitError::InTransactionBlock => PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            InitError::Argument(_) => PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            InitError::AlreadyMember(_)
            | InitError::Unsuitable(_)
            | InitError::Step { .. }
            | InitError::NotOnline { .. } => {
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE
            }
        }
    }

    fn detail(&self) -> Option<String> {
        match self {
            InitError::Unsuitable(problems) | InitError::NotOnline { problems, .. } => {
                Some(lines(problems))
            }
            InitError::Step {
                problem, leftovers, ..
            } if leftovers.is_empty() => Some(format!(
                "{problem}\nEverything done so far was undone on all nodes."
            )),
            InitError::Step {
                problem, leftovers, ..
            } => Some(format!(
                "{problem}\nWhat was done so far could not be undone everywhere:\n{}",
                lines(leftovers)
            )),
            _ => None,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            InitError::NotSuperuser => None,
            InitError::InTransactionBlock => {
                Some("Send SELECT mtm.init_cluster(...) alone, outside BEGIN and other statements.")
            }
            InitError::Argument(_) => Some(
                "Example: SELECT mtm.init_cluster('host=a dbname=app', ARRAY['host=b dbname=app', 'host=c dbname=app']);",
            ),
            InitError::AlreadyMember(_) => Some("See mtm.nodes() for the nodes of the cluster."),
            InitError::Unsuitable(_) => Some(
                "Nothing was changed on any node. Correct all of these, then call mtm.init_cluster again.",
            ),
            InitError::Step { leftovers, .. } if leftovers.is_empty() => {
                Some("Remove the cause, then call mtm.init_cluster again.")
            }
            InitError::Step { .. } => {
                Some("Remove the cause, then call mtm.init_cluster again: it clears what is left.")
            }
            InitError::NotOnline { .. } => Some(
                "Check that every node reaches the others' multimaster.arbiter_port; see mtm.status() and the server logs.",
            ),
        }
    }

    /// Raises the error to the client.
    pub fn raise(self) -> ! {
        let mut report = ErrorReport::new(self.code(), self.to_string(), function_name!());
        if let Some(detail) = self.detail() {
            report = report.set_detail(detail);
        }
        if let Some(hint) = self.hint() {
            report = report.set_hint(hint);
        }
        report::raise(report)
    }
}
