//! TLS interception: the sandbox's TLS ends here, with a certificate of the sandbox's CA, and
//! another TLS connection leads to the endpoint.

use std::future::Future;
use std::io;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls::server::{Acceptor, ClientHello};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

use super::certificate_authority::CertificateAuthority;
use super::error::{HANDSHAKE_LIMIT, ProxyError};

const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// Bytes that TLS buffers in each direction before the other side takes them.
const TLS_BUFFER: usize = 32 * 1024;

/// Both sides of an intercepted connection, with the same protocol.
pub(super) struct Intercepted<S, E> {
    pub sandbox: server::TlsStream<S>,
    pub endpoint: client::TlsStream<E>,
    pub is_http2: bool,
}

/// Accepts TLS of the sandbox for `host`, and connects to the endpoint of this name with TLS.
///
/// The server name of the sandbox (SNI, RFC 6066) must be `host`.
pub(super) async fn intercept_tls<S, E>(
    authority: &CertificateAuthority,
    trust: &ClientConfig,
    sandbox: S,
    endpoint: E,
    host: &str,
) -> Result<Intercepted<S, E>, ProxyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: AsyncRead + AsyncWrite + Unpin,
{
    let start = with_limit(LazyConfigAcceptor::new(Acceptor::default(), sandbox)).await?;
    let start = start.map_err(|error| match error.kind() {
        // The bytes are not a handshake record.
        io::ErrorKind::InvalidData => ProxyError::NotTls,
        kind => ProxyError::SandboxHandshake(kind.to_string()),
    })?;
    let hello = start.client_hello();
    if hello.server_name() != Some(host) {
        return Err(ProxyError::OtherServerName);
    }

    // The endpoint selects from the sandbox's protocols, so that both sides use the same one.
    let mut config = ClientConfig::clone(trust);
    config.alpn_protocols = offered_protocols(&hello);
    let name = ServerName::try_from(host.to_owned()).map_err(|_| ProxyError::OtherServerName)?;
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, endpoint);
    let mut endpoint = with_limit(connecting).await?.map_err(ProxyError::EndpointHandshake)?;
    endpoint.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let is_http2 = endpoint.get_ref().1.alpn_protocol() == Some(HTTP2);

    let config = authority.server_config(host, if is_http2 { HTTP2 } else { HTTP1 })?;
    let sandbox = with_limit(start.into_stream(Arc::new(config))).await?;
    let mut sandbox = sandbox.map_err(|error| ProxyError::SandboxHandshake(error.to_string()))?;
    sandbox.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    Ok(Intercepted { sandbox, endpoint, is_http2 })
}

/// Returns the protocols that the sandbox offers (ALPN, RFC 7301) and the proxy supports; HTTP/1.1
/// if there are none.
fn offered_protocols(hello: &ClientHello<'_>) -> Vec<Vec<u8>> {
    let mut offered: Vec<Vec<u8>> =
        hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect();
    offered.retain(|protocol| [HTTP2, HTTP1].contains(&protocol.as_slice()));
    if offered.is_empty() {
        offered.push(HTTP1.to_vec());
    }
    offered
}

async fn with_limit<T>(handshake: impl Future<Output = T>) -> Result<T, ProxyError> {
    let limited = tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await;
    limited.map_err(|_| ProxyError::HandshakeTimedOut)
}
