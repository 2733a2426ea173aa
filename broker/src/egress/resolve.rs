//! Resolution of names by the host's resolver.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::Arc;
use std::thread;

use tokio::sync::{Semaphore, oneshot};

/// Maximum number of concurrent lookups of one sandbox. Each blocks a thread until the host's
/// resolver gives up, even if the caller has stopped waiting.
const MAX_LOOKUPS: usize = 16;

/// Stack of the thread of a lookup. The C library keeps answers of up to 64 KiB on it.
const STACK: usize = 512 * 1024;

/// The future of a lookup.
pub(super) type Lookup<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;

/// A resolver of names.
pub(super) trait Resolve: Send + Sync + fmt::Debug {
    /// Returns the addresses of a name, possibly none.
    fn resolve(&self, host: &str) -> Lookup<'_>;
}

/// A function that resolves a name and blocks meanwhile.
type BlockingLookup = fn(&str) -> io::Result<Vec<IpAddr>>;

/// The host's resolver, `getaddrinfo(3)`, for one sandbox.
///
/// Each lookup has a thread. The runtime's pool of threads belongs to all sandboxes of a process
/// and to its files: a few sandboxes with slow names would occupy it.
#[derive(Debug)]
pub(super) struct SystemResolver {
    lookups: Arc<Semaphore>,
    look_up: BlockingLookup,
}

impl Default for SystemResolver {
    fn default() -> SystemResolver {
        SystemResolver::new(look_up_addresses)
    }
}

fn look_up_addresses(host: &str) -> io::Result<Vec<IpAddr>> {
    Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
}

impl SystemResolver {
    fn new(look_up: BlockingLookup) -> SystemResolver {
        SystemResolver { lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)), look_up }
    }
}

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> Lookup<'_> {
        let (host, look_up) = (host.to_owned(), self.look_up);
        Box::pin(async move {
            let permit = self.lookups.clone().acquire_owned().await.map_err(io::Error::other)?;
            let (sender, receiver) = oneshot::channel();
            thread::Builder::new().name("chitin-resolve".into()).stack_size(STACK).spawn(
                move || {
                    let addresses = look_up(&host);
                    drop(permit);
                    // The caller may have stopped waiting.
                    let _ = sender.send(addresses);
                },
            )?;
            receiver.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        })
    }
}

#[cfg(test)]
#[path = "resolve_test.rs"]
mod tests;
