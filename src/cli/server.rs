//! The server program on the copied directory, alone: nobody can connect, and the extension is not loaded.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Settings of the node that was copied which a copy needs to start at all.
pub struct Limits {
    pub max_prepared_transactions: String,
    pub database: String,
    /// Major release of its server.
    pub release: u32,
}

/// PostgreSQL's programs.
pub struct Programs {
    bindir: PathBuf,
}

impl Programs {
    /// Those of the directory, or of the `pg_config` in the search path.
    pub fn find(bindir: Option<&Path>) -> Result<Programs> {
        if let Some(bindir) = bindir {
            return Ok(Programs {
                bindir: bindir.to_owned(),
            });
        }
        let output = Command::new("pg_config").arg("--bindir").output().context(
            "cannot run pg_config; name the directory of PostgreSQL's programs with --bindir",
        )?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(Programs {
            bindir: PathBuf::from(text.trim()),
        })
    }

    /// A program with messages in English: one of them is read.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.bindir.join(name));
        command.env("LC_ALL", "C").env("PGAPPNAME", "mtm clone");
        command
    }

    /// The copy would be complete before the wrong one says so.
    pub fn demand_release(&self, wanted: u32) -> Result<()> {
        for name in ["postgres", "pg_basebackup", "pg_resetwal"] {
            let output = self
                .command(name)
                .arg("--version")
                .output()
                .with_context(|| format!("cannot run {name} of {}", self.bindir.display()))?;
            let said = String::from_utf8_lossy(&output.stdout);
            ensure!(
                release(&said) == Some(wanted),
                "the programs in {} are of another release: {}; the node to copy from has PostgreSQL {wanted} (--bindir)",
                self.bindir.display(),
                said.trim()
            );
        }
        Ok(())
    }

    /// Runs a program to its end; what it says is shown.
    pub fn run(&self, name: &str, arguments: impl FnOnce(&mut Command)) -> Result<()> {
        let mut command = self.command(name);
        arguments(&mut command);
        let status = command
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot run {name}"))?;
        if !status.success() {
            bail!("{name} failed ({status})");
        }
        Ok(())
    }

    /// Runs statements, each by itself, on the directory; returns what the server wrote.
    pub fn single(&self, pgdata: &Path, limits: &Limits, statements: &[String]) -> Result<String> {
        // The copied configuration may lie elsewhere, and names an extension that must not run yet.
        let empty = pgdata.join("multimaster.copy.conf");
        std::fs::write(&empty, "").with_context(|| format!("cannot write {}", empty.display()))?;
        let mut command = self.command("postgres");
        command.arg("--single").arg("-j").arg("-D").arg(pgdata);
        for setting in [
            format!("config_file={}", empty.display()),
            "shared_preload_libraries=".to_owned(),
            "lc_messages=C".to_owned(),
            "logging_collector=off".to_owned(),
            "log_destination=stderr".to_owned(),
            "log_min_messages=log".to_owned(),
            "synchronous_standby_names=".to_owned(),
            "archive_mode=off".to_owned(),
            "exit_on_error=on".to_owned(),
            "wal_level=logical".to_owned(),
            format!(
                "max_prepared_transactions={}",
                limits.max_prepared_transactions
            ),
        ] {
            command.arg("-c").arg(setting);
        }
        let mut child = command
            .arg(&limits.database)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run postgres")?;
        let mut input = child.stdin.take().context("no way to talk to postgres")?;
        let text: String = statements
            .iter()
            .map(|statement| format!("{statement};\n\n"))
            .collect();
        // What the server has to say when it ends early is the better message.
        let written = input.write_all(text.as_bytes());
        drop(input);
        let output = child.wait_with_output().context("postgres was lost")?;
        std::fs::remove_file(&empty)
            .with_context(|| format!("cannot remove {}", empty.display()))?;
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let failed = ["ERROR:", "FATAL:", "PANIC:"]
            .iter()
            .any(|level| said.contains(level));
        if !output.status.success() || failed || written.is_err() {
            bail!("the copied server did not do what it should\n{said}");
        }
        Ok(said)
    }
}

/// The major release in what `postgres --version` prints.
fn release(said: &str) -> Option<u32> {
    let version = said.split("(PostgreSQL) ").nth(1)?;
    let digits = version.split(|sign: char| !sign.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// Where the last record begins that the server has replayed.
pub fn replayed_to(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.contains("redo done at "))?;
    let place = line.split("redo done at ").nth(1)?.split(' ').next()?;
    let (upper, lower) = place.split_once('/')?;
    let upper = u64::from_str_radix(upper, 16).ok()?;
    Some(upper << 32 | u64::from_str_radix(lower, 16).ok()?)
}

/// The values of a column in what a server without clients prints.
pub fn values<'a>(said: &'a str, column: &str) -> Vec<&'a str> {
    let prefix = format!("{column} = \"");
    said.lines()
        .filter_map(|line| line.split(prefix.as_str()).nth(1)?.split('"').next())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_redo_is_read() {
        let said = "LOG:  redo starts at 0/2000060\nLOG:  redo done at 1/20000A0 system usage: CPU: user: 0.00 s\n";
        assert_eq!(replayed_to(said), Some(0x1_0200_00A0));
        assert_eq!(replayed_to("LOG:  ready"), None);
    }

    #[test]
    fn the_release_is_read() {
        let said = "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        assert_eq!(release(said), Some(15));
        assert_eq!(release("postgres (PostgreSQL) 17devel\n"), Some(17));
        assert_eq!(release(""), None);
    }

    #[test]
    fn printed_rows_are_read() {
        let said = "\t 1: gid = \"mtm-1-2\"\t(typeid = 25, len = -1, typmod = -1, byval = f)\n\t----\n\t 1: gid = \"b\"\t(x)\n";
        assert_eq!(values(said, "gid"), ["mtm-1-2", "b"]);
    }
}
