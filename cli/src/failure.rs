//! What is told to a person when something fails: one line, the chain of causes in it, and what to do.

use std::error::Error as _;
use std::io;

/// Chitin itself failed; the workload may never have run.
pub const CHITIN_FAILED: u8 = 125;

/// The time limit was reached.
const TIMED_OUT: u8 = 124;

/// How many of the guest kernel's last lines are shown.
const LOG_LINES: usize = 25;

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The library says so.
    #[error(transparent)]
    Sandbox(#[from] chitin::Error),
    /// A file, pipe or terminal of the host.
    #[error("{what}")]
    Io {
        /// What was done, and to what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl Failure {
    /// The exit code that goes with it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Sandbox(chitin::Error::Timeout { .. }) => TIMED_OUT,
            _ => CHITIN_FAILED,
        }
    }

    /// The failure and its causes as one line.
    pub fn line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        printable(&line)
    }

    /// Says it on standard error, with the guest kernel's last messages where there are any.
    pub fn print(&self) {
        eprintln!("chitin: {}", self.line());
        if let Failure::Sandbox(error) = self
            && let Some(log) = error.guest_log()
        {
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("chitin: the last messages from inside:");
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                eprintln!("  | {}", printable(line));
            }
        }
    }
}

/// A usage error of clap as one line.
pub fn usage_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut words = Vec::new();
    // The first paragraph says what is wrong; usage and advertisement follow.
    for line in text.lines().take_while(|line| !line.is_empty()) {
        words.push(line.trim());
    }
    let line = words.join(" ");
    format!(
        "{}; `chitin --help` and `chitin run --help` say what there is",
        line.trim_start_matches("error: ")
    )
}

/// Text of a guest, or with a path in it, may hold escape sequences that a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(
            |c| if c.is_control() && c != '\t' { c.escape_default().collect() } else { vec![c] },
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}c\td"), "a\\u{1b}[2Jb\\u{9b}c\td");
    }

    #[test]
    fn a_chain_is_one_line() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let failure = Failure::Io { what: "write\nreport.json".into(), source };
        assert_eq!(failure.line(), "write\\nreport.json: entity not found");
    }
}
