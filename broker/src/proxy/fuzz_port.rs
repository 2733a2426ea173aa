//! The proxy for a fuzz target: a connection without TLS, and the parts that scrub.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use zeroize::Zeroizing;

use super::redaction::RedactionPatterns;
use super::scrubber::Scrubber;
use super::websocket::MessageScrubber;
use super::{Proxy, ProxyStats, SetupError};
use crate::secret_value::{SecretValue, SecretValueError};
use crate::tls;

/// The host of the connection. Requests for it are accepted.
pub const HOST: &str = "api.test";

/// Bytes between the proxy and either side.
const BUFFER: usize = 16 * 1024;

/// The time after which a connection ends that neither side ends. The clock of a target is paused,
/// and advances when nothing else is to be done.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A proxy with one credential for [`HOST`].
pub struct FuzzProxy(Proxy);

/// An error of making a [`FuzzProxy`].
#[derive(Debug, thiserror::Error)]
pub enum FuzzError {
    /// The value cannot be held.
    #[error(transparent)]
    Value(#[from] SecretValueError),
    /// The proxy cannot be made.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

/// A piece that one side sends.
#[derive(Debug)]
pub enum Piece {
    /// From the sandbox.
    Sandbox(Vec<u8>),
    /// From the endpoint.
    Endpoint(Vec<u8>),
}

impl FuzzProxy {
    /// Makes a proxy for this value.
    ///
    /// # Errors
    /// The value cannot be delivered.
    pub fn new(value: &[u8]) -> Result<FuzzProxy, FuzzError> {
        let value = SecretValue::new(Zeroizing::new(value.to_vec()), false)?;
        let hosts = format!("{HOST}:443").parse().into_iter().collect();
        let scope = chitin_spec::ProxyScope { hosts, ..chitin_spec::ProxyScope::default() };
        let trust = tls::client_config(Arc::new(tls::root_store(Vec::new())));
        let fill = |bytes: &mut [u8]| -> io::Result<()> {
            bytes.fill(7);
            Ok(())
        };
        Ok(FuzzProxy(Proxy::new(vec![("TOKEN".into(), scope, value)], trust, fill)?))
    }

    /// Returns the placeholder of the credential.
    pub fn placeholder(&self) -> String {
        self.0.placeholders().map(|(_, placeholder)| placeholder.to_owned()).collect()
    }

    /// Relays a connection on which the sides send these pieces. Returns what the sandbox received,
    /// and what the endpoint did.
    pub async fn relay(&self, is_http2: bool, pieces: Vec<Piece>) -> (Vec<u8>, Vec<u8>) {
        self.0.store.reset_hits();
        let (sandbox, near) = tokio::io::duplex(BUFFER);
        let (far, endpoint) = tokio::io::duplex(BUFFER);
        let stats = Arc::new(ProxyStats::default());
        let share = self.0.budget.reserve_connection().await;
        let relaying = self.0.relay_decrypted(near, far, is_http2, (HOST, 443), &stats, share);
        let (from_sandbox, to_sandbox) = tokio::io::split(sandbox);
        let (from_endpoint, to_endpoint) = tokio::io::split(endpoint);
        let (mut sandbox_received, mut endpoint_received) = (Vec::new(), Vec::new());
        let sending = send_pieces(to_sandbox, to_endpoint, pieces);
        let all = async {
            let (relayed, ()) = tokio::join!(relaying, sending);
            drop(relayed);
        };
        let reading = async {
            tokio::join!(
                read_all(from_sandbox, &mut sandbox_received),
                read_all(from_endpoint, &mut endpoint_received),
            )
        };
        let _ = tokio::time::timeout(TIME_LIMIT, async { tokio::join!(all, reading) }).await;
        (sandbox_received, endpoint_received)
    }
}

async fn read_all(mut from: tokio::io::ReadHalf<DuplexStream>, received: &mut Vec<u8>) {
    while let Ok(1..) = from.read_buf(received).await {}
}

/// Sends each piece when the one before was taken, and then ends both sides.
async fn send_pieces(
    mut sandbox: tokio::io::WriteHalf<DuplexStream>,
    mut endpoint: tokio::io::WriteHalf<DuplexStream>,
    pieces: Vec<Piece>,
) {
    for piece in pieces {
        let _ = match piece {
            Piece::Sandbox(bytes) => sandbox.write_all(&bytes).await,
            Piece::Endpoint(bytes) => endpoint.write_all(&bytes).await,
        };
        // The other tasks run.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let _ = tokio::join!(sandbox.shutdown(), endpoint.shutdown());
}

/// Scrubs the pieces of a body of this value; returns the output for each, and that of its end.
pub fn scrub_body(value: &[u8], pieces: &[&[u8]]) -> Vec<Vec<u8>> {
    let patterns = RedactionPatterns::new(&[Zeroizing::new(value.to_vec())]);
    let mut scrubber = Scrubber::default();
    let mut out: Vec<Vec<u8>> =
        pieces.iter().map(|piece| scrubber.scrub(&patterns, piece)).collect();
    out.push(scrubber.finish());
    out
}

/// Scrubs the pieces of a WebSocket of this value; returns the output for each until one is
/// invalid.
pub fn scrub_websocket(value: &[u8], pieces: &[&[u8]]) -> Vec<Vec<u8>> {
    let patterns = RedactionPatterns::new(&[Zeroizing::new(value.to_vec())]);
    let mut scrubber = MessageScrubber::new();
    pieces.iter().map_while(|piece| scrubber.scrub(&patterns, piece).ok()).collect()
}
