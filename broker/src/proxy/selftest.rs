//! Proof, before a workload runs, that placeholders are replaced: every credential goes the whole way once, with the sandbox's
//! own authority, over HTTP/1.1 and HTTP/2, to an endpoint of ours in this process.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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

use super::authority::Authority;
use super::{Account, Credential, Proxy, SetupError};
use crate::secret_value::SecretValue;
use crate::tls;

/// More than the answers of our own endpoint have.
const MAX_ANSWER: usize = 1024 * 1024;

/// A bug that hangs is a failure as well.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(20);

impl Proxy {
    /// Sends every credential to an endpoint of ours.
    pub async fn self_test(self: &Arc<Proxy>) -> Result<(), SetupError> {
        for credential in &self.credentials {
            for protocol in ["http/1.1", "h2"] {
                let tested = tokio::time::timeout(LIMIT, self.test_one(credential, protocol)).await;
                tested.unwrap_or_else(|_| Err("it does not end".into())).map_err(|why| {
                    SetupError::SelfTest {
                        name: credential.name.clone(),
                        why: format!("{protocol}: {why}"),
                    }
                })?;
            }
        }
        Ok(())
    }

    async fn test_one(
        self: &Arc<Proxy>,
        credential: &Credential,
        protocol: &str,
    ) -> Result<(), String> {
        let Some(endpoint) = credential.hosts.first() else {
            return Err("it is for no host".into());
        };
        let host = if endpoint.wildcard {
            format!("self-test.{}", endpoint.host)
        } else {
            endpoint.host.clone()
        };
        let said = |error: &dyn std::fmt::Display| error.to_string();

        let authority = Authority::new([host.clone()]).map_err(|error| said(&error))?;
        let server = authority.server(&host, protocol.as_bytes()).map_err(|error| said(&error))?;
        let (sandbox, near) = tokio::io::duplex(16 * 1024);
        let (far, ours) = tokio::io::duplex(16 * 1024);
        let seen = Arc::new(AtomicUsize::new(0));
        let value = credential.value().ok_or("it was taken back")?;
        let serving = serve(ours, server, &value, seen.clone());
        let trust = Arc::new(tls::client(Arc::new(tls::roots_of(vec![authority.certificate()]))));
        let account = Arc::new(Account::default());
        let proxying = self.clone().run_with(trust, near, far, &host, endpoint.port, &account);
        let asking = async {
            let mut trust =
                tls::client(Arc::new(tls::roots_of(vec![self.authority.certificate()])));
            trust.alpn_protocols = vec![protocol.as_bytes().to_vec()];
            let name = ServerName::try_from(host.clone()).map_err(|error| said(&error))?;
            let stream = TlsConnector::from(Arc::new(trust))
                .connect(name, sandbox)
                .await
                .map_err(|error| said(&error))?;
            ask(stream, protocol == "h2", &host, endpoint.port, credential).await
        };
        // When one of the others ends early, the one who asks sees it.
        let others = async {
            let (ended, ()) = tokio::join!(proxying, serving);
            drop(ended);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            asked = asking => asked?,
            () = others => {}
        }
        match seen.load(Ordering::Relaxed) {
            1 => Ok(()),
            count => Err(format!("{count} requests got through, and 1 is right")),
        }
    }
}

/// An endpoint that wants the value and says it.
async fn serve(
    stream: DuplexStream,
    config: rustls::ServerConfig,
    value: &SecretValue,
    seen: Arc<AtomicUsize>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        seen.fetch_add(1, Ordering::Relaxed);
        let value = value.to_bytes();
        let right = [b"Bearer ", value.expose()].concat();
        let given = request.headers().get(AUTHORIZATION);
        let status = match given.is_some_and(|given| given.as_bytes() == right) {
            true => StatusCode::OK,
            false => StatusCode::UNAUTHORIZED,
        };
        let mut response = Response::new(Full::new(Bytes::from(value.expose().to_vec())));
        *response.status_mut() = status;
        async move { Ok::<_, Infallible>(response) }
    });
    let Ok(stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else { return };
    let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let stream = TokioIo::new(stream);
    let _ = match h2 {
        true => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(stream, service)
                .await
        }
        false => hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await,
    };
}

/// A connection that requests go out on.
pub(super) enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Http2(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    /// The connection is driven by a task of `tasks`.
    pub async fn new<S>(stream: S, h2: bool, tasks: &mut JoinSet<()>) -> hyper::Result<Sender>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stream = TokioIo::new(stream);
        if h2 {
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

    pub async fn send(
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

async fn ask(
    stream: TlsStream<DuplexStream>,
    h2: bool,
    host: &str,
    port: u16,
    credential: &Credential,
) -> Result<(), String> {
    let said = |error: hyper::Error| error.to_string();
    let mut tasks = JoinSet::new();
    let mut sender = Sender::new(stream, h2, &mut tasks).await.map_err(said)?;
    let request = |path: &str| {
        let builder =
            Request::builder().header(AUTHORIZATION, format!("Bearer {}", credential.placeholder));
        let builder = match h2 {
            true => builder.version(Version::HTTP_2).uri(format!("https://{host}:{port}{path}")),
            false => builder.header(HOST, format!("{host}:{port}")).uri(path),
        };
        builder.body(Full::default()).map_err(|error| error.to_string())
    };
    let (head, body) = sender.send(request("/")?).await.map_err(said)?.into_parts();
    if head.status != StatusCode::OK {
        return Err(format!("the endpoint did not get the value (status {})", head.status));
    }
    let body = Limited::new(body, MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| error.to_string())?
        .to_bytes();
    let length = credential.value().map_or(0, |value| value.to_bytes().expose().len());
    if body.len() != length || body.iter().any(|byte| *byte != b'*') {
        return Err("the value came back".into());
    }
    let response =
        sender.send(request(&format!("/{}", credential.placeholder))?).await.map_err(said)?;
    match response.status() {
        StatusCode::FORBIDDEN => Ok(()),
        status => Err(format!("a placeholder in a path was not stopped (status {status})")),
    }
}
