//! Delivery `proxy`: the value never enters the sandbox. The workload holds a placeholder; here, on the host, TLS to the named
//! hosts is taken apart, the placeholder is replaced in what goes out, and the value in what comes back.
//!
//! ```text
//!   workload ──TLS, this sandbox's own authority──▶ [ placeholder → value ] ──TLS, the host's authorities──▶ endpoint
//!            ◀──────────────────────────────────── [ value → *********** ] ◀────────────────────────────────
//! ```
//!
//! Whatever the sandbox sends is hostile: SNI, the request's host and what the policy allowed have to be one name; a
//! placeholder in any other place than those it is for stops the request before the endpoint sees it.

mod authority;
mod message;
pub(crate) mod placeholder;
mod selftest;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use chitin_spec::{Endpoint, ProxyScope};
use hyper::client::conn::{http1 as client1, http2 as client2};
use hyper::server::conn::{http1 as server1, http2 as server2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

use authority::Authority;
pub use authority::AuthorityError;
use message::{Place, Watched};
use placeholder::{Needles, Placeholders, placeholder};

use crate::secret_value::SecretValue;

/// How long a TLS handshake may take, on either side.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Shorter values would be found where they are not, and replaced there.
const MIN_VALUE: usize = 8;

/// Bodies that are held whole, of all connections of a sandbox: 16 MiB. Others wait.
const MAX_HELD: usize = 16;

/// All headers of one message. Servers' own limits are between 8 and 64 KiB.
const MAX_HEADERS: usize = 64 * 1024;

/// Requests at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;

pub(crate) struct Credential {
    pub name: String,
    pub hosts: Vec<chitin_protocol::Endpoint>,
    pub query: bool,
    pub body: bool,
    pub placeholder: String,
    values: Mutex<Values>,
}

/// What a credential is.
#[derive(Default)]
struct Values {
    /// Nothing, once it was taken back.
    now: Option<Arc<SecretValue>>,
    /// What it was before, which is kept out of what comes back as well.
    before: Option<Arc<SecretValue>>,
}

/// Why there is no proxy for a credential.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("secret {name}: {why}")]
    /// Its value cannot be delivered so.
    Value {
        /// Its name.
        name: String,
        /// In words.
        why: String,
    },
    /// There is no certificate for it.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(
        "secret {name}: the self-test of its proxy failed, so it would not have been what it is for: {why}"
    )]
    /// Its placeholder was not replaced.
    SelfTest {
        /// Its name.
        name: String,
        /// In words.
        why: String,
    },
}

/// All credentials of a sandbox that are delivered so.
pub struct Proxy {
    pub(crate) credentials: Vec<Credential>,
    pub(crate) placeholders: Placeholders,
    needles: RwLock<Needles>,
    pub(crate) authority: Authority,
    endpoint: Arc<ClientConfig>,
    /// For bodies that are held whole.
    pub(crate) held: Arc<Semaphore>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> =
            self.credentials.iter().map(|credential| credential.name.as_str()).collect();
        f.debug_struct("Proxy").field("credentials", &names).finish_non_exhaustive()
    }
}

/// Why a connection ended, where neither side just ended it. Said to nobody but the audit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("it is no TLS, which a credential's host has to be spoken to with")]
    NotTls,
    #[error("the TLS handshake with the sandbox failed: {0}")]
    Sandbox(String),
    #[error("TLS was for another host than the connection")]
    Sni,
    #[error("the TLS handshake with the endpoint failed: {0}")]
    Endpoint(String),
    #[error("a TLS handshake took longer than {} s", HANDSHAKE_LIMIT.as_secs())]
    Slow,
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("HTTP broke off: {0}")]
    Http(String),
}

/// What became of the requests of one connection.
#[derive(Debug, Default)]
pub(crate) struct Account {
    inner: Mutex<Tally>,
}

#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub requests: u64,
    pub delivered: BTreeSet<String>,
    blocked: Vec<String>,
    blocked_more: u64,
}

/// Blocked requests of one connection that are written down with their reasons.
const MAX_BLOCKED: usize = 16;

impl Account {
    pub(crate) fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn block(&self, why: String) {
        let mut tally = self.tally();
        if tally.blocked.len() < MAX_BLOCKED {
            tally.blocked.push(why);
        } else {
            tally.blocked_more += 1;
        }
    }

    /// Credentials that went out, by their names.
    pub fn delivered(&self) -> Vec<String> {
        self.tally().delivered.iter().cloned().collect()
    }

    /// Requests that went out.
    pub fn requests(&self) -> u64 {
        self.tally().requests
    }

    /// Why requests did not go out, and how many more there were.
    pub fn blocked(&self) -> (Vec<String>, u64) {
        let tally = self.tally();
        (tally.blocked.clone(), tally.blocked_more)
    }
}

impl Proxy {
    /// A proxy for these: name, where it is for, value.
    pub(crate) fn new(
        values: Vec<(String, ProxyScope, SecretValue)>,
        endpoint: ClientConfig,
        mut random: impl FnMut(&mut [u8]) -> std::io::Result<()>,
    ) -> Result<Proxy, SetupError> {
        let (mut credentials, mut placeholders, mut needles) =
            (Vec::new(), Placeholders::default(), Needles::default());
        for (name, reach, value) in values {
            let wrong = |why: String| SetupError::Value { name: name.clone(), why };
            check(&value).map_err(wrong)?;
            let mut digits = [0; 20];
            random(&mut digits).map_err(|error| wrong(format!("get random bytes: {error}")))?;
            let placeholder = placeholder(digits);
            placeholders.insert(placeholder.clone(), credentials.len());
            needles.add(value.to_bytes().expose());
            let values = Mutex::new(Values { now: Some(Arc::new(value)), before: None });
            let hosts = reach.hosts.iter().map(|Endpoint { host, wildcard, port }| {
                chitin_protocol::Endpoint { host: host.clone(), wildcard: *wildcard, port: *port }
            });
            let (hosts, ProxyScope { query, body, .. }) = (hosts.collect(), reach);
            credentials.push(Credential { name, hosts, query, body, placeholder, values });
        }
        let hosts = credentials.iter().flat_map(|credential: &Credential| &credential.hosts);
        let authority =
            Authority::new(hosts.map(|host| host.host.clone()).collect::<BTreeSet<_>>())?;
        let (endpoint, held) = (Arc::new(endpoint), Arc::new(Semaphore::new(MAX_HELD)));
        Ok(Proxy {
            credentials,
            placeholders,
            needles: RwLock::new(needles),
            authority,
            endpoint,
            held,
        })
    }

    /// What must not come back.
    pub(crate) fn needles(&self) -> RwLockReadGuard<'_, Needles> {
        self.needles.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another value in place of a credential's. Why it cannot, if it cannot.
    pub fn replace(&self, name: &str, value: SecretValue) -> Result<(), String> {
        check(&value)?;
        self.change(name, Some(Arc::new(value)));
        Ok(())
    }

    /// From now on the placeholder of this credential stops what it stands in.
    pub fn revoke(&self, name: &str) {
        self.change(name, None);
    }

    fn change(&self, name: &str, value: Option<Arc<SecretValue>>) {
        // Before it goes out it is among those that must not come back.
        let mut needles = self.needles.write().unwrap_or_else(PoisonError::into_inner);
        for credential in self.credentials.iter().filter(|credential| credential.name == name) {
            let mut values = credential.values();
            if let Some(before) = values.now.take() {
                values.before = Some(before);
            }
            values.now = value.clone();
        }
        *needles = Needles::default();
        for credential in &self.credentials {
            let values = credential.values();
            for value in [&values.now, &values.before].into_iter().flatten() {
                needles.add(value.to_bytes().expose());
            }
        }
    }

    /// What the sandbox is to trust, as PEM.
    pub fn certificate(&self) -> &str {
        self.authority.pem()
    }

    /// Names with what the workload has instead of their values.
    pub(crate) fn placeholders(&self) -> impl Iterator<Item = (&str, &str)> {
        self.credentials
            .iter()
            .map(|credential| (credential.name.as_str(), credential.placeholder.as_str()))
    }

    /// Whether anything is delivered to this endpoint, whose TLS is taken apart then.
    pub(crate) fn is_for(&self, host: &str, port: u16) -> bool {
        self.credentials.iter().any(|credential| credential.is_for(host, port))
    }

    /// Looks for placeholders in what goes out to a host that none is for.
    pub(crate) fn watched<S>(self: &Arc<Proxy>, inner: S, account: &Arc<Account>) -> Watched<S> {
        Watched::new(inner, self.clone(), account.clone())
    }

    /// Speaks for the endpoint to the sandbox, and for the sandbox to the endpoint, until either is done.
    pub(crate) async fn run<S, E>(
        self: Arc<Proxy>,
        sandbox: S,
        endpoint: E,
        host: &str,
        port: u16,
        account: &Arc<Account>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let tls = self.endpoint.clone();
        self.run_with(tls, sandbox, endpoint, host, port, account).await
    }

    pub(crate) async fn run_with<S, E>(
        self: Arc<Proxy>,
        tls: Arc<ClientConfig>,
        sandbox: S,
        endpoint: E,
        host: &str,
        port: u16,
        account: &Arc<Account>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let start = in_time(LazyConfigAcceptor::new(Acceptor::default(), sandbox)).await?;
        let start = start.map_err(|error| match error.kind() {
            // What is not a record of a handshake.
            std::io::ErrorKind::InvalidData => ProxyError::NotTls,
            kind => ProxyError::Sandbox(kind.to_string()),
        })?;
        let hello = start.client_hello();
        if hello.server_name() != Some(host) {
            return Err(ProxyError::Sni);
        }
        let mut offered: Vec<Vec<u8>> =
            hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect();
        offered.retain(|protocol| matches!(protocol.as_slice(), b"h2" | b"http/1.1"));
        if offered.is_empty() {
            offered.push(b"http/1.1".to_vec());
        }

        // The endpoint chooses among what the sandbox speaks, so that both sides speak the same.
        let mut config = ClientConfig::clone(&tls);
        config.alpn_protocols = offered;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| ProxyError::Sni)?;
        let upstream =
            in_time(TlsConnector::from(Arc::new(config)).connect(name, endpoint)).await?;
        let upstream = upstream.map_err(|error| ProxyError::Endpoint(error.to_string()))?;
        let h2 = upstream.get_ref().1.alpn_protocol() == Some(b"h2");

        let config = self.authority.server(host, if h2 { b"h2" } else { b"http/1.1" })?;
        let downstream = in_time(start.into_stream(Arc::new(config))).await?;
        let downstream = downstream.map_err(|error| ProxyError::Sandbox(error.to_string()))?;
        let place =
            Arc::new(Place { proxy: self, host: host.to_owned(), port, account: account.clone() });
        let (downstream, upstream) = (TokioIo::new(downstream), TokioIo::new(upstream));
        if h2 {
            place.http2(downstream, upstream).await
        } else {
            place.http1(downstream, upstream).await
        }
    }
}

/// Whether a value can be delivered so, and why not.
fn check(value: &SecretValue) -> Result<(), String> {
    let bytes = value.to_bytes();
    if bytes.expose().len() < MIN_VALUE {
        return Err(
            "a value of less than 8 bytes cannot be kept out of what comes back: deliver it otherwise".into(),
        );
    }
    if !bytes.expose().iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return Err("no HTTP header can hold its value: printable ASCII only".into());
    }
    Ok(())
}

impl Credential {
    fn values(&self) -> std::sync::MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its value, until it is taken back.
    pub fn value(&self) -> Option<Arc<SecretValue>> {
        self.values().now.clone()
    }

    pub fn is_for(&self, host: &str, port: u16) -> bool {
        self.hosts.iter().any(|endpoint| endpoint.port == port && endpoint.matches_host(host))
    }
}

async fn in_time<T>(future: impl Future<Output = T>) -> Result<T, ProxyError> {
    tokio::time::timeout(HANDSHAKE_LIMIT, future).await.map_err(|_| ProxyError::Slow)
}

impl Place {
    async fn http1<S, E>(
        self: Arc<Place>,
        sandbox: TokioIo<S>,
        endpoint: TokioIo<E>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let failed = |error: hyper::Error| ProxyError::Http(error.to_string());
        let (sender, upstream) = client1::Builder::new()
            .preserve_header_case(true)
            .max_header_size(MAX_HEADERS)
            .max_buf_size(2 * MAX_HEADERS)
            .handshake(endpoint)
            .await
            .map_err(failed)?;
        let sender = Arc::new(tokio::sync::Mutex::new(sender));
        let service = service_fn(|request| {
            let (place, sender) = (self.clone(), sender.clone());
            async move {
                let send = |request| async move {
                    let mut sender = sender.lock().await;
                    sender.ready().await?;
                    sender.send_request(request).await
                };
                Ok::<_, Infallible>(place.answer(request, send).await)
            }
        });
        let mut upstream = pin!(upstream.with_upgrades());
        let mut downstream = pin!(
            server1::Builder::new()
                .preserve_header_case(true)
                // An idle connection is not cut, and there are few.
                .header_read_timeout(None)
                .max_header_size(MAX_HEADERS)
                .max_buf_size(2 * MAX_HEADERS)
                .serve_connection(sandbox, service)
                .with_upgrades()
        );
        tokio::select! {
            served = &mut downstream => return served.map_err(failed),
            _ = &mut upstream => {}
        }
        // The endpoint has ended: what it has said is still passed on.
        downstream.as_mut().graceful_shutdown();
        downstream.await.map_err(failed)
    }

    async fn http2<S, E>(
        self: Arc<Place>,
        sandbox: TokioIo<S>,
        endpoint: TokioIo<E>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let failed = |error: hyper::Error| ProxyError::Http(error.to_string());
        let headers = u32::try_from(MAX_HEADERS).unwrap_or(u32::MAX);
        let (sender, upstream) = client2::Builder::new(TokioExecutor::new())
            .max_header_list_size(headers)
            .handshake(endpoint)
            .await
            .map_err(failed)?;
        let service = service_fn(|request| {
            let (place, mut sender) = (self.clone(), sender.clone());
            async move {
                let send = |request| async move {
                    sender.ready().await?;
                    sender.send_request(request).await
                };
                Ok::<_, Infallible>(place.answer(request, send).await)
            }
        });
        let mut upstream = pin!(upstream);
        let mut downstream = pin!(
            server2::Builder::new(TokioExecutor::new())
                .max_concurrent_streams(MAX_STREAMS)
                .max_header_list_size(headers)
                .serve_connection(sandbox, service)
        );
        tokio::select! {
            served = &mut downstream => return served.map_err(failed),
            _ = &mut upstream => {}
        }
        downstream.as_mut().graceful_shutdown();
        downstream.await.map_err(failed)
    }
}

#[cfg(test)]
#[path = "proxy_test.rs"]
mod tests;
