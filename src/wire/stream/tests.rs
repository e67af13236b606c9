//! Round trips, hostile bytes, golden frames.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use protocol::{Csn, GenerationNum, Gid, Lsn, NodeId, NodeSet};

#[derive(Debug, Clone)]
enum OwnedField {
    Null,
    Unchanged,
    Value(Vec<u8>),
}

impl OwnedField {
    fn borrow(&self) -> Field<'_> {
        match self {
            OwnedField::Null => Field::Null,
            OwnedField::Unchanged => Field::Unchanged,
            OwnedField::Value(bytes) => Field::Value(bytes),
        }
    }
}

fn any_field() -> impl Strategy<Value = OwnedField> {
    prop_oneof![
        Just(OwnedField::Null),
        Just(OwnedField::Unchanged),
        vec(any::<u8>(), 0..20).prop_map(OwnedField::Value),
        // Around the border between short and long values.
        vec(any::<u8>(), 245..262).prop_map(OwnedField::Value),
    ]
}

fn any_row() -> impl Strategy<Value = Vec<OwnedField>> {
    vec(any_field(), 0..8)
}

fn any_gid() -> impl Strategy<Value = Gid> {
    (
        1u8..=16,
        any::<u64>(),
        any::<u32>(),
        any::<u16>(),
        any::<i64>(),
    )
        .prop_map(|(node, xid, generation, members, started_at)| Gid {
            coordinator: NodeId::new(node).unwrap(),
            xid,
            generation: GenerationNum(generation),
            members: NodeSet::from_bits(members),
            started_at,
        })
}

fn fill(row: &[OwnedField]) -> impl FnMut(&mut RowWriter<'_>) {
    move |out| row.iter().for_each(|field| out.field(field.borrow()))
}

fn fields(row: Row<'_>) -> Vec<Field<'_>> {
    row.fields().collect::<Result<_, _>>().unwrap()
}

fn borrowed(row: &[OwnedField]) -> Vec<Field<'_>> {
    row.iter().map(OwnedField::borrow).collect()
}

/// Decodes everything there is to decode; says how many frames were good.
fn exhaust(bytes: &[u8]) -> usize {
    let Ok(message) = Message::parse(bytes) else {
        return 0;
    };
    let rows = |row: Row<'_>| {
        let fields = row.fields().count();
        assert!(fields <= row.len());
    };
    let old_rows = |old: OldRow<'_>| match old {
        OldRow::Absent => {}
        OldRow::Key(row) | OldRow::Full(row) => rows(row),
    };
    message
        .frames()
        .filter_map(Result::ok)
        .inspect(|frame| match frame {
            StreamFrame::Begin(begin) => assert!(begin.deps.iter().count() <= 255),
            StreamFrame::Relation(relation) => {
                relation.columns.count();
                let _ = relation.columns.filter(Result::is_ok).count();
            }
            StreamFrame::Insert { new, .. } => rows(*new),
            StreamFrame::Update { old, new, .. } => {
                old_rows(*old);
                rows(*new);
            }
            StreamFrame::Delete { old, .. } => old_rows(*old),
            StreamFrame::Truncate(truncate) => {
                let _ = truncate.relations().count();
            }
            _ => {}
        })
        .count()
}

/// A transaction with one frame of each kind.
fn sample() -> MessageWriter {
    let gid = Gid {
        coordinator: NodeId::new(2).unwrap(),
        xid: 0x1_0000_0007,
        generation: GenerationNum(3),
        members: NodeSet::from_bits(0b111),
        started_at: -5,
    };
    let mut deps = Vec::new();
    Deps::describe(&[(NodeId::new(1).unwrap(), Csn(9))], &mut deps);
    let mut out = MessageWriter::new();
    out.frame(&StreamFrame::Begin(Begin {
        gid,
        name: "mine".into(),
        prepare_lsn: Lsn(16),
        deps: Deps::from_bytes(&deps).unwrap(),
    }));
    let columns = [
        Column {
            name: "id".into(),
            type_schema: "pg_catalog".into(),
            type_name: "int4".into(),
            format: ValueFormat::Raw { base_type: 23 },
            key: true,
        },
        Column {
            name: "mood".into(),
            type_schema: "public".into(),
            type_name: "mood".into(),
            format: ValueFormat::Text,
            key: false,
        },
    ];
    let relation = Relation::describe(
        RelationKind::Table,
        ReplicaIdentity::Key,
        "public".into(),
        "t".into(),
        &columns,
    );
    let id = RelationId(7);
    out.relation(id, &relation);
    out.insert(id, |row| {
        row.value(&[1, 0, 0, 0]);
        row.value(b"ok");
    });
    out.update(
        id,
        OldRowWriter::Key(&mut |row| row.value(&[1, 0, 0, 0])),
        |row| {
            row.value(&[2, 0, 0, 0]);
            row.unchanged();
        },
    );
    out.delete(
        id,
        OldRowWriter::Full(&mut |row| {
            row.value(&[2, 0, 0, 0]);
            row.null();
        }),
    );
    out.truncate(true, &[id]);
    out.frame(&StreamFrame::Ddl(b"d"));
    out.frame(&StreamFrame::Sequence(b"s"));
    out.frame(&StreamFrame::Prepare(Prepare {
        gid,
        end_lsn: Lsn(32),
        aborted: false,
    }));
    out
}

#[test]
fn golden_transaction_of_version_2() {
    let hex: String = sample()
        .bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        hex,
        include_str!("golden_v2.txt").replace(char::is_whitespace, "")
    );
}

#[test]
fn every_kind_of_frame_is_read_back() {
    let sample = sample();
    let message = Message::parse(sample.bytes()).unwrap();
    assert!(message.begins() && message.ends());
    let frames: Vec<_> = message.frames().collect::<Result<_, _>>().unwrap();
    assert_eq!(frames.len(), 9);
    let mut again = MessageWriter::new();
    frames.iter().for_each(|frame| again.frame(frame));
    assert_eq!(again.bytes(), sample.bytes());
    let StreamFrame::Relation(relation) = frames[1] else {
        panic!("not a relation: {:?}", frames[1]);
    };
    let columns: Vec<_> = relation.columns.collect::<Result<_, _>>().unwrap();
    assert_eq!(columns[1].type_name, "mood".into());
    assert_eq!(columns[0].format, ValueFormat::Raw { base_type: 23 });
    assert!(columns[0].key && !columns[1].key);
}

/// What is sent of a transaction that still runs, and of its end.
fn pieces() -> Vec<MessageWriter> {
    let mut deps = Vec::new();
    Deps::describe(&[(NodeId::new(3).unwrap(), Csn(11))], &mut deps);
    let deps = Deps::from_bytes(&deps).unwrap();
    let gid = Gid {
        coordinator: NodeId::new(2).unwrap(),
        xid: 9,
        generation: GenerationNum(3),
        members: NodeSet::from_bits(0b111),
        started_at: 5,
    };
    let piece = StreamFrame::Piece(Piece {
        top: 9,
        sub: 10,
        held: true,
        deps,
    });
    let undo = StreamFrame::Undo(Undo { top: 9, sub: 10 });
    let resume = StreamFrame::Resume(Resume {
        top: 9,
        begin: Begin {
            gid,
            name: "mtm-x".into(),
            prepare_lsn: Lsn(16),
            deps,
        },
    });
    [piece, undo, resume]
        .iter()
        .map(|frame| {
            let mut out = MessageWriter::new();
            out.frame(frame);
            out
        })
        .collect()
}

#[test]
fn golden_pieces_of_version_2() {
    let messages = pieces();
    let hex: Vec<String> = messages
        .iter()
        .map(|message| {
            message
                .bytes()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect()
        })
        .collect();
    assert_eq!(hex.join("\n"), include_str!("golden_pieces_v2.txt").trim());
    for message in &messages {
        let read = Message::parse(message.bytes()).unwrap();
        let mut again = MessageWriter::new();
        read.frames().for_each(|frame| again.frame(&frame.unwrap()));
        assert_eq!(again.bytes(), message.bytes());
        assert!(!read.ends());
    }
    let kinds = messages.iter().map(|message| {
        let read = Message::parse(message.bytes()).unwrap();
        (read.is_piece(), read.begins())
    });
    let kinds: Vec<_> = kinds.collect();
    assert_eq!(kinds, [(true, false), (false, false), (false, true)]);
}

#[test]
fn a_message_cut_anywhere_is_refused_or_shorter() {
    let sample = sample();
    let whole = exhaust(sample.bytes());
    for end in 0..sample.len() {
        assert!(exhaust(&sample.bytes()[..end]) < whole);
    }
}

#[test]
fn another_version_is_refused() {
    let mut bytes = sample().bytes().to_vec();
    bytes[0] += 1;
    assert_eq!(
        Message::parse(&bytes).unwrap_err(),
        Malformed("unknown version")
    );
}

#[test]
fn a_users_finish_is_read_and_garbage_refused() {
    let read = UserFinish::from_payload(b"\x01a gid", Lsn(4)).unwrap();
    let finish = UserFinish {
        name: "a gid".into(),
        commit: true,
        lsn: Lsn(4),
    };
    assert_eq!(read, finish);
    assert!(UserFinish::from_payload(b"", Lsn(4)).is_err());
    assert!(UserFinish::from_payload(b"\x02a gid", Lsn(4)).is_err());
}

proptest! {
    #[test]
    fn rows_are_read_back(old in any_row(), new in any_row(), id in any::<u32>()) {
        let mut out = MessageWriter::new();
        out.insert(RelationId(id), fill(&new));
        out.update(RelationId(id), OldRowWriter::Full(&mut fill(&old)), fill(&new));
        out.delete(RelationId(id), OldRowWriter::Key(&mut fill(&old)));
        let frames: Vec<_> = Message::parse(out.bytes()).unwrap().frames().collect();
        prop_assert_eq!(frames.len(), 3);
        for frame in frames {
            match frame.unwrap() {
                StreamFrame::Insert { relation, new: read } => {
                    prop_assert_eq!(relation, RelationId(id));
                    prop_assert_eq!(fields(read), borrowed(&new));
                }
                StreamFrame::Update { old: OldRow::Full(before), new: read, .. } => {
                    prop_assert_eq!(fields(before), borrowed(&old));
                    prop_assert_eq!(fields(read), borrowed(&new));
                }
                StreamFrame::Delete { old: OldRow::Key(before), .. } => {
                    prop_assert_eq!(fields(before), borrowed(&old));
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }

    #[test]
    fn markers_are_read_back(generation in any::<u32>(), lsn in any::<u64>()) {
        let marker = Marker::from_payload(&generation.to_le_bytes(), Lsn(lsn)).unwrap();
        let mut out = MessageWriter::new();
        out.frame(&StreamFrame::Marker(marker));
        let frame = Message::parse(out.bytes()).unwrap().frames().next().unwrap().unwrap();
        prop_assert_eq!(frame, StreamFrame::Marker(marker));
        prop_assert!(Marker::from_payload(&[1, 2, 3], Lsn(lsn)).is_err());
    }

    #[test]
    fn ends_of_transactions_are_read_back(
        gid in any_gid(), name in "[a-z0-9-]{0,80}", lsn in any::<u64>(), flag in any::<bool>(),
    ) {
        let end = Prepared { gid, name: name.as_str().into(), end_lsn: Lsn(lsn) };
        let mut out = MessageWriter::new();
        out.frame(&StreamFrame::CommitPrepared(end));
        out.frame(&StreamFrame::RollbackPrepared(end));
        out.frame(&StreamFrame::Prepare(Prepare { gid, end_lsn: Lsn(lsn), aborted: flag }));
        let frames: Vec<_> =
            Message::parse(out.bytes()).unwrap().frames().collect::<Result<_, _>>().unwrap();
        let mut again = MessageWriter::new();
        frames.iter().for_each(|frame| again.frame(frame));
        prop_assert_eq!(again.bytes(), out.bytes());
        prop_assert_eq!(frames[0], StreamFrame::CommitPrepared(end));
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in vec(any::<u8>(), 0..400)) {
        exhaust(&bytes);
    }

    #[test]
    fn damaged_messages_never_panic(damage in vec((any::<u16>(), any::<u8>()), 1..6)) {
        let mut bytes = sample().bytes().to_vec();
        for (at, value) in damage {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        exhaust(&bytes);
    }
}
