//! The error of the benchmark tool.

use std::io;
use std::process::ExitStatus;

use chitin::{Exit, TierKind, Unavailable, error_chain};

use crate::peer::PeerError;

/// The exit code of every failure.
pub const BENCH_FAILED: i32 = 125;

/// A measurement that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The library reports it.
    #[error(transparent)]
    Sandbox(#[from] chitin::Error),
    /// The other monitor reports it.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// An operation on the host failed.
    #[error("{operation}")]
    Io { operation: String, source: io::Error },
    /// The measured command printed nothing, so that it has no first byte.
    #[error("the command prints nothing: measure one that writes to standard output")]
    NoOutput,
    /// The measured command failed in its sandbox.
    #[error("the command failed in the sandbox: {exit:?}")]
    CommandFailed { exit: Exit },
    /// A transfer ended before all bytes were moved.
    #[error("the transfer failed in the sandbox: {exit:?}")]
    TransferFailed { exit: Exit },
    /// A program of the host failed.
    #[error("{program} failed ({status}): {message}")]
    ProgramFailed { program: String, status: ExitStatus, message: String },
    /// The server in the sandbox closed the connection without an answer.
    #[error("port {port} of the sandbox sends no answer: there is nothing to measure")]
    NoAnswer { port: u16 },
    /// The HTTPS client failed, on the host or in a sandbox.
    #[error("the HTTPS client failed: {message}")]
    ClientFailed { message: String },
    /// The one tier that was asked for is not available.
    #[error("{tier} cannot be measured: {unavailable}")]
    TierUnavailable { tier: TierKind, unavailable: Unavailable },
    /// No tier is available.
    #[error("no tier is available on this host: `chitin doctor` gives the reasons")]
    NoTier,
}

impl BenchError {
    /// Returns a function that adds the failed operation to an I/O error.
    pub fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
        move |source| BenchError::Io { operation: operation.into(), source }
    }

    /// Returns the error and its causes as one line.
    pub fn line(&self) -> String {
        error_chain(self)
    }

    /// Prints the error to standard error.
    pub fn print(&self) {
        eprintln!("chitin-bench: {}", self.line());
    }
}
