//! What a receiver tells those who finish users' prepared transactions: which PREPAREs its stream may still bring again (`docs/membership.md`, *Users' prepared
//! transactions*).

use super::Shared;
use protocol::{Lsn, NodeId, NodeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// PREPAREs of users between the mark and what has been read that are remembered one by one. Of more than these the place of the last is, so that finishes wait
/// for longer than they need.
const PREPARES: usize = 1024;

/// A user's PREPARE that was read and is prepared here, or about to be.
#[repr(C)]
#[derive(Default)]
struct Prepare {
    /// [`name_hash`] of its name; 0 for none.
    name: AtomicU64,
    /// Its end in the peer's WAL.
    end: AtomicU64,
}

/// What stands between a finish and the PREPARE of its transaction, in one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// The stream brings the PREPARE no more.
    Never,
    /// It would if the receiver started anew: the mark that is written is before it.
    BeyondMark,
    /// The receiver, if there is one, has not read yet what was there when it started.
    NotRead,
}

/// One stream's part. Written by its receiver alone, but for `wanted`.
#[repr(C)]
pub struct Replay {
    /// Receivers of this peer so far.
    lives: AtomicU64,
    /// The receiver, by its number, that has read all that its peer had when it started; 0 while none has.
    level: AtomicU64,
    /// The mark as WAL has it. It may not be flushed yet: whatever follows it in WAL is flushed with it.
    written: AtomicU64,
    /// Somebody waits for the mark to be written.
    wanted: AtomicBool,
    prepares: [Prepare; PREPARES],
    /// End of the last PREPARE that found no room in `prepares`.
    crowded: AtomicU64,
}

impl Replay {
    /// A receiver starts at a mark.
    pub fn begin(&self, mark: Lsn) {
        self.end();
        for prepare in &self.prepares {
            prepare.name.store(0, Ordering::Release);
        }
        self.crowded.store(0, Ordering::Release);
        self.written.store(mark.0, Ordering::Release);
        self.lives.fetch_add(1, Ordering::AcqRel);
    }

    /// The receiver has read all that its peer's WAL had when it started.
    pub fn come_level(&self) {
        let life = self.lives.load(Ordering::Acquire);
        self.level.store(life, Ordering::Release);
    }

    pub fn is_level(&self) -> bool {
        self.level.load(Ordering::Acquire) != 0
    }

    /// The receiver goes away.
    pub fn end(&self) {
        self.level.store(0, Ordering::SeqCst);
    }

    /// A user's PREPARE was read that ends at `end`. Before it can be prepared, and before the next one.
    pub fn note(&self, name: &[u8], end: Lsn) {
        let free = |prepare: &&Prepare| prepare.name.load(Ordering::Acquire) == 0;
        match self.prepares.iter().find(free) {
            Some(prepare) => {
                prepare.end.store(end.0, Ordering::Release);
                prepare.name.store(name_hash(name), Ordering::Release);
            }
            None => self.crowded.store(end.0, Ordering::Release),
        }
    }

    /// The mark is in WAL.
    pub fn wrote(&self, mark: Lsn) {
        self.written.fetch_max(mark.0, Ordering::AcqRel);
        for prepare in &self.prepares {
            if prepare.end.load(Ordering::Acquire) <= mark.0 {
                prepare.name.store(0, Ordering::Release);
            }
        }
    }

    pub fn written(&self) -> Lsn {
        Lsn(self.written.load(Ordering::Acquire))
    }

    /// Asks for the mark to be written; the receiver must be woken.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::Release);
    }

    /// Whether that was asked for.
    pub fn take_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire) && self.wanted.swap(false, Ordering::AcqRel)
    }

    /// Whether the stream may bring the PREPARE of this name again, to this receiver or a later one.
    fn again(&self, name: &[u8]) -> Again {
        let life = self.level.load(Ordering::SeqCst);
        let name = name_hash(name);
        let written = self.written.load(Ordering::Acquire);
        let beyond = |end: &AtomicU64| end.load(Ordering::Acquire) > written;
        let known = self
            .prepares
            .iter()
            .any(|prepare| prepare.name.load(Ordering::Acquire) == name && beyond(&prepare.end));
        let again = known || beyond(&self.crowded);
        // What was seen in between may be of two receivers.
        if life == 0 || life != self.level.load(Ordering::SeqCst) {
            Again::NotRead
        } else if again {
            Again::BeyondMark
        } else {
            Again::Never
        }
    }
}

/// Whether a user's prepared transaction may be finished here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clearance {
    Clear,
    /// A mark is being written, which takes as long as what is being applied before the PREPARE.
    Soon,
    /// The stream of this node has not come as far as it went when its receiver started, or has none.
    Behind(NodeId),
}

impl Shared {
    /// Whether no stream would bring the PREPARE of this name again once it is finished: that of no member, nor `stream`, which brought the finish. Asks for the marks that
    /// are missing. What the stream of a node outside of the generation brings is refused or skipped.
    pub fn clearance(&self, name: &[u8], stream: Option<NodeId>) -> Clearance {
        let others = self
            .node_id()
            .map_or(NodeSet::EMPTY, |node| self.current().members.without(node));
        let waited = stream.map_or(others, |stream| others.with(stream));
        let mut clearance = Clearance::Clear;
        for node in waited.iter() {
            match self.node(node).replay.again(name) {
                Again::Never => {}
                Again::NotRead => return Clearance::Behind(node),
                Again::BeyondMark => {
                    self.node(node).replay.want();
                    self.node(node).receiver.wake();
                    clearance = Clearance::Soon;
                }
            }
        }
        clearance
    }

    /// A stream has come level: finishes in others may have waited for that.
    pub fn wake_receivers(&self) {
        for node in self.configured_nodes().iter() {
            self.node(node).receiver.wake();
        }
    }
}

/// A number for a name of a prepared transaction: FNV-1a, never 0. Two names of one number wait for what concerns the other one, no more.
pub fn name_hash(name: &[u8]) -> u64 {
    let mixed = name.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mixed.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(mark: u64) -> Replay {
        let replay = Replay {
            lives: AtomicU64::default(),
            level: AtomicU64::default(),
            written: AtomicU64::default(),
            wanted: AtomicBool::default(),
            prepares: std::array::from_fn(|_| Prepare::default()),
            crowded: AtomicU64::default(),
        };
        replay.begin(Lsn(mark));
        replay
    }

    #[test]
    fn nothing_is_known_before_the_stream_is_level() {
        let replay = started(10);
        assert_eq!(replay.again(b"a"), Again::NotRead);
        replay.come_level();
        assert_eq!(replay.again(b"a"), Again::Never);
        replay.end();
        assert_eq!(replay.again(b"a"), Again::NotRead);
    }

    #[test]
    fn a_prepare_comes_again_until_the_mark_is_behind_it() {
        let replay = started(10);
        replay.note(b"a", Lsn(20));
        replay.note(b"b", Lsn(30));
        replay.come_level();
        assert_eq!(replay.again(b"a"), Again::BeyondMark);
        replay.wrote(Lsn(20));
        assert_eq!(replay.again(b"a"), Again::Never);
        assert_eq!(replay.again(b"b"), Again::BeyondMark);
        assert_eq!(replay.written(), Lsn(20));
    }

    #[test]
    fn what_finds_no_room_holds_up_all() {
        let replay = started(10);
        replay.come_level();
        for number in 0..=PREPARES as u64 {
            replay.note(&number.to_le_bytes(), Lsn(20 + number));
        }
        assert_eq!(replay.again(b"another"), Again::BeyondMark);
        replay.wrote(Lsn(20 + PREPARES as u64));
        assert_eq!(replay.again(b"another"), Again::Never);
    }
}
