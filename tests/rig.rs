//! The cluster that cases share, and what they do with it.

use std::io::Write;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::{Context, Result, ensure};
use xtask::cluster::{Cluster, specs};
use xtask::command;
use xtask::installation::Installation;
use xtask::server::{Server, Spec, settings};

use crate::Session;

/// A running cluster. Each case works in a schema of its own, which is the first of every session's search path.
pub struct Rig {
    pub cluster: Cluster,
    schema: Mutex<String>,
}

impl Rig {
    /// Starts a cluster.
    ///
    /// # Errors
    /// When it does not become whole.
    pub fn start(installation: &Installation, nodes: usize) -> Result<Rig> {
        if crate::plain() {
            let cluster = Cluster::start_servers(installation, &plain_specs())?;
            return Ok(Rig {
                cluster,
                schema: Mutex::default(),
            });
        }
        let cluster = Cluster::start(installation, nodes)?;
        cluster
            .init_cluster()
            .inspect_err(|_| cluster.keep_logs())?;
        Ok(Rig {
            cluster,
            schema: Mutex::default(),
        })
    }

    /// Gives the coming case its schema.
    ///
    /// # Errors
    /// When the cluster does not take it.
    pub fn begin_case(&self, name: &str) -> Result<()> {
        let schema = name.replace("::", "_").chars().take(60).collect::<String>();
        Session::new(self.cluster.connect(0)?).run(&format!("CREATE SCHEMA {schema}"))?;
        *self.schema.lock().unwrap_or_else(PoisonError::into_inner) = schema;
        Ok(())
    }

    /// Removes what the case made.
    ///
    /// # Errors
    /// When the cluster does not take it.
    pub fn end_case(&self) -> Result<()> {
        let schema = self.schema();
        Session::new(self.cluster.connect(0)?).run(&format!("DROP SCHEMA {schema} CASCADE"))
    }

    /// The case's schema.
    pub fn schema(&self) -> String {
        self.schema
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.cluster.nodes.len()
    }

    /// Never; a cluster has at least one node.
    pub fn is_empty(&self) -> bool {
        self.cluster.nodes.is_empty()
    }

    /// The server of node `node` (from 1, as people count); on one stock server, always that one.
    pub fn server(&self, node: usize) -> &Server {
        &self.cluster.nodes[(node - 1) % self.len()]
    }

    /// A session on node `node` (from 1, as people count).
    ///
    /// # Errors
    /// When the node refuses it.
    pub fn session(&self, node: usize) -> Result<Session> {
        let mut session = Session::new(self.server(node).connect()?);
        session.run(&format!("SET search_path = {}, public", self.schema()))?;
        Ok(session)
    }

    /// Runs `sql` on every node and demands `expected` everywhere, at once: what was committed on one node is visible
    /// on all when the client has its answer.
    ///
    /// # Errors
    /// When a node refuses, or answers something else.
    pub fn expect(&self, sql: &str, expected: &str) -> Result<()> {
        for node in 1..=self.len() {
            let found = self.session(node)?.text(sql)?;
            ensure!(
                found == expected,
                "node {node}: {sql}\n  expected {expected:?}\n  found    {found:?}"
            );
        }
        Ok(())
    }

    /// What psql prints for `script` on a node, command tags included; errors are part of the output.
    ///
    /// # Errors
    /// When psql cannot be run.
    pub fn psql(&self, node: usize, script: &str) -> Result<String> {
        let mut psql = self.server(node).client_program("psql");
        psql.env(
            "PGOPTIONS",
            format!("-c search_path={},public", self.schema()),
        )
        .args([
            "--no-psqlrc",
            "--no-align",
            "--tuples-only",
            "--set",
            "VERBOSITY=default",
            "--file",
            "-",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
        let mut child = psql.spawn().context("cannot run psql")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(script.as_bytes())?;
        }
        Ok(command::joined(&child.wait_with_output()?))
    }

    /// Runs a pgbench script `transactions` times in one client; returns pgbench's report.
    ///
    /// # Errors
    /// When pgbench fails.
    pub fn pgbench(
        &self,
        node: usize,
        script: &str,
        protocol: &str,
        transactions: u32,
    ) -> Result<String> {
        let file = std::env::temp_dir().join(format!(
            "multimaster-{}-{}.pgbench",
            std::process::id(),
            self.schema()
        ));
        std::fs::write(&file, script)?;
        let mut pgbench = self.server(node).client_program("pgbench");
        pgbench
            .env(
                "PGOPTIONS",
                format!("-c search_path={},public", self.schema()),
            )
            .args([
                "--no-vacuum",
                "--protocol",
                protocol,
                "--transactions",
                &transactions.to_string(),
                "--file",
            ])
            .arg(&file);
        let report = command::capture(&mut pgbench);
        let _ = std::fs::remove_file(&file);
        report
    }
}

/// One stock server that can do what the cases ask for.
fn plain_specs() -> Vec<Spec> {
    let mut specs = specs(1);
    specs[0].settings = settings(&[
        ("wal_level", "logical"),
        ("max_prepared_transactions", "10"),
    ]);
    specs
}
