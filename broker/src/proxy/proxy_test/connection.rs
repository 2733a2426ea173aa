//! A test connection: a client and an endpoint on both sides of a proxy.

use std::sync::Mutex;

use bytes::Bytes;
use chitin_spec::Endpoint;
use http::header::{HOST, HeaderMap};
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1 as server1, http2 as server2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use zeroize::Zeroizing;

use super::super::blocked::BlockReason;
use super::super::selftest::Sender;
use super::super::*;
use crate::tls;

pub const VALUE: &str = "canary-3f9/a1+\"c07e";
pub const OTHER: &str = "canary-of-another-1";

pub fn endpoint(text: &str) -> Endpoint {
    text.parse().unwrap()
}

pub fn scope(hosts: &[&str], query: bool, body: bool) -> ProxyScope {
    let hosts = hosts.iter().map(|host| endpoint(host)).collect();
    ProxyScope { hosts, query, body, ..ProxyScope::default() }
}

pub fn proxy(values: Vec<(&str, ProxyScope, &str)>) -> Result<Proxy, SetupError> {
    let hold = |value: &str| SecretValue::new(Zeroizing::new(value.into()), false).unwrap();
    let values = values
        .into_iter()
        .map(|(name, scope, value)| (name.to_owned(), scope, hold(value)))
        .collect();
    let mut next = 0u8;
    Proxy::new(values, tls::client_config(tls::system_roots()), move |bytes| {
        next += 1;
        bytes.fill(next);
        Ok(())
    })
}

/// A request that the endpoint received.
#[derive(Debug, Clone)]
pub struct ReceivedRequest {
    pub line: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl ReceivedRequest {
    pub fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }
}

/// A connection of a sandbox, through a proxy, to an endpoint with a handler.
pub struct TestConnection {
    pub proxy: Arc<Proxy>,
    pub stats: Arc<ProxyStats>,
    pub received: Arc<Mutex<Vec<ReceivedRequest>>>,
    pub sender: Sender,
    pub host: String,
    pub h2: bool,
    _tasks: JoinSet<()>,
}

pub type Handler = Arc<dyn Fn(&ReceivedRequest) -> Response<Full<Bytes>> + Send + Sync>;

/// Serves HTTP as the endpoint, with the response of the handler; upgraded connections echo.
pub async fn serve_endpoint(
    stream: DuplexStream,
    config: rustls::ServerConfig,
    h2: bool,
    handler: Handler,
    received: Arc<Mutex<Vec<ReceivedRequest>>>,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (received, handler) = (received.clone(), handler.clone());
        async move {
            let upgraded =
                request.headers().contains_key("upgrade").then(|| hyper::upgrade::on(&mut request));
            let (head, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            let line = format!("{} {}", head.method, head.uri);
            let request = ReceivedRequest { line, headers: head.headers, body };
            let response = handler(&request);
            received.lock().unwrap().push(request);
            if let Some(upgraded) = upgraded {
                tokio::spawn(
                    async move { echo_stream(TokioIo::new(upgraded.await.unwrap())).await },
                );
            }
            Ok::<_, hyper::Error>(response)
        }
    });
    let Ok(stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else { return };
    let stream = TokioIo::new(stream);
    if h2 {
        drop(server2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await);
    } else {
        drop(server1::Builder::new().serve_connection(stream, service).with_upgrades().await);
    }
}

/// Echoes text frames of less than 126 bytes whose mask is zero.
pub async fn echo_stream(mut stream: TokioIo<hyper::upgrade::Upgraded>) {
    let mut buffer = [0; 128];
    while stream.read_exact(&mut buffer[..6]).await.is_ok() {
        assert_eq!(buffer[2..6], [0; 4]);
        let length = buffer[1] & 0x7f;
        let payload = &mut buffer[2..2 + usize::from(length)];
        stream.read_exact(payload).await.unwrap();
        buffer[1] = length;
        stream.write_all(&buffer[..2 + usize::from(length)]).await.unwrap();
        stream.flush().await.unwrap();
    }
}

/// Connects to `host` through the proxy, with the server name `sni`. Returns the error of the
/// proxy, or that of the client if the proxy has not ended.
pub async fn connect(
    proxy: Arc<Proxy>,
    host: &str,
    sni: &str,
    h2: bool,
    handler: Handler,
) -> Result<TestConnection, Result<ProxyError, io::Error>> {
    let mut tasks = JoinSet::new();
    let authority = CertificateAuthority::new([host.to_owned()]).unwrap();
    let protocol: &[u8] = if h2 { b"h2" } else { b"http/1.1" };
    let server = authority.server_config(host, protocol).unwrap();
    let (sandbox, near) = tokio::io::duplex(16 * 1024);
    let (far, upstream) = tokio::io::duplex(16 * 1024);
    let received: Arc<Mutex<Vec<ReceivedRequest>>> = Arc::default();
    tasks.spawn(serve_endpoint(upstream, server, h2, handler, received.clone()));

    let stats = Arc::new(ProxyStats::default());
    let trust = tls::client_config(Arc::new(tls::root_store(vec![authority.certificate()])));
    let (relaying, name, relay_stats) = (proxy.clone(), host.to_owned(), stats.clone());
    let outcome = Arc::new(Mutex::new(None));
    let relay_outcome = outcome.clone();
    tasks.spawn(async move {
        let ended = relaying.relay_with_trust(&trust, near, far, &name, 443, &relay_stats).await;
        *relay_outcome.lock().unwrap() = Some(ended);
    });

    let roots = tls::root_store(vec![proxy.authority.certificate()]);
    let mut trust = tls::client_config(Arc::new(roots));
    trust.alpn_protocols = vec![protocol.to_vec()];
    let name = ServerName::try_from(sni.to_owned()).unwrap();
    let stream = match TlsConnector::from(Arc::new(trust)).connect(name, sandbox).await {
        Ok(stream) => stream,
        Err(error) => {
            tokio::task::yield_now().await;
            let ended = outcome.lock().unwrap().take();
            return Err(ended.map_or(Err(error), |ended| Ok(ended.unwrap_err())));
        }
    };
    let sender = Sender::new(stream, h2, &mut tasks).await.unwrap();
    Ok(TestConnection { proxy, stats, received, sender, host: host.to_owned(), h2, _tasks: tasks })
}

impl TestConnection {
    pub fn placeholder(&self, name: &str) -> String {
        self.proxy.placeholders().find(|(other, _)| *other == name).unwrap().1.to_owned()
    }

    pub async fn request(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (StatusCode, HeaderMap, String) {
        let mut builder = Request::builder().method(if body.is_empty() { "GET" } else { "POST" });
        builder = match self.h2 {
            true => builder.version(Version::HTTP_2).uri(format!("https://{}{path}", self.host)),
            false => builder.uri(path),
        };
        if !self.h2 && !headers.iter().any(|(name, _)| *name == "host") {
            builder = builder.header(HOST, &self.host);
        }
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let request = builder.body(Full::from(body.to_owned())).unwrap();
        let (head, body) = match self.sender.send_request(request).await {
            Ok(response) => response.into_parts(),
            Err(_) => return (StatusCode::IM_A_TEAPOT, HeaderMap::new(), String::new()),
        };
        let body = body.collect().await.map(|whole| whole.to_bytes()).unwrap_or_default();
        (head.status, head.headers, String::from_utf8(body.to_vec()).unwrap())
    }

    pub fn last_request(&self) -> ReceivedRequest {
        self.received.lock().unwrap().last().unwrap().clone()
    }

    /// Asserts that the endpoint received no request, and that one was blocked for this reason.
    pub fn assert_blocked(&self, expected: impl Fn(&BlockReason) -> bool) {
        assert!(self.received.lock().unwrap().is_empty(), "{:?}", self.received);
        let (blocked, _) = self.stats.blocked_requests();
        assert!(blocked.iter().any(expected), "{blocked:?}");
        for reason in blocked {
            assert!(!format!("{reason:?} {reason}").contains("canary"), "{reason:?}");
        }
    }
}

pub fn echo_handler() -> Handler {
    Arc::new(|sent| {
        let shown =
            format!("{} {:?} {}", sent.line, sent.headers, String::from_utf8_lossy(&sent.body));
        let mut response = Response::new(Full::from(shown));
        for name in ["authorization", "x-api-key"] {
            if let Some(value) = sent.headers.get(name) {
                response.headers_mut().insert("x-echo", value.clone());
            }
        }
        response
    })
}

pub fn one_credential() -> Arc<Proxy> {
    Arc::new(proxy(vec![("TOKEN", scope(&["api.test:443"], false, false), VALUE)]).unwrap())
}
