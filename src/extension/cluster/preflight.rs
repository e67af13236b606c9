//! Settings of the server without which a node cannot work.
//!
//! The same rules are applied twice: when the server starts, where nobody knows yet how many peers there will be, so that the
//! needs of the smallest cluster decide; and by `mtm.init_cluster` for the real number, on every node.

use std::collections::BTreeMap;

use pgrx::prelude::*;

use crate::pg::report::ErrorReport;
use crate::pg::settings;

/// Peers of the smallest cluster: a server that does not suffice for these does not start.
const PEERS_MIN: u32 = 1;

/// Peers for which the start-up message gives values: three nodes survive the loss of one.
const PEERS_USUAL: u32 = 2;

/// Background workers beside receivers and apply workers: arbiter, finisher, monitor, slot maker, recovery and referee of ours, and core's logical
/// replication launcher. Apply workers never end, so nothing else is free when a node has to recover.
const FIXED_WORKERS: u32 = 7;

/// Setting of newer minor releases that lists the output plugins a server may load.
const OUTPUT_PLUGIN_LIBRARIES: &str = "output_plugin_libraries";

/// Name of the library, as in `shared_preload_libraries`.
pub const LIBRARY: &str = "multimaster";

/// Settings that the rules look at.
pub const RELEVANT: [&str; 14] = [
    "wal_level",
    "max_connections",
    "max_prepared_transactions",
    "max_replication_slots",
    "max_wal_senders",
    "max_worker_processes",
    OUTPUT_PLUGIN_LIBRARIES,
    "fsync",
    "full_page_writes",
    "shared_preload_libraries",
    "multimaster.max_workers",
    "multimaster.arbiter_port",
    "multimaster.heartbeat_send_timeout",
    "multimaster.heartbeat_recv_timeout",
];

/// Values of settings by name, as text in the setting's base unit. A setting that the server does not know is missing.
#[derive(Debug, Clone, Default)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Reads this server's settings.
    pub fn of_this_server() -> Settings {
        let known = |&name: &&str| settings::value(name).map(|value| (name.to_owned(), value));
        Settings(RELEVANT.iter().filter_map(known).collect())
    }

    /// The value of a setting.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The value of a numeric setting; 0 when the server does not know it.
    pub fn number(&self, name: &str) -> u32 {
        let number = self.get(name).and_then(|value| value.parse::<i64>().ok());
        u32::try_from(number.unwrap_or(0).max(0)).unwrap_or(u32::MAX)
    }
}

impl FromIterator<(String, String)> for Settings {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Settings {
        Settings(pairs.into_iter().collect())
    }
}

/// A setting that stands in the way, and the value that would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongSetting {
    pub name: &'static str,
    pub value: String,
    pub wanted: String,
}

impl WrongSetting {
    /// What is wrong, in one line.
    pub fn complaint(&self) -> String {
        format!(
            "{} is {}, needed: {}",
            self.name,
            shown(&self.value),
            shown(&self.wanted)
        )
    }

    /// The line for `postgresql.conf`.
    pub fn cure(&self) -> String {
        let number = self.wanted.parse::<i64>().is_ok();
        if number || self.wanted == "logical" {
            format!("{} = {}", self.name, self.wanted)
        } else {
            format!("{} = '{}'", self.name, self.wanted)
        }
    }
}

fn shown(value: &str) -> &str {
    if value.is_empty() { "empty" } else { value }
}

/// The settings that are wrong for a node with that many peers.
pub fn wrong_settings(settings: &Settings, peers: u32) -> Vec<WrongSetting> {
    let mut wrong = Vec::new();
    if settings.get("wal_level") != Some("logical") {
        wrong.push(WrongSetting {
            name: "wal_level",
            value: settings.get("wal_level").unwrap_or_default().to_owned(),
            wanted: "logical".to_owned(),
        });
    }
    for (name, needed) in needs(settings, peers) {
        let value = settings.number(name);
        if value < needed {
            wrong.push(WrongSetting {
                name,
                value: value.to_string(),
                wanted: needed.to_string(),
            });
        }
    }
    wrong.extend(wrong_output_plugins(settings));
    wrong
}

/// Smallest values of numeric settings.
fn needs(settings: &Settings, peers: u32) -> [(&'static str, u32); 5] {
    let connections = settings.number("max_connections");
    let send_timeout = settings.number("multimaster.heartbeat_send_timeout");
    [
        // Every commit of every node passes through here as a prepared transaction.
        (
            "max_prepared_transactions",
            connections.saturating_mul(peers + 1),
        ),
        // A peer that recovers from this node reads through a copy of its slot, beside the slot itself.
        ("max_replication_slots", 2 * peers),
        // One more serves the connection of mtm.init_cluster.
        ("max_wal_senders", 2 * peers + 1),
        (
            "max_worker_processes",
            settings
                .number("multimaster.max_workers")
                .saturating_add(peers + FIXED_WORKERS),
        ),
        (
            "multimaster.heartbeat_recv_timeout",
            send_timeout.saturating_mul(2),
        ),
    ]
}

fn wrong_output_plugins(settings: &Settings) -> Option<WrongSetting> {
    let list = settings.get(OUTPUT_PLUGIN_LIBRARIES)?;
    if split_list(list).iter().any(|plugin| plugin == LIBRARY) {
        return None;
    }
    let mut wanted = split_list(list);
    wanted.push(LIBRARY.to_owned());
    Some(WrongSetting {
        name: OUTPUT_PLUGIN_LIBRARIES,
        value: list.to_owned(),
        wanted: wanted.join(", "),
    })
}

/// Settings that work but weaken the promise that no committed transaction is lost.
pub fn risky_settings(settings: &Settings) -> Vec<String> {
    let off = ["fsync", "full_page_writes"]
        .into_iter()
        .filter(|name| settings.get(name) == Some("off"));
    off.map(|name| format!("{name} is off: a crash of this server can lose committed transactions"))
        .collect()
}

/// The entries of a list of libraries, without quotes, folders and file endings.
fn split_list(list: &str) -> Vec<String> {
    let entry = |item: &str| {
        let item = item.trim().trim_matches('"');
        let name = item.rsplit('/').next().unwrap_or(item);
        name.strip_suffix(".so").unwrap_or(name).to_owned()
    };
    list.split(',')
        .map(entry)
        .filter(|name| !name.is_empty())
        .collect()
}

/// Why the library may not run with this `shared_preload_libraries`, if it may not.
pub fn wrong_preload(list: &str) -> Option<&'static str> {
    let libraries = split_list(list);
    match libraries.iter().position(|library| library == LIBRARY) {
        Some(0) => None,
        Some(_) => Some("multimaster is not the first library in shared_preload_libraries"),
        None => Some("multimaster is not in shared_preload_libraries"),
    }
}

/// Refuses to go on in a server that cannot be a node.
///
/// For `_PG_init`, after `guc::register`. In the postmaster it ends the start of the server (FATAL); where the library is loaded later,
/// by `CREATE EXTENSION` or `LOAD`, it raises an error (55000).
pub fn check_server() {
    let list = settings::value("shared_preload_libraries").unwrap_or_default();
    if let Some(reason) = wrong_preload(&list) {
        refuse_loading(&list, reason);
    }
    let settings = Settings::of_this_server();
    if !wrong_settings(&settings, PEERS_MIN).is_empty() {
        refuse_settings(&wrong_settings(&settings, PEERS_USUAL));
    }
    for risk in risky_settings(&settings) {
        ereport!(WARNING, PgSqlErrorCode::ERRCODE_WARNING, risk);
    }
}

/// Refuses a library that was not loaded when the server started. To be called before anything else in `_PG_init`.
pub fn check_preloading() {
    if !settings::preloading() {
        let list = settings::value("shared_preload_libraries").unwrap_or_default();
        refuse_loading(&list, "multimaster was not loaded when the server started");
    }
}

fn refuse_loading(list: &str, reason: &'static str) {
    let level = if settings::preloading() {
        PgLogLevel::FATAL
    } else {
        PgLogLevel::ERROR
    };
    let mut libraries = split_list(list);
    libraries.retain(|library| library != LIBRARY);
    libraries.insert(0, LIBRARY.to_owned());
    ErrorReport::new(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        "multimaster must be loaded first through shared_preload_libraries",
        function_name!(),
    )
    .set_detail(reason)
    .set_hint(format!(
        "Set shared_preload_libraries = '{}' in postgresql.conf and restart the server.",
        libraries.join(", ")
    ))
    .report(level);
}

fn refuse_settings(wrong: &[WrongSetting]) {
    let complaints: Vec<String> = wrong.iter().map(WrongSetting::complaint).collect();
    let cures: Vec<String> = wrong.iter().map(WrongSetting::cure).collect();
    ErrorReport::new(
        PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR,
        format!(
            "multimaster cannot run: {} settings must change",
            wrong.len()
        ),
        function_name!(),
    )
    .set_detail(complaints.join("\n"))
    .set_hint(format!(
        "Enough for three nodes, in postgresql.conf:\n{}",
        cures.join("\n")
    ))
    .report(PgLogLevel::FATAL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let pairs = pairs.iter();
        pairs
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    const DEFAULTS: [(&str, &str); 8] = [
        ("wal_level", "replica"),
        ("max_connections", "100"),
        ("max_prepared_transactions", "0"),
        ("max_replication_slots", "10"),
        ("max_wal_senders", "10"),
        ("max_worker_processes", "8"),
        ("multimaster.max_workers", "32"),
        ("multimaster.heartbeat_recv_timeout", "2000"),
    ];

    #[test]
    fn every_wrong_setting_is_listed() {
        let wrong = wrong_settings(&settings(&DEFAULTS), 2);
        let names: Vec<&str> = wrong.iter().map(|setting| setting.name).collect();
        assert_eq!(
            names,
            [
                "wal_level",
                "max_prepared_transactions",
                "max_worker_processes"
            ]
        );
        assert_eq!(wrong[1].cure(), "max_prepared_transactions = 300");
        assert_eq!(
            wrong[2].complaint(),
            "max_worker_processes is 8, needed: 41"
        );
    }

    #[test]
    fn output_plugins_matter_where_the_server_knows_them() {
        let listed = settings(&[(OUTPUT_PLUGIN_LIBRARIES, "pgoutput, multimaster")]);
        assert_eq!(wrong_output_plugins(&listed), None);
        assert_eq!(wrong_output_plugins(&settings(&[])), None);
        let missing = settings(&[(OUTPUT_PLUGIN_LIBRARIES, "pgoutput, test_decoding")]);
        let cure = wrong_output_plugins(&missing).map(|wrong| wrong.cure());
        let line = "output_plugin_libraries = 'pgoutput, test_decoding, multimaster'";
        assert_eq!(cure.as_deref(), Some(line));
    }

    #[test]
    fn must_be_first_in_the_list() {
        assert_eq!(wrong_preload("multimaster"), None);
        assert_eq!(
            wrong_preload("\"$libdir/multimaster.so\", auto_explain"),
            None
        );
        assert!(wrong_preload("auto_explain, multimaster").is_some());
        assert!(wrong_preload("").is_some());
    }
}
