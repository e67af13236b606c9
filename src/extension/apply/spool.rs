//! What has come of one transaction that still runs, kept until its end.
//!
//! A file of the server's directory of temporary files, without a name there: whatever ends this process takes it away.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where PostgreSQL keeps temporary files, seen from the directory in which its processes run; at its start it removes what has this prefix.
const DIRECTORY: &str = "base/pgsql_tmp";
const PREFIX: &str = "pgsql_tmp_mtm_";

/// Bytes of messages, each with its length (4 bytes, little-endian) before it, as a worker's ring has them.
#[derive(Debug)]
pub struct Spool {
    file: File,
    end: u64,
    /// Where the first message of each subtransaction begins, in the order in which they came, and their places in that order.
    begins: Vec<(u32, u64)>,
    places: BTreeMap<u32, usize>,
}

impl Spool {
    /// An empty one.
    ///
    /// # Errors
    /// What the file system says.
    pub fn new() -> io::Result<Spool> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(DIRECTORY)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = format!("{DIRECTORY}/{PREFIX}{}.{number}", std::process::id());
        Spool::at(&path)
    }

    fn at(path: &str) -> io::Result<Spool> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        fs::remove_file(path)?;
        Ok(Spool {
            file,
            end: 0,
            begins: Vec::new(),
            places: BTreeMap::new(),
        })
    }

    /// Where the last message ends.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Adds a message of a subtransaction (or of the transaction itself).
    ///
    /// # Errors
    /// What the file system says; there is no room for it, say.
    pub fn add(&mut self, sub: u32, message: &[u8]) -> io::Result<()> {
        // PostgreSQL bounds a message to 1 GB.
        let length = (message.len() as u32).to_le_bytes();
        self.file.write_all_at(&length, self.end)?;
        let body = self.end + length.len() as u64;
        self.file.write_all_at(message, body)?;
        if let Entry::Vacant(place) = self.places.entry(sub) {
            place.insert(self.begins.len());
            self.begins.push((sub, self.end));
        }
        self.end = body + message.len() as u64;
        Ok(())
    }

    /// Forgets what a subtransaction did, and all that came after it began: that was its own or its children's.
    pub fn undo(&mut self, sub: u32) {
        if let Some(&place) = self.places.get(&sub) {
            self.end = self.begins[place].1;
            for (later, _) in self.begins.drain(place..) {
                self.places.remove(&later);
            }
        }
    }

    /// Fills `bytes` with what begins at `at`, as far as there is something; returns how much.
    ///
    /// # Errors
    /// What the file system says.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let there = self.end.saturating_sub(at).min(bytes.len() as u64) as usize;
        self.file.read_exact_at(&mut bytes[..there], at)?;
        Ok(there)
    }

    /// Where the message ends that begins at `at`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn message_end(&self, at: u64) -> io::Result<u64> {
        let mut length = [0; 4];
        self.file.read_exact_at(&mut length, at)?;
        Ok(at + length.len() as u64 + u64::from(u32::from_le_bytes(length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool() -> Spool {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("{PREFIX}test_{}.{number}", std::process::id()));
        Spool::at(path.to_str().unwrap()).unwrap()
    }

    fn content(spool: &Spool) -> Vec<u8> {
        let mut bytes = vec![0; 100];
        let count = spool.read(0, &mut bytes).unwrap();
        bytes.truncate(count);
        bytes
    }

    #[test]
    fn messages_are_read_back_with_their_lengths() {
        let mut spool = spool();
        spool.add(1, b"abc").unwrap();
        spool.add(1, b"").unwrap();
        assert_eq!(content(&spool), b"\x03\0\0\0abc\0\0\0\0");
        assert_eq!(spool.message_end(0).unwrap(), 7);
        assert_eq!(spool.message_end(7).unwrap(), spool.end());
        assert_eq!(spool.read(spool.end(), &mut [0; 4]).unwrap(), 0);
    }

    #[test]
    fn a_subtransaction_goes_with_what_came_after_it() {
        let mut spool = spool();
        spool.add(1, b"a").unwrap();
        spool.add(2, b"b").unwrap();
        spool.add(3, b"c").unwrap();
        spool.add(2, b"d").unwrap();
        spool.undo(2);
        assert_eq!(content(&spool), b"\x01\0\0\0a");
        // Its child was undone with it, and what was never heard of changes nothing.
        spool.undo(3);
        spool.undo(4);
        spool.add(5, b"e").unwrap();
        assert_eq!(content(&spool), b"\x01\0\0\0a\x01\0\0\0e");
    }
}
