//! Connections that were upgraded to another protocol, such as WebSocket: bytes both ways, still
//! scanned and scrubbed.

use std::io;
use std::sync::Arc;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::blocked::Location;
use super::placeholder::PlaceholderScanner;
use super::redaction::Scrubber;
use super::upstream_context::UpstreamContext;

/// Bytes read at once, each way.
const BUFFER: usize = 16 * 1024;

/// Relays an upgraded connection until either side ends it.
pub(super) async fn relay_upgraded(
    context: Arc<UpstreamContext>,
    sandbox: OnUpgrade,
    endpoint: OnUpgrade,
) {
    let (Ok(sandbox), Ok(endpoint)) = tokio::join!(sandbox, endpoint) else { return };
    let (from_sandbox, to_sandbox) = tokio::io::split(TokioIo::new(sandbox));
    let (from_endpoint, to_endpoint) = tokio::io::split(TokioIo::new(endpoint));
    let out = copy_scanned(&context, from_sandbox, to_endpoint);
    let back = copy_scrubbed(&context, from_endpoint, to_sandbox);
    let _: io::Result<((), ())> = tokio::try_join!(out, back);
}

/// Copies bytes of the sandbox; a placeholder ends the connection.
async fn copy_scanned(
    context: &UpstreamContext,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let (mut scanner, mut buffer) = (PlaceholderScanner::default(), vec![0; BUFFER]);
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        if let Some(credential) = scanner.scan(&context.store.placeholders, &buffer[..count]) {
            let reason = context.misplaced(credential, Location::UpgradedConnection);
            context.stats.record_blocked(reason);
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
}

/// Copies bytes of the endpoint without values.
async fn copy_scrubbed(
    context: &UpstreamContext,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let (mut scrubber, mut buffer) = (Scrubber::default(), vec![0; BUFFER]);
    loop {
        let count = from.read(&mut buffer).await?;
        let bytes = match count {
            0 => scrubber.finish(),
            _ => scrubber.scrub(&context.store.patterns(), &buffer[..count]).0,
        };
        to.write_all(&bytes).await?;
        to.flush().await?;
        if count == 0 {
            return to.shutdown().await;
        }
    }
}
