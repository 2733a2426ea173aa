//! The context of one intercepted connection: its endpoint, its credentials and its statistics.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderValue};
use tokio::sync::Semaphore;

use super::blocked::{BlockReason, Location};
use super::stats::ProxyStats;
use super::store::{Credential, CredentialStore};

/// The endpoint of one intercepted connection, and what its messages are checked against.
pub(super) struct UpstreamContext {
    pub store: Arc<CredentialStore>,
    /// Limits the buffered bodies of all connections of the sandbox.
    pub buffered_bodies: Arc<Semaphore>,
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

    /// Scrubs the values of headers or trailers.
    pub fn scrub_headers(&self, headers: &mut HeaderMap) {
        for value in headers.values_mut() {
            let mut bytes = value.as_bytes().to_vec();
            if self.store.patterns().scrub(&mut bytes) {
                // Asterisks in place of printable characters: the header stays valid.
                *value = HeaderValue::from_bytes(&bytes).unwrap_or(HeaderValue::from_static("*"));
            }
        }
    }
}
