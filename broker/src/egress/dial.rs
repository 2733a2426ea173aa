//! Dialling an endpoint: every rule, from the name to the connected address.
//!
//! ```text
//!   check_host_name ─▶ allowed? ─▶ admit_connection ─▶ resolve_host ─▶ connect_to_first
//! ```

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chitin_protocol::MAX_DIALS;
use chitin_spec::{EgressLimits, MAX_HOST, is_numeric};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::address::classify_address;
use super::refusal::Refusal;
use super::resolve::Resolve;
use super::spec::EgressSpec;
use super::splice::TransferLimits;
use crate::audit_log::AuditLog;
use crate::token_bucket::TokenBucket;

/// Time limit of a lookup: two attempts of the C library's resolver.
pub(super) const RESOLVE_LIMIT: Duration = Duration::from_secs(10);

/// Time limit of connecting, for all addresses of a name together.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Maximum number of addresses of one name that are tried. A name can have hundreds.
const MAX_ADDRESSES: usize = 4;

/// Dials the endpoints that a sandbox is allowed, within its limits.
#[derive(Debug)]
pub(super) struct Dialer {
    pub endpoints: Vec<chitin_protocol::Endpoint>,
    /// The limits of all connections of the sandbox.
    pub transfers: TransferLimits,
    allow_private: bool,
    audit: Arc<AuditLog>,
    resolver: Box<dyn Resolve>,
    connections: Arc<Semaphore>,
    dial_rate: Mutex<TokenBucket>,
}

/// A connection to an endpoint.
pub(super) struct Dialled {
    pub stream: TcpStream,
    pub address: IpAddr,
    /// Counts the connection against the limit until it is dropped.
    pub permit: OwnedSemaphorePermit,
}

impl Dialer {
    pub fn new(spec: &EgressSpec, audit: Arc<AuditLog>, resolver: Box<dyn Resolve>) -> Dialer {
        let EgressLimits { connections, dials_per_second, connection_bytes, total_bytes, .. } =
            spec.limits;
        let rate = f64::from(dials_per_second.max(1));
        #[expect(clippy::cast_precision_loss, reason = "the limit needs no exact byte count")]
        let bytes = spec
            .limits
            .bytes_per_second
            .map(|rate| TokenBucket::new(rate.get() as f64, rate.get() as f64));
        Dialer {
            endpoints: spec.endpoints.iter().map(Into::into).collect(),
            transfers: TransferLimits::new(connection_bytes, total_bytes, bytes),
            allow_private: spec.allow_private,
            audit,
            resolver,
            connections: Arc::new(Semaphore::new(connections.min(MAX_DIALS))),
            dial_rate: Mutex::new(TokenBucket::new(rate, 4.0 * rate)),
        }
    }

    /// Connects to a host and port, if every rule allows it.
    pub async fn dial(&self, host: &str, port: u16) -> Result<Dialled, Refusal> {
        check_host_name(host)?;
        let mut endpoints = self.endpoints.iter();
        if !endpoints.any(|endpoint| endpoint.port == port && endpoint.matches_host(host)) {
            return Err(Refusal::Policy);
        }
        let permit = self.admit_connection()?;
        let addresses = self.resolve_host(host).await?;
        let (stream, address) = connect_to_first(&addresses, port).await?;
        // A name may also resolve to one of this host's public addresses.
        if !self.allow_private && stream.local_addr().is_ok_and(|local| local.ip() == address) {
            return Err(Refusal::ThisHost);
        }
        Ok(Dialled { stream, address, permit })
    }

    /// Counts one more connection against the limits.
    pub fn admit_connection(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        if !self.audit.is_writable() {
            return Err(Refusal::Audit);
        }
        if self.transfers.is_exhausted() {
            return Err(Refusal::ByteLimit);
        }
        if !self.dial_rate.lock().unwrap_or_else(PoisonError::into_inner).try_take() {
            return Err(Refusal::DialRate);
        }
        self.connections.clone().try_acquire_owned().map_err(|_| Refusal::ConnectionLimit)
    }

    /// Returns the addresses of a name that may be dialled.
    async fn resolve_host(&self, host: &str) -> Result<Vec<IpAddr>, Refusal> {
        let lookup = tokio::time::timeout(RESOLVE_LIMIT, self.resolver.resolve(host)).await;
        let addresses = match lookup {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return Err(Refusal::Resolve(error)),
            Err(_) => return Err(Refusal::ResolveTimedOut),
        };
        let mut refusal = Refusal::NoAddress;
        let mut allowed = Vec::new();
        for address in addresses {
            match classify_address(address) {
                Some(range) if !(self.allow_private && range.is_private()) => {
                    refusal = Refusal::Address(range)
                }
                _ => allowed.push(address),
            }
        }
        allowed.truncate(MAX_ADDRESSES);
        if allowed.is_empty() { Err(refusal) } else { Ok(allowed) }
    }
}

/// Checks length and characters of a name that a guest sends, as the agent does.
fn check_host_name(host: &str) -> Result<(), Refusal> {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
    };
    if host.len() > MAX_HOST || !host.split('.').all(is_label) {
        return Err(Refusal::InvalidName);
    }
    // Resolvers read 127.1, 0x7f000001 and 2130706433 as addresses.
    if is_numeric(host) { Err(Refusal::AddressLiteral) } else { Ok(()) }
}

/// Connects to the first address that accepts.
async fn connect_to_first(addresses: &[IpAddr], port: u16) -> Result<(TcpStream, IpAddr), Refusal> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    let mut refusal = Refusal::ConnectTimedOut;
    for (tried, address) in addresses.iter().enumerate() {
        // A silent address leaves the others their share of the time.
        let left = u32::try_from(addresses.len() - tried).unwrap_or(1);
        let share = deadline.saturating_duration_since(Instant::now()) / left;
        let connecting = TcpStream::connect(SocketAddr::new(*address, port));
        match tokio::time::timeout(share, connecting).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok((stream, *address));
            }
            Ok(Err(error)) => refusal = Refusal::Connect(error),
            Err(_) => refusal = Refusal::ConnectTimedOut,
        }
    }
    Err(refusal)
}
