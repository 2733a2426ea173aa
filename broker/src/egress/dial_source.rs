//! The requests of a sandbox for connections, however they reach the broker.

use std::future::Future;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

/// An attempt of the workload to connect. The guest controls every field.
#[derive(Debug)]
pub enum DialRequest<T> {
    /// A request for a connection.
    Dial {
        /// The host name.
        host: String,
        /// The TCP port.
        port: u16,
        /// The sandbox's side of the connection. Dropping it before its shutdown resets it.
        tunnel: T,
    },
    /// A name that the agent did not resolve.
    Denied {
        /// The host name.
        host: String,
    },
}

/// A future that resolves when a sandbox has ended.
pub type Ended = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The source of the requests of one sandbox.
pub trait DialSource: Send + 'static {
    /// The sandbox's side of a connection.
    type Tunnel: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Returns the next request; `None` after the last one. Cancel-safe.
    fn next_request(&mut self) -> impl Future<Output = Option<DialRequest<Self::Tunnel>>> + Send;

    /// Returns the number of requests that were dropped since the last call.
    fn take_missed(&mut self) -> u64;

    /// Returns a future that resolves when the sandbox has ended and its tunnels are closed.
    fn ended(&self) -> Ended;
}
