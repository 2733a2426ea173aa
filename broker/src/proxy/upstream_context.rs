//! The context of one intercepted connection: its endpoint, its credentials and its statistics.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderName, HeaderValue};

use super::blocked::{BlockReason, Location};
use super::budget::{ByteBudget, Share};
use super::stats::ProxyStats;
use super::store::{Credential, CredentialStore};

/// The endpoint of one intercepted connection, and what its messages are checked against.
pub(super) struct UpstreamContext {
    pub store: Arc<CredentialStore>,
    pub budget: Arc<ByteBudget>,
    /// The share of this connection, also after it was upgraded.
    pub share: Option<Share>,
    pub is_http2: bool,
    pub host: String,
    pub port: u16,
    pub stats: Arc<ProxyStats>,
}

impl UpstreamContext {
    /// Returns true if this credential is for the endpoint.
    pub fn accepts(&self, credential: &Credential) -> bool {
        credential.covers(&self.host, self.port)
    }

    /// Returns the reason for which a placeholder in this location blocks the message.
    pub fn misplaced(&self, credential: usize, location: Location) -> BlockReason {
        let credential = &self.store.credentials[credential];
        let name = credential.name.clone();
        match self.accepts(credential) {
            true => BlockReason::Misplaced { credential: name, location },
            false => BlockReason::WrongHost { credential: name, location },
        }
    }

    /// Counts a message in which a value was scrubbed.
    pub fn record_hit(&self) {
        self.stats.count_scrubbed();
        self.store.record_hit();
    }

    /// Returns headers or trailers with names and values scrubbed.
    pub fn scrub_headers(&self, headers: HeaderMap) -> HeaderMap {
        let patterns = self.store.patterns();
        let mut scrubbed = HeaderMap::with_capacity(headers.len());
        let (mut found, mut name) = (false, HeaderName::from_static("x"));
        for (next, value) in headers {
            // A further value of the same header has no name.
            if let Some(next) = next {
                let mut bytes = next.as_str().as_bytes().to_vec();
                let matches = patterns.scrub_name(&mut bytes);
                found |= matches;
                // An asterisk is valid in a name.
                name = match matches {
                    true => HeaderName::from_bytes(&bytes).unwrap_or(HeaderName::from_static("*")),
                    false => next,
                };
            }
            let mut bytes = value.as_bytes().to_vec();
            let value = match patterns.scrub(&mut bytes) {
                // Asterisks in place of printable characters: the header stays valid.
                true => {
                    found = true;
                    HeaderValue::from_bytes(&bytes).unwrap_or(HeaderValue::from_static("*"))
                }
                false => value,
            };
            scrubbed.append(name.clone(), value);
        }
        drop(patterns);
        if found {
            self.record_hit();
        }
        scrubbed
    }
}
