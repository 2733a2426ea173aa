//! Errors that end the agent, and failures that it reports to the host.

use std::fmt::Display;

use chitin_protocol::{Failure, Fault};
use rustix::io::Errno;

/// An error that ends the agent with exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    System(#[from] SystemError),
    #[error("the host violated the protocol: {0}")]
    Fault(#[from] Fault),
}

/// A system call that failed while the agent set up itself or its sandbox.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {object}: {errno}")]
pub struct SystemError {
    pub operation: &'static str,
    pub object: String,
    pub errno: Errno,
}

/// Adds the operation and the object to the error of a system call.
pub trait Context<T> {
    fn context(self, operation: &'static str, object: impl Display) -> Result<T, SystemError>;
}

impl<T> Context<T> for Result<T, Errno> {
    fn context(self, operation: &'static str, object: impl Display) -> Result<T, SystemError> {
        self.map_err(|errno| SystemError { operation, object: object.to_string(), errno })
    }
}

/// The limit of an object in a [`Failure`], in bytes. A path may have 256 KiB, and an answer has to
/// fit a control frame.
const MAX_OBJECT_LEN: usize = 512;

/// Makes a failure for the host. `object` may hold any bytes, and may be empty.
pub fn make_failure(operation: &str, object: &[u8], errno: Errno) -> Failure {
    let object = String::from_utf8_lossy(&object[..object.len().min(MAX_OBJECT_LEN)]);
    let operation =
        if object.is_empty() { operation.to_owned() } else { format!("{operation} {object}") };
    Failure { operation, errno: errno.raw_os_error() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_about_a_long_object_is_short() {
        let failure = make_failure("enter", &[0xff; 100_000], Errno::NOENT);
        assert!(failure.operation.len() < 4 * MAX_OBJECT_LEN, "{}", failure.operation.len());
    }
}
