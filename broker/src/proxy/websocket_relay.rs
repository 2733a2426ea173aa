//! The relay of a WebSocket: messages of the sandbox are scanned, those of the endpoint scrubbed.

use std::io;
use std::sync::Arc;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::blocked::{BlockReason, Location, Side};
use super::upstream_context::UpstreamContext;
use super::websocket::{MessageScanner, MessageScrubber, ScanError};

/// Bytes read at once, each way.
const BUFFER: usize = 16 * 1024;

/// Relays a WebSocket until either side ends it or sends what is not one.
pub(super) async fn relay_websocket(
    context: Arc<UpstreamContext>,
    sandbox: OnUpgrade,
    endpoint: OnUpgrade,
) {
    let (Ok(sandbox), Ok(endpoint)) = tokio::join!(sandbox, endpoint) else { return };
    let (from_sandbox, to_sandbox) = tokio::io::split(TokioIo::new(sandbox));
    let (from_endpoint, to_endpoint) = tokio::io::split(TokioIo::new(endpoint));
    let out = relay_scanned(&context, from_sandbox, to_endpoint);
    let back = relay_scrubbed(&context, from_endpoint, to_sandbox);
    let _: io::Result<((), ())> = tokio::try_join!(out, back);
}

/// Relays the messages of the sandbox; a placeholder ends the connection.
async fn relay_scanned(
    context: &UpstreamContext,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let (mut scanner, mut buffer) = (MessageScanner::new(), vec![0; BUFFER]);
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        let scanned = scanner.scan(&context.store.placeholders, &buffer[..count]);
        let bytes = scanned.map_err(|error| {
            end_connection(
                context,
                match error {
                    ScanError::Frame(_) => BlockReason::WebSocketFrame(Side::Sandbox),
                    ScanError::Placeholder(index) => context.misplaced(index, Location::WebSocket),
                },
            )
        })?;
        to.write_all(&bytes).await?;
        to.flush().await?;
    }
}

/// Relays the messages of the endpoint without values.
async fn relay_scrubbed(
    context: &UpstreamContext,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let (mut scrubber, mut buffer) = (MessageScrubber::new(), vec![0; BUFFER]);
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        let scrubbed = scrubber.scrub(&context.store.patterns(), &buffer[..count]);
        let bytes = scrubbed
            .map_err(|_| end_connection(context, BlockReason::WebSocketFrame(Side::Endpoint)))?;
        for _ in 0..scrubber.take_hits() {
            context.record_hit();
            if context.store.hit_limit_reached() {
                return Err(end_connection(context, BlockReason::ScrubLimit));
            }
        }
        to.write_all(&bytes).await?;
        to.flush().await?;
    }
}

/// Records the reason for which a connection ends.
fn end_connection(context: &UpstreamContext, reason: BlockReason) -> io::Error {
    context.stats.record_blocked(reason);
    io::ErrorKind::PermissionDenied.into()
}
