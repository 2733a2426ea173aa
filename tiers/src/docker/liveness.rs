//! Deadlines for a daemon that stops answering: every call has one, and clean-up is abandoned soon
//! after the daemon has fallen silent.
//!
//! A slow daemon is told from a silent one by pings, so that a loaded host has time to remove a
//! container, and a stopped daemon does not hold up the end of a run.

use std::future::Future;
use std::time::Duration;

use bollard::Docker;

/// Time limit of one call. A start on a loaded machine takes seconds.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Time in which a daemon must answer a ping during clean-up.
pub(super) const PATIENCE: Duration = Duration::from_millis(1200);

/// The same after a signal, which must end a run within a second.
pub(super) const SIGNAL_PATIENCE: Duration = Duration::from_millis(600);

/// The same once the daemon was found silent.
pub(super) const LAST_PATIENCE: Duration = Duration::from_millis(150);

/// Time before the first ping. Usually clean-up is done by then.
const FIRST_PING: Duration = Duration::from_millis(250);

/// Time between pings.
const PING_INTERVAL: Duration = Duration::from_millis(200);

/// An error of a call to the daemon.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Client(#[from] bollard::errors::Error),
    #[error("the daemon did not {operation} within {} s", limit.as_secs())]
    TimedOut { operation: &'static str, limit: Duration },
}

impl CallError {
    /// Returns the status of the response, if the daemon has sent one.
    pub fn status(&self) -> Option<u16> {
        match self {
            CallError::Client(bollard::errors::Error::DockerResponseServerError {
                status_code,
                ..
            }) => Some(*status_code),
            _ => None,
        }
    }
}

/// Awaits a call for at most [`CALL_LIMIT`].
pub(super) async fn call<T>(
    operation: &'static str,
    future: impl Future<Output = Result<T, bollard::errors::Error>>,
) -> Result<T, CallError> {
    call_within(CALL_LIMIT, operation, future).await
}

/// Awaits a call for at most `limit`.
pub(super) async fn call_within<T>(
    limit: Duration,
    operation: &'static str,
    future: impl Future<Output = Result<T, bollard::errors::Error>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(limit, future).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(CallError::TimedOut { operation, limit }),
    }
}

/// Waits until the daemon leaves a ping unanswered for `patience`, or cannot be connected to.
pub(super) async fn wait_until_silent(docker: &Docker, patience: Duration) {
    loop {
        match tokio::time::timeout(patience, docker.ping()).await {
            // An error of the daemon is an answer too.
            Ok(Ok(_)) => {}
            Ok(Err(bollard::errors::Error::DockerResponseServerError { .. })) => {}
            Ok(Err(_)) | Err(_) => return,
        }
        tokio::time::sleep(PING_INTERVAL).await;
    }
}

/// Awaits clean-up for at most `limit`, as long as the daemon answers pings. Returns `None` if it
/// was not completed.
pub(super) async fn while_answering<T>(
    docker: &Docker,
    patience: Duration,
    limit: Duration,
    cleanup: impl Future<Output = T>,
) -> Option<T> {
    let silence = async {
        tokio::time::sleep(FIRST_PING.min(patience)).await;
        wait_until_silent(docker, patience).await;
    };
    tokio::select! {
        done = tokio::time::timeout(limit, cleanup) => done.ok(),
        () = silence => None,
    }
}
