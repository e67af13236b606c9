//! How long commits take, by phase and by peer: histograms in shared memory, cheap enough to be always on.
//!
//! A commit of this node goes through these phases, one after the other:
//!
//! | phase | from | to |
//! |---|---|---|
//! | prepare | COMMIT arrives | the transaction is durably prepared here |
//! | vote | | every node has applied and prepared it, and its vote is here |
//! | precommit | | a majority has made the verdict durable; missing where votes alone decide |
//! | commit | the backend hears the outcome | COMMIT PREPARED is durable here |
//! | peer commit | | every node has finished it (`multimaster.wait_peer_commits`) |
//! | total | COMMIT arrives | the client is answered |
//!
//! Votes and peers' commits are kept for each peer too, measured from the same start: the slowest peer makes the phase.

use protocol::NodeId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::pg::shared::NODES;

/// Buckets of one power of two: a value is known to an eighth.
const PARTS: u64 = 8;
/// Powers of two up to 2^27 µs, which is more than two minutes; what is longer counts as that.
const POWERS: u64 = 25;
const BUCKETS: usize = (PARTS * (POWERS + 1)) as usize;

/// Durations in microseconds, in buckets of logarithmic width that are divided evenly. All zeroes is an empty one.
#[repr(C)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
    max_us: AtomicU64,
}

/// What a histogram says; in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub count: u64,
    pub mean_us: f64,
    /// Median, 95 % and 99 %, each to an eighth.
    pub percentiles_us: [f64; 3],
    pub max_us: u64,
}

/// Parts of a commit, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Prepare,
    Vote,
    Precommit,
    Commit,
    PeerCommit,
    Total,
}

impl Phase {
    pub const ALL: [Phase; 6] = [
        Phase::Prepare,
        Phase::Vote,
        Phase::Precommit,
        Phase::Commit,
        Phase::PeerCommit,
        Phase::Total,
    ];

    /// The word that SQL shows.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prepare => "prepare",
            Phase::Vote => "vote",
            Phase::Precommit => "precommit",
            Phase::Commit => "commit",
            Phase::PeerCommit => "peer commit",
            Phase::Total => "total",
        }
    }
}

/// All histograms of a server.
#[repr(C)]
pub struct Latencies {
    phases: [Histogram; Phase::ALL.len()],
    votes: [Histogram; NODES],
    peer_commits: [Histogram; NODES],
}

impl Latencies {
    /// A phase of a commit took so long.
    pub fn note(&self, phase: Phase, took: Duration) {
        self.phases[phase as usize].note(took);
    }

    /// The vote of this peer came after so long.
    pub fn note_vote(&self, peer: NodeId, took: Duration) {
        self.votes[peer.get() as usize].note(took);
    }

    /// This peer had finished a commit after so long.
    pub fn note_peer_commit(&self, peer: NodeId, took: Duration) {
        self.peer_commits[peer.get() as usize].note(took);
    }

    /// Every phase with the peer that it is about, or none for all of them together.
    pub fn all(
        &self,
        peers: impl Iterator<Item = NodeId> + Clone,
    ) -> impl Iterator<Item = (Phase, Option<NodeId>, Summary)> {
        Phase::ALL.into_iter().flat_map(move |phase| {
            let by_peer = match phase {
                Phase::Vote => Some(&self.votes),
                Phase::PeerCommit => Some(&self.peer_commits),
                _ => None,
            };
            let whole = (phase, None, self.phases[phase as usize].summary());
            let parts = peers.clone().filter_map(move |peer| {
                let histogram = &by_peer?[peer.get() as usize];
                Some((phase, Some(peer), histogram.summary()))
            });
            std::iter::once(whole).chain(parts)
        })
    }

    /// The votes of a peer.
    pub fn votes_of(&self, peer: NodeId) -> Summary {
        self.votes[peer.get() as usize].summary()
    }

    /// Forgets everything.
    pub fn reset(&self) {
        self.phases
            .iter()
            .chain(&self.votes)
            .chain(&self.peer_commits)
            .for_each(Histogram::reset);
    }
}

impl Histogram {
    fn note(&self, took: Duration) {
        let us = took.as_micros() as u64;
        self.buckets[bucket_of(us)].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
        self.max_us.fetch_max(us, Ordering::Relaxed);
    }

    /// What was noted so far; what is noted meanwhile may be in some figures and not in others.
    fn summary(&self) -> Summary {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .collect();
        let count: u64 = counts.iter().sum();
        let max_us = self.max_us.load(Ordering::Relaxed);
        Summary {
            count,
            mean_us: self.sum_us.load(Ordering::Relaxed) as f64 / count.max(1) as f64,
            percentiles_us: [50, 95, 99]
                .map(|hundredths| percentile(&counts, count, hundredths).min(max_us as f64)),
            max_us,
        }
    }

    fn reset(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
        self.sum_us.store(0, Ordering::Relaxed);
        self.max_us.store(0, Ordering::Relaxed);
    }
}

/// The bucket of a value: below [`PARTS`] each value has its own; then each power of two has [`PARTS`] of them.
fn bucket_of(us: u64) -> usize {
    let power = us.max(1).ilog2();
    let bucket = if power < PARTS.ilog2() {
        us
    } else {
        let shift = power - PARTS.ilog2();
        PARTS * u64::from(shift) + (us >> shift)
    };
    (bucket as usize).min(BUCKETS - 1)
}

/// The least value of a bucket.
fn least_of(bucket: usize) -> f64 {
    let bucket = bucket as u64;
    if bucket < PARTS {
        return bucket as f64;
    }
    let shift = bucket / PARTS - 1;
    ((PARTS + bucket % PARTS) << shift) as f64
}

/// The middle of the bucket in which the value lies that so many hundredths are not above; 0 when there are none.
fn percentile(counts: &[u64], count: u64, hundredths: u64) -> f64 {
    let wanted = (count * hundredths).div_ceil(100);
    let mut seen = 0;
    counts
        .iter()
        .position(|bucket| {
            seen += bucket;
            seen > 0 && seen >= wanted
        })
        .map_or(0.0, |bucket| {
            f64::midpoint(least_of(bucket), least_of(bucket + 1))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Histogram {
        Histogram {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            sum_us: AtomicU64::new(0),
            max_us: AtomicU64::new(0),
        }
    }

    #[test]
    fn every_value_lies_in_its_bucket() {
        for us in (0..100_000).chain([1 << 20, (1 << 26) + 12_345, (1 << 28) - 1]) {
            let bucket = bucket_of(us);
            let (least, next) = (least_of(bucket), least_of(bucket + 1));
            assert!(least <= us as f64 && (us as f64) < next, "{us} in {bucket}");
            assert!(next - least <= (least / PARTS as f64).max(1.0));
        }
    }

    #[test]
    fn what_is_too_long_counts_as_the_longest() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_right_to_an_eighth() {
        let histogram = empty();
        for us in 1..=10_000 {
            histogram.note(Duration::from_micros(us));
        }
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.max_us), (10_000, 10_000));
        assert!((summary.mean_us - 5000.5).abs() < 0.01);
        for (found, exact) in summary
            .percentiles_us
            .into_iter()
            .zip([5000.0, 9500.0, 9900.0])
        {
            assert!((found - exact).abs() <= exact / 8.0, "{found} for {exact}");
        }
    }

    #[test]
    fn nothing_noted_and_everything_forgotten_are_zeroes() {
        let histogram = empty();
        let nothing = histogram.summary();
        assert_eq!((nothing.count, nothing.percentiles_us), (0, [0.0; 3]));
        histogram.note(Duration::from_millis(3));
        histogram.reset();
        assert_eq!(histogram.summary(), nothing);
    }
}
