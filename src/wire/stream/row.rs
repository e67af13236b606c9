//! Rows: the hot path of the stream.

use super::bytes::{Malformed, Put, Reader, with_length};

const NULL: u8 = 0;
const UNCHANGED: u8 = 1;
const LONG: u8 = 2;
/// Tags from here on carry a short value's length themselves.
const SHORT: u8 = 3;
const SHORT_MAX: usize = (u8::MAX - SHORT) as usize;

/// One column of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field<'a> {
    Null,
    /// A TOASTed value that the UPDATE did not touch and that is therefore not in WAL.
    Unchanged,
    /// Bytes in the column's [`ValueFormat`](super::ValueFormat).
    Value(&'a [u8]),
}

/// The columns of a row, in the order of the relation's columns; read in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    columns: u16,
    bytes: &'a [u8],
}

impl<'a> Row<'a> {
    pub(super) fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let columns = from.u16()?;
        let length = from.u32()?;
        Ok(Row {
            columns,
            bytes: from.take(length as usize)?,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put(&self.columns.to_le_bytes());
        with_length(out, |out| out.put(self.bytes));
    }

    /// How many columns the row says it has; [`Row::fields`] yields exactly as many or ends with an error.
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// How many bytes its columns take.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    pub fn fields(&self) -> Fields<'a> {
        Fields {
            left: self.columns,
            from: Reader::new(self.bytes),
        }
    }
}

/// Iterates over a row; after an error it ends.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    left: u16,
    from: Reader<'a>,
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<Field<'a>, Malformed> {
        match self.from.u8()? {
            NULL => Ok(Field::Null),
            UNCHANGED => Ok(Field::Unchanged),
            LONG => {
                let length = self.from.u32()?;
                self.from.take(length as usize).map(Field::Value)
            }
            short => self.from.take(usize::from(short - SHORT)).map(Field::Value),
        }
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let mut field = self.field();
        if self.left == 0 && field.is_ok() && !self.from.is_empty() {
            field = Err(Malformed("a row is longer than its columns"));
        }
        if field.is_err() {
            self.left = 0;
        }
        Some(field)
    }
}

/// Appends one row to a message.
#[derive(Debug)]
pub struct RowWriter<'o> {
    out: &'o mut Vec<u8>,
    columns: u16,
}

impl RowWriter<'_> {
    /// Appends the row that `fill` writes.
    pub(super) fn write(out: &mut Vec<u8>, fill: impl FnOnce(&mut RowWriter<'_>)) {
        let at = out.len();
        out.put(&[0; 2]);
        let mut columns = 0;
        with_length(out, |out| {
            let mut row = RowWriter { out, columns: 0 };
            fill(&mut row);
            columns = row.columns;
        });
        out[at..at + 2].copy_from_slice(&columns.to_le_bytes());
    }

    pub fn null(&mut self) {
        self.columns += 1;
        self.out.push(NULL);
    }

    pub fn unchanged(&mut self) {
        self.columns += 1;
        self.out.push(UNCHANGED);
    }

    /// Values are shorter than 1 GB, PostgreSQL's bound.
    pub fn value(&mut self, bytes: &[u8]) {
        self.columns += 1;
        if bytes.len() <= SHORT_MAX {
            self.out.push(SHORT + bytes.len() as u8);
        } else {
            self.out.push(LONG);
            let length = u32::try_from(bytes.len()).expect("PostgreSQL bounds a value to 1 GB");
            self.out.put(&length.to_le_bytes());
        }
        self.out.put(bytes);
    }

    pub fn field(&mut self, field: Field<'_>) {
        match field {
            Field::Null => self.null(),
            Field::Unchanged => self.unchanged(),
            Field::Value(bytes) => self.value(bytes),
        }
    }
}
