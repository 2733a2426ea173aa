//! Detection of placeholders on connections that are not intercepted.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::blocked::BlockReason;
use super::placeholder::PlaceholderScanner;
use super::stats::ProxyStats;
use super::store::CredentialStore;

/// A sandbox's connection to a host that no credential is for. Reading a placeholder fails.
pub(crate) struct ScanningStream<S> {
    inner: S,
    scanner: PlaceholderScanner,
    store: Arc<CredentialStore>,
    stats: Arc<ProxyStats>,
}

impl<S> ScanningStream<S> {
    pub(super) fn new(
        inner: S,
        store: Arc<CredentialStore>,
        stats: Arc<ProxyStats>,
    ) -> ScanningStream<S> {
        ScanningStream { inner, scanner: PlaceholderScanner::default(), store, stats }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ScanningStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        match this.scanner.scan(&this.store.placeholders, &buf.filled()[before..]) {
            None => Poll::Ready(Ok(())),
            Some(credential) => {
                let credential = this.store.credentials[credential].name.clone();
                this.stats.record_blocked(BlockReason::NotIntercepted { credential });
                buf.set_filled(before);
                Poll::Ready(Err(io::ErrorKind::PermissionDenied.into()))
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ScanningStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
