//! What a sandbox shares with its processes: the channel, what is at its other end, and the reason for their end.

use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chitin_protocol::{Failure, MIN_ENTROPY, Reseed, SecretBytes, ToGuest};
use chitin_tiers::Instance;
use chitin_tiers::microvm::Reported;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::channel::{Channel, Closed, Tunnel};
use crate::{Error, GuestEnd};

/// A sandbox's random identity.
const INSTANCE_BYTES: usize = 16;

/// An answer of the agent on its way.
pub(crate) type Answer = oneshot::Receiver<Result<(), Failure>>;

/// How long a sandbox may take to end, or to say how it did, once the channel is gone.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a sandbox shares with its processes.
#[derive(Debug)]
pub(crate) struct Session {
    pub channel: Channel,
    pub memory_bytes: u64,
    pub instance: Mutex<Box<dyn Instance>>,
    /// By the monitor of a microVM.
    pub reported: Option<watch::Receiver<Reported>>,
    /// When the start was begun, `CLOCK_MONOTONIC` nanoseconds.
    pub spawned: u64,
    /// Environment variables of every command, beside those that all sandboxes have.
    pub environment: OnceLock<Vec<(&'static str, &'static str)>>,
    /// The moment at which the time is up, and the limit that makes it.
    pub timeout: Option<(Instant, Duration)>,
    /// Whether a copy could be made another one than its template.
    pub reseeded: std::sync::Mutex<Option<Answer>>,
}

impl Session {
    /// Asks the agent and waits for its answer.
    pub async fn request(&self, request: u32, message: &ToGuest) -> Result<(), Error> {
        let answer = self.ask(request, message)?;
        self.answered(answer).await
    }

    /// Asks the agent; [`answered`](Self::answered) waits.
    pub fn ask(&self, request: u32, message: &ToGuest) -> Result<Answer, Error> {
        self.channel
            .request(request, message)
            .map_err(|error| Error::CommandTooLong { len: error.len })
    }

    /// Waits for an answer.
    pub async fn answered(&self, answer: Answer) -> Result<(), Error> {
        match answer.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(failure)) => Err(Error::Guest(failure)),
            Err(_) => Err(self.why_closed().await),
        }
    }

    /// Connects to a port of the sandbox's loopback address.
    pub async fn connect(&self, port: u16) -> Result<Tunnel, Error> {
        let tunnel = self.channel.open_tunnel().ok_or(Error::TooManyStreams)?;
        let request = self.channel.name();
        self.request(request, &ToGuest::Connect { request, port, stream: tunnel.id() }).await?;
        Ok(tunnel)
    }

    /// Makes a restored guest one of its own, before anything else is asked of it.
    ///
    /// Nobody waits for the answer: the agent does nothing else before this has been done, and ends when it is asked for
    /// something after it has failed.
    pub fn reseed(&self) -> Result<(), Error> {
        let mut random = Zeroizing::new([0; MIN_ENTROPY + INSTANCE_BYTES]);
        getrandom::fill(&mut *random)
            .map_err(|error| Error::Host { what: "get random bytes", source: error.into() })?;
        let (entropy, instance) = random.split_at(MIN_ENTROPY);
        let request = self.channel.name();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let reseed = Reseed {
            request,
            entropy: SecretBytes::new(entropy.to_vec()),
            unix_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            instance: instance.try_into().unwrap_or_default(),
        };
        let answer = self.ask(request, &ToGuest::Reseed(reseed))?;
        *self.reseeded.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        Ok(())
    }

    /// The error to report when the channel has closed: what lies behind it rather than that it did.
    pub async fn why_closed(&self) -> Error {
        let closed = self.channel.closed().await;
        // It is there, or it will never be.
        let reseeded = self.reseeded.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut answer) = reseeded
            && let Ok(Err(failure)) = answer.try_recv()
        {
            return Error::Guest(failure);
        }
        if let Some((deadline, limit)) = self.timeout
            && deadline <= Instant::now()
        {
            return Error::Timeout { limit };
        }
        match closed {
            Closed::Local => Error::Stopped,
            Closed::Fault(fault) => Error::Protocol(fault),
            Closed::Eof | Closed::Io(_) => self.last_words().await,
        }
    }

    async fn last_words(&self) -> Error {
        let mut instance = self.instance.lock().await;
        match tokio::time::timeout(LAST_WORDS, instance.ended()).await {
            Ok(why) => why.into(),
            Err(_) => Error::GuestEnded(GuestEnd {
                reason: "it closed the channel and went on running".into(),
                log: String::new(),
            }),
        }
    }
}
