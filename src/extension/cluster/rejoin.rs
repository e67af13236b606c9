//! `mtm.rejoin()`: a node that has given up tries again, once somebody has mended the cause; and what there is to do where that does not help.

use pgrx::prelude::*;

use crate::pg::process;
use crate::pg::report::{self, ErrorReport};
use crate::pg::shared::{NodeStatus, shared};

/// How often it is looked whether the arbiter has ended, and after how many milliseconds; short enough to do without a look for interrupts.
const LOOKS: u32 = 300;
const LOOK_MS: u64 = 10;

/// What an operator has to type on this machine; the first other node stands for any of them. Without the extension's own names in the search path.
const COMMAND: &str = "SELECT pg_catalog.format( \
    'Stop this server, move its data directory away and run on this machine: mtm clone --node %s --from %L --pgdata %L', \
    c.node_id, mtm.without_secrets(n.conninfo), pg_catalog.current_setting('data_directory')) \
    FROM mtm.cluster c, mtm.cluster_nodes n WHERE n.node_id <> c.node_id ORDER BY n.node_id LIMIT 1";

/// Makes a node that has stopped as `failed` recover again; says what it does, or that there is nothing to do.
///
/// The arbiter starts anew, as it does with the server: whatever it had given up on is forgotten, and nothing else.
///
/// # Errors
/// 42501 unless the user is a superuser; 55000 where only a copy helps, with the command, or where there is no cluster.
#[pg_extern]
fn rejoin() -> String {
    super::require_superuser();
    match shared().status() {
        NodeStatus::Failed => {
            try_again();
            "this node recovers again: see mtm.recovery".to_owned()
        }
        NodeStatus::NeedsCopy => refuse(
            "what this node has missed is no longer kept; it needs a copy of another node",
            command(),
        ),
        NodeStatus::Disabled => refuse("this server is not a node of a cluster", None),
        NodeStatus::Online => "this node is online: there is nothing to do".to_owned(),
        other => format!(
            "this node is {} and comes back by itself: there is nothing to do",
            other.name()
        ),
    }
}

/// Ends the arbiter, which the postmaster starts again, and waits until it is gone.
fn try_again() {
    let arbiter = shared().arbiter.pid();
    // Read-only: with a transaction id the session's transaction would have to commit, on a node that does not serve.
    let ended = Spi::connect(|client| {
        let end = "SELECT pg_catalog.pg_terminate_backend($1)";
        client.select(end, Some(1), &[arbiter.into()]).map(drop)
    });
    if let Err(error) = ended {
        pgrx::error!("multimaster cannot end its arbiter: {error}");
    }
    for _ in 0..LOOKS {
        if shared().status() != NodeStatus::Failed || shared().arbiter.pid() != arbiter {
            return;
        }
        process::pause_ms(LOOK_MS);
    }
}

fn command() -> Option<String> {
    match Spi::get_one::<String>(COMMAND) {
        Ok(command) => command,
        Err(error) => pgrx::error!("multimaster cannot read its catalog: {error}"),
    }
}

fn refuse(why: &'static str, hint: Option<String>) -> ! {
    let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
    let report = ErrorReport::new(code, why, function_name!());
    report::raise(match hint {
        Some(hint) => report.set_hint(hint),
        None => report,
    })
}
