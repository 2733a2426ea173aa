//! Delivery `proxy`: the value never enters the sandbox. The workload holds a placeholder. The
//! host intercepts TLS to the credential's hosts, replaces the placeholder in requests, and scrubs
//! the value from responses.
//!
//! ```text
//!   workload ──TLS, the sandbox's CA──▶ [ placeholder → value ] ──TLS, the host's CAs──▶ endpoint
//!            ◀───────────────────────── [ value → *********** ] ◀───────────────────────
//! ```
//!
//! Everything that the sandbox sends is hostile: the SNI, the request's host and the name that the
//! policy allowed must be the same name. A placeholder in a location where it is not replaced
//! blocks the request before the endpoint receives it.
//!
//! Requests and responses are rebuilt from the parts that the proxy understands, and the rest is
//! removed or refused: only what is understood can be scrubbed. What the scrubber forwards, and
//! when, does not depend on a value.

mod blocked;
mod body;
mod budget;
mod certificate_authority;
mod detect;
pub(crate) mod encoding;
mod error;
mod exchange;
mod framing;
#[cfg(feature = "fuzzing")]
pub mod fuzz_port;
mod intercept;
mod name_constraints;
mod placeholder;
mod redaction;
mod relay;
mod replace;
mod request;
mod response;
mod scrubber;
mod selftest;
mod stats;
mod store;
mod upstream_context;
mod websocket;
mod websocket_relay;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::Arc;

use chitin_spec::ProxyScope;
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};

pub use certificate_authority::CertificateError;
pub(crate) use error::ProxyError;
pub use error::{SelfTestError, SetupError, ValueError};
pub(crate) use stats::ProxyStats;

use crate::secret_value::SecretValue;
use budget::{ByteBudget, Share};
use certificate_authority::CertificateAuthority;
use detect::ScanningStream;
use intercept::{Intercepted, intercept_tls};
use relay::{relay_http1, relay_http2};
use store::CredentialStore;
use upstream_context::UpstreamContext;

/// The proxy of one sandbox.
pub struct Proxy {
    store: Arc<CredentialStore>,
    authority: CertificateAuthority,
    /// The TLS configuration for endpoints: the CAs that the host trusts.
    trust: Arc<ClientConfig>,
    budget: Arc<ByteBudget>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.placeholders().map(|(name, _)| name).collect();
        f.debug_struct("Proxy").field("credentials", &names).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Makes a proxy for these credentials: name, scope, value.
    pub(crate) fn new(
        secrets: Vec<(String, ProxyScope, SecretValue)>,
        trust: ClientConfig,
        fill_random: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<Proxy, SetupError> {
        let store = CredentialStore::new(secrets, fill_random)?;
        let hosts = store.credentials.iter().flat_map(|credential| &credential.hosts);
        let domains: BTreeSet<String> = hosts.map(|endpoint| endpoint.host.clone()).collect();
        Ok(Proxy {
            authority: CertificateAuthority::new(domains)?,
            store: Arc::new(store),
            trust: Arc::new(trust),
            budget: Arc::default(),
        })
    }

    /// Replaces the value of a credential.
    pub fn replace_value(&self, name: &str, value: SecretValue) -> Result<(), ValueError> {
        self.store.replace_value(name, value)
    }

    /// Removes the value of a credential: its placeholder blocks every later request.
    pub fn revoke(&self, name: &str) {
        self.store.revoke(name);
    }

    /// Returns the certificate of the sandbox's CA, which the sandbox must trust, as PEM.
    pub fn certificate(&self) -> &str {
        self.authority.pem()
    }

    /// Returns the names of the credentials, each with its placeholder.
    pub(crate) fn placeholders(&self) -> impl Iterator<Item = (&str, &str)> {
        self.store
            .credentials
            .iter()
            .map(|credential| (credential.name.as_str(), credential.placeholder.as_str()))
    }

    /// Returns true if connections to this host and port are intercepted.
    pub(crate) fn intercepts(&self, host: &str, port: u16) -> bool {
        self.store.covers(host, port)
    }

    /// Scans a connection to a host that no credential is for: a placeholder breaks it.
    pub(crate) fn scan_stream<S>(&self, inner: S, stats: &Arc<ProxyStats>) -> ScanningStream<S> {
        ScanningStream::new(inner, self.store.clone(), stats.clone())
    }

    /// Intercepts a connection, and relays its requests until either side ends it.
    pub(crate) async fn relay_connection<S, E>(
        &self,
        sandbox: S,
        endpoint: E,
        host: &str,
        port: u16,
        stats: &Arc<ProxyStats>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.relay_with_trust(&self.trust, sandbox, endpoint, host, port, stats).await
    }

    /// Relays a connection to an endpoint that other CAs than the host's vouch for.
    async fn relay_with_trust<S, E>(
        &self,
        trust: &ClientConfig,
        sandbox: S,
        endpoint: E,
        host: &str,
        port: u16,
        stats: &Arc<ProxyStats>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let share = self.budget.reserve_connection().await;
        let Intercepted { sandbox, endpoint, is_http2 } =
            intercept_tls(&self.authority, trust, sandbox, endpoint, host).await?;
        self.relay_decrypted(sandbox, endpoint, is_http2, (host, port), stats, share).await
    }

    /// Relays HTTP between the two sides of a connection whose TLS is intercepted.
    async fn relay_decrypted<S, E>(
        &self,
        sandbox: S,
        endpoint: E,
        is_http2: bool,
        (host, port): (&str, u16),
        stats: &Arc<ProxyStats>,
        share: Option<Share>,
    ) -> Result<(), ProxyError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let context = Arc::new(UpstreamContext {
            store: self.store.clone(),
            budget: self.budget.clone(),
            share,
            is_http2,
            host: host.to_owned(),
            port,
            stats: stats.clone(),
        });
        match is_http2 {
            true => relay_http2(context, sandbox, endpoint).await?,
            false => relay_http1(context, sandbox, endpoint).await?,
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "proxy_test/mod.rs"]
mod tests;
