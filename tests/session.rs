//! A client session with answers that are easy to compare.

use std::ops::{Deref, DerefMut};

use anyhow::{Context, Result, bail};
use postgres::error::DbError;
use postgres::{Client, SimpleQueryMessage};
use xtask::cluster::explain;

/// A session; everything of [`Client`] works on it too.
pub struct Session(Client);

impl Session {
    /// Wraps a connection.
    pub fn new(client: Client) -> Session {
        Session(client)
    }

    /// Runs statements in one message of the simple protocol.
    ///
    /// # Errors
    /// What the server says.
    pub fn run(&mut self, sql: &str) -> Result<()> {
        self.0
            .batch_execute(sql)
            .map_err(explain)
            .with_context(|| format!("in {sql:?}"))
    }

    /// Runs statements and returns all rows: columns separated by `|`, rows by line ends, NULL empty.
    ///
    /// # Errors
    /// What the server says.
    pub fn text(&mut self, sql: &str) -> Result<String> {
        let messages = self
            .0
            .simple_query(sql)
            .map_err(explain)
            .with_context(|| format!("in {sql:?}"))?;
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                let cells: Vec<&str> = (0..row.len())
                    .map(|column| row.get(column).unwrap_or(""))
                    .collect();
                Some(cells.join("|"))
            }
            _ => None,
        });
        Ok(rows.collect::<Vec<_>>().join("\n"))
    }

    /// Runs statements that must fail, and returns the server's error.
    ///
    /// # Errors
    /// When they succeed, or the connection breaks.
    pub fn refused(&mut self, sql: &str) -> Result<DbError> {
        match self.0.batch_execute(sql) {
            Ok(()) => bail!("{sql:?} must fail, and did not"),
            Err(error) => match error.as_db_error() {
                Some(db) => Ok(db.clone()),
                None => Err(anyhow::Error::new(error).context(format!("in {sql:?}"))),
            },
        }
    }

    /// Runs statements that must fail with this SQLSTATE.
    ///
    /// # Errors
    /// When they succeed or fail otherwise.
    pub fn refused_with(&mut self, sqlstate: &str, sql: &str) -> Result<DbError> {
        let error = self.refused(sql)?;
        if error.code().code() != sqlstate {
            bail!("{sql:?} must fail with {sqlstate}, but: {error:?}");
        }
        Ok(error)
    }
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.0
    }
}
