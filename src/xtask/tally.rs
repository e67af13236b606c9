//! Counting tests, whoever ran them.

use std::ops::AddAssign;

/// Tests that passed and tests that did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
}

impl Tally {
    /// A check without tests of its own.
    pub const PASSED: Tally = Tally {
        passed: 1,
        failed: 0,
    };

    /// The same, failed.
    pub const FAILED: Tally = Tally {
        passed: 0,
        failed: 1,
    };

    /// Reads the summaries that `cargo test` and `cargo nextest` print.
    pub fn read(output: &str) -> Tally {
        // nextest also shows what a failed test printed, which has a summary of its own.
        let nextest: Tally = sum(output, "Summary [");
        if nextest == Tally::default() {
            sum(output, "test result:")
        } else {
            nextest
        }
    }

    /// Did all tests pass, and was there at least one?
    pub fn is_good(self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Adds up the summary lines that start with `mark`.
fn sum(output: &str, mark: &str) -> Tally {
    let mut tally = Tally::default();
    for line in output
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with(mark))
    {
        tally += Tally {
            passed: count_before(line, "passed"),
            failed: count_before(line, "failed")
                + count_before(line, "timed out")
                + count_before(line, "exec failed"),
        };
    }
    tally
}

/// The number right before the first `word`, or 0.
fn count_before(line: &str, word: &str) -> usize {
    line.split_once(word)
        .and_then(|(before, _)| before.split_whitespace().next_back())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn summaries_of_cargo_test_add_up() {
        let output = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 0 ignored\n\
                      test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured\n";
        assert_eq!(
            Tally::read(output),
            Tally {
                passed: 4,
                failed: 2
            }
        );
    }

    #[test]
    fn summary_of_nextest_is_understood() {
        let good = "     Summary [   0.521s] 12 tests run: 12 passed (1 slow), 0 skipped";
        assert_eq!(
            Tally::read(good),
            Tally {
                passed: 12,
                failed: 0
            }
        );
        let bad =
            "     Summary [   0.521s] 12 tests run: 9 passed, 2 failed, 1 timed out, 0 skipped";
        assert_eq!(
            Tally::read(bad),
            Tally {
                passed: 9,
                failed: 3
            }
        );
    }

    #[test]
    fn run_without_tests_is_not_good() {
        assert!(!Tally::read("nothing here").is_good());
        assert!(!Tally::read("test result: ok. 0 passed; 0 failed").is_good());
    }
}
