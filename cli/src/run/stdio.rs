//! The workload's standard streams, connected with those of this process until it ends.

use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::{Duration, Instant};

use chitin::{Exit, Process, Sandbox, StreamReader, StreamWriter, Usage};
use tokio::fs::File;
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader};
use tokio::task::{JoinError, JoinHandle};

use super::copies::keep_first_error;
use super::signals::Signals;
use crate::error::CliError;

/// The time that a workload has to end after a signal, and its last output to be delivered.
const GRACE: Duration = Duration::from_secs(5);

/// The time for its last output to be delivered after the time limit.
const LATE_GRACE: Duration = Duration::from_secs(1);

/// The time between two looks at whether the terminal is ours: short for a person.
const FOREGROUND_POLL: Duration = Duration::from_millis(200);

/// Bytes of one read: the capacity of a pipe.
const BUFFER_SIZE: usize = 64 * 1024;

/// The end of the time limit, and the limit itself.
pub type Deadline = (Instant, Duration);

/// The end of a workload and of the delivery of its output.
pub enum Attended {
    /// A signal came first.
    Interrupted,
    Ended {
        exit: Exit,
        usage: Usage,
        /// The first error of the delivery: a part of the output is lost.
        undelivered: Result<(), CliError>,
    },
}

/// Connects the standard streams until the workload has ended and all its output is delivered.
///
/// A reader of our output that stops reading makes the delivery wait for ever; the time limit
/// covers this too.
pub async fn attend_process(
    sandbox: &Sandbox,
    mut process: Process,
    signals: &mut Signals,
    deadline: Option<Deadline>,
) -> Result<Attended, CliError> {
    let stdin = process.stdin.take().map(|stdin| tokio::spawn(forward_stdin(stdin)));
    let (our_stdout, our_stderr) = (share_stream(io::stdout())?, share_stream(io::stderr())?);
    let stdout = process.stdout.take().map(|from| tokio::spawn(deliver_output(from, our_stdout)));
    let stderr = process.stderr.take().map(|from| tokio::spawn(deliver_output(from, our_stderr)));

    let ended = wait_for_end(sandbox, &mut process, signals).await;
    if let Some(stdin) = stdin {
        stdin.abort();
    }
    let mut undelivered = Ok(());
    for (name, delivery) in [("output", stdout), ("error", stderr)] {
        let Some(delivery) = delivery else { continue };
        if matches!(ended, Ok(None)) {
            // The workload still runs, and its further output is not waited for.
            delivery.abort();
            continue;
        }
        let left = match &ended {
            // The time is over already.
            Err(CliError::Sandbox(chitin::Error::Timeout { .. })) => Some(LATE_GRACE),
            // The sandbox is gone: its last output is waited for only this long.
            Err(_) => Some(GRACE),
            Ok(_) => deadline.map(|(at, _)| at.saturating_duration_since(Instant::now())),
        };
        match finish_delivery(delivery, left, signals).await {
            Delivered::Signal => return Ok(Attended::Interrupted),
            Delivered::Done(Ok(Ok(())) | Err(_)) => {}
            Delivered::Done(Ok(Err(source))) => {
                let error = CliError::io(format!("write to standard {name}"))(source);
                undelivered = keep_first_error(undelivered, Err(error));
            }
            Delivered::Late => {
                if let (Some((_, limit)), true) = (deadline, ended.is_ok()) {
                    return Err(chitin::Error::Timeout { limit }.into());
                }
            }
        }
    }
    Ok(match ended? {
        Some((exit, usage)) => Attended::Ended { exit, usage, undelivered },
        None => Attended::Interrupted,
    })
}

/// The end of a delivery.
enum Delivered {
    Done(Result<io::Result<()>, JoinError>),
    /// The time was over first; the delivery is aborted.
    Late,
    /// A signal came first; the delivery is aborted.
    Signal,
}

async fn finish_delivery(
    delivery: JoinHandle<io::Result<()>>,
    left: Option<Duration>,
    signals: &mut Signals,
) -> Delivered {
    let abort = delivery.abort_handle();
    tokio::select! {
        delivered = with_timeout(left, delivery) => match delivered {
            Some(delivered) => Delivered::Done(delivered),
            None => {
                abort.abort();
                Delivered::Late
            }
        },
        _ = signals.next() => {
            abort.abort();
            Delivered::Signal
        }
    }
}

/// Awaits a future for at most this long, or without a limit.
async fn with_timeout<T>(limit: Option<Duration>, future: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, future).await.ok(),
        None => Some(future.await),
    }
}

/// Waits until the workload ends. The first signal is passed on to it; a second one, or the end of
/// the grace period, returns `None`. So does a daemon that does not pass the signal on.
async fn wait_for_end(
    sandbox: &Sandbox,
    process: &mut Process,
    signals: &mut Signals,
) -> Result<Option<(Exit, Usage)>, CliError> {
    tokio::select! {
        ended = process.wait() => return Ok(Some(ended?)),
        number = signals.next() => process.signal(number),
    }
    let mut grace = pin!(tokio::time::sleep(GRACE));
    tokio::select! {
        ended = process.wait() => Ok(Some(ended?)),
        () = &mut grace => Ok(None),
        () = sandbox.wait_until_silent() => Ok(None),
        _ = signals.next() => Ok(None),
    }
}

/// Copies our standard input to the workload until either end closes.
async fn forward_stdin(mut stdin: StreamWriter) {
    wait_for_foreground().await;
    let mut ours = BufReader::with_capacity(BUFFER_SIZE, tokio::io::stdin());
    // An error is an end too: ours has no more input, or the workload reads no more.
    let _ = tokio::io::copy_buf(&mut ours, &mut stdin).await;
    let _ = stdin.shutdown().await;
}

/// Waits until this process may read its terminal. A process in the background that reads is
/// stopped by the kernel (SIGTTIN), and the sandbox with it.
async fn wait_for_foreground() {
    let stdin = io::stdin();
    while rustix::termios::isatty(&stdin)
        && rustix::termios::tcgetpgrp(&stdin)
            .is_ok_and(|foreground| foreground != rustix::process::getpgrp())
    {
        tokio::time::sleep(FOREGROUND_POLL).await;
    }
}

/// Returns a standard stream as a file.
///
/// Bytes written to it are passed on as they are, while [`io::Stdout`] first looks for the end of a
/// line in them.
fn share_stream(stream: impl AsFd) -> Result<File, CliError> {
    let shared = stream.as_fd().try_clone_to_owned();
    Ok(File::from_std(shared.map_err(CliError::io("share a standard stream"))?.into()))
}

/// Writes all output of the workload to our stream.
///
/// If our reader has gone, the stream of the workload is closed, and its next write fails as in a
/// pipe of a shell.
async fn deliver_output(stream: StreamReader, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(BUFFER_SIZE, stream);
    match tokio::io::copy_buf(&mut stream, &mut to).await {
        Ok(_) => Ok(()),
        // Our reader has gone (BrokenPipe), or the sandbox has ended, which is reported with its
        // reason (ConnectionReset).
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}
