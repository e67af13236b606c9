//! Are the databases equal? Compared are the definitions of all objects, then the rows of all tables.
//!
//! Nothing is copied when a cluster is formed, so all nodes must start with the same: nothing at all, or the same dump restored.

use std::collections::BTreeMap;

use super::error::Problem;
use super::member::Member;

const SCHEMA_OBJECTS_SQL: &str = include_str!("schema_objects.sql");

/// Tables whose rows are replicated: (name as SQL writes it).
const TABLES_SQL: &str = "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind = 'r' AND c.relpersistence = 'p' \
    AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'mtm') \
    ORDER BY 1";

/// Differences named in one message; the rest is counted.
const SHOWN_MAX: usize = 5;

/// In what the databases of the other nodes differ from that of the first.
///
/// Rows are compared only when all definitions are equal. Fails with the first node that cannot answer.
pub fn differences(members: &[Member]) -> Result<Vec<Problem>, Problem> {
    let schemas = each(members, schema_objects)?;
    let problems = compare(members, &schemas);
    if !problems.is_empty() {
        return Ok(problems);
    }
    let contents = each(members, table_contents)?;
    Ok(compare(members, &contents))
}

/// What was looked at, by name.
type Fingerprint = BTreeMap<String, String>;

fn each(
    members: &[Member],
    fingerprint: fn(&Member) -> Result<Fingerprint, Problem>,
) -> Result<Vec<Fingerprint>, Problem> {
    members.iter().map(fingerprint).collect()
}

fn schema_objects(member: &Member) -> Result<Fingerprint, Problem> {
    let rows = member.query(SCHEMA_OBJECTS_SQL, 2)?;
    let pairs = rows.into_iter().filter_map(|row| {
        let mut values = row.into_iter().flatten();
        Some((values.next()?, values.next()?))
    });
    Ok(pairs.collect())
}

/// Number of rows and an order-independent hash of them, for each table.
fn table_contents(member: &Member) -> Result<Fingerprint, Problem> {
    let tables = member.query(TABLES_SQL, 1)?;
    let mut contents = Fingerprint::new();
    for table in tables.into_iter().flatten().flatten() {
        let sql = format!(
            "SELECT count(*) || ' rows, hash ' || coalesce(sum(hashtextextended(ROW(mtm_row.*)::text, 0)), 0) \
             FROM ONLY {table} AS mtm_row"
        );
        let content = member.value(&sql)?.unwrap_or_default();
        contents.insert(format!("table {table}"), content);
    }
    Ok(contents)
}

fn compare(members: &[Member], fingerprints: &[Fingerprint]) -> Vec<Problem> {
    let Some((first, others)) = fingerprints.split_first() else {
        return Vec::new();
    };
    let others = members.iter().skip(1).zip(others);
    others
        .filter_map(|(member, other)| describe(first, other).map(|cause| member.problem(cause)))
        .collect()
}

/// What distinguishes two databases, in one line; `None` when nothing does.
fn describe(first: &Fingerprint, other: &Fingerprint) -> Option<String> {
    let missing = first.keys().filter(|name| !other.contains_key(*name));
    let surplus = other.keys().filter(|name| !first.contains_key(*name));
    let changed = first
        .iter()
        .filter(|(name, value)| other.get(*name).is_some_and(|v| v != *value));
    let mut differences: Vec<String> = missing.map(|name| format!("{name} is missing")).collect();
    differences.extend(surplus.map(|name| format!("{name} does not exist on n1")));
    differences.extend(changed.map(|(name, _)| format!("{name} differs from n1")));
    if differences.is_empty() {
        return None;
    }
    let rest = differences.len().saturating_sub(SHOWN_MAX);
    differences.truncate(SHOWN_MAX);
    if rest > 0 {
        differences.push(format!("and {rest} more"));
    }
    Some(format!(
        "the databases are not equal: {}",
        differences.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::{Fingerprint, describe};

    fn fingerprint(pairs: &[(&str, &str)]) -> Fingerprint {
        let pairs = pairs.iter();
        pairs
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn differences_are_named() {
        let first = fingerprint(&[("a", "1"), ("b", "1")]);
        let other = fingerprint(&[("b", "2"), ("c", "1")]);
        let text = describe(&first, &other).unwrap_or_default();
        assert!(text.ends_with("a is missing, c does not exist on n1, b differs from n1"));
        assert_eq!(describe(&first, &first), None);
    }
}
