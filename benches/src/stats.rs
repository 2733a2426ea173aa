//! Summaries: minimum, median, 99th percentile and maximum of many values.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Nanoseconds in a millisecond.
pub const MILLISECOND: f64 = 1e6;

/// Bytes in a KiB and in a MiB.
pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// One quantity over all runs, in nanoseconds or bytes.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Row {
    /// The name of the quantity.
    pub name: &'static str,
    /// The smallest value.
    pub min: u64,
    /// The middle value, by nearest rank.
    pub median: u64,
    /// The smallest value that 99 of 100 do not exceed.
    pub p99: u64,
    /// The largest value.
    pub max: u64,
}

impl Row {
    /// Summarizes values; returns `None` if there are none.
    pub fn summarize(name: &'static str, mut values: Vec<u64>) -> Option<Row> {
        values.sort_unstable();
        // Nearest rank: the smallest value that at least so many percent of all do not exceed.
        let rank = |percent: usize| {
            values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied()
        };
        let (min, median, p99, max) = (*values.first()?, rank(50)?, rank(99)?, *values.last()?);
        Some(Row { name, min, median, p99, max })
    }
}

/// Every run and its summary, as a report lists them.
#[derive(Serialize)]
pub struct Figures<T> {
    pub summary: Vec<Row>,
    pub runs: Vec<T>,
}

/// Summarizes commands by the time of their first byte of output and the time of their end.
pub fn summarize_output_and_exit(times: impl Iterator<Item = (u64, u64)>) -> Vec<Row> {
    let (outputs, exits) = times.unzip();
    let rows = [Row::summarize("output", outputs), Row::summarize("exit", exits)];
    rows.into_iter().flatten().collect()
}

/// Returns the nanoseconds since a moment.
pub fn elapsed_ns(since: Instant) -> u64 {
    ns_between(since, Instant::now())
}

/// Returns the nanoseconds between two moments.
pub fn ns_between(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

/// Returns bytes per second.
pub fn bytes_per_second(bytes: u64, took: Duration) -> u64 {
    let nanoseconds = took.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// Prints rows as a table, each value divided by `unit`.
pub fn print_rows(title: &str, rows: &[Row], unit: f64) {
    println!("{title:<10} {:>10} {:>10} {:>10} {:>8}", "min", "median", "p99", "spread");
    for row in rows {
        println!(
            "{:<10} {:>10.3} {:>10.3} {:>10.3} {:>7.2}%",
            row.name,
            scale(row.min, unit),
            scale(row.median, unit),
            scale(row.p99, unit),
            100.0 * scale(row.max - row.min, to_f64(row.median.max(1))),
        );
    }
}

/// Converts a count to another unit.
pub fn scale(count: u64, unit: f64) -> f64 {
    to_f64(count) / unit
}

/// Converts a count to a number that can be divided.
#[expect(clippy::cast_precision_loss, reason = "for display, with three decimals")]
pub fn to_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let expected = Row { name: "x", min: 1, median: 50, p99: 99, max: 100 };
        assert_eq!(Row::summarize("x", (1..=100).rev().collect()), Some(expected));
        let expected = Row { name: "x", min: 7, median: 7, p99: 7, max: 7 };
        assert_eq!(Row::summarize("x", vec![7]), Some(expected));
        assert_eq!(Row::summarize("x", vec![]), None);
    }
}
