//! The self-test: before a workload starts, every credential is sent through the proxy once over
//! HTTP/1.1 and once over HTTP/2, with the sandbox's CA, to an endpoint in this process.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::certificate_authority::CertificateAuthority;
use super::store::Credential;
use super::{Proxy, ProxyStats, SelfTestError, SetupError};
use crate::secret_value::SecretValue;
use crate::tls;

/// Maximum size of a response; the test endpoint sends less.
const MAX_RESPONSE: usize = 1024 * 1024;

/// Time limit of the test of one credential: a hang is a failure, too.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// Bytes in transit between the proxy and either side.
const BUFFER: usize = 16 * 1024;

impl Proxy {
    /// Tests that each placeholder is replaced in requests, that the value is scrubbed from
    /// responses, and that a misplaced placeholder blocks a request.
    pub async fn self_test(&self) -> Result<(), SetupError> {
        for credential in &self.store.credentials {
            for protocol in ["http/1.1", "h2"] {
                let test = self.test_credential(credential, protocol);
                let tested = tokio::time::timeout(TIME_LIMIT, test).await;
                if let Err(error) = tested.unwrap_or(Err(SelfTestError::TimedOut(TIME_LIMIT))) {
                    let name = credential.name.clone();
                    return Err(SetupError::SelfTest { name, protocol, error });
                }
                // The response contained the value on purpose.
                self.store.reset_hits();
            }
        }
        Ok(())
    }

    async fn test_credential(
        &self,
        credential: &Credential,
        protocol: &str,
    ) -> Result<(), SelfTestError> {
        let endpoint = credential.hosts.first().ok_or(SelfTestError::NoHost)?;
        let host = match endpoint.wildcard {
            true => format!("self-test.{}", endpoint.host),
            false => endpoint.host.clone(),
        };
        let value = credential.value().ok_or(SelfTestError::Revoked)?;
        let authority = CertificateAuthority::new([host.clone()])?;
        let server = authority.server_config(&host, protocol.as_bytes())?;
        let trust = tls::client_config(Arc::new(tls::root_store(vec![authority.certificate()])));

        let (sandbox, near) = tokio::io::duplex(BUFFER);
        let (far, upstream) = tokio::io::duplex(BUFFER);
        let (requests, stats) = (AtomicUsize::new(0), Arc::new(ProxyStats::default()));
        let serving = serve_value(upstream, server, &value, &requests);
        let relaying = self.relay_with_trust(&trust, near, far, &host, endpoint.port, &stats);
        let testing = async {
            let stream = self.connect_with_tls(sandbox, &host, protocol).await?;
            test_requests(stream, protocol == "h2", &host, endpoint.port, credential).await
        };
        // If the endpoint or the proxy ends early, the requests fail with the cause.
        let others = async {
            let (ended, ()) = tokio::join!(relaying, serving);
            drop(ended);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            tested = testing => tested?,
            () = others => {}
        }
        match requests.load(Ordering::Relaxed) {
            1 => Ok(()),
            count => Err(SelfTestError::RequestCount(count)),
        }
    }

    /// Connects as the workload does: with trust in the sandbox's CA alone.
    async fn connect_with_tls(
        &self,
        stream: DuplexStream,
        host: &str,
        protocol: &str,
    ) -> Result<TlsStream<DuplexStream>, SelfTestError> {
        let roots = tls::root_store(vec![self.authority.certificate()]);
        let mut trust = tls::client_config(Arc::new(roots));
        trust.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| SelfTestError::Tls(std::io::Error::other(error)))?;
        TlsConnector::from(Arc::new(trust)).connect(name, stream).await.map_err(SelfTestError::Tls)
    }
}

/// Serves an endpoint that requires the value, and returns it in the response.
async fn serve_value(
    stream: DuplexStream,
    config: rustls::ServerConfig,
    value: &SecretValue,
    requests: &AtomicUsize,
) {
    let service = service_fn(|request: Request<Incoming>| {
        requests.fetch_add(1, Ordering::Relaxed);
        let value = value.to_bytes();
        let expected = [b"Bearer ", value.expose()].concat();
        let received = request.headers().get(AUTHORIZATION);
        let status = match received.is_some_and(|received| received.as_bytes() == expected) {
            true => StatusCode::OK,
            false => StatusCode::UNAUTHORIZED,
        };
        let mut response = Response::new(Full::new(Bytes::from(value.expose().to_vec())));
        *response.status_mut() = status;
        async move { Ok::<_, Infallible>(response) }
    });
    let Ok(stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else { return };
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let stream = TokioIo::new(stream);
    let _ = match is_http2 {
        true => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(stream, service)
                .await
        }
        false => hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await,
    };
}

/// A client connection of either protocol.
pub(super) enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Http2(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    /// Starts HTTP on a stream; a task of `tasks` drives the connection.
    pub async fn new<S>(stream: S, is_http2: bool, tasks: &mut JoinSet<()>) -> hyper::Result<Sender>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stream = TokioIo::new(stream);
        if is_http2 {
            let (sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
            tasks.spawn(async { drop(connection.await) });
            Ok(Sender::Http2(sender))
        } else {
            let (sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
            tasks.spawn(async { drop(connection.with_upgrades().await) });
            Ok(Sender::Http1(sender))
        }
    }

    pub async fn send_request(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        match self {
            Sender::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }
}

/// Sends one request with a valid placeholder, and one with a misplaced placeholder.
async fn test_requests(
    stream: TlsStream<DuplexStream>,
    is_http2: bool,
    host: &str,
    port: u16,
    credential: &Credential,
) -> Result<(), SelfTestError> {
    let mut tasks = JoinSet::new();
    let mut sender = Sender::new(stream, is_http2, &mut tasks).await?;
    let build_request = |path: &str| {
        let builder =
            Request::builder().header(AUTHORIZATION, format!("Bearer {}", credential.placeholder));
        let builder = match is_http2 {
            true => builder.version(Version::HTTP_2).uri(format!("https://{host}:{port}{path}")),
            false => builder.header(HOST, format!("{host}:{port}")).uri(path),
        };
        builder.body(Full::default())
    };
    let (head, body) = sender.send_request(build_request("/")?).await?.into_parts();
    if head.status != StatusCode::OK {
        return Err(SelfTestError::NotReplaced(head.status));
    }
    let body = Limited::new(body, MAX_RESPONSE).collect().await.map_err(SelfTestError::Body)?;
    let body = body.to_bytes();
    let length = credential.value().map_or(0, |value| value.to_bytes().expose().len());
    if body.len() != length || body.iter().any(|byte| *byte != b'*') {
        return Err(SelfTestError::NotScrubbed);
    }
    let misplaced = build_request(&format!("/{}", credential.placeholder))?;
    match sender.send_request(misplaced).await?.status() {
        StatusCode::FORBIDDEN => Ok(()),
        status => Err(SelfTestError::NotBlocked(status)),
    }
}
