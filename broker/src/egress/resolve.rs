//! Names to addresses, by the host's own means.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::Semaphore;

/// Lookups at once. Each holds a thread until the host's resolver gives up, however short we wait ourselves.
const MAX_LOOKUPS: usize = 16;

/// A lookup's answer, on its way.
pub(crate) type Answer<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;

/// What looks names up.
pub(crate) trait Resolve: Send + Sync + fmt::Debug {
    /// The addresses of a name; none is no error.
    fn resolve(&self, host: &str) -> Answer<'_>;
}

/// `getaddrinfo(3)`.
#[derive(Debug)]
pub(crate) struct System {
    lookups: Arc<Semaphore>,
}

impl Default for System {
    fn default() -> System {
        System { lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)) }
    }
}

impl Resolve for System {
    fn resolve(&self, host: &str) -> Answer<'_> {
        let host = host.to_owned();
        Box::pin(async move {
            let permit = self.lookups.clone().acquire_owned().await.map_err(io::Error::other)?;
            let looked = tokio::task::spawn_blocking(move || {
                let addresses = (host.as_str(), 0).to_socket_addrs();
                drop(permit);
                addresses.map(|addresses| addresses.map(|address| address.ip()).collect())
            });
            looked.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        })
    }
}
