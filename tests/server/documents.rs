//! What documents say of settings is what the server says.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use multimaster_tests::{Rig, SharedCase, cases};

pub fn cases() -> Vec<SharedCase> {
    cases![configuration_md_lists_the_settings_of_the_server]
}

const CONFIGURATION: &str = include_str!("../../docs/configuration.md");
/// How the row of a setting of the extension begins.
const ROW: &str = "| `multimaster.";
/// Name, default, unit, range and context; the meaning follows.
const COMPARED_COLUMNS: usize = 5;

/// The settings as the page has them: name, default, unit, range, context, with `|` between them.
fn documented() -> Result<BTreeSet<String>> {
    CONFIGURATION
        .lines()
        .filter(|line| line.starts_with(ROW))
        .map(|line| {
            let cells: Vec<&str> = line
                .trim_matches('|')
                .split('|')
                .take(COMPARED_COLUMNS)
                .map(|cell| cell.trim().trim_matches('`'))
                .collect();
            let [name, default, unit, range, context] = cells[..] else {
                bail!("a column is missing in {line}");
            };
            // What else stands there explains the number.
            let default = default.split(" (").next().unwrap_or_default();
            Ok(format!("{name}|{default}|{unit}|{range}|{context}"))
        })
        .collect()
}

const IN_THE_SERVER: &str = "
    SELECT name, boot_val, unit,
           CASE vartype WHEN 'integer' THEN min_val || ' to ' || max_val
                        WHEN 'enum' THEN array_to_string(enumvals, ', ')
                        WHEN 'bool' THEN 'on, off'
           END,
           CASE context WHEN 'postmaster' THEN 'start' WHEN 'sighup' THEN 'reload' WHEN 'user' THEN 'session' ELSE context END
      FROM pg_settings WHERE name LIKE 'multimaster.%'";

fn configuration_md_lists_the_settings_of_the_server(rig: &Rig) -> Result<()> {
    let documented = documented()?;
    for node in 1..=rig.len() {
        let mut session = rig.session(node)?;
        let known: BTreeSet<String> = session
            .text(IN_THE_SERVER)?
            .lines()
            .map(str::to_owned)
            .collect();
        ensure!(
            known == documented,
            "only in the server: {:#?}, only in docs/configuration.md: {:#?}",
            known.difference(&documented),
            documented.difference(&known)
        );
        let unexplained = session.text("SELECT name FROM pg_settings WHERE name LIKE 'multimaster.%' AND (short_desc = '' OR extra_desc = '')")?;
        ensure!(unexplained.is_empty(), "not explained: {unexplained}");
    }
    Ok(())
}
