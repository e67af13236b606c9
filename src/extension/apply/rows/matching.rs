//! Matching a relation of the stream with a table of this node, column by column, by name.
//!
//! The order of columns may differ, and dropped columns are nobody's business; but names and types must be the same on both sides,
//! because the schema is replicated too: a difference means that a node went its own way.

use super::{ApplyError, TableName};
use wire::stream::{Column, Relation, ValueFormat};

/// A column of the table here that takes values from the stream: neither dropped nor generated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalColumn {
    /// Position in the row here, from 0.
    pub index: usize,
    pub name: Vec<u8>,
    pub type_schema: Vec<u8>,
    pub type_name: Vec<u8>,
    /// Oid of the type, or of what a domain is built on.
    pub base_type: u32,
}

/// Where a column of the stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatchedColumn {
    pub index: usize,
    pub format: ValueFormat,
    /// Belongs to the origin's replica identity.
    pub key: bool,
}

/// Says for each column of the stream, in its order, where it goes.
pub fn match_columns(
    relation: &Relation<'_>,
    local: &[LocalColumn],
) -> Result<Vec<MatchedColumn>, ApplyError> {
    let mut matched = Vec::with_capacity(relation.columns.count().min(local.len()));
    for column in relation.columns {
        let column = column?;
        let Some(found) = local
            .iter()
            .find(|local| local.name == column.name.as_bytes())
        else {
            let (table, column) = (TableName::of(relation), column.name.to_string());
            return Err(ApplyError::UnknownColumn { table, column });
        };
        check_type(relation, &column, found)?;
        matched.push(MatchedColumn {
            index: found.index,
            format: column.format,
            key: column.key,
        });
    }
    match local
        .iter()
        .find(|local| matched.iter().all(|matched| matched.index != local.index))
    {
        Some(extra) => Err(ApplyError::ExtraColumn {
            table: TableName::of(relation),
            column: String::from_utf8_lossy(&extra.name).into_owned(),
        }),
        None => Ok(matched),
    }
}

fn check_type(
    relation: &Relation<'_>,
    column: &Column<'_>,
    local: &LocalColumn,
) -> Result<(), ApplyError> {
    let same_name = column.type_schema.as_bytes() == local.type_schema
        && column.type_name.as_bytes() == local.type_name;
    let same_bytes = match column.format {
        ValueFormat::Text => true,
        ValueFormat::Raw { base_type } => base_type == local.base_type,
    };
    if same_name && same_bytes {
        return Ok(());
    }
    let lossy = String::from_utf8_lossy;
    Err(ApplyError::OtherType {
        table: TableName::of(relation),
        column: column.name.to_string(),
        here: format!("{}.{}", lossy(&local.type_schema), lossy(&local.type_name)),
        origin: format!("{}.{}", column.type_schema, column.type_name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::stream::{
        Message, MessageWriter, RelationId, RelationKind, ReplicaIdentity, StreamFrame,
    };

    fn sent(name: &'static str, type_name: &'static str, format: ValueFormat) -> Column<'static> {
        Column {
            name: name.into(),
            type_schema: "pg_catalog".into(),
            type_name: type_name.into(),
            format,
            key: false,
        }
    }

    fn local(index: usize, name: &str, type_name: &str, base_type: u32) -> LocalColumn {
        LocalColumn {
            index,
            name: name.into(),
            type_schema: b"pg_catalog".to_vec(),
            type_name: type_name.into(),
            base_type,
        }
    }

    fn matched(
        columns: &[Column<'_>],
        local: &[LocalColumn],
    ) -> Result<Vec<MatchedColumn>, ApplyError> {
        let fingerprint = Relation::describe(
            RelationKind::Table,
            ReplicaIdentity::Key,
            "public".into(),
            "t".into(),
            columns,
        );
        let mut out = MessageWriter::new();
        out.relation(RelationId(1), &fingerprint);
        let Some(Ok(StreamFrame::Relation(relation))) =
            Message::parse(out.bytes())?.frames().next()
        else {
            panic!("no relation");
        };
        match_columns(&relation, local)
    }

    const INT4: ValueFormat = ValueFormat::Raw { base_type: 23 };

    #[test]
    fn columns_meet_by_name_in_any_order() {
        let columns = [
            sent("a", "int4", INT4),
            sent("b", "text", ValueFormat::Text),
        ];
        let found = matched(
            &columns,
            &[local(0, "b", "text", 25), local(3, "a", "int4", 23)],
        )
        .unwrap();
        assert_eq!(
            found.iter().map(|column| column.index).collect::<Vec<_>>(),
            [3, 0]
        );
    }

    #[test]
    fn a_column_without_counterpart_is_named() {
        let columns = [sent("a", "int4", INT4)];
        let missing = matched(&columns, &[local(0, "b", "int4", 23)]).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "column \"a\" of table \"public.t\" does not exist"
        );
        let extra = matched(
            &columns,
            &[local(0, "a", "int4", 23), local(1, "b", "int4", 23)],
        )
        .unwrap_err();
        assert_eq!(
            extra.to_string(),
            "column \"b\" of table \"public.t\" has no counterpart on the origin"
        );
    }

    #[test]
    fn another_type_is_refused() {
        let columns = [sent("a", "int4", INT4)];
        assert!(matched(&columns, &[local(0, "a", "int8", 20)]).is_err());
        // A domain of the same name built on something else.
        assert!(matched(&columns, &[local(0, "a", "int4", 20)]).is_err());
    }
}
