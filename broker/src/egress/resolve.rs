//! Resolution of names by the host's resolver.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::Semaphore;

/// Maximum number of concurrent lookups. Each blocks a thread until the host's resolver gives up,
/// even if the caller has stopped waiting.
const MAX_LOOKUPS: usize = 16;

/// The future of a lookup.
pub(super) type Lookup<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;

/// A resolver of names.
pub(super) trait Resolve: Send + Sync + fmt::Debug {
    /// Returns the addresses of a name, possibly none.
    fn resolve(&self, host: &str) -> Lookup<'_>;
}

/// The host's resolver, `getaddrinfo(3)`.
#[derive(Debug)]
pub(super) struct SystemResolver {
    lookups: Arc<Semaphore>,
}

impl Default for SystemResolver {
    fn default() -> SystemResolver {
        SystemResolver { lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)) }
    }
}

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> Lookup<'_> {
        let host = host.to_owned();
        Box::pin(async move {
            let permit = self.lookups.clone().acquire_owned().await.map_err(io::Error::other)?;
            let lookup = tokio::task::spawn_blocking(move || {
                let addresses = (host.as_str(), 0).to_socket_addrs();
                drop(permit);
                addresses.map(|addresses| addresses.map(|address| address.ip()).collect())
            });
            lookup.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        })
    }
}
