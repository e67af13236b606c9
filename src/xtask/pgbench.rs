//! What pgbench reports.

/// The figures of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Committed transactions.
    pub transactions: u64,
    /// Transactions that were given up.
    pub failed: u64,
    /// Attempts beyond each transaction's first.
    pub retries: u64,
    /// Milliseconds.
    pub latency_ms: f64,
    /// Committed transactions per second, without the time of connecting.
    pub tps: f64,
}

impl Report {
    /// Reads pgbench's closing report.
    pub fn read(text: &str) -> Option<Report> {
        let transactions = after(text, "number of transactions actually processed: ")?;
        Some(Report {
            // `12/1000` when a number of transactions was asked for.
            transactions: transactions.split('/').next()?.parse().ok()?,
            failed: after(text, "number of failed transactions: ")
                .and_then(|word| word.parse().ok())
                .unwrap_or(0),
            retries: after(text, "total number of retries: ")
                .and_then(|word| word.parse().ok())
                .unwrap_or(0),
            latency_ms: after(text, "latency average = ")
                .and_then(|word| word.parse().ok())
                .unwrap_or(0.0),
            tps: after(text, "tps = ")?.parse().ok()?,
        })
    }
}

/// The word that follows `label`.
fn after<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    text.split_once(label)?.1.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::Report;

    #[test]
    fn report_of_a_run_with_retries_is_read() {
        let text = "number of transactions actually processed: 2540\nnumber of failed transactions: 1 (0.039%)\n\
                    number of transactions retried: 7 (0.275%)\ntotal number of retries: 9\n\
                    latency average = 3.935 ms\ninitial connection time = 5.2 ms\ntps = 254.125 (without initial connection time)\n";
        let expected = Report {
            transactions: 2540,
            failed: 1,
            retries: 9,
            latency_ms: 3.935,
            tps: 254.125,
        };
        assert_eq!(Report::read(text), Some(expected));
    }

    #[test]
    fn other_text_is_no_report() {
        assert_eq!(Report::read("pgbench: error"), None);
    }
}
