//! A container of the daemon, from its start to its removal.

use std::os::unix::net::UnixStream as StdStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::query_parameters::{
    AttachContainerOptionsBuilder, InspectContainerOptions, StartContainerOptions,
    WaitContainerOptionsBuilder,
};
use chitin_spec::EndCause;
use chitin_text::error_chain;
use futures_util::StreamExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::channel::copy_both_ways;
use super::daemon::Daemon;
use super::liveness::{
    CallError, LAST_PATIENCE, PATIENCE, SIGNAL_PATIENCE, call, call_within, wait_until_silent,
    while_answering,
};
use super::prune::remove_abandoned;
use crate::container::{Log, START_LIMIT, STOP_LIMIT};
use crate::error::ContainerError;
use crate::{Error, GuestEnd, Instance, Pending};

/// Time in which a daemon must report the state of a container that has ended.
const INSPECT_LIMIT: Duration = Duration::from_secs(2);

/// A container of the daemon.
#[derive(Debug)]
pub(super) struct Container {
    daemon: Daemon,
    id: String,
    log: Log,
    /// The error that broke the connection.
    broken: Arc<Mutex<Option<String>>>,
    bridge: Option<JoinHandle<()>>,
    answered: bool,
    /// The daemon has removed the container.
    gone: bool,
    /// The daemon was found to answer no longer.
    silent: Arc<AtomicBool>,
}

impl Container {
    pub fn new(daemon: Daemon, id: String) -> Container {
        Container {
            daemon,
            id,
            log: Log::default(),
            broken: Arc::default(),
            bridge: None,
            answered: false,
            gone: false,
            silent: Arc::default(),
        }
    }

    pub async fn attach_and_start(&mut self) -> Result<StdStream, CallError> {
        let failed = |error: std::io::Error| CallError::Client(error.into());
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let ours = ours.into_std().map_err(failed)?;
        let docker = &self.daemon.docker;
        let options = AttachContainerOptionsBuilder::default()
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .stream(true)
            .build();
        // Attach before the start, so that the agent's first message is not lost.
        let attached = docker.attach_container(&self.id, Some(options));
        let attached = call("attach to the container", attached).await?;
        let bridge = copy_both_ways(attached, theirs, self.log.clone(), self.broken.clone());
        self.bridge = Some(tokio::spawn(bridge));
        let started = docker.start_container(&self.id, None::<StartContainerOptions>);
        call("start the container", started).await?;
        tokio::spawn(remove_abandoned(self.daemon.clone()));
        Ok(ours)
    }

    /// Waits until the daemon has removed the container, which it does at the end of the agent.
    async fn wait_until_removed(&mut self) -> bool {
        let options = WaitContainerOptionsBuilder::default().condition("removed").build();
        let waiting = async {
            let mut answers = Box::pin(self.daemon.docker.wait_container(&self.id, Some(options)));
            match answers.next().await {
                // The exit code does not matter here.
                Some(Ok(_) | Err(bollard::errors::Error::DockerContainerWaitError { .. }))
                | None => true,
                Some(Err(error)) => CallError::from(error).status() == Some(404),
            }
        };
        tokio::time::timeout(STOP_LIMIT, waiting).await.unwrap_or(false)
    }

    /// Removes the container by force.
    async fn remove(&mut self) -> Result<(), Error> {
        let removed = self.daemon.remove_container(&self.id).await;
        self.gone = match removed.as_ref().map_err(CallError::status) {
            Ok(()) | Err(Some(404)) => true,
            // The removal is in progress: 409 of Docker, 500 of Podman.
            Err(Some(409 | 500)) => self.wait_until_removed().await,
            Err(_) => false,
        };
        match (self.gone, removed) {
            (false, Err(error)) => {
                let (engine, cause) = (self.daemon.engine, error_chain(&error));
                let id = self.short_id();
                Err(Error::Leftover {
                    leftover: format!("the container {id} of {engine}: {cause}"),
                })
            }
            _ => Ok(()),
        }
    }

    fn short_id(&self) -> &str {
        &self.id[..self.id.len().min(12)]
    }

    /// Ends the container and waits until it is removed, as long as the daemon answers.
    pub async fn end(&mut self) -> Result<(), Error> {
        if self.gone {
            return Ok(());
        }
        if let Some(bridge) = self.bridge.take() {
            // The channel is closed, and the rest of its bytes is not needed.
            bridge.abort();
            let _ = bridge.await;
        }
        let docker = self.daemon.docker.clone();
        let patience = if self.silent.load(Ordering::Relaxed) { LAST_PATIENCE } else { PATIENCE };
        let removal = async {
            if self.answered && self.wait_until_removed().await {
                self.gone = true;
                return Ok(());
            }
            self.remove().await
        };
        match while_answering(&docker, patience, 2 * STOP_LIMIT, removal).await {
            Some(removed) => removed,
            None => {
                let leftover = self.daemon.describe_leftover(self.short_id());
                Err(Error::Leftover { leftover })
            }
        }
    }

    /// Returns the cause of the end of a container that had started.
    async fn explain_end(&self) -> (EndCause, String) {
        let engine = self.daemon.engine;
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let docker = &self.daemon.docker;
        let inspect = docker.inspect_container(&self.id, None::<InspectContainerOptions>);
        let inspected = call_within(INSPECT_LIMIT, "describe the container", inspect).await;
        match (&inspected, broken) {
            (Err(error), _) if error.status().is_some() => {
                (EndCause::Host, "its container has ended".into())
            }
            (Err(error), _) => {
                let reason = format!(
                    "the {engine} daemon no longer answers; it ends the container when it is \
                     restarted ({})",
                    error_chain(error)
                );
                (EndCause::Host, reason)
            }
            (Ok(_), Some(broken)) => {
                (EndCause::Host, format!("the connection to the {engine} daemon broke: {broken}"))
            }
            (Ok(container), None) => {
                let state = container.state.as_ref();
                match state.and_then(|state| state.oom_killed) {
                    Some(true) => (EndCause::OutOfMemory, "its container ran out of memory".into()),
                    _ => (EndCause::Host, "its container has ended".into()),
                }
            }
        }
    }
}

impl Instance for Container {
    fn release_start_resources(&mut self) {
        self.answered = true;
    }

    fn start_limit(&self) -> Duration {
        START_LIMIT
    }

    fn wait_until_silent(&self) -> Pending<'static, ()> {
        let (docker, silent) = (self.daemon.docker.clone(), self.silent.clone());
        Box::pin(async move {
            wait_until_silent(&docker, SIGNAL_PATIENCE).await;
            silent.store(true, Ordering::Relaxed);
        })
    }

    fn wait_for_end(&mut self) -> Pending<'_, Error> {
        Box::pin(async {
            if let Some(bridge) = &mut self.bridge {
                let _ = bridge.await;
                self.bridge = None;
            }
            let (cause, reason) = self.explain_end().await;
            if self.answered {
                return Error::GuestEnded(GuestEnd { cause, reason, log: self.log.to_text() });
            }
            let source = ContainerError::Reported(self.log.last_line().unwrap_or(reason));
            self.daemon.error(source)
        })
    }

    fn stop(&mut self) -> Pending<'_, Result<(), Error>> {
        Box::pin(self.end())
    }
}
