//! Outcomes and durations of tests, read from the output of nextest.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Tests that the summary names.
const SLOWEST: usize = 15;

/// Statuses of a test that passed; one that leaks has left a child process behind, and nextest's
/// profile decides whether it fails.
const PASSED: [&str; 4] = ["PASS", "LEAK", "TIMEOUT-PASS", "TMPASS"];

/// One finished test.
#[derive(Debug, Clone, PartialEq)]
struct TestRun {
    passed: bool,
    duration: Duration,
}

/// The last outcome of each test. nextest repeats failures after its summary, and reports each try
/// of a test that it retries.
#[derive(Debug, Default)]
pub struct TestLog {
    runs: Mutex<BTreeMap<String, TestRun>>,
}

impl TestLog {
    /// Records the test that a line of nextest's output reports, if it reports one.
    pub fn observe(&self, line: &str) {
        if let Some((name, run)) = parse_line(line) {
            self.runs.lock().unwrap_or_else(PoisonError::into_inner).insert(name, run);
        }
    }

    /// Returns the number of tests that passed, and of tests that did not.
    pub fn counts(&self) -> (usize, usize) {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = runs.values().filter(|run| run.passed).count();
        (passed, runs.len() - passed)
    }

    /// Returns the names of these tests that were not reported.
    pub fn missing<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        names.filter(|name| !runs.contains_key(*name)).collect()
    }

    /// Returns a line for each of the slowest tests, and one for each that did not pass.
    pub fn summary(&self) -> Vec<String> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<_> = runs.iter().collect();
        sorted.sort_by_key(|(_, run)| std::cmp::Reverse(run.duration));
        let mut lines = vec!["slowest tests:".to_owned()];
        lines.extend(
            sorted
                .iter()
                .take(SLOWEST)
                .map(|(name, run)| format!("{:8.1} s  {name}", run.duration.as_secs_f64())),
        );
        let failed = runs.iter().filter(|(_, run)| !run.passed);
        lines.extend(failed.map(|(name, _)| format!("failed: {name}")));
        lines
    }
}

/// Parses a line `STATUS [   1.234s] (12/34) BINARY TEST`.
fn parse_line(line: &str) -> Option<(String, TestRun)> {
    let (status, rest) = line.split_once('[')?;
    let (duration, name) = rest.split_once(']')?;
    // `TRY 2 FAIL`, `FLAKY 2/3`, `SIGABRT`; a summary is not in capitals, and a test that still
    // runs has no duration.
    if status.trim().is_empty() || status.contains(|c: char| c.is_ascii_lowercase()) {
        return None;
    }
    let mut words = status.split_whitespace();
    let passed = words.clone().next() == Some("FLAKY")
        || words.next_back().is_some_and(|word| PASSED.contains(&word));
    let seconds: f64 = duration.trim().strip_suffix('s')?.parse().ok()?;
    let duration = Duration::try_from_secs_f64(seconds).ok()?;
    let name = match name.trim().strip_prefix('(') {
        Some(counted) => counted.split_once(')')?.1.trim(),
        None => name.trim(),
    };
    (!name.is_empty()).then(|| (name.to_owned(), TestRun { passed, duration }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_try_of_a_test_counts() {
        let log = TestLog::default();
        for line in [
            "        PASS [   0.005s] (  1/161) chitin-protocol frame::tests::short",
            "        SLOW [> 60.000s] (---------) chitin-integration::fork slow",
            "        PASS [  61.500s] (  2/161) chitin-integration::fork slow",
            "  TRY 1 FAIL [   0.022s] (  3/161) chitin flaky",
            "  TRY 2 PASS [   0.021s] (  3/161) chitin flaky",
            "        FAIL [   0.022s] (  4/161) chitin broken",
            " SIGABRT [   0.1s] (  5/161) chitin aborted",
            "     TIMEOUT [ 300.001s] (  6/161) chitin hung",
            "     Summary [   2.015s] 6 tests run: 3 passed, 3 failed, 0 skipped",
            "   FLAKY 2/2 [   0.021s] (  3/161) chitin flaky",
            "        FAIL [   0.022s] (  4/161) chitin broken",
            "    Starting 6 tests across 3 binaries",
            "[not a status] of any kind",
        ] {
            log.observe(line);
        }
        assert_eq!(log.counts(), (3, 3));
        assert_eq!(log.missing(["chitin flaky", "chitin new"].into_iter()), ["chitin new"]);
        let summary = log.summary();
        assert_eq!(summary[1], "   300.0 s  chitin hung");
        assert_eq!(summary[2], "    61.5 s  chitin-integration::fork slow");
        assert!(summary.contains(&"failed: chitin aborted".to_owned()), "{summary:?}");
    }
}
