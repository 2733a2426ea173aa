//! The error of the CLI and its exit code.

use std::io;

use chitin::{EndCause, error_chain, printable};

use crate::output::notice;

/// The exit code if Chitin itself failed. The workload may never have run.
pub const CHITIN_FAILED: u8 = 125;

/// The exit code of an invalid command line, as of most programs.
pub const INVALID_USAGE: u8 = 2;

/// The exit code if the time limit was reached.
const TIMED_OUT: u8 = 124;

/// The exit code of a shell for a command that SIGKILL ended.
const KILLED: u8 = 137;

/// Lines of the guest kernel's log that an error shows.
const LOG_LINES: usize = 25;

/// A command that failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The library reports it.
    #[error(transparent)]
    Sandbox(#[from] chitin::Error),
    /// An operation on a file, pipe or terminal of the host failed.
    #[error("{operation}")]
    Io { operation: String, source: io::Error },
    /// `--env =VALUE`.
    #[error("--env {argument}: the name of the variable is empty")]
    EmptyVariable { argument: String },
    /// `--env NAME=VALUE` with a name that has white space, control characters or other alphabets.
    #[error("--env: `{name}` cannot be the name of a variable: use printable ASCII without spaces")]
    VariableName { name: String },
    /// `--env NAME` of a variable that this process does not have.
    #[error("--env {name}: {name} is not set on this host: give a value, {name}=VALUE")]
    UnsetVariable { name: String },
    /// An option about a secret that no `--secret` defines.
    #[error("{option} {name}: there is no --secret {name}=SRC: add it")]
    UnknownSecret { option: &'static str, name: String },
    /// An option about a placeholder of a secret that has none.
    #[error("{option} {name}: there is no --secret {name}=SRC@HOST: add it")]
    UnknownPlaceholder { option: &'static str, name: String },
    /// Two options that deliver the same secret.
    #[error("{option} {name}: another option already delivers {name}: remove one of them")]
    DeliveredTwice { option: &'static str, name: String },
    /// A log filter that cannot be parsed.
    #[error("CHITIN_LOG: `{filter}` is not a log filter such as `info` or `chitin_broker=debug`")]
    LogFilter { filter: String },
}

impl CliError {
    /// Returns a function that adds the failed operation to an I/O error.
    pub fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> CliError {
        move |source| CliError::Io { operation: operation.into(), source }
    }

    /// Returns the cause of the end for programs.
    pub fn cause(&self) -> EndCause {
        match self {
            CliError::Sandbox(error) => error.cause(),
            CliError::Io { .. } => EndCause::Host,
            _ => EndCause::Request,
        }
    }

    /// Returns the exit code that reports this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Sandbox(chitin::Error::Timeout { .. }) => TIMED_OUT,
            // The limit has killed the command along with its sandbox.
            CliError::Sandbox(chitin::Error::GuestEnded(end))
                if end.cause == EndCause::OutOfMemory =>
            {
                KILLED
            }
            CliError::Sandbox(_) | CliError::Io { .. } | CliError::LogFilter { .. } => {
                CHITIN_FAILED
            }
            _ => INVALID_USAGE,
        }
    }

    /// Returns the error and its causes as one line.
    pub fn line(&self) -> String {
        error_chain(self)
    }

    /// Prints the error to standard error, and the last messages of the guest kernel if there are
    /// any.
    pub fn print(&self) {
        notice!("chitin: {}", self.line());
        if let CliError::Sandbox(error) = self
            && let Some(log) = error.guest_log()
        {
            let lines: Vec<&str> = log.lines().collect();
            notice!("chitin: last messages of the guest kernel:");
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                notice!("  | {}", printable(line));
            }
        }
    }
}
