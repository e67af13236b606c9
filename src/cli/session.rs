//! A session with a node, through `psql`: so a connection string means here what it means to the nodes, with password files, services and TLS.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail};

use crate::server::Programs;

/// Seconds that an attempt to connect may take where the connection string does not say; the same as the nodes have with each other.
const CONNECT_TIMEOUT: &str = "10";
/// What a role or a database may be limited to: a slot waits for transactions that run, and a session is idle for as long as the copy takes.
const TIMEOUTS: [&str; 3] = ["statement_timeout", "lock_timeout", "idle_session_timeout"];
/// Between the columns of a row.
const SEPARATOR: char = '\u{1f}';
/// Printed when a statement has ended without error.
const END: &str = "mtm: end of statement";

/// Columns of a row as text; null is empty.
pub type Row = Vec<String>;

/// Ends when dropped, and so do the locks that it holds.
pub struct Session {
    psql: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Fails with what the server, or the way to it, has to say.
    pub fn connect(programs: &Programs, conninfo: &str) -> Result<Session> {
        let mut command = programs.command("psql");
        command
            .args([
                "--no-psqlrc",
                "--no-password",
                "--quiet",
                "--no-align",
                "--tuples-only",
            ])
            .args(["--set", "ON_ERROR_STOP=1", "--field-separator"])
            .arg(SEPARATOR.to_string())
            .arg("--dbname")
            .arg(conninfo);
        if std::env::var_os("PGCONNECT_TIMEOUT").is_none() {
            command.env("PGCONNECT_TIMEOUT", CONNECT_TIMEOUT);
        }
        let mut psql = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run psql")?;
        let input = psql.stdin.take();
        let output = psql.stdout.take().context("psql has no output")?;
        let mut session = Session {
            psql,
            input,
            output: BufReader::new(output),
        };
        session.query("SET client_min_messages = error")?;
        for timeout in TIMEOUTS {
            session.query(&format!("SET {timeout} = 0"))?;
        }
        Ok(session)
    }

    /// Runs one statement. An error ends the session.
    pub fn query(&mut self, statement: &str) -> Result<Vec<Row>> {
        let input = self.input.as_mut().context("the session has ended")?;
        // A psql that is gone says why it went, which is the better message.
        let _ = write!(input, "{statement};\n\\echo {END}\n").and_then(|()| input.flush());
        let mut rows = Vec::new();
        loop {
            let mut line = String::new();
            self.output
                .read_line(&mut line)
                .context("cannot read from psql")?;
            match line.strip_suffix('\n') {
                Some(END) => return Ok(rows),
                Some(row) => rows.push(row.split(SEPARATOR).map(str::to_owned).collect()),
                None => bail!("{}", self.complaint()),
            }
        }
    }

    /// The only row of a statement.
    pub fn row(&mut self, statement: &str) -> Result<Row> {
        let mut rows = self.query(statement)?;
        match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => Ok(row),
            _ => bail!("not one row from {statement}"),
        }
    }

    /// Why psql has ended.
    fn complaint(&mut self) -> String {
        self.input = None;
        let mut said = String::new();
        if let Some(mut errors) = self.psql.stderr.take() {
            let _ = errors.read_to_string(&mut said);
        }
        match plain(&said) {
            "" => "the connection was lost".to_owned(),
            said => said.to_owned(),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.psql.wait();
    }
}

/// Whether a base backup may be taken this way: superusers need nothing but a line of `pg_hba.conf` for connections for replication.
///
/// # Errors
/// What the server says if not.
pub fn demand_replication(programs: &Programs, conninfo: &str) -> Result<()> {
    let output = programs
        .command("psql")
        .args(["--no-psqlrc", "--no-password", "--command=IDENTIFY_SYSTEM"])
        .arg("--dbname")
        .arg(for_replication(conninfo))
        .stdin(Stdio::null())
        .output()
        .context("cannot run psql")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    bail!(
        "{}\nA base backup needs connections for replication: see pg_hba.conf and max_wal_senders there.",
        plain(&said)
    )
}

/// The same connection, for replication. A connection string is an address, or names with values, or the name of a database.
fn for_replication(conninfo: &str) -> String {
    let is_address = ["postgresql://", "postgres://"]
        .iter()
        .any(|scheme| conninfo.starts_with(scheme));
    match (is_address, conninfo.contains('?'), conninfo.contains('=')) {
        (true, true, _) => format!("{conninfo}&replication=true"),
        (true, false, _) => format!("{conninfo}?replication=true"),
        (false, _, true) => format!("{conninfo} replication=true"),
        // Of this form pg_basebackup uses nothing, either.
        (false, _, false) => "replication=true".to_owned(),
    }
}

/// What the server said, without psql's words before it.
fn plain(said: &str) -> &str {
    let said = said.trim();
    match said.split_once("ERROR:  ") {
        Some((place, rest)) if place.starts_with("psql:<stdin>:") => rest,
        _ => said.strip_prefix("psql: error: ").unwrap_or(said),
    }
}

/// A column of a row.
pub fn column<T: std::str::FromStr>(row: &Row, number: usize) -> Result<T> {
    let text = row.get(number).context("a row has too few columns")?;
    match text.parse() {
        Ok(value) => Ok(value),
        Err(_) => bail!("not a value that was expected: {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_shown_as_the_server_says_them() {
        assert_eq!(
            plain("psql:<stdin>:3: ERROR:  no\nHINT:  Do.\n"),
            "no\nHINT:  Do."
        );
        assert_eq!(
            plain("psql: error: connection to server failed\n"),
            "connection to server failed"
        );
        assert_eq!(plain(""), "");
    }

    #[test]
    fn every_form_of_a_connection_string_is_made_one_for_replication() {
        for (conninfo, expected) in [
            ("host=a dbname=b", "host=a dbname=b replication=true"),
            ("postgresql://a/b", "postgresql://a/b?replication=true"),
            (
                "postgres://a/b?port=1",
                "postgres://a/b?port=1&replication=true",
            ),
            ("b", "replication=true"),
        ] {
            assert_eq!(for_replication(conninfo), expected);
        }
    }

    #[test]
    fn columns_are_read() {
        let row: Row = vec!["7".to_owned(), String::new()];
        assert_eq!(column::<i64>(&row, 0).unwrap(), 7);
        assert!(column::<i64>(&row, 1).is_err());
        assert!(column::<String>(&row, 2).is_err());
    }
}
