//! `mtm clone`: a lost node becomes a copy of another one.
//!
//! 1. All other nodes say that it can be replaced: they are the members, nothing older is open, and nobody hears the lost node.
//! 2. Each makes the slot from which the new node will read.
//! 3. A base backup of the donor, replayed to its end without the extension.
//! 4. What is the donor's own is taken out: its number, what it has promised and voted, and what it holds prepared. The copy's place in the donor's WAL is the end of
//!    what was replayed.
//! 5. Transaction ids, numbers of commits and WAL positions continue above all that the lost node can have used.
//!
//! Why that is right is in `docs/membership.md`, "A copy of a node".

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

use crate::CloneOptions;
use crate::nodes::{Nodes, Position};
use crate::server::{Limits, Programs, replayed_to, values};
use crate::session::{column, demand_replication};

/// Room in the numbering of WAL between what others have seen of the lost node and what the copy writes, bytes: more than it can have written unseen.
const WAL_GAP: u64 = 1 << 36;
/// Rows of `mtm.marks`: the epoch, sixteen nodes, the membership.
const MARK_ROWS: i32 = 18;
const EPOCH_ROW: i32 = 0;
const MEMBERS_ROW: i32 = 17;
/// Files of an installation that belong to the machine, not to the data.
const CONFIGURATION: [&str; 8] = [
    "postgresql.conf",
    "postgresql.auto.conf",
    "pg_hba.conf",
    "pg_ident.conf",
    // Where PostgreSQL looks for certificates and keys unless told otherwise. Those of the node that was copied would say another name.
    "server.crt",
    "server.key",
    "root.crt",
    "root.crl",
];
/// Files that say how the copied server was started or followed.
const LEFT_OVER: [&str; 2] = ["standby.signal", "postmaster.opts"];

/// The lost node has used values of its share that the donor's sequences know nothing of. Those in columns that own a sequence, or whose default uses one, can be found.
/// What lies outside of the sequence's range was not drawn from it; temporary and unlogged tables are not the cluster's.
const PASS_USED_VALUES: &str = "DO $$ DECLARE s record; used bigint; BEGIN \
FOR s IN SELECT q.seqrelid::regclass AS name, a.attrelid::regclass AS owner, a.attname, q.seqincrement > 0 AS rises, q.seqmin, q.seqmax \
FROM (SELECT objid AS sequence, refobjid AS owner, refobjsubid AS number FROM pg_depend \
WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND deptype IN ('a', 'i') \
UNION SELECT d.refobjid, e.adrelid, e.adnum FROM pg_depend d JOIN pg_attrdef e ON e.oid = d.objid \
WHERE d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_class'::regclass) AS uses \
JOIN pg_sequence q ON q.seqrelid = uses.sequence JOIN pg_attribute a ON a.attrelid = uses.owner AND a.attnum = uses.number \
JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p' \
WHERE a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) LOOP \
EXECUTE format('SELECT CASE WHEN %L THEN max(%I) ELSE min(%I) END::bigint FROM %s WHERE %I BETWEEN %L AND %L', \
s.rises, s.attname, s.attname, s.owner, s.attname, s.seqmin, s.seqmax) INTO used; \
EXECUTE format('SELECT setval(%L, %L) FROM %s WHERE CASE WHEN %L THEN last_value <= %L ELSE last_value >= %L END', \
s.name, used, s.name, s.rises, used, used); \
END LOOP; END $$";

/// Where copies are made, within the data directory.
const WORK: &str = "multimaster-copy";
/// Without this file no server starts.
const VERSION_FILE: &str = "PG_VERSION";

/// Makes the copy, from the first question to a directory that can be started.
pub fn run(options: &CloneOptions) -> Result<()> {
    let programs = Programs::find(options.bindir.as_deref())?;
    let target = Target::new(&options.pgdata)?;
    let mut nodes = Nodes::connect(&programs, &options.from, options.node)?;
    nodes.lock()?;
    say("looking at the other nodes");
    nodes.position()?;
    let limits = limits(&mut nodes)?;
    programs.demand_release(limits.release)?;
    demand_replication(&programs, &options.from).context("the node to copy from")?;
    target.clear()?;
    let number = nodes.begin()?;
    copy(options, &programs, &target, &mut nodes, &Begun { limits, number })
        .with_context(|| format!("node {} has not been replaced, run mtm clone again; until then the other nodes keep WAL for it, up to multimaster.max_recovery_lag", options.node))?;
    say(&format!(
        "node {} is ready: look at its postgresql.conf, then start its server",
        options.node
    ));
    Ok(())
}

/// What the other nodes have said.
struct Begun {
    limits: Limits,
    /// Number of the copy.
    number: i64,
}

/// From the first slot on.
fn copy(
    options: &CloneOptions,
    programs: &Programs,
    target: &Target,
    nodes: &mut Nodes,
    begun: &Begun,
) -> Result<()> {
    let Begun { limits, number } = begun;
    say("making slots");
    let begins = nodes.make_slots()?;
    say(&format!("copying node {}", nodes.donor));
    programs.run("pg_basebackup", |command| {
        command
            .args(["--progress", "--checkpoint=fast", "--wal-method=stream"])
            .arg("--dbname")
            .arg(&options.from)
            .arg("--pgdata")
            .arg(&target.work);
        for mapping in &options.tablespace_mapping {
            command.arg("--tablespace-mapping").arg(mapping);
        }
    })?;
    // Whoever the lost node was, it must not be there. What it has said until now, should it have been back in between, counts as lost, too: the copy begins with what is true at this moment.
    let position = nodes.position()?;
    for name in LEFT_OVER {
        let _ = fs::remove_file(target.work.join(name));
    }
    say("replaying what was written meanwhile");
    let list = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND gid LIKE 'mtm-%'";
    let who = "SELECT node_id AS copied FROM mtm.cluster";
    let said = programs.single(&target.work, limits, &[list.to_owned(), who.to_owned()])?;
    let copied = values(&said, "copied");
    ensure!(
        copied == [nodes.donor.to_string()],
        "the copy is one of node {}, not of node {}; --from has to lead to one node alone, and always",
        copied.join(", "),
        nodes.donor
    );
    let replayed = replayed_to(&said).context("the server did not say how far it has replayed")?;
    say(&format!("making it node {}", options.node));
    let plan = Plan {
        node: options.node,
        number: *number,
        donor: nodes.donor,
        replayed,
        position: &position,
        begins: &begins,
    };
    programs.single(
        &target.work,
        limits,
        &plan.statements(&values(&said, "gid"))?,
    )?;
    let segment = segment_after(nodes, position.mark)?;
    programs.run("pg_resetwal", |command| {
        command
            .arg(format!("--epoch={number}"))
            .arg(format!("--next-wal-file={segment}"))
            .arg(&target.work);
    })?;
    if let Some(directory) = &options.config {
        take_configuration(directory, &target.work)?;
    }
    target.done()
}

fn say(text: &str) {
    println!("mtm: {text}");
}

/// The data directory. The copy is made in a directory within, which tells an interrupted run from somebody's data.
struct Target {
    pgdata: PathBuf,
    /// Holds the directories of all runs.
    works: PathBuf,
    /// Another one in each run: a program that an interrupted run has left behind may still write to its own.
    work: PathBuf,
}

impl Target {
    fn new(pgdata: &Path) -> Result<Target> {
        let pgdata = std::path::absolute(pgdata).context("the data directory")?;
        let works = pgdata.join(WORK);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let work = works.join(format!("{}-{}", now.as_nanos(), std::process::id()));
        let target = Target {
            pgdata,
            works,
            work,
        };
        // Where the last file has come, the copy is complete, and no run is interrupted.
        let is_complete = target.pgdata.join(VERSION_FILE).exists();
        ensure!(
            target.works.exists() && !is_complete || target.entries()?.is_empty(),
            "{} is not empty; move away what is left of the lost node",
            target.pgdata.display()
        );
        Ok(target)
    }

    fn entries(&self) -> Result<Vec<PathBuf>> {
        match fs::read_dir(&self.pgdata) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read {}", self.pgdata.display()))
            }
        }
    }

    /// Makes the directory, and removes what an interrupted run has left: that with the mark of such a run comes last.
    fn clear(&self) -> Result<()> {
        let rest = self
            .entries()?
            .into_iter()
            .filter(|path| *path != self.works);
        for path in rest.chain(self.works.exists().then(|| self.works.clone())) {
            let removed = if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.with_context(|| format!("cannot remove {}", path.display()))?;
        }
        let private = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o700));
        fs::create_dir_all(&self.work)
            .and_then(|()| private(&self.pgdata))
            .and_then(|()| private(&self.work))
            .with_context(|| format!("cannot make {}", self.work.display()))
    }

    /// Moves the copy to its place. No server starts there before the last file has come.
    fn done(&self) -> Result<()> {
        let move_up = |name: &OsStr| {
            fs::rename(self.work.join(name), self.pgdata.join(name))
                .with_context(|| format!("cannot move {}", name.display()))
        };
        let entries = fs::read_dir(&self.work).context("cannot read the copy")?;
        let names: Vec<OsString> = entries
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<_>>()?;
        for name in names.iter().filter(|name| *name != VERSION_FILE) {
            move_up(name)?;
        }
        let keep = || {
            let kept = File::open(&self.pgdata).and_then(|directory| directory.sync_all());
            kept.with_context(|| format!("cannot flush {}", self.pgdata.display()))
        };
        keep()?;
        move_up(OsStr::new(VERSION_FILE))?;
        keep()?;
        fs::remove_dir(&self.work)
            .and_then(|()| fs::remove_dir(&self.works))
            .with_context(|| format!("cannot remove {}", self.works.display()))
    }
}

/// Everything that makes the copy the lost node.
struct Plan<'a> {
    node: i32,
    number: i64,
    donor: i32,
    /// Where the last record begins that the copy holds.
    replayed: u64,
    position: &'a Position,
    /// Where each node's slot begins.
    begins: &'a [(i32, i64)],
}

impl Plan<'_> {
    fn statements(&self, prepared: &[&str]) -> Result<Vec<String>> {
        let mut statements = Vec::new();
        for gid in prepared {
            let plain = gid
                .chars()
                .all(|sign| sign.is_ascii_alphanumeric() || sign == '-');
            ensure!(plain, "a prepared transaction with a strange name: {gid}");
            statements.push(format!("ROLLBACK PREPARED '{gid}'"));
        }
        statements.push(
            "TRUNCATE mtm.records, mtm.marks, mtm.recovered, mtm.slots_made, mtm.needs_copy, mtm.copied"
                .to_owned(),
        );
        for id in 0..MARK_ROWS {
            statements.push(self.mark_row(id)?);
        }
        statements.push(PASS_USED_VALUES.to_owned());
        statements.push(format!("UPDATE mtm.cluster SET node_id = {}", self.node));
        statements.push(format!(
            "INSERT INTO mtm.copied VALUES (true, {}, {}, true)",
            self.donor, self.position.generation
        ));
        Ok(statements)
    }

    fn mark_row(&self, id: i32) -> Result<String> {
        let mut body = [0; 8];
        match id {
            EPOCH_ROW => body[0] = self.number,
            MEMBERS_ROW => {
                for (word, bytes) in body.iter_mut().zip(self.position.record.chunks_exact(8)) {
                    *word = i64::from_ne_bytes(bytes.try_into().context("a record is too short")?);
                }
            }
            // A position behind the start of the last record and not behind the start of the next.
            id if id == self.donor => body[0] = i64::try_from(self.replayed + 1)?,
            id => {
                let begin = self.begins.iter().find(|(node, _)| *node == id);
                body[0] = begin.map_or(0, |(_, lsn)| *lsn);
            }
        }
        let words: Vec<String> = body.iter().map(i64::to_string).collect();
        Ok(format!(
            "INSERT INTO mtm.marks VALUES ({id}, 0, {})",
            words.join(", ")
        ))
    }
}

fn limits(nodes: &mut Nodes) -> Result<Limits> {
    let row = nodes.donor()?.row(
        "SELECT current_setting('max_prepared_transactions'), current_database(), current_setting('server_version_num')::int / 10000",
    )?;
    Ok(Limits {
        max_prepared_transactions: column(&row, 0)?,
        database: column(&row, 1)?,
        release: column(&row, 2)?,
    })
}

/// Name of the WAL file with which the copy goes on.
fn segment_after(nodes: &mut Nodes, mark: i64) -> Result<String> {
    let row = nodes.donor()?.row(
        "SELECT (pg_current_wal_lsn() - '0/0')::bigint, pg_size_bytes(current_setting('wal_segment_size')), \
                (SELECT timeline_id FROM pg_control_checkpoint())",
    )?;
    let (end, size, timeline): (i64, i64, i32) =
        (column(&row, 0)?, column(&row, 1)?, column(&row, 2)?);
    let (end, size) = (u64::try_from(end.max(mark))?, u64::try_from(size)?);
    if size == 0 {
        bail!("WAL segments without a size");
    }
    let segment = (end + WAL_GAP).div_ceil(size);
    let per_file = (1 << 32) / size;
    Ok(format!(
        "{timeline:08X}{:08X}{:08X}",
        segment / per_file,
        segment % per_file
    ))
}

fn take_configuration(from: &Path, to: &Path) -> Result<()> {
    for name in CONFIGURATION {
        let file = from.join(name);
        if file.exists() {
            let copy = to.join(name);
            fs::copy(&file, &copy)
                .and_then(|_| File::open(&copy)?.sync_all())
                .with_context(|| format!("cannot copy {}", file.display()))?;
        }
    }
    Ok(())
}
