//! Test-only SQL functions; not part of a shipped library.

use crate::decode::{self, Environment};
use crate::pg::rows::{self, RowApplier};
use pgrx::prelude::*;
use protocol::{Csn, GenerationNum, NodeId};
use wire::stream::{Message, StreamFrame};

/// Stands in for what a cluster knows.
pub fn set_environment() {
    decode::set_environment(Environment {
        node: || NodeId::new(1),
        generation: || GenerationNum(1),
        visible: |out| out.extend(NodeId::new(2).map(|node| (node, Csn(7)))),
        is_local: |_, name| name.starts_with(b"local_"),
    });
}

/// Applies the messages in a file that COPY ... (FORMAT binary) has written; the payload of a DDL frame is run as SQL. Returns the number of
/// frames of kinds other than row changes, row changes, and transactions.
#[pg_extern]
fn mtm_test_apply_file(path: &str) -> String {
    let bytes = std::fs::read(path).unwrap_or_else(|error| pgrx::error!("{path}: {error}"));
    let mut applier = RowApplier::begin();
    let mut counts = [0u64; 3];
    for message in copied_messages(&bytes) {
        let message = Message::parse(message).unwrap_or_else(|error| pgrx::error!("{error}"));
        for frame in message.frames() {
            let frame = frame.unwrap_or_else(|error| pgrx::error!("{error}"));
            apply_frame(&mut applier, &frame, &mut counts);
        }
    }
    if let Err(error) = applier.finish() {
        pgrx::error!("{error}");
    }
    format!(
        "{} begun, {} rows, {} other",
        counts[0], counts[1], counts[2]
    )
}

fn apply_frame(applier: &mut RowApplier, frame: &StreamFrame<'_>, counts: &mut [u64; 3]) {
    let kind = match frame {
        StreamFrame::Begin(_) => 0,
        StreamFrame::Insert { .. } | StreamFrame::Update { .. } | StreamFrame::Delete { .. } => 1,
        _ => 2,
    };
    counts[kind] += 1;
    match frame {
        StreamFrame::Begin(_)
        | StreamFrame::Prepare(_)
        | StreamFrame::Sequence(_)
        | StreamFrame::CommitPrepared(_)
        | StreamFrame::RollbackPrepared(_)
        | StreamFrame::FinishUser(_) => {}
        StreamFrame::Ddl(statement) => {
            applier.before_ddl();
            let statement = String::from_utf8_lossy(statement);
            if let Err(error) = Spi::run(&statement) {
                pgrx::error!("{statement}: {error}");
            }
        }
        row => {
            if let Err(error) = applier.apply(row) {
                let state = String::from_utf8_lossy(&error.sqlstate()).into_owned();
                let target = rows::current_target().unwrap_or_default();
                pgrx::error!("{state}: {error} | {} | {target}", error.detail());
            }
        }
    }
}

/// The row in hand when applying failed last in this session.
#[pg_extern]
fn mtm_test_target() -> Option<String> {
    rows::current_target()
}

/// Applies each transaction in such a file as a statement of its own, which is what a worker does between BEGIN and PREPARE. Returns
/// microseconds for each.
#[pg_extern]
fn mtm_test_apply_each(path: &str) -> f64 {
    let bytes = std::fs::read(path).unwrap_or_else(|error| pgrx::error!("{path}: {error}"));
    let begun = std::time::Instant::now();
    let mut transactions = 0u32;
    let mut applier = RowApplier::begin();
    for message in copied_messages(&bytes) {
        let message = Message::parse(message).unwrap_or_else(|error| pgrx::error!("{error}"));
        for frame in message.frames() {
            let frame = frame.unwrap_or_else(|error| pgrx::error!("{error}"));
            apply_frame(&mut applier, &frame, &mut [0; 3]);
        }
        if message.ends() {
            transactions += 1;
            if let Err(error) = std::mem::replace(&mut applier, RowApplier::begin()).finish() {
                pgrx::error!("{error}");
            }
        }
    }
    begun.elapsed().as_secs_f64() * 1e6 / f64::from(transactions)
}

/// Shows the frames in such a file.
#[pg_extern]
fn mtm_test_show_file(path: &str) -> SetOfIterator<'static, String> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| pgrx::error!("{path}: {error}"));
    let mut shown = Vec::new();
    for message in copied_messages(&bytes) {
        let message = Message::parse(message).unwrap_or_else(|error| pgrx::error!("{error}"));
        shown.push(format!(
            "message begins={} ends={}",
            message.begins(),
            message.ends()
        ));
        shown.extend(
            message
                .frames()
                .map(|frame| format!("{frame:?}").chars().take(300).collect()),
        );
    }
    SetOfIterator::new(shown)
}

/// The first column of each row of a binary COPY file.
fn copied_messages(bytes: &[u8]) -> Vec<&[u8]> {
    const HEADER: usize = 19;
    let mut rest = bytes.get(HEADER..).unwrap_or_default();
    let mut messages = Vec::new();
    while let Some((head, tail)) = rest.split_at_checked(6) {
        let length = u32::from_be_bytes([head[2], head[3], head[4], head[5]]) as usize;
        let Some((message, tail)) = tail.split_at_checked(length) else {
            break;
        };
        messages.push(message);
        rest = tail;
    }
    messages
}
