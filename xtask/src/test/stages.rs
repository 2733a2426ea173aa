//! The stages of a test run: what ran, for how long, and what was left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

#[derive(Debug)]
struct Stage {
    name: String,
    duration: Duration,
    passed: bool,
}

/// The stages of one run. Stages can run at the same time.
#[derive(Debug, Default)]
pub struct Stages {
    finished: Mutex<Vec<Stage>>,
    left_out: Mutex<Vec<String>>,
}

impl Stages {
    /// Runs a stage, whose result is false if it ran and found faults, and reports whether it
    /// passed. An error of the stage is printed.
    pub fn run(&self, name: &str, stage: impl FnOnce() -> Result<bool>) -> bool {
        eprintln!("test: {name} …");
        let started = Instant::now();
        let passed = stage().unwrap_or_else(|error| {
            eprintln!("test: {name}: {error:#}");
            false
        });
        let duration = started.elapsed();
        let outcome = if passed { "passed" } else { "FAILED" };
        eprintln!("test: {name} {outcome} after {} s", duration.as_secs());
        let stage = Stage { name: name.to_owned(), duration, passed };
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).push(stage);
        passed
    }

    /// Prints that something is left out, and repeats it in the summary.
    pub fn leave_out(&self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("test: left out: {what}");
        self.left_out.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// Reports whether every stage passed.
    pub fn passed(&self) -> bool {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        finished.iter().all(|stage| stage.passed)
    }

    /// Returns a line for each stage and each thing left out.
    pub fn summary(&self) -> Vec<String> {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = vec!["stages:".to_owned()];
        lines.extend(finished.iter().map(|stage| {
            let mark = if stage.passed { "" } else { " FAILED" };
            format!("{:6} s  {}{mark}", stage.duration.as_secs(), stage.name)
        }));
        let left_out = self.left_out.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend(left_out.iter().map(|what| format!("left out: {what}")));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_names_failures_and_what_is_left_out() {
        let stages = Stages::default();
        assert!(stages.run("one", || Ok(true)));
        assert!(stages.passed());
        assert!(!stages.run("two", || anyhow::bail!("broken")));
        stages.leave_out("three");
        assert!(!stages.passed());
        let expected = ["stages:", "     0 s  one", "     0 s  two FAILED", "left out: three"];
        assert_eq!(stages.summary(), expected);
    }
}
