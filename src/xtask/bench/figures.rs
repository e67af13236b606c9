//! The figures of one measurement, and medians of several.

use std::fmt;

/// What one measurement gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Committed transactions per second.
    pub tps: f64,
    /// Milliseconds from BEGIN to the answer of COMMIT, retries included: median, 95 %, 99 %, longest.
    pub latency_ms: [f64; 4],
    /// Seconds of CPU of all servers per 1000 transactions (per second, where there are none).
    pub cpu_s: f64,
    /// Context switches of all servers per 1000 transactions.
    pub switches: f64,
    /// Calls of fdatasync of all servers per 1000 transactions.
    pub flushes: Option<f64>,
    /// Attempts beyond the first per 1000 transactions.
    pub retries: f64,
}

impl Figures {
    /// The medians of each figure.
    pub fn medians(all: &[Figures]) -> Figures {
        let of =
            |figure: &dyn Fn(&Figures) -> f64| median(&all.iter().map(figure).collect::<Vec<_>>());
        let flushes: Vec<f64> = all.iter().filter_map(|figures| figures.flushes).collect();
        Figures {
            tps: of(&|figures| figures.tps),
            latency_ms: std::array::from_fn(|place| of(&|figures| figures.latency_ms[place])),
            cpu_s: of(&|figures| figures.cpu_s),
            switches: of(&|figures| figures.switches),
            flushes: (!flushes.is_empty()).then(|| median(&flushes)),
            retries: of(&|figures| figures.retries),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} a second, median {} ms, CPU {} s and {} switches per 1000",
            short(self.tps),
            short(self.latency_ms[0]),
            short(self.cpu_s),
            short(self.switches),
        )
    }
}

/// The median of the ratios of two series, pair by pair.
pub fn median_ratio(ours: &[Figures], theirs: &[Figures], figure: impl Fn(&Figures) -> f64) -> f64 {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(ours, theirs)| figure(ours) / figure(theirs))
        .collect();
    median(&ratios)
}

/// The middle value; not a number when there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

/// The values below which so many hundredths of all lie: median, 95, 99, and the largest.
pub fn percentiles(values: &mut [f64]) -> [f64; 4] {
    values.sort_by(f64::total_cmp);
    let at = |hundredths: usize| {
        let place = (values.len() * hundredths / 100).min(values.len().saturating_sub(1));
        values.get(place).copied().unwrap_or(f64::NAN)
    };
    [at(50), at(95), at(99), at(100)]
}

/// A number with three digits that count.
pub fn short(value: f64) -> String {
    if !value.is_finite() {
        return "-".to_owned();
    }
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_even_and_odd_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn percentiles_come_from_the_sorted_values() {
        let mut values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentiles(&mut values), [101.0, 191.0, 199.0, 200.0]);
        assert_eq!(percentiles(&mut [7.0]), [7.0; 4]);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        let of = |tps| Figures {
            tps,
            ..Figures::default()
        };
        let (ours, theirs) = ([of(1.0), of(4.0), of(9.0)], [of(2.0), of(4.0), of(3.0)]);
        assert_eq!(median_ratio(&ours, &theirs, |figures| figures.tps), 1.0);
    }

    #[test]
    fn numbers_are_shown_with_three_digits() {
        assert_eq!(
            [1234.5, 12.34, 1.234, 0.1234, f64::NAN].map(short),
            ["1234", "12.3", "1.23", "0.123", "-"]
        );
    }
}
