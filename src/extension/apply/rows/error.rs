//! Why a frame cannot be applied, beyond what PostgreSQL itself refuses.

use std::fmt;
use wire::stream::{Malformed, Relation};

/// A table of the stream, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName(String);

impl TableName {
    pub fn of(relation: &Relation<'_>) -> Self {
        TableName(format!("{}.{}", relation.schema, relation.name))
    }
}

impl From<&str> for TableName {
    fn from(name: &str) -> Self {
        TableName(name.to_owned())
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Every one of them is a no vote. Most mean that this node no longer equals the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("table \"{table}\" does not exist")]
    UnknownTable { table: TableName },
    #[error("\"{table}\" is not a table")]
    NotATable { table: TableName },
    #[error("column \"{column}\" of table \"{table}\" does not exist")]
    UnknownColumn { table: TableName, column: String },
    #[error("column \"{column}\" of table \"{table}\" has no counterpart on the origin")]
    ExtraColumn { table: TableName, column: String },
    #[error("column \"{column}\" of table \"{table}\" has type {here}, but {origin} on the origin")]
    OtherType {
        table: TableName,
        column: String,
        here: String,
        origin: String,
    },
    #[error("a value for table \"{table}\" has the wrong length")]
    ValueLength { table: TableName },
    #[error("table \"{table}\" has no replica identity, so its rows cannot be updated or deleted")]
    NoIdentity { table: TableName },
    #[error("the row to {command} in table \"{table}\" does not exist")]
    RowMissing {
        table: TableName,
        command: &'static str,
    },
    #[error("the row to {command} in table \"{table}\" was changed by a concurrent transaction")]
    RowTaken {
        table: TableName,
        command: &'static str,
    },
}

impl ApplyError {
    pub fn sqlstate(&self) -> [u8; 5] {
        *match self {
            ApplyError::Malformed(_) | ApplyError::ValueLength { .. } => b"08P01",
            ApplyError::UnknownTable { .. } => b"42P01",
            ApplyError::NotATable { .. } => b"42809",
            ApplyError::UnknownColumn { .. } | ApplyError::ExtraColumn { .. } => b"42703",
            ApplyError::OtherType { .. } => b"42804",
            ApplyError::NoIdentity { .. } => b"55000",
            ApplyError::RowMissing { .. } => b"XX001",
            ApplyError::RowTaken { .. } => b"40001",
        }
    }

    /// What the message leaves out, but for the row, which [`crate::pg::rows::current_target`] names.
    pub fn detail(&self) -> String {
        let detail = match self {
            ApplyError::RowMissing { .. } => "This node differs from the origin.",
            ApplyError::NoIdentity { .. } => {
                "The table needs a primary key, or REPLICA IDENTITY FULL."
            }
            _ => "",
        };
        detail.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_row_is_divergence_and_a_taken_one_a_conflict() {
        let (table, command) = (TableName::from("public.t"), "update");
        let missing = ApplyError::RowMissing {
            table: table.clone(),
            command,
        };
        assert_eq!(
            missing.to_string(),
            "the row to update in table \"public.t\" does not exist"
        );
        assert_eq!(missing.sqlstate(), *b"XX001");
        assert_eq!(
            ApplyError::RowTaken { table, command }.sqlstate(),
            *b"40001"
        );
    }
}
