//! The state that a running sandbox shares with its processes, copies and port forwards.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chitin_protocol::{Failure, MIN_ENTROPY, Reseed, SecretBytes, ToGuest};
use chitin_spec::EndCause;
use chitin_tiers::microvm::Reported;
use chitin_tiers::{BOOT_LIMIT, GuestEnd, GuestFiles, Instance};
use chitin_vmm::HostError;
use chitin_vmm::control::Request;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::channel::{Channel, CloseReason, Tunnel};
use crate::error::Error;

/// Bytes of a guest's random identity.
const IDENTITY_BYTES: usize = 16;

/// Time for a sandbox to end, or to report why it did, after its channel has closed.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A reply of the agent that has not arrived yet.
pub(crate) type Reply = oneshot::Receiver<Result<(), Failure>>;

/// A time limit and the moment at which it is reached.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    pub at: Instant,
    pub limit: Duration,
    /// The time after it in which files can still be copied out.
    pub copy_grace: Duration,
}

impl Deadline {
    /// Returns true if the limit is reached.
    pub fn is_past(&self) -> bool {
        self.at <= Instant::now()
    }

    pub fn to_error(self) -> Error {
        Error::Timeout { limit: self.limit }
    }
}

/// A running sandbox as its processes see it.
#[derive(Debug)]
pub(crate) struct Session {
    pub channel: Channel,
    pub instance: Mutex<Box<dyn Instance>>,
    /// The reports of a microVM's monitor.
    pub monitor_reports: Option<watch::Receiver<Reported>>,
    pub memory_bytes: u64,
    /// The start of the launch, `CLOCK_MONOTONIC` nanoseconds.
    pub launched_at_ns: u64,
    /// Environment variables of every command, in addition to those that all sandboxes have.
    pub extra_environment: OnceLock<Vec<(&'static str, &'static str)>>,
    pub deadline: Option<Deadline>,
    /// The reply to the reseed of a restored guest, until it is read.
    reseed_reply: std::sync::Mutex<Option<Reply>>,
}

impl Session {
    /// Takes over a launched guest. Must be called within a tokio runtime.
    pub fn new(
        mut launched: chitin_tiers::LaunchedInstance,
        memory_bytes: u64,
        deadline: Option<Deadline>,
    ) -> Session {
        let monitor_reports = launched.instance.monitor().map(|monitor| monitor.reported.clone());
        Session {
            channel: Channel::new(launched.stream),
            instance: Mutex::new(launched.instance),
            monitor_reports,
            memory_bytes,
            launched_at_ns: launched.spawned,
            extra_environment: OnceLock::new(),
            deadline,
            reseed_reply: std::sync::Mutex::default(),
        }
    }

    /// Waits for the agent's first message.
    pub async fn wait_for_agent(&self) -> Result<(), Error> {
        let limit = self.instance.lock().await.start_limit();
        match tokio::time::timeout(limit, self.channel.wait_until_ready()).await {
            Ok(Ok(())) => {
                self.instance.lock().await.release_start_resources();
                Ok(())
            }
            Ok(Err(_)) => Err(self.explain_close().await),
            Err(_) => Err(Error::BootTimeout { limit }),
        }
    }

    /// Sends a request to the agent and waits for the reply.
    pub async fn call_agent(&self, request: u32, message: &ToGuest) -> Result<(), Error> {
        let reply = self.send_request(request, message)?;
        self.wait_for_reply(reply).await
    }

    /// Sends a request to the agent; [`wait_for_reply`](Self::wait_for_reply) waits for the reply.
    pub fn send_request(&self, request: u32, message: &ToGuest) -> Result<Reply, Error> {
        self.channel
            .send_request(request, message)
            .map_err(|error| Error::CommandTooLong { len: error.len })
    }

    /// Waits for a reply and returns the agent's failure as an error.
    pub async fn wait_for_reply(&self, reply: Reply) -> Result<(), Error> {
        self.receive_reply(reply).await?.map_err(Error::Guest)
    }

    /// Waits for a reply. The outer error is the channel's, the inner one the agent's.
    pub async fn receive_reply(&self, reply: Reply) -> Result<Result<(), Failure>, Error> {
        match reply.await {
            Ok(result) => Ok(result),
            Err(_) => Err(self.explain_close().await),
        }
    }

    /// Connects to a port of the sandbox's loopback address.
    pub async fn connect_port(&self, port: u16) -> Result<Tunnel, Error> {
        let tunnel = self.channel.open_tunnel().ok_or(Error::TooManyStreams)?;
        let request = self.channel.next_id();
        let connect = ToGuest::Connect { request, port, stream: tunnel.id() };
        self.call_agent(request, &connect).await?;
        Ok(tunnel)
    }

    /// Gives a restored guest its own entropy, clock and identity, before any other request.
    ///
    /// The reply is not waited for: the agent does nothing else until it has reseeded, and ends at
    /// the next request if that has failed.
    pub fn send_reseed(&self) -> Result<(), Error> {
        let mut random = Zeroizing::new([0; MIN_ENTROPY + IDENTITY_BYTES]);
        getrandom::fill(&mut *random).map_err(HostError::during("get random bytes"))?;
        let (entropy, identity) = random.split_at(MIN_ENTROPY);
        let request = self.channel.next_id();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let reseed = Reseed {
            request,
            entropy: SecretBytes::new(entropy.to_vec()),
            unix_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            instance: identity.try_into().unwrap_or_default(),
        };
        let reply = self.send_request(request, &ToGuest::Reseed(reseed))?;
        *self.reseed_reply.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
        Ok(())
    }

    /// Freezes the guest, so that it can be saved.
    pub async fn freeze(&self) -> Result<(), Error> {
        let request = self.channel.next_id();
        self.call_agent(request, &ToGuest::Freeze { request }).await
    }

    /// Saves the frozen guest into these files, which ends it.
    pub async fn save(&self, binding: String, files: &GuestFiles) -> Result<(), Error> {
        let mut instance = self.instance.lock().await;
        let monitor = instance.monitor().ok_or(Error::MicrovmRequired)?;
        let frozen = tokio::time::timeout(BOOT_LIMIT, monitor.wait_until_frozen()).await;
        if frozen.is_err() {
            return Err(Error::BootTimeout { limit: BOOT_LIMIT });
        }
        let fds = [files.memory.as_fd(), files.state.as_fd(), files.key.as_fd()];
        Ok(monitor.send_last_request(&Request::Snapshot { binding }, &fds).await?)
    }

    /// Writes a state that lists the pages which the guest has used so far. This ends the guest.
    pub async fn record_used_pages(&self, state: &File, key: &File) -> Result<(), Error> {
        let mut instance = self.instance.lock().await;
        let monitor = instance.monitor().ok_or(Error::MicrovmRequired)?;
        Ok(monitor.send_last_request(&Request::Record {}, &[state.as_fd(), key.as_fd()]).await?)
    }

    /// Returns the error behind a closed channel. Waits until it is closed.
    pub async fn explain_close(&self) -> Error {
        let reason = self.channel.wait_until_closed().await;
        // The reply to the reseed has arrived by now, or never will.
        let reseed_reply = self.reseed_reply.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut reply) = reseed_reply
            && let Ok(Err(failure)) = reply.try_recv()
        {
            return Error::Guest(failure);
        }
        if let Some(deadline) = self.deadline
            && deadline.is_past()
        {
            return deadline.to_error();
        }
        match reason {
            CloseReason::Local => Error::Stopped,
            CloseReason::Fault(fault) => Error::Protocol(fault),
            CloseReason::Eof | CloseReason::Io(_) => self.wait_for_end().await,
        }
    }

    async fn wait_for_end(&self) -> Error {
        let mut instance = self.instance.lock().await;
        match tokio::time::timeout(END_LIMIT, instance.wait_for_end()).await {
            Ok(error) => error.into(),
            Err(_) => Error::GuestEnded(GuestEnd {
                cause: EndCause::GuestFault,
                reason: "it closed the channel and continued to run".into(),
                log: String::new(),
            }),
        }
    }
}
