//! What `mtm.init_cluster` learns about each server before it changes anything.

use super::error::Problem;
use super::member::{Member, WHO_SQL, literal_list};
use super::preflight::{self, Settings};

/// Columns of [`SERVER_SQL`].
const SERVER_COLUMNS: usize = 14;

/// Column names of newer majors are reached through JSON, so that one text serves all.
const SERVER_SQL: &str = "SELECT \
    current_setting('server_version_num'), \
    current_setting('server_version'), \
    pg_is_in_recovery(), \
    (SELECT system_identifier FROM pg_control_system()), \
    d.datname, \
    pg_encoding_to_char(d.encoding), \
    d.datcollate, \
    d.datctype, \
    d.datlocprovider, \
    coalesce(to_jsonb(d) ->> 'daticulocale', to_jsonb(d) ->> 'datlocale', ''), \
    coalesce(pg_database_collation_actual_version(d.oid), ''), \
    coalesce(d.datcollversion, ''), \
    (SELECT count(*) FROM pg_replication_slots), \
    (SELECT count(*) FROM pg_prepared_xacts) \
    FROM pg_database d WHERE d.datname = current_database()";

const EXTENSION_SQL: &str = "SELECT \
    (SELECT extversion FROM pg_extension WHERE extname = 'multimaster'), \
    (SELECT default_version FROM pg_available_extensions WHERE name = 'multimaster')";

/// Databases of the server, other than this one, that carry a cluster's marker.
const OTHER_CLUSTERS_SQL: &str = "SELECT coalesce(d.datname, o.roname) \
    FROM pg_replication_origin o LEFT JOIN pg_database d ON o.roname = 'mtm_' || d.oid \
    WHERE o.roname ~ '^mtm_[0-9]+$' AND d.datname IS DISTINCT FROM current_database()";

const MEMBERSHIP_SQL: &str = "SELECT state, cluster_id FROM mtm.cluster";

/// Whether the server belongs to a cluster already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    None,
    /// A run of `mtm.init_cluster` died here.
    Forming,
    Active {
        cluster_id: String,
    },
}

/// One server and database.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Server, its start and the database: equal only for one and the same.
    pub who: String,
    pub version_num: u32,
    pub version: String,
    pub in_recovery: bool,
    pub system_id: String,
    pub database: String,
    pub encoding: String,
    /// Everything that decides the order of texts: (what, value).
    pub collation: Vec<(&'static str, String)>,
    pub recorded_collation_version: String,
    pub slots: u32,
    pub prepared: u32,
    pub extension: Option<String>,
    pub available_extension: Option<String>,
    pub other_clusters: Vec<String>,
    pub membership: Membership,
    pub settings: Settings,
}

impl Facts {
    /// Asks the server.
    pub fn collect(member: &Member) -> Result<Facts, Problem> {
        let rows = member.query(SERVER_SQL, SERVER_COLUMNS)?;
        let row = rows
            .into_iter()
            .next()
            .ok_or_else(|| member.problem("the server did not describe itself"))?;
        let mut values = row.into_iter().map(Option::unwrap_or_default);
        let mut next = || values.next().unwrap_or_default();
        let extension = member
            .query(EXTENSION_SQL, 2)?
            .into_iter()
            .next()
            .unwrap_or_default();
        let mut extension = extension.into_iter();
        let (installed, available) = (extension.next().flatten(), extension.next().flatten());
        Ok(Facts {
            version_num: next().parse().unwrap_or_default(),
            version: next(),
            in_recovery: next() == "t",
            system_id: next(),
            database: next(),
            encoding: next(),
            collation: vec![
                ("lc_collate", next()),
                ("lc_ctype", next()),
                ("locale provider", next()),
                ("ICU locale", next()),
                ("collation version", next()),
            ],
            recorded_collation_version: next(),
            slots: next().parse().unwrap_or_default(),
            prepared: next().parse().unwrap_or_default(),
            who: member.value(WHO_SQL)?.unwrap_or_default(),
            membership: membership(member, installed.is_some())?,
            other_clusters: column(member, OTHER_CLUSTERS_SQL)?,
            settings: settings(member)?,
            extension: installed,
            available_extension: available,
        })
    }

    /// Port of the server's arbiter; missing when the library is not loaded.
    pub fn arbiter_port(&self) -> Option<u16> {
        self.settings.get("multimaster.arbiter_port")?.parse().ok()
    }
}

fn membership(member: &Member, installed: bool) -> Result<Membership, Problem> {
    if !installed {
        return Ok(Membership::None);
    }
    let rows = member.query(MEMBERSHIP_SQL, 2)?;
    let Some(row) = rows.into_iter().next() else {
        return Ok(Membership::None);
    };
    let mut values = row.into_iter().map(Option::unwrap_or_default);
    let state = values.next().unwrap_or_default();
    Ok(match state.as_str() {
        "forming" => Membership::Forming,
        _ => Membership::Active {
            cluster_id: values.next().unwrap_or_default(),
        },
    })
}

fn settings(member: &Member) -> Result<Settings, Problem> {
    let names = literal_list(preflight::RELEVANT);
    let sql = format!("SELECT name, setting FROM pg_settings WHERE name IN ({names})");
    let rows = member.query(&sql, 2)?;
    let pairs = rows.into_iter().filter_map(|row| {
        let mut values = row.into_iter().map(Option::unwrap_or_default);
        Some((values.next()?, values.next()?))
    });
    Ok(pairs.collect())
}

fn column(member: &Member, sql: &str) -> Result<Vec<String>, Problem> {
    let rows = member.query(sql, 1)?;
    Ok(rows.into_iter().flatten().flatten().collect())
}
