//! Transactions of a peer that still run there (docs/replication.md, "Large transactions").
//!
//! All that comes of one is kept in a [`Spool`]. Beside that it is applied *ahead*, where a worker is free, up to the first thing that is held. Applying ahead decides
//! nothing: whatever goes wrong, the worker drops what it has done, and the transaction is applied from the spool when its PREPARE has come.

use super::feed::Feed;
use super::spool::Spool;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use wire::stream::{Piece, Undo};

/// So much is read from a spool at a time.
const READ_BYTES: usize = 64 * 1024;

/// The running transactions of one peer of which something has come, by their xid there.
#[derive(Default)]
pub struct Streams(BTreeMap<u32, Streamed>);

/// One of them.
pub struct Streamed {
    spool: Spool,
    /// From here on it is applied at the PREPARE only.
    held_from: Option<u64>,
    ahead: Ahead,
}

/// How far applying ahead is.
enum Ahead {
    /// Until a worker is free.
    Waits,
    /// A worker has been given this many bytes of the spool.
    Runs { feed: Feed, given: u64 },
    /// It was dropped.
    Over,
}

impl Streams {
    /// A piece has come; `message` is the whole message.
    ///
    /// # Errors
    /// What the file system says.
    pub fn add(&mut self, piece: &Piece<'_>, message: &[u8], ahead: bool) -> io::Result<()> {
        let streamed = match self.0.entry(piece.top) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(Streamed {
                spool: Spool::new()?,
                held_from: None,
                ahead: Ahead::Waits,
            }),
        };
        if piece.held && streamed.held_from.is_none() {
            streamed.held_from = Some(streamed.spool.end());
        }
        streamed.spool.add(piece.sub, message)?;
        streamed.go_on(ahead)
    }

    /// A transaction or one of its subtransactions was rolled back.
    pub fn undo(&mut self, undo: Undo) {
        if undo.sub != undo.top {
            if let Some(streamed) = self.0.get_mut(&undo.top) {
                streamed.spool.undo(undo.sub);
            }
        } else if let Some(streamed) = self.0.remove(&undo.top) {
            streamed.drop_all();
        }
    }

    /// Gives workers what they have room for, and lets go of those that have dropped what they did. `ahead`: whether anything may be applied ahead now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn go_on(&mut self, ahead: bool) -> io::Result<()> {
        self.0
            .values_mut()
            .try_for_each(|streamed| streamed.go_on(ahead))
    }

    /// The PREPARE of a transaction has come: it is the caller's now. Nothing when nothing was sent of it.
    pub fn take(&mut self, top: u32) -> Option<Streamed> {
        self.0.remove(&top)
    }
}

impl Streamed {
    fn go_on(&mut self, may: bool) -> io::Result<()> {
        let limit = self.held_from.unwrap_or(self.spool.end());
        if may
            && limit > 0
            && matches!(self.ahead, Ahead::Waits)
            && let Some(feed) = Feed::claim_ahead()
        {
            self.ahead = Ahead::Runs { feed, given: 0 };
        }
        let Ahead::Runs { feed, given } = &mut self.ahead else {
            return Ok(());
        };
        if !may || feed.was_dropped() {
            self.stop_ahead();
            return Ok(());
        }
        let mut bytes = Vec::new();
        while *given < limit {
            bytes.resize(READ_BYTES, 0);
            let wanted = (limit - *given).min(READ_BYTES as u64) as usize;
            let count = self.spool.read(*given, &mut bytes[..wanted])?;
            let taken = feed.offer(&bytes[..count]);
            *given += taken as u64;
            if taken < count {
                break;
            }
        }
        Ok(())
    }

    fn stop_ahead(&mut self) {
        if let Ahead::Runs { feed, .. } = std::mem::replace(&mut self.ahead, Ahead::Over) {
            feed.break_off();
        }
    }

    /// It is not wanted any more.
    pub fn drop_all(mut self) {
        self.stop_ahead();
    }

    /// Has the transaction applied whose `Resume` is `message`: by the worker that has applied it so far, as long as that `may` be, or by another one
    /// from the start. The message with `Prepare` is still to be fed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn resume(mut self, message: &[u8], may: impl Fn() -> bool) -> io::Result<Feed> {
        let ahead = std::mem::replace(&mut self.ahead, Ahead::Over);
        if let Ahead::Runs { feed, given } = ahead {
            let boundary = self.boundary_from(given)?;
            self.feed(&feed, given, boundary)?;
            feed.write_message(message, || ());
            if feed.await_begin(may) {
                self.feed(&feed, boundary, self.spool.end())?;
                return Ok(feed);
            }
            feed.break_off();
        }
        let feed = Feed::claim(|| ());
        feed.write_message(message, || ());
        self.feed(&feed, 0, self.spool.end())?;
        Ok(feed)
    }

    /// Where the message ends of which bytes up to `given` were given; `given` if that is between two.
    fn boundary_from(&self, given: u64) -> io::Result<u64> {
        let mut boundary = 0;
        while boundary < given {
            boundary = self.spool.message_end(boundary)?;
        }
        Ok(boundary)
    }

    fn feed(&self, feed: &Feed, from: u64, to: u64) -> io::Result<()> {
        let mut bytes = vec![0; READ_BYTES];
        let mut at = from;
        while at < to {
            let wanted = (to - at).min(READ_BYTES as u64) as usize;
            let count = self.spool.read(at, &mut bytes[..wanted])?;
            // A worker that is gone has answered: the rest is not wanted.
            if count == 0 || !feed.write(&[&bytes[..count]], || ()) {
                break;
            }
            at += count as u64;
        }
        Ok(())
    }
}
