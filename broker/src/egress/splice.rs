//! Two connections made one: bytes both ways, each way with an end of its own.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::bucket::Bucket;

/// Bytes held on their way, each way: enough to keep a window busy, little for hundreds of connections.
const CHUNK: usize = 32 * 1024;

/// What may pass.
#[derive(Debug, Default)]
pub struct Allowance {
    /// Of one connection, both ways together.
    per_connection: Option<u64>,
    /// Of all that share it.
    total: Option<u64>,
    /// Of all that share it, bytes a second.
    rate: Option<Mutex<Bucket>>,
    used: AtomicU64,
}

impl Allowance {
    pub(crate) fn new(
        per_connection: Option<u64>,
        total: Option<u64>,
        rate: Option<Bucket>,
    ) -> Allowance {
        Allowance { per_connection, total, rate: rate.map(Mutex::new), used: AtomicU64::new(0) }
    }

    /// Whether nothing more may pass.
    pub fn is_used_up(&self) -> bool {
        self.total.is_some_and(|total| self.used.load(Ordering::Relaxed) >= total)
    }
}

/// What has passed on a connection.
#[derive(Debug, Default)]
pub struct Counts {
    /// From the sandbox.
    pub sent: AtomicU64,
    /// To the sandbox.
    pub received: AtomicU64,
    /// Both, with what is still on its way.
    taken: AtomicU64,
}

/// Why a connection did not end of itself.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The sandbox's side is gone.
    #[error("the sandbox broke it off")]
    Sandbox,
    /// The other side is gone.
    #[error("the endpoint broke it off: {0}")]
    Endpoint(io::ErrorKind),
    /// One connection's limit.
    #[error("the limit of {0} bytes a connection was reached")]
    TooLong(u64),
    /// The sandbox's limit.
    #[error("the sandbox's limit of {0} bytes was reached")]
    TooMuch(u64),
}

/// Moves bytes until both sides have ended, or one breaks off.
pub async fn splice<S, E>(
    sandbox: S,
    endpoint: E,
    allowance: &Allowance,
    counts: &Counts,
) -> Result<(), Broken>
where
    S: AsyncRead + AsyncWrite,
    E: AsyncRead + AsyncWrite,
{
    let (from_sandbox, to_sandbox) = tokio::io::split(sandbox);
    let (from_endpoint, to_endpoint) = tokio::io::split(endpoint);
    let out = carry(from_sandbox, to_endpoint, allowance, counts, &counts.sent);
    let back = carry(from_endpoint, to_sandbox, allowance, counts, &counts.received);
    let sandbox_broke = |_| Broken::Sandbox;
    let endpoint_broke = |error: io::Error| Broken::Endpoint(error.kind());
    let out = async { out.await.map_err(|end| end.or(sandbox_broke, endpoint_broke)) };
    let back = async { back.await.map_err(|end| end.or(endpoint_broke, sandbox_broke)) };
    tokio::try_join!(out, back).map(drop)
}

enum End {
    Reading(io::Error),
    Writing(io::Error),
    Limit(Broken),
}

impl End {
    fn or(
        self,
        read: impl FnOnce(io::Error) -> Broken,
        written: impl FnOnce(io::Error) -> Broken,
    ) -> Broken {
        match self {
            End::Reading(error) => read(error),
            End::Writing(error) => written(error),
            End::Limit(broken) => broken,
        }
    }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    allowance: &Allowance,
    counts: &Counts,
    count: &AtomicU64,
) -> Result<(), End> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = from.read(&mut buffer).await.map_err(End::Reading)?;
        if length == 0 {
            return to.shutdown().await.map_err(End::Writing);
        }
        let bytes = length as u64;
        // What would go beyond a limit does not pass, not even in part.
        let before = counts.taken.fetch_add(bytes, Ordering::Relaxed);
        if let Some(limit) = allowance.per_connection
            && before.saturating_add(bytes) > limit
        {
            return Err(End::Limit(Broken::TooLong(limit)));
        }
        let before = allowance.used.fetch_add(bytes, Ordering::Relaxed);
        if let Some(limit) = allowance.total
            && before.saturating_add(bytes) > limit
        {
            return Err(End::Limit(Broken::TooMuch(limit)));
        }
        if let Some(rate) = &allowance.rate {
            let wait = rate.lock().unwrap_or_else(PoisonError::into_inner).borrow(bytes);
            tokio::time::sleep(wait).await;
        }
        to.write_all(&buffer[..length]).await.map_err(End::Writing)?;
        to.flush().await.map_err(End::Writing)?;
        count.fetch_add(bytes, Ordering::Relaxed);
    }
}
