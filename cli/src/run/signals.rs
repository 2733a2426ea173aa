//! Signals that ask a run to end.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CliError;

/// A listener for the signals that the workload receives first.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// The number of the last signal that came.
    pub last: u8,
}

impl Signals {
    /// Starts to listen; from then on these signals no longer end this process.
    pub fn listen() -> Result<Signals, CliError> {
        let listen = |kind| signal(kind).map_err(CliError::io("listen for signals"));
        Ok(Signals {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            last: 0,
        })
    }

    /// Waits for the next signal and returns its number.
    pub async fn next(&mut self) -> u8 {
        self.last = tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
        };
        self.last
    }
}
