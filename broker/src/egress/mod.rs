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
mod resolve;
mod splice;

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chitin_protocol::{MAX_DIALS, MAX_ENDPOINTS};
use chitin_spec::{DeliveryKind, EgressLimits, Endpoint, MAX_HOST, ParseEndpointError, is_numeric};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::audit_log::{AuditLog, Line, Verdict, truncate_name};
use crate::aws::{AwsCredentialServer, Outcome};
use crate::bucket::Bucket;
use crate::proxy::{Account, Proxy};
use address::{Range, range};
use resolve::{Resolve, System};
pub use splice::{Allowance, Broken, Counts, splice};

/// How long a name may take to resolve: the two attempts of the C library's resolver.
const RESOLVE_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection may take to be made, all addresses of a name together.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Addresses of one name that are tried. A name can have hundreds.
const MAX_ADDRESSES: usize = 4;

/// What is on its way between a sandbox and its proxy, each way: a window's worth.
const PROXY_BUFFER: usize = 64 * 1024;

/// What a workload tries to reach. All of it is the guest's word.
#[derive(Debug)]
pub enum DialRequest<T> {
    /// A connection.
    Dial {
        /// A name.
        host: String,
        /// TCP port.
        port: u16,
        /// The sandbox's end of the connection. Dropping it before it was shut down resets it.
        tunnel: T,
    },
    /// A name that the agent has refused.
    Denied {
        /// The name.
        host: String,
    },
}

/// Resolves when a sandbox has ended.
pub type Ended = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The requests of one sandbox, by whatever way they come.
pub trait DialSource: Send + 'static {
    /// A connection of the sandbox.
    type Tunnel: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next request; `None` when there will be no more. Safe to cancel.
    fn next_request(&mut self) -> impl Future<Output = Option<DialRequest<Self::Tunnel>>> + Send;

    /// How many requests were turned away before they came here, since this was last asked.
    fn take_missed(&mut self) -> u64;

    /// Resolves when the sandbox has ended, and nothing goes through its tunnels any more.
    fn ended(&self) -> Ended;
}

/// What a sandbox may connect to. Nothing, as it begins.
#[derive(Debug, Clone, Default)]
pub struct EgressSpec {
    /// The names and ports.
    pub endpoints: Vec<Endpoint>,
    /// Whether names may resolve to loopback and private addresses.
    pub allow_private: bool,
    /// The file that attempts are written to.
    pub audit: Option<PathBuf>,
    /// How much of it there is.
    pub limits: EgressLimits,
    /// The first thing that was asked for and makes no sense.
    pub wrong: Option<ParseEndpointError>,
}

/// What is wrong with the egress that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// A requested endpoint is invalid.
    #[error(transparent)]
    Endpoint(#[from] ParseEndpointError),
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

impl EgressSpec {
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
        if let Some(error) = &self.wrong {
            return Err(error.clone().into());
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
    pub fn open_audit(&self) -> Result<AuditLog, EgressError> {
        AuditLog::open(self.audit.as_deref()).map_err(|source| self.unwritten(source))
    }

    /// Writes down how each of these is delivered, before it is.
    pub fn record_deliveries<'a>(
        &self,
        audit: &AuditLog,
        deliveries: impl IntoIterator<Item = (&'a str, DeliveryKind)>,
    ) -> Result<(), EgressError> {
        let mut deliveries = deliveries.into_iter();
        deliveries
            .try_for_each(|(name, how)| audit.record_delivery(name, how))
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
pub struct Broker {
    endpoints: Vec<chitin_protocol::Endpoint>,
    allow_private: bool,
    audit: Arc<AuditLog>,
    proxy: Option<Arc<Proxy>>,
    /// Answers at an endpoint that leads nowhere.
    aws_server: Option<Arc<AwsCredentialServer>>,
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
    /// A broker for what a sandbox may connect to.
    pub fn new(
        spec: &EgressSpec,
        audit: Arc<AuditLog>,
        proxy: Option<Arc<Proxy>>,
        aws_server: Option<Arc<AwsCredentialServer>>,
    ) -> Broker {
        Broker { proxy, aws_server, ..Broker::with(spec, audit, Box::new(System::default())) }
    }

    /// What the agent is to accept for.
    pub fn wire(&self) -> Vec<chitin_protocol::Endpoint> {
        let keys = self.aws_server.as_ref().map(|_| AwsCredentialServer::wire());
        self.endpoints.iter().cloned().chain(keys).collect()
    }

    fn with(spec: &EgressSpec, audit: Arc<AuditLog>, resolver: Box<dyn Resolve>) -> Broker {
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
            aws_server: None,
            resolver,
            connections: Arc::new(Semaphore::new(limits.connections.min(MAX_DIALS))),
            dials: Mutex::new(Bucket::new(rate, 4.0 * rate)),
            allowance: Allowance::new(limits.connection_bytes, limits.total_bytes, bytes),
        }
    }

    /// Serves a sandbox until it has ended and every attempt is written down.
    pub async fn serve<S: DialSource>(self: Arc<Broker>, mut source: S) {
        let mut attempts = JoinSet::new();
        loop {
            tokio::select! {
                request = source.next_request() => match request {
                    None => break,
                    Some(DialRequest::Denied { host }) => {
                        let reason = Some(Refusal::Policy.to_string());
                        self.audit.write(Line::new(&host, None, Verdict::Refused, reason));
                    }
                    Some(DialRequest::Dial { host, port, tunnel }) => {
                        let (broker, ended) = (self.clone(), source.ended());
                        let at_aws = |_: &Arc<_>| AwsCredentialServer::is_at(&host, port);
                        match self.aws_server.clone().filter(at_aws) {
                            Some(server) => {
                                attempts.spawn(broker.give(ended, tunnel, server, host, port));
                            }
                            None => {
                                attempts.spawn(broker.attempt(ended, tunnel, host, port));
                            }
                        }
                    }
                },
                Some(_) = attempts.join_next() => {}
            }
            self.audit.omit(source.take_missed());
        }
        while attempts.join_next().await.is_some() {}
    }

    /// One connection to the endpoint of a credential: a line in the audit if it asked for that.
    async fn give<T>(
        self: Arc<Broker>,
        ended: Ended,
        tunnel: T,
        keys: Arc<AwsCredentialServer>,
        host: String,
        port: u16,
    ) where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let began = Instant::now();
        let mut line = Line::new(&host, Some(port), Verdict::Allowed, None);
        match self.admit() {
            Ok(_permit) => {
                let answered = tokio::select! {
                    answered = keys.serve(tunnel) => answered,
                    () = ended => None,
                };
                (line.verdict, line.reason) = match answered {
                    None => return,
                    Some(Outcome::Given { trouble }) => (Verdict::Allowed, trouble),
                    Some(Outcome::Refused(why)) => (Verdict::Refused, Some(why.into())),
                    Some(Outcome::Failed(why)) => (Verdict::Failed, Some(why)),
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
    #[tracing::instrument(
        name = "egress",
        level = "debug",
        skip_all,
        fields(host = truncate_name(&host), port)
    )]
    async fn attempt<T>(self: Arc<Broker>, mut ended: Ended, tunnel: T, host: String, port: u16)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let began = Instant::now();
        let mut line = Line::new(&host, Some(port), Verdict::Allowed, None);
        let counts = Counts::default();
        let dialled = tokio::select! {
            dialled = self.dial(&host, port) => dialled,
            () = &mut ended => Err(Refusal::Ended),
        };
        match dialled {
            Ok(Dialled { mut stream, address, permit }) => {
                line.address = Some(address);
                let account = Arc::new(Account::default());
                let outcome = match &self.proxy {
                    Some(proxy) if proxy.is_for(&host, port) => {
                        tokio::select! {
                            outcome = self.take_apart(proxy, tunnel, stream, &host, port, &counts, &account) => outcome,
                            () = &mut ended => Err(Broken::Sandbox.to_string()),
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
                            () = &mut ended => Err(Broken::Sandbox),
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
    async fn take_apart<T>(
        &self,
        proxy: &Arc<Proxy>,
        tunnel: T,
        stream: TcpStream,
        host: &str,
        port: u16,
        counts: &Counts,
        account: &Arc<Account>,
    ) -> Result<(), String>
    where
        T: AsyncRead + AsyncWrite,
    {
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
    if host.len() > MAX_HOST || !host.split('.').all(label) {
        return Err(Refusal::Name);
    }
    // Resolvers take 127.1, 0x7f000001 and 2130706433 for addresses.
    if is_numeric(host) { Err(Refusal::Literal) } else { Ok(()) }
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
