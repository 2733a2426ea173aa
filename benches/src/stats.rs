//! Many values as a few.

use std::time::Duration;

use serde::Serialize;

/// One quantity over all runs. Nanoseconds or bytes, as its table says.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Row {
    /// What was measured.
    pub name: &'static str,
    /// The smallest value.
    pub min: u64,
    /// The middle one, by nearest rank.
    pub median: u64,
    /// The smallest that 99 of 100 do not exceed.
    pub p99: u64,
    /// The largest.
    pub max: u64,
}

impl Row {
    /// `None` of no values.
    pub fn of(name: &'static str, mut values: Vec<u64>) -> Option<Row> {
        values.sort_unstable();
        // Nearest rank: the smallest value that at least so many percent of all do not exceed.
        let rank = |percent: usize| {
            values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied()
        };
        let (min, median, p99, max) = (*values.first()?, rank(50)?, rank(99)?, *values.last()?);
        Some(Row { name, min, median, p99, max })
    }
}

/// The rows of commands: when each one's first byte of output came, and its end.
pub fn output_and_exit(times: impl Iterator<Item = (u64, u64)>) -> Vec<Row> {
    let (outputs, exits) = times.unzip();
    [Row::of("output", outputs), Row::of("exit", exits)].into_iter().flatten().collect()
}

/// Bytes per second.
pub fn rate(bytes: u64, took: Duration) -> u64 {
    let nanoseconds = took.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// Prints rows, each value divided by `unit`.
pub fn print(title: &str, rows: &[Row], unit: f64) {
    println!("{title:<10} {:>10} {:>10} {:>10} {:>8}", "min", "median", "p99", "spread");
    for row in rows {
        println!(
            "{:<10} {:>10.3} {:>10.3} {:>10.3} {:>7.2}%",
            row.name,
            scaled(row.min, unit),
            scaled(row.median, unit),
            scaled(row.p99, unit),
            100.0 * scaled(row.max - row.min, scaled(row.median.max(1), 1.0)),
        );
    }
}

/// A count in another unit.
#[expect(clippy::cast_precision_loss, reason = "for display, with three decimals")]
pub fn scaled(count: u64, unit: f64) -> f64 {
    count as f64 / unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let expected = Row { name: "x", min: 1, median: 50, p99: 99, max: 100 };
        assert_eq!(Row::of("x", (1..=100).rev().collect()), Some(expected));
        let expected = Row { name: "x", min: 7, median: 7, p99: 7, max: 7 };
        assert_eq!(Row::of("x", vec![7]), Some(expected));
        assert_eq!(Row::of("x", vec![]), None);
    }
}
