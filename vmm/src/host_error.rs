//! The error of a refused operation of the host, for every program of the host.

use std::io;

/// The host has refused an operation that every process may usually do.
#[derive(Debug, thiserror::Error)]
#[error("{operation}")]
pub struct HostError {
    /// The operation: a verb and its object.
    pub operation: &'static str,
    /// The cause.
    pub source: io::Error,
}

impl HostError {
    /// Returns the conversion of an error of this operation, for `map_err`.
    pub fn during<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> HostError + Copy {
        move |error| HostError { operation, source: error.into() }
    }
}
