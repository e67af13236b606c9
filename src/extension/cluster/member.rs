//! One future node while `mtm.init_cluster` works on it: its name, its address and the connection to it.

use std::time::Duration;

use pgrx::spi::quote_literal;
use protocol::NodeId;

use super::conninfo::Conninfo;
use super::error::Problem;
use crate::pg::remote::{Connection, RemoteError, Row};

/// Used when the connection string sets no `connect_timeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How much longer this side waits than the other side is told to, so that the other side's own message arrives.
const PATIENCE: Duration = Duration::from_secs(2);

/// Held by the session of `mtm.init_cluster` on every node, so that two of them cannot mix.
const INIT_LOCK: i64 = 0x6d74_6d5f_696e_6974;

const APPLICATION: &str = "multimaster init";

/// Answer of `node_identify`: which database of which server.
pub const WHO_SQL: &str = "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()) || '/' || \
     extract(epoch FROM pg_catalog.pg_postmaster_start_time()) || '/' || oid \
     FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()";

/// A future node and the connection to it.
pub struct Member {
    pub id: NodeId,
    pub conninfo: String,
    connection: Connection,
    backend_pid: i32,
}

impl Member {
    /// Connects and prepares the session: nothing it sends is logged or shown, since some of it holds passwords, and nothing waits longer than
    /// `timeout`.
    pub fn connect(id: NodeId, conninfo: &str, timeout: Duration) -> Result<Member, Problem> {
        Self::open(id, conninfo, timeout).map_err(|error| problem(id, conninfo, tidy(&error)))
    }

    fn open(id: NodeId, conninfo: &str, timeout: Duration) -> Result<Member, RemoteError> {
        let connect_timeout = connect_timeout(conninfo);
        let mut connection = Connection::open(conninfo, APPLICATION, connect_timeout)?;
        connection.set_timeout(timeout + PATIENCE);
        let superuser = connection.query("SELECT current_setting('is_superuser')", 1)?;
        if first_value(superuser).as_deref() != Some("on") {
            return Err(RemoteError(
                "the role that connects is not a superuser".into(),
            ));
        }
        connection.run(&session_settings(timeout))?;
        let pid = connection.query("SELECT pg_catalog.pg_backend_pid()", 1)?;
        let backend_pid = first_value(pid).and_then(|pid| pid.parse().ok());
        let backend_pid = backend_pid.ok_or_else(|| RemoteError("no process id".into()))?;
        Ok(Member {
            id,
            conninfo: conninfo.to_owned(),
            connection,
            backend_pid,
        })
    }

    /// Connects anew and ends the old session, which may still be at work on something that nobody wants any more.
    pub fn reconnect(self, timeout: Duration) -> Result<Member, Problem> {
        let Member {
            id,
            conninfo,
            connection,
            backend_pid,
        } = self;
        drop(connection);
        let member = Member::connect(id, &conninfo, timeout)?;
        let end = format!("SELECT pg_catalog.pg_terminate_backend({backend_pid}, 5000)");
        member.query(&end, 1)?;
        Ok(member)
    }

    /// Runs one command that returns no rows.
    pub fn run(&self, sql: &str) -> Result<(), Problem> {
        self.connection
            .run(sql)
            .map_err(|error| self.problem(tidy(&error)))
    }

    /// Runs one query that returns `columns` columns.
    pub fn query(&self, sql: &str, columns: usize) -> Result<Vec<Row>, Problem> {
        self.connection
            .query(sql, columns)
            .map_err(|error| self.problem(tidy(&error)))
    }

    /// Runs one query and returns the first column of its first row.
    pub fn value(&self, sql: &str) -> Result<Option<String>, Problem> {
        Ok(first_value(self.query(sql, 1)?))
    }

    /// Keeps other runs of `mtm.init_cluster` off the node until this session ends; `false` when another one is at work.
    pub fn lock(&self) -> Result<bool, Problem> {
        let locked = self.value(&format!(
            "SELECT pg_catalog.pg_try_advisory_lock({INIT_LOCK})"
        ))?;
        Ok(locked.as_deref() == Some("t"))
    }

    /// Host under which the other nodes find this one's arbiter: what the connection string names, or this machine for a socket.
    pub fn host(&self) -> String {
        let conninfo = Conninfo::parse(&self.conninfo);
        let single = |name: &&str| !name.contains(',');
        if let Some(address) = conninfo.get("hostaddr").filter(single) {
            return address.to_owned();
        }
        match self.connection.address() {
            Some((host, _)) if !host.starts_with(['/', '@']) => host,
            _ => "localhost".to_owned(),
        }
    }

    /// A problem of this node.
    pub fn problem(&self, cause: impl Into<String>) -> Problem {
        problem(self.id, &self.conninfo, cause.into())
    }
}

/// Name of the node with that number.
pub fn node_name(id: NodeId) -> String {
    format!("n{id}")
}

/// A problem of the node to which `conninfo` should lead.
pub fn problem(id: NodeId, conninfo: &str, cause: String) -> Problem {
    let shown = Conninfo::parse(conninfo).without_secrets();
    Problem {
        node: format!("{} ({shown})", node_name(id)),
        cause,
    }
}

/// How long a connection attempt with this string may take.
pub fn connect_timeout(conninfo: &str) -> Duration {
    let given = Conninfo::parse(conninfo)
        .get("connect_timeout")
        .and_then(|text| text.parse().ok());
    match given {
        Some(seconds @ 1..) => Duration::from_secs(seconds),
        _ => CONNECT_TIMEOUT,
    }
}

/// An SQL list of text values.
pub fn literal_list<'a>(values: impl IntoIterator<Item = &'a str>) -> String {
    let literals: Vec<String> = values.into_iter().map(quote_literal).collect();
    literals.join(", ")
}

/// Settings under which two servers give equal texts for equal data, and which keep secrets out of logs.
fn session_settings(timeout: Duration) -> String {
    let millis = timeout.as_millis();
    format!(
        "SET log_statement = 'none'; SET log_min_error_statement = 'panic'; SET log_min_duration_statement = -1; \
         SET log_min_duration_sample = -1; SET log_duration = off; SET track_activities = off; \
         SET statement_timeout = {millis}; SET lock_timeout = {millis}; SET idle_in_transaction_session_timeout = 0; \
         SET timezone = 'UTC'; SET bytea_output = 'hex'; SET xmloption = 'content'; SET lc_monetary = 'C'; \
         SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed'; \
         SET session_replication_role = 'origin'; SET role = 'none'"
    )
}

fn first_value(rows: Vec<Row>) -> Option<String> {
    rows.into_iter().next()?.into_iter().next()?
}

/// libpq's text without the severity that every server error starts with.
fn tidy(error: &RemoteError) -> String {
    let text = error.0.as_str();
    text.strip_prefix("ERROR:")
        .unwrap_or(text)
        .trim()
        .to_owned()
}
