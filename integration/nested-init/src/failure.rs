//! A failure before or around the command.

/// The exit code when the emulated host is at fault.
pub const HOST_FAULT: u8 = 125;

/// The step that failed, and the exit code to end with.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// The step and the error, in one line.
    pub message: String,
}

/// The result of a step.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Returns a failure of the emulated host itself.
    pub fn of_host(message: String) -> Self {
        Self { code: HOST_FAULT, message }
    }
}

/// Turns an error into a [`Failure`] of the emulated host.
pub trait During<T> {
    /// Adds the step to an error.
    fn during(self, step: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> During<T> for std::result::Result<T, E> {
    fn during(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::of_host(format!("{}: {error}", step())))
    }
}
