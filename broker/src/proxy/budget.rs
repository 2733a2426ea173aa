//! The byte budget of a sandbox's proxy: the memory of this host for all messages in transit.
//!
//! ```text
//!   128 MiB = 128 connections × 704 KiB     each connection, with one request
//!           + 40 MiB shared                 further requests of HTTP/2, larger windows, bodies
//! ```
//!
//! Memory is reserved before a message is read, at the most that it can need. Reading never stops
//! in the middle of a message for lack of memory: a sandbox could otherwise choose where an
//! endpoint's text is cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chitin_protocol::MAX_DIALS;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::body::MAX_BODY;

const KIB: usize = 1024;

/// Maximum number of concurrent connections of a sandbox.
pub(super) const MAX_CONNECTIONS: usize = MAX_DIALS;

/// The most that one connection buffers: bytes between the sandbox and the proxy (2 × 64 + 2 × 32
/// KiB), TLS of both sides (4 × 48 KiB), the windows and buffers of HTTP (2 × 96 KiB), and one
/// request (128 KiB).
const CONNECTION_BYTES: usize = 704 * KIB;

/// The most that one more request buffers: its headers and those of its response (2 × 32 KiB), and
/// a piece of each body (16 KiB, and 16 KiB with up to 24 KiB held back by the scrubber).
const REQUEST_BYTES: usize = 128 * KIB;

/// The window of a connection of HTTP/2 over a distance: 2 MiB is 40 MiB/s at 50 ms.
pub(super) const LARGE_WINDOW: usize = 2048 * KIB;

/// What all connections share.
const SHARED_BYTES: usize = 40 * 1024 * KIB;

/// The part of it that larger windows leave to requests.
const REQUESTS_ONLY: usize = SHARED_BYTES / 2;

/// The bytes that all connections of a sandbox may buffer together.
#[cfg(test)]
pub(super) const BUDGET: usize = MAX_CONNECTIONS * CONNECTION_BYTES + SHARED_BYTES;

/// The byte budget of a sandbox.
#[derive(Debug)]
pub(super) struct ByteBudget {
    connections: Arc<Semaphore>,
    /// In KiB.
    shared: Arc<Semaphore>,
    reserved: Arc<AtomicUsize>,
}

/// The share of one connection.
#[derive(Debug)]
pub(super) struct Share {
    /// The one request that the share is for.
    request: Arc<Semaphore>,
    _reservation: Reservation,
}

/// Bytes of the budget, until this is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    bytes: usize,
    reserved: Arc<AtomicUsize>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Default for ByteBudget {
    fn default() -> ByteBudget {
        ByteBudget {
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            shared: Arc::new(Semaphore::new(SHARED_BYTES / KIB)),
            reserved: Arc::default(),
        }
    }
}

impl ByteBudget {
    /// Reserves the share of one connection, when another has ended if necessary.
    pub async fn reserve_connection(&self) -> Option<Share> {
        let permit = self.connections.clone().acquire_owned().await.ok()?;
        let reservation = self.count(permit, CONNECTION_BYTES);
        Some(Share { request: Arc::new(Semaphore::new(1)), _reservation: reservation })
    }

    /// Reserves the bytes of a request: those of its connection's share, or others if they are
    /// available.
    pub fn try_reserve_request(&self, share: Option<&Share>) -> Option<Reservation> {
        let own = share.and_then(|share| share.request.clone().try_acquire_owned().ok());
        own.map(|permit| self.count(permit, 0)).or_else(|| self.try_reserve(REQUEST_BYTES))
    }

    /// Reserves a large window, if enough remains for requests.
    pub fn try_reserve_window(&self) -> Option<Reservation> {
        let remaining = self.shared.available_permits() * KIB;
        (remaining >= REQUESTS_ONLY + LARGE_WINDOW).then(|| self.try_reserve(LARGE_WINDOW))?
    }

    /// Reserves the bytes of a body that is replaced, twice, when others have ended if necessary.
    pub async fn reserve_body(&self) -> Option<Reservation> {
        let (bytes, permits) = (2 * MAX_BODY, count_permits(2 * MAX_BODY));
        let permit = self.shared.clone().acquire_many_owned(permits).await.ok()?;
        Some(self.count(permit, bytes))
    }

    /// Returns the bytes that are reserved.
    #[cfg(test)]
    pub fn reserved(&self) -> usize {
        self.reserved.load(Ordering::Relaxed)
    }

    fn try_reserve(&self, bytes: usize) -> Option<Reservation> {
        let permit = self.shared.clone().try_acquire_many_owned(count_permits(bytes)).ok()?;
        Some(self.count(permit, bytes))
    }

    fn count(&self, permit: OwnedSemaphorePermit, bytes: usize) -> Reservation {
        self.reserved.fetch_add(bytes, Ordering::Relaxed);
        Reservation { bytes, reserved: self.reserved.clone(), _permit: permit }
    }
}

fn count_permits(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(KIB)).unwrap_or(u32::MAX)
}
