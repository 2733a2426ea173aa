//! Signals that ask a run to end.

use std::fs;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CliError;

const INTERRUPT: u8 = 2;
const TERMINATE: u8 = 15;
const HANGUP: u8 = 1;

/// A listener for the signals that the workload receives first.
pub struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
    /// The number of the last signal that came.
    pub last: u8,
}

impl Signals {
    /// Starts to listen; from then on these signals no longer end this process.
    ///
    /// A signal that was ignored when this process started stays ignored: `nohup` and the
    /// background of a shell without job control rely on it.
    pub fn listen() -> Result<Signals, CliError> {
        let ignored = read_ignored_signals();
        let listen = |number: u8, kind| {
            if ignored & (1 << (number - 1)) != 0 {
                return Ok(None);
            }
            signal(kind).map(Some).map_err(CliError::io("listen for signals"))
        };
        Ok(Signals {
            interrupt: listen(INTERRUPT, SignalKind::interrupt())?,
            terminate: listen(TERMINATE, SignalKind::terminate())?,
            hangup: listen(HANGUP, SignalKind::hangup())?,
            last: 0,
        })
    }

    /// Waits for the next signal and returns its number.
    pub async fn next(&mut self) -> u8 {
        self.last = tokio::select! {
            () = receive(&mut self.interrupt) => INTERRUPT,
            () = receive(&mut self.terminate) => TERMINATE,
            () = receive(&mut self.hangup) => HANGUP,
        };
        self.last
    }
}

/// Waits for a signal; for ever, if it is ignored.
async fn receive(signal: &mut Option<Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

/// Returns the set of ignored signals of this process (`SigIgn` of proc(5)), bit 0 for signal 1.
fn read_ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0)
}
