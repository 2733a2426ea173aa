//! A splice of two connections: bytes both ways, each direction with a separate end.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::token_bucket::TokenBucket;

/// Bytes buffered in each direction: enough to keep a window busy, little for hundreds of
/// connections.
const CHUNK: usize = 32 * 1024;

/// Limits of the bytes that may pass. The default is unlimited.
#[derive(Debug, Default)]
pub struct TransferLimits {
    /// Bytes of one connection, both ways together.
    per_connection: Option<u64>,
    /// Bytes of all connections that share these limits.
    total: Option<u64>,
    /// Bytes per second of all connections that share these limits.
    rate: Option<Mutex<TokenBucket>>,
    used: AtomicU64,
}

impl TransferLimits {
    pub(super) fn new(
        per_connection: Option<u64>,
        total: Option<u64>,
        rate: Option<TokenBucket>,
    ) -> TransferLimits {
        let rate = rate.map(Mutex::new);
        TransferLimits { per_connection, total, rate, used: AtomicU64::new(0) }
    }

    /// Returns true if the total is used up.
    pub fn is_exhausted(&self) -> bool {
        self.total.is_some_and(|total| self.used.load(Ordering::Relaxed) >= total)
    }

    /// Counts bytes of a connection, and waits until the rate allows them. Fails if they would
    /// exceed a limit.
    async fn reserve_bytes(&self, counts: &TransferCounts, bytes: u64) -> Result<(), SpliceError> {
        let before = counts.reserved.fetch_add(bytes, Ordering::Relaxed);
        if let Some(limit) = self.per_connection
            && before.saturating_add(bytes) > limit
        {
            return Err(SpliceError::ConnectionLimit(limit));
        }
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        if let Some(limit) = self.total
            && before.saturating_add(bytes) > limit
        {
            return Err(SpliceError::TotalLimit(limit));
        }
        if let Some(rate) = &self.rate {
            let wait = rate.lock().unwrap_or_else(PoisonError::into_inner).take_with_debt(bytes);
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }
}

/// The bytes that have passed on a connection.
#[derive(Debug, Default)]
pub struct TransferCounts {
    /// From the sandbox.
    pub sent: AtomicU64,
    /// To the sandbox.
    pub received: AtomicU64,
    /// Both ways, including bytes in transit.
    reserved: AtomicU64,
}

/// An error that ended a connection before both sides had ended it.
#[derive(Debug, thiserror::Error)]
pub enum SpliceError {
    /// The sandbox's side failed.
    #[error("the sandbox reset the connection")]
    Sandbox,
    /// The endpoint's side failed.
    #[error("the endpoint reset the connection: {0}")]
    Endpoint(io::ErrorKind),
    /// The limit of one connection was reached.
    #[error("the connection reached its limit of {0} bytes")]
    ConnectionLimit(u64),
    /// The limit of all connections was reached.
    #[error("the sandbox reached its limit of {0} bytes")]
    TotalLimit(u64),
}

/// Copies bytes both ways until both sides have ended, or one fails.
pub async fn splice<S, E>(
    sandbox: S,
    endpoint: E,
    limits: &TransferLimits,
    counts: &TransferCounts,
) -> Result<(), SpliceError>
where
    S: AsyncRead + AsyncWrite,
    E: AsyncRead + AsyncWrite,
{
    let (from_sandbox, to_sandbox) = tokio::io::split(sandbox);
    let (from_endpoint, to_endpoint) = tokio::io::split(endpoint);
    let out = copy_limited(from_sandbox, to_endpoint, limits, counts, &counts.sent);
    let back = copy_limited(from_endpoint, to_sandbox, limits, counts, &counts.received);
    let sandbox_error = |_| SpliceError::Sandbox;
    let endpoint_error = |error: io::Error| SpliceError::Endpoint(error.kind());
    let out = async { out.await.map_err(|error| error.attribute(sandbox_error, endpoint_error)) };
    let back = async { back.await.map_err(|error| error.attribute(endpoint_error, sandbox_error)) };
    tokio::try_join!(out, back).map(drop)
}

/// An error of one direction.
enum CopyError {
    Read(io::Error),
    Write(io::Error),
    Limit(SpliceError),
}

impl CopyError {
    /// Attributes the error to the side that was read or written.
    fn attribute(
        self,
        read: impl FnOnce(io::Error) -> SpliceError,
        write: impl FnOnce(io::Error) -> SpliceError,
    ) -> SpliceError {
        match self {
            CopyError::Read(error) => read(error),
            CopyError::Write(error) => write(error),
            CopyError::Limit(error) => error,
        }
    }
}

async fn copy_limited(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    limits: &TransferLimits,
    counts: &TransferCounts,
    count: &AtomicU64,
) -> Result<(), CopyError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = from.read(&mut buffer).await.map_err(CopyError::Read)?;
        if length == 0 {
            return to.shutdown().await.map_err(CopyError::Write);
        }
        // Bytes that would exceed a limit do not pass, not even in part.
        limits.reserve_bytes(counts, length as u64).await.map_err(CopyError::Limit)?;
        to.write_all(&buffer[..length]).await.map_err(CopyError::Write)?;
        to.flush().await.map_err(CopyError::Write)?;
        count.fetch_add(length as u64, Ordering::Relaxed);
    }
}
