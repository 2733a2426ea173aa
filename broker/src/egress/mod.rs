//! Egress without a network, the host's half: a broker that dials what the policy allows, and nothing else.
//!
//! ```text
//!   Dial from the agent ──▶ name and port allowed? ──▶ rate, number ──▶ resolved here ──▶ address public? ──▶ connected
//!          │                        │                      │                │                  │              │
//!          └──────── refused, with a line in the audit ◀───┴────────────────┴──────────────────┘      bytes both ways
//! ```
//!
//! The agent checks names too, so that a workload sees a name that is not there. Nothing relies on it: whoever rules the
//! guest can send any Dial. No packets are parsed here, and the address that was checked is the address that is dialled,
//! so that a name cannot change its mind in between.

mod address;
mod audit;
mod bucket;
mod forward;
mod resolve;
mod splice;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chitin_protocol::{MAX_DIALS, MAX_ENDPOINTS};
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::channel::{Channel, Knock, Tunnel};
use crate::credential::{Account, Answered, Endpoint as Keys, Proxy, Way};
use crate::policy::Endpoint;
use address::{Range, range};
pub(crate) use audit::Audit;
use audit::{Line, Verdict};
use bucket::Bucket;
pub use forward::Forward;
use resolve::{Resolve, System};
use splice::{Allowance, Broken, Counts, splice};

/// How long a name may take to resolve: the two attempts of the C library's resolver.
const RESOLVE_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection may take to be made, all addresses of a name together.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Addresses of one name that are tried. A name can have hundreds.
const MAX_ADDRESSES: usize = 4;

/// What is on its way between a sandbox and its proxy, each way: a window's worth.
const PROXY_BUFFER: usize = 64 * 1024;

/// How much egress a sandbox has. What is over is refused or reset, and written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressLimits {
    /// Connections at once, at most 128, which is also the agent's limit.
    pub connections: usize,
    /// Connections a second, so that a sandbox cannot be used to flood an endpoint with them; four seconds' worth may come
    /// at once.
    pub dials_per_second: u32,
    /// Bytes of one connection, both ways together.
    pub connection_bytes: Option<u64>,
    /// Bytes of all connections of the sandbox.
    pub total_bytes: Option<u64>,
    /// Bytes a second of all connections of the sandbox.
    pub bytes_per_second: Option<NonZeroU64>,
}

impl Default for EgressLimits {
    fn default() -> EgressLimits {
        EgressLimits {
            connections: MAX_DIALS,
            dials_per_second: 50,
            connection_bytes: None,
            total_bytes: None,
            bytes_per_second: None,
        }
    }
}

/// What a sandbox may connect to. Nothing, as it begins.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    pub endpoints: Vec<Endpoint>,
    pub allow_private: bool,
    pub audit: Option<PathBuf>,
    pub limits: EgressLimits,
    /// The first thing that was asked for and makes no sense.
    pub wrong: Option<String>,
}

/// What is wrong with the egress that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// An endpoint is none.
    #[error("{what}")]
    Endpoint {
        /// Which, and why.
        what: String,
    },
    /// That is a network, not a list.
    #[error("{count} endpoints: a sandbox may reach at most {MAX_ENDPOINTS}")]
    TooMany {
        /// How many were asked for.
        count: usize,
    },
    /// Attempts could not be written down.
    #[error("write the audit of connections to {}", path.display())]
    Audit {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Spec {
    /// Adds endpoints: of a command line, of a policy.
    pub fn allow(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
        for endpoint in endpoints {
            if !self.endpoints.contains(&endpoint) {
                self.endpoints.push(endpoint);
            }
        }
    }

    /// Whether it makes sense, before anything is started for it.
    pub fn check(&self) -> Result<(), EgressError> {
        if let Some(what) = &self.wrong {
            return Err(EgressError::Endpoint { what: what.clone() });
        }
        if self.endpoints.len() > MAX_ENDPOINTS {
            return Err(EgressError::TooMany { count: self.endpoints.len() });
        }
        self.open_audit().map(drop)
    }

    /// Whether there is any.
    pub fn is_on(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// The endpoints as the agent is told them.
    pub fn wire(&self) -> Vec<chitin_protocol::Endpoint> {
        self.endpoints.iter().map(wire).collect()
    }

    /// Opens the file that attempts and deliveries are written to, if there is to be one.
    pub fn open_audit(&self) -> Result<Audit, EgressError> {
        Audit::open(self.audit.as_deref()).map_err(|source| self.unwritten(source))
    }

    /// Writes down how each of these is delivered, before it is.
    pub fn deliver<'a>(
        &self,
        audit: &Audit,
        deliveries: impl IntoIterator<Item = (&'a str, Way)>,
    ) -> Result<(), EgressError> {
        let mut deliveries = deliveries.into_iter();
        deliveries
            .try_for_each(|(name, how)| audit.deliver(name, how))
            .map_err(|source| self.unwritten(source))
    }

    fn unwritten(&self, source: io::Error) -> EgressError {
        EgressError::Audit { path: self.audit.clone().unwrap_or_default(), source }
    }
}

fn wire(endpoint: &Endpoint) -> chitin_protocol::Endpoint {
    let Endpoint { host, wildcard, port } = endpoint.clone();
    chitin_protocol::Endpoint { host, wildcard, port }
}

/// Dials for one sandbox.
#[derive(Debug)]
pub(crate) struct Broker {
    endpoints: Vec<chitin_protocol::Endpoint>,
    allow_private: bool,
    audit: Arc<Audit>,
    proxy: Option<Arc<Proxy>>,
    /// Answers at an endpoint that leads nowhere.
    keys: Option<Arc<Keys>>,
    resolver: Box<dyn Resolve>,
    connections: Arc<Semaphore>,
    dials: Mutex<Bucket>,
    allowance: Allowance,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no host has such a name")]
    Name,
    #[error("an address is not a name")]
    Literal,
    #[error("the policy does not list it")]
    Policy,
    #[error("too many connections in a short time")]
    Rate,
    #[error("too many connections at once")]
    Number,
    #[error("the sandbox's limit of bytes was reached")]
    Bytes,
    #[error("the audit file cannot be written")]
    Audit,
    #[error("it resolves to {}{}", .0.name(), if .0.is_private() { ", which needs --allow-private" } else { "" })]
    Address(Range),
    #[error("it resolves to this host")]
    Itself,
    #[error("it does not resolve: {0}")]
    Resolve(io::Error),
    #[error("it has no address")]
    NoAddress,
    #[error("it did not resolve within {} s", RESOLVE_LIMIT.as_secs())]
    ResolveLimit,
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("it did not answer within {} s", CONNECT_LIMIT.as_secs())]
    ConnectLimit,
    #[error("the sandbox ended")]
    Ended,
}

impl Refusal {
    fn verdict(&self) -> Verdict {
        match self {
            Refusal::Name
            | Refusal::Literal
            | Refusal::Policy
            | Refusal::Rate
            | Refusal::Number
            | Refusal::Bytes
            | Refusal::Audit
            | Refusal::Address(_)
            | Refusal::Itself => Verdict::Refused,
            Refusal::Resolve(_)
            | Refusal::NoAddress
            | Refusal::ResolveLimit
            | Refusal::Connect(_)
            | Refusal::ConnectLimit
            | Refusal::Ended => Verdict::Failed,
        }
    }
}

impl Broker {
    pub fn new(
        spec: &Spec,
        audit: Arc<Audit>,
        proxy: Option<Arc<Proxy>>,
        keys: Option<Arc<Keys>>,
    ) -> Broker {
        Broker { proxy, keys, ..Broker::with(spec, audit, Box::new(System::default())) }
    }

    /// What the agent is to accept for.
    pub fn wire(&self) -> Vec<chitin_protocol::Endpoint> {
        let keys = self.keys.as_ref().map(|_| Keys::wire());
        self.endpoints.iter().cloned().chain(keys).collect()
    }

    fn with(spec: &Spec, audit: Arc<Audit>, resolver: Box<dyn Resolve>) -> Broker {
        let limits = &spec.limits;
        let rate = f64::from(limits.dials_per_second.max(1));
        #[expect(clippy::cast_precision_loss, reason = "a byte more or less")]
        let bytes =
            limits.bytes_per_second.map(|rate| Bucket::new(rate.get() as f64, rate.get() as f64));
        Broker {
            endpoints: spec.wire(),
            allow_private: spec.allow_private,
            audit,
            proxy: None,
            keys: None,
            resolver,
            connections: Arc::new(Semaphore::new(limits.connections.min(MAX_DIALS))),
            dials: Mutex::new(Bucket::new(rate, 4.0 * rate)),
            allowance: Allowance::new(limits.connection_bytes, limits.total_bytes, bytes),
        }
    }

    /// Serves a channel until it has closed and every attempt is written down.
    pub async fn serve(self: Arc<Broker>, channel: Channel, mut knocks: mpsc::Receiver<Knock>) {
        let mut attempts = JoinSet::new();
        loop {
            tokio::select! {
                knock = knocks.recv() => match knock {
                    None => break,
                    Some(Knock::Denied { host }) => {
                        let reason = Some(Refusal::Policy.to_string());
                        self.audit.write(Line::new(&host, None, Verdict::Refused, reason));
                    }
                    Some(Knock::Dial { host, port, stream }) => {
                        let tunnel = channel.adopt(stream);
                        match self.keys.clone().filter(|_| Keys::is_at(&host, port)) {
                            Some(keys) => {
                                attempts.spawn(self.clone().give(channel.clone(), tunnel, keys, host, port));
                            }
                            None => {
                                attempts.spawn(self.clone().attempt(channel.clone(), tunnel, host, port));
                            }
                        }
                    }
                },
                Some(_) = attempts.join_next() => {}
            }
            self.audit.omit(channel.missed());
        }
        while attempts.join_next().await.is_some() {}
    }

    /// One connection to the endpoint of a credential: a line in the audit if it asked for that.
    async fn give(
        self: Arc<Broker>,
        channel: Channel,
        tunnel: Tunnel,
        keys: Arc<Keys>,
        host: String,
        port: u16,
    ) {
        let began = Instant::now();
        let mut line = Line::new(&host, Some(port), Verdict::Allowed, None);
        match self.admit() {
            Ok(_permit) => {
                let answered = tokio::select! {
                    answered = keys.serve(tunnel) => answered,
                    _ = channel.closed() => None,
                };
                (line.verdict, line.reason) = match answered {
                    None => return,
                    Some(Answered::Given { trouble }) => (Verdict::Allowed, trouble),
                    Some(Answered::Refused(why)) => (Verdict::Refused, Some(why.into())),
                    Some(Answered::Failed(why)) => (Verdict::Failed, Some(why)),
                };
                if line.verdict == Verdict::Allowed {
                    line.credentials.push(keys.name().into());
                }
            }
            Err(refusal) => {
                drop(tunnel);
                line.verdict = refusal.verdict();
                line.reason = Some(refusal.to_string());
            }
        }
        line.lasted(began.elapsed());
        self.audit.write(line);
    }

    /// One attempt, from the Dial to its line in the audit.
    async fn attempt(self: Arc<Broker>, channel: Channel, tunnel: Tunnel, host: String, port: u16) {
        let began = Instant::now();
        let mut line = Line::new(&host, Some(port), Verdict::Allowed, None);
        let counts = Counts::default();
        let dialled = tokio::select! {
            dialled = self.dial(&host, port) => dialled,
            _ = channel.closed() => Err(Refusal::Ended),
        };
        match dialled {
            Ok(Dialled { mut stream, address, permit }) => {
                line.address = Some(address);
                let account = Arc::new(Account::default());
                let outcome = match &self.proxy {
                    Some(proxy) if proxy.is_for(&host, port) => {
                        tokio::select! {
                            outcome = self.take_apart(proxy, tunnel, stream, &host, port, &counts, &account) => outcome,
                            _ = channel.closed() => Err(Broken::Sandbox.to_string()),
                        }
                    }
                    proxy => {
                        let splicing = async {
                            match proxy {
                                Some(proxy) => {
                                    let watched = proxy.watched(tunnel, &account);
                                    splice(watched, &mut stream, &self.allowance, &counts).await
                                }
                                None => splice(tunnel, &mut stream, &self.allowance, &counts).await,
                            }
                        };
                        let outcome = tokio::select! {
                            outcome = splicing => outcome,
                            _ = channel.closed() => Err(Broken::Sandbox),
                        };
                        if outcome.is_err() {
                            // The other side is to know that it has not heard everything.
                            let _ = sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
                        }
                        outcome.map_err(|broken| broken.to_string())
                    }
                };
                line.reason = outcome.err();
                self.settle(&mut line, &account);
                drop(permit);
            }
            Err(refusal) => {
                // Dropping the stream resets it.
                drop(tunnel);
                line.verdict = refusal.verdict();
                line.reason = Some(refusal.to_string());
            }
        }
        line.sent = counts.sent.load(Ordering::Relaxed);
        line.received = counts.received.load(Ordering::Relaxed);
        line.lasted(began.elapsed());
        self.audit.write(line);
    }

    /// Joins both sides with TLS taken apart between them.
    #[expect(clippy::too_many_arguments, reason = "one connection, seen from both sides")]
    async fn take_apart(
        &self,
        proxy: &Arc<Proxy>,
        tunnel: Tunnel,
        stream: TcpStream,
        host: &str,
        port: u16,
        counts: &Counts,
        account: &Arc<Account>,
    ) -> Result<(), String> {
        // Limits and counts are of what the sandbox sends and gets, so they lie between it and the proxy.
        let (near, far) = tokio::io::duplex(PROXY_BUFFER);
        let proxying = proxy.clone().run(far, stream, host, port, account);
        let (spliced, proxied) =
            tokio::join!(splice(tunnel, near, &self.allowance, counts), proxying);
        match spliced {
            Err(broken @ (Broken::TooLong(_) | Broken::TooMuch(_))) => Err(broken.to_string()),
            // What the proxy says is why; the rest follows from it.
            _ => proxied.map_err(|error| error.to_string()),
        }
    }

    /// Adds to a connection's line what became of credentials on it, and writes a line for each request that was stopped.
    fn settle(&self, line: &mut Line<'_>, account: &Account) {
        line.requests = account.requests();
        line.credentials = account.delivered();
        let (blocked, more) = account.blocked();
        for why in blocked {
            let mut stopped = Line::new(line.host, line.port, Verdict::Refused, Some(why));
            stopped.address = line.address;
            self.audit.write(stopped);
        }
        self.audit.omit(more);
    }

    /// Whether one more connection is within the limits.
    fn admit(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        if !self.audit.works() {
            return Err(Refusal::Audit);
        }
        if self.allowance.is_used_up() {
            return Err(Refusal::Bytes);
        }
        if !self.dials.lock().unwrap_or_else(PoisonError::into_inner).take_one() {
            return Err(Refusal::Rate);
        }
        self.connections.clone().try_acquire_owned().map_err(|_| Refusal::Number)
    }

    async fn dial(&self, host: &str, port: u16) -> Result<Dialled, Refusal> {
        check_name(host)?;
        if !self
            .endpoints
            .iter()
            .any(|endpoint| endpoint.port == port && endpoint.matches_host(host))
        {
            return Err(Refusal::Policy);
        }
        let permit = self.admit()?;
        let addresses = self.resolve(host).await?;
        let (stream, address) = connect(&addresses, port).await?;
        // A name may also resolve to one of this host's public addresses.
        if !self.allow_private && stream.local_addr().is_ok_and(|local| local.ip() == address) {
            return Err(Refusal::Itself);
        }
        Ok(Dialled { stream, address, permit })
    }

    /// The addresses of a name that may be dialled.
    async fn resolve(&self, host: &str) -> Result<Vec<IpAddr>, Refusal> {
        let addresses = match tokio::time::timeout(RESOLVE_LIMIT, self.resolver.resolve(host)).await
        {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return Err(Refusal::Resolve(error)),
            Err(_) => return Err(Refusal::ResolveLimit),
        };
        let mut refusal = Refusal::NoAddress;
        let mut passed = Vec::new();
        for address in addresses {
            match range(address) {
                Some(range) if !(self.allow_private && range.is_private()) => {
                    refusal = Refusal::Address(range)
                }
                _ => passed.push(address),
            }
        }
        passed.truncate(MAX_ADDRESSES);
        if passed.is_empty() { Err(refusal) } else { Ok(passed) }
    }
}

struct Dialled {
    stream: TcpStream,
    address: IpAddr,
    permit: OwnedSemaphorePermit,
}

/// Bounds and letters of a name that a guest sends: what the agent's own check lets through.
fn check_name(host: &str) -> Result<(), Refusal> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
    };
    if host.len() > crate::policy::MAX_HOST || !host.split('.').all(label) {
        return Err(Refusal::Name);
    }
    // Resolvers take 127.1, 0x7f000001 and 2130706433 for addresses.
    if crate::policy::is_numeric(host) { Err(Refusal::Literal) } else { Ok(()) }
}

/// Connects to the first address that answers.
async fn connect(addresses: &[IpAddr], port: u16) -> Result<(TcpStream, IpAddr), Refusal> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    let mut refusal = Refusal::ConnectLimit;
    for (done, address) in addresses.iter().enumerate() {
        // One that is silent leaves the others their share.
        let left = u32::try_from(addresses.len() - done).unwrap_or(1);
        let share = deadline.saturating_duration_since(Instant::now()) / left;
        match tokio::time::timeout(share, TcpStream::connect(SocketAddr::new(*address, port))).await
        {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok((stream, *address));
            }
            Ok(Err(error)) => refusal = Refusal::Connect(error),
            Err(_) => refusal = Refusal::ConnectLimit,
        }
    }
    Err(refusal)
}

#[cfg(test)]
#[path = "egress_test.rs"]
mod tests;
