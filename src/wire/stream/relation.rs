//! What a row belongs to: a relation and its columns, by name.

use super::bytes::{Malformed, Put, Reader, Text};

/// Handle of a relation within one transaction of the stream; says nothing on another node or in another transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationId(pub u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelationKind {
    /// A table or a leaf partition: rows belong to it.
    Table,
    /// A partitioned table: only TRUNCATE names it.
    Partitioned,
}

/// What the origin logs of a row that is updated or deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The columns marked as key.
    Key,
    /// All columns.
    Full,
    /// Nothing: updated and deleted rows cannot be found again.
    Nothing,
}

/// How a column's values travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueFormat {
    /// What the type's output function writes.
    Text,
    /// The stored bytes of this builtin type (for a domain: of its base type), without a varlena header.
    Raw { base_type: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column<'a> {
    pub name: Text<'a>,
    pub type_schema: Text<'a>,
    pub type_name: Text<'a>,
    pub format: ValueFormat,
    /// Belongs to the replica identity.
    pub key: bool,
}

impl<'a> Column<'a> {
    fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let name = from.text()?;
        let type_schema = from.text()?;
        let type_name = from.text()?;
        let key = from.flag()?;
        let format = match from.u32()? {
            0 => ValueFormat::Text,
            base_type => ValueFormat::Raw { base_type },
        };
        Ok(Column {
            name,
            type_schema,
            type_name,
            format,
            key,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_text(self.name);
        out.put_text(self.type_schema);
        out.put_text(self.type_name);
        out.push(u8::from(self.key));
        let base_type = match self.format {
            ValueFormat::Text => 0,
            ValueFormat::Raw { base_type } => base_type,
        };
        out.put(&base_type.to_le_bytes());
    }
}

/// A relation as the origin knows it at this point of the transaction. Dropped and generated columns are left out: rows of
/// the stream do not have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation<'a> {
    pub id: RelationId,
    pub kind: RelationKind,
    pub identity: ReplicaIdentity,
    pub schema: Text<'a>,
    pub name: Text<'a>,
    pub columns: Columns<'a>,
    /// All of the above but the id, as it travelled: equal bytes mean an equal relation.
    pub fingerprint: &'a [u8],
}

impl<'a> Relation<'a> {
    pub(super) fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let id = RelationId(from.u32()?);
        let fingerprint = from.take(from.rest().len())?;
        Ok(Relation {
            id,
            ..Self::from_fingerprint(fingerprint)?
        })
    }

    /// Reads what [`Relation::describe`] writes; the id is then 0.
    pub fn from_fingerprint(fingerprint: &'a [u8]) -> Result<Self, Malformed> {
        let from = &mut Reader::new(fingerprint);
        let kind = match from.u8()? {
            b'r' => RelationKind::Table,
            b'p' => RelationKind::Partitioned,
            _ => return Err(Malformed("unknown kind of relation")),
        };
        let identity = match from.u8()? {
            b'k' => ReplicaIdentity::Key,
            b'f' => ReplicaIdentity::Full,
            b'n' => ReplicaIdentity::Nothing,
            _ => return Err(Malformed("unknown replica identity")),
        };
        let schema = from.text()?;
        let name = from.text()?;
        let left = from.u16()?;
        let columns = Columns {
            left,
            from: Reader::new(from.take(from.rest().len())?),
        };
        Ok(Relation {
            id: RelationId(0),
            kind,
            identity,
            schema,
            name,
            columns,
            fingerprint,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put(&self.id.0.to_le_bytes());
        out.put(self.fingerprint);
    }

    /// Writes what [`Relation::fingerprint`] holds.
    pub fn describe(
        kind: RelationKind,
        identity: ReplicaIdentity,
        schema: Text<'_>,
        name: Text<'_>,
        columns: &[Column<'_>],
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + 48 * columns.len());
        out.push(match kind {
            RelationKind::Table => b'r',
            RelationKind::Partitioned => b'p',
        });
        out.push(match identity {
            ReplicaIdentity::Key => b'k',
            ReplicaIdentity::Full => b'f',
            ReplicaIdentity::Nothing => b'n',
        });
        out.put_text(schema);
        out.put_text(name);
        let count =
            u16::try_from(columns.len()).expect("PostgreSQL bounds a table to 1600 columns");
        out.put(&count.to_le_bytes());
        for column in columns {
            column.encode(&mut out);
        }
        out
    }
}

/// Iterates over the columns; after an error it ends.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    left: u16,
    from: Reader<'a>,
}

impl Columns<'_> {
    /// How many columns the relation says it has.
    pub fn count(&self) -> usize {
        usize::from(self.left)
    }
}

impl PartialEq for Columns<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.left == other.left && self.from.rest() == other.from.rest()
    }
}

impl Eq for Columns<'_> {}

impl<'a> Iterator for Columns<'a> {
    type Item = Result<Column<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let mut column = Column::decode(&mut self.from);
        if self.left == 0 && column.is_ok() && !self.from.is_empty() {
            column = Err(Malformed("a relation is longer than its columns"));
        }
        if column.is_err() {
            self.left = 0;
        }
        Some(column)
    }
}
