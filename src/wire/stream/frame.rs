//! The frames of the stream.

use super::bytes::{Malformed, Put, Reader, Text};
use super::relation::{Relation, RelationId};
use super::row::Row;
use protocol::{Csn, GenerationNum, Gid, Lsn, NodeId};

/// First frame of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin<'a> {
    pub gid: Gid,
    /// The transaction's name in PostgreSQL: the text of `gid`, or what the user called it.
    pub name: Text<'a>,
    pub prepare_lsn: Lsn,
    pub deps: Deps<'a>,
}

/// Per coordinator, the highest commit this transaction can have seen; apply waits until they are settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deps<'a>(&'a [u8]);

const DEP_BYTES: usize = 9;

impl<'a> Deps<'a> {
    pub const NONE: Deps<'static> = Deps(&[]);

    /// Writes dependencies for [`Deps::from_bytes`].
    pub fn describe(deps: &[(NodeId, Csn)], out: &mut Vec<u8>) {
        for (node, csn) in deps {
            out.push(node.get());
            out.put(&csn.0.to_le_bytes());
        }
    }

    /// Checks each pair once, so that iterating cannot fail.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if !bytes.len().is_multiple_of(DEP_BYTES)
            || bytes
                .chunks_exact(DEP_BYTES)
                .any(|dep| dep_of(dep).is_none())
        {
            return Err(Malformed("dependencies are not pairs of node and csn"));
        }
        Ok(Deps(bytes))
    }

    pub fn iter(&self) -> impl Iterator<Item = (NodeId, Csn)> + 'a {
        self.0.chunks_exact(DEP_BYTES).filter_map(dep_of)
    }

    fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let count = from.u8()?;
        Deps::from_bytes(from.take(usize::from(count) * DEP_BYTES)?)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::try_from(self.0.len() / DEP_BYTES).expect("at most 16 nodes"));
        out.put(self.0);
    }
}

fn dep_of(bytes: &[u8]) -> Option<(NodeId, Csn)> {
    let (node, csn) = bytes.split_first()?;
    Some((
        NodeId::new(*node)?,
        Csn(u64::from_le_bytes(csn.try_into().ok()?)),
    ))
}

/// First frame of each message with changes of a transaction that still runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The transaction's id at its origin; it has no name yet.
    pub top: u32,
    /// The subtransaction that made the changes of this message; `top` where there is none.
    pub sub: u32,
    /// This message and all later ones may be applied at the PREPARE only.
    pub held: bool,
    pub deps: Deps<'a>,
}

/// A transaction of which pieces were sent, or one of its subtransactions, was rolled back: so are the changes of the subtransaction and
/// all that came after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undo {
    pub top: u32,
    /// `top`: everything.
    pub sub: u32,
}

/// A transaction of which pieces were sent comes to its PREPARE; it follows alone in a message of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume<'a> {
    pub top: u32,
    pub begin: Begin<'a>,
}

/// What the origin logged of a row before it was updated or deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldRow<'a> {
    /// An UPDATE that left the key as it was (or a table without replica identity).
    Absent,
    /// The key columns only, in the order of the relation's columns.
    Key(Row<'a>),
    /// Every column.
    Full(Row<'a>),
}

/// Tables emptied by one TRUNCATE, cascaded ones included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncate<'a> {
    pub restart_identity: bool,
    ids: &'a [u8],
}

impl<'a> Truncate<'a> {
    pub fn relations(&self) -> impl Iterator<Item = RelationId> + 'a {
        self.ids
            .as_chunks::<4>()
            .0
            .iter()
            .map(|id| RelationId(u32::from_le_bytes(*id)))
    }
}

/// Last frame of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepare {
    pub gid: Gid,
    /// End of the PREPARE record.
    pub end_lsn: Lsn,
    /// The origin rolled the transaction back while it was being decoded: frames are missing, and it must not be applied.
    pub aborted: bool,
}

/// The end of a prepared transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared<'a> {
    pub gid: Gid,
    pub name: Text<'a>,
    /// End of the COMMIT PREPARED or ROLLBACK PREPARED record.
    pub end_lsn: Lsn,
}

/// A user's COMMIT PREPARED or ROLLBACK PREPARED of a transaction of any node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserFinish<'a> {
    pub name: Text<'a>,
    pub commit: bool,
    pub lsn: Lsn,
}

impl<'a> UserFinish<'a> {
    /// Reads the payload of the logical message that asks for this frame: 1 for commit or 0, then
    /// the name.
    pub fn from_payload(payload: &'a [u8], lsn: Lsn) -> Result<Self, Malformed> {
        let mut from = Reader::new(payload);
        let commit = from.flag()?;
        let name = Text(from.rest());
        Ok(UserFinish { name, commit, lsn })
    }
}

/// From here on the sending node prepares under the generation; what is older and can commit lies before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    pub generation: GenerationNum,
    pub lsn: Lsn,
}

impl Marker {
    /// Reads the payload of the logical message that asks for this frame: the number, four bytes.
    pub fn from_payload(payload: &[u8], lsn: Lsn) -> Result<Self, Malformed> {
        let mut from = Reader::new(payload);
        let generation = GenerationNum(from.u32()?);
        from.finish()?;
        Ok(Marker { generation, lsn })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamFrame<'a> {
    Begin(Begin<'a>),
    Relation(Relation<'a>),
    Insert {
        relation: RelationId,
        new: Row<'a>,
    },
    Update {
        relation: RelationId,
        old: OldRow<'a>,
        new: Row<'a>,
    },
    Delete {
        relation: RelationId,
        old: OldRow<'a>,
    },
    Truncate(Truncate<'a>),
    /// Payload of a transactional message `mtm-ddl`.
    Ddl(&'a [u8]),
    /// Payload of a transactional message `mtm-seq`.
    Sequence(&'a [u8]),
    Prepare(Prepare),
    CommitPrepared(Prepared<'a>),
    RollbackPrepared(Prepared<'a>),
    FinishUser(UserFinish<'a>),
    Marker(Marker),
    Piece(Piece<'a>),
    Undo(Undo),
    Resume(Resume<'a>),
}

pub(super) mod tag {
    pub const BEGIN: u8 = 1;
    pub const RELATION: u8 = 2;
    pub const INSERT: u8 = 3;
    pub const UPDATE: u8 = 4;
    pub const DELETE: u8 = 5;
    pub const TRUNCATE: u8 = 6;
    pub const DDL: u8 = 7;
    pub const SEQUENCE: u8 = 8;
    pub const PREPARE: u8 = 9;
    pub const COMMIT_PREPARED: u8 = 10;
    pub const ROLLBACK_PREPARED: u8 = 11;
    pub const FINISH_USER: u8 = 12;
    pub const MARKER: u8 = 13;
    pub const PIECE: u8 = 14;
    pub const UNDO: u8 = 15;
    pub const RESUME: u8 = 16;
}

pub(super) const OLD_ABSENT: u8 = 0;
pub(super) const OLD_KEY: u8 = 1;
pub(super) const OLD_FULL: u8 = 2;

impl<'a> StreamFrame<'a> {
    /// Reads one frame from the front of `from`.
    pub(super) fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let tag = from.u8()?;
        let length = from.u32()?;
        let mut body = Reader::new(from.take(length as usize)?);
        let frame = Self::decode_body(tag, &mut body)?;
        body.finish()?;
        Ok(frame)
    }

    fn decode_body(tag: u8, from: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(match tag {
            tag::BEGIN => StreamFrame::Begin(Begin::decode(from)?),
            tag::RELATION => StreamFrame::Relation(Relation::decode(from)?),
            tag::INSERT => StreamFrame::Insert {
                relation: RelationId(from.u32()?),
                new: Row::decode(from)?,
            },
            tag::UPDATE => StreamFrame::Update {
                relation: RelationId(from.u32()?),
                old: OldRow::decode(from)?,
                new: Row::decode(from)?,
            },
            tag::DELETE => StreamFrame::Delete {
                relation: RelationId(from.u32()?),
                old: OldRow::decode(from)?,
            },
            tag::TRUNCATE => StreamFrame::Truncate(Truncate::decode(from)?),
            tag::DDL => StreamFrame::Ddl(from.take(from.rest().len())?),
            tag::SEQUENCE => StreamFrame::Sequence(from.take(from.rest().len())?),
            tag::PREPARE => StreamFrame::Prepare(Prepare {
                gid: from.gid()?,
                end_lsn: from.lsn()?,
                aborted: from.flag()?,
            }),
            tag::COMMIT_PREPARED => StreamFrame::CommitPrepared(Prepared::decode(from)?),
            tag::ROLLBACK_PREPARED => StreamFrame::RollbackPrepared(Prepared::decode(from)?),
            tag::FINISH_USER => StreamFrame::FinishUser(UserFinish {
                name: from.text()?,
                commit: from.flag()?,
                lsn: from.lsn()?,
            }),
            tag::MARKER => StreamFrame::Marker(Marker {
                generation: GenerationNum(from.u32()?),
                lsn: from.lsn()?,
            }),
            tag::PIECE => StreamFrame::Piece(Piece {
                top: from.u32()?,
                sub: from.u32()?,
                held: from.flag()?,
                deps: Deps::decode(from)?,
            }),
            tag::UNDO => StreamFrame::Undo(Undo {
                top: from.u32()?,
                sub: from.u32()?,
            }),
            tag::RESUME => StreamFrame::Resume(Resume {
                top: from.u32()?,
                begin: Begin::decode(from)?,
            }),
            _ => return Err(Malformed("unknown frame")),
        })
    }

    pub(super) fn tag(&self) -> u8 {
        match self {
            StreamFrame::Begin(_) => tag::BEGIN,
            StreamFrame::Relation(_) => tag::RELATION,
            StreamFrame::Insert { .. } => tag::INSERT,
            StreamFrame::Update { .. } => tag::UPDATE,
            StreamFrame::Delete { .. } => tag::DELETE,
            StreamFrame::Truncate(_) => tag::TRUNCATE,
            StreamFrame::Ddl(_) => tag::DDL,
            StreamFrame::Sequence(_) => tag::SEQUENCE,
            StreamFrame::Prepare(_) => tag::PREPARE,
            StreamFrame::CommitPrepared(_) => tag::COMMIT_PREPARED,
            StreamFrame::RollbackPrepared(_) => tag::ROLLBACK_PREPARED,
            StreamFrame::FinishUser(_) => tag::FINISH_USER,
            StreamFrame::Marker(_) => tag::MARKER,
            StreamFrame::Piece(_) => tag::PIECE,
            StreamFrame::Undo(_) => tag::UNDO,
            StreamFrame::Resume(_) => tag::RESUME,
        }
    }

    pub(super) fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            StreamFrame::Begin(begin) => begin.encode(out),
            StreamFrame::Relation(relation) => relation.encode(out),
            StreamFrame::Insert { relation, new } => {
                out.put(&relation.0.to_le_bytes());
                new.encode(out);
            }
            StreamFrame::Update { relation, old, new } => {
                out.put(&relation.0.to_le_bytes());
                old.encode(out);
                new.encode(out);
            }
            StreamFrame::Delete { relation, old } => {
                out.put(&relation.0.to_le_bytes());
                old.encode(out);
            }
            StreamFrame::Truncate(truncate) => {
                out.push(u8::from(truncate.restart_identity));
                out.put(truncate.ids);
            }
            StreamFrame::Ddl(payload) | StreamFrame::Sequence(payload) => out.put(payload),
            StreamFrame::Prepare(prepare) => {
                out.put_gid(&prepare.gid);
                out.put(&prepare.end_lsn.0.to_le_bytes());
                out.push(u8::from(prepare.aborted));
            }
            StreamFrame::CommitPrepared(end) | StreamFrame::RollbackPrepared(end) => {
                out.put_gid(&end.gid);
                out.put_text(end.name);
                out.put(&end.end_lsn.0.to_le_bytes());
            }
            StreamFrame::FinishUser(finish) => {
                out.put_text(finish.name);
                out.push(u8::from(finish.commit));
                out.put(&finish.lsn.0.to_le_bytes());
            }
            StreamFrame::Marker(marker) => {
                out.put(&marker.generation.0.to_le_bytes());
                out.put(&marker.lsn.0.to_le_bytes());
            }
            StreamFrame::Piece(piece) => {
                out.put(&piece.top.to_le_bytes());
                out.put(&piece.sub.to_le_bytes());
                out.push(u8::from(piece.held));
                piece.deps.encode(out);
            }
            StreamFrame::Undo(undo) => {
                out.put(&undo.top.to_le_bytes());
                out.put(&undo.sub.to_le_bytes());
            }
            StreamFrame::Resume(resume) => {
                out.put(&resume.top.to_le_bytes());
                resume.begin.encode(out);
            }
        }
    }
}

impl<'a> Begin<'a> {
    fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(Begin {
            gid: from.gid()?,
            name: from.text()?,
            prepare_lsn: from.lsn()?,
            deps: Deps::decode(from)?,
        })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_gid(&self.gid);
        out.put_text(self.name);
        out.put(&self.prepare_lsn.0.to_le_bytes());
        self.deps.encode(out);
    }
}

impl<'a> OldRow<'a> {
    fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        match from.u8()? {
            OLD_ABSENT => Ok(OldRow::Absent),
            OLD_KEY => Row::decode(from).map(OldRow::Key),
            OLD_FULL => Row::decode(from).map(OldRow::Full),
            _ => Err(Malformed("unknown kind of old row")),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            OldRow::Absent => out.push(OLD_ABSENT),
            OldRow::Key(row) => {
                out.push(OLD_KEY);
                row.encode(out);
            }
            OldRow::Full(row) => {
                out.push(OLD_FULL);
                row.encode(out);
            }
        }
    }
}

impl<'a> Truncate<'a> {
    fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let restart_identity = from.flag()?;
        let ids = from.take(from.rest().len())?;
        if ids.len().is_multiple_of(4) {
            Ok(Truncate {
                restart_identity,
                ids,
            })
        } else {
            Err(Malformed("the tables of a TRUNCATE are cut off"))
        }
    }
}

impl<'a> Prepared<'a> {
    fn decode(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(Prepared {
            gid: from.gid()?,
            name: from.text()?,
            end_lsn: from.lsn()?,
        })
    }
}
