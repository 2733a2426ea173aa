//! The error of the benchmark tool.

use std::error::Error as _;
use std::io;

use crate::peer::PeerError;

/// The exit code of every failure.
pub const CHITIN_FAILED: u8 = 125;

/// The reason for which a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The library reports it.
    #[error(transparent)]
    Sandbox(#[from] chitin::Error),
    /// A file, pipe or process of the host.
    #[error("{what}")]
    Io {
        /// The operation and its object.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The other monitor reports it.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The request or the result of a command makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl Failure {
    /// Returns the failure and its causes as one line.
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

    /// Prints the failure to standard error.
    pub fn print(&self) {
        eprintln!("chitin-bench: {}", self.line());
    }
}

/// Escapes control characters, which a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(
            |c| if c.is_control() && c != '\t' { c.escape_default().collect() } else { vec![c] },
        )
        .collect()
}
