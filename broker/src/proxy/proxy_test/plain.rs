//! The proxy between two streams without TLS, so that a test sees each piece of its output.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http2 as server2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep};

use super::super::selftest::Sender;
use super::super::*;
use super::connection::{proxy, scope};

/// Bytes between the proxy and either side.
const BUFFER: usize = 64 * 1024;

/// The time between two pieces that an endpoint sends.
pub const PAUSE: Duration = Duration::from_millis(10);

/// A piece of output: the time since the first request, and the bytes.
pub type Event = (Duration, Vec<u8>);

/// Returns a proxy with one credential for `api.test`.
pub fn proxy_of(value: &str) -> Arc<Proxy> {
    Arc::new(proxy(vec![("TOKEN", scope(&["api.test:443"], false, false), value)]).unwrap())
}

/// Starts to relay a connection; returns the sandbox's end, the endpoint's end and the statistics.
pub fn start_relay(
    proxy: &Arc<Proxy>,
    is_http2: bool,
    tasks: &mut JoinSet<()>,
) -> (DuplexStream, DuplexStream, Arc<ProxyStats>) {
    let (sandbox, near) = tokio::io::duplex(BUFFER);
    let (far, endpoint) = tokio::io::duplex(BUFFER);
    let (proxy, stats) = (proxy.clone(), Arc::new(ProxyStats::default()));
    let relay_stats = stats.clone();
    tasks.spawn(async move {
        let relaying = proxy.relay_decrypted(
            near,
            far,
            is_http2,
            ("api.test", 443),
            &relay_stats,
            proxy.budget.reserve_connection().await,
        );
        drop(relaying.await);
    });
    (sandbox, endpoint, stats)
}

/// Sends a request of HTTP/1, and returns each piece of the output. The endpoint sends each of its
/// pieces after a pause.
pub async fn exchange_http1(
    proxy: &Arc<Proxy>,
    request: &str,
    pieces: &[Vec<u8>],
) -> (Vec<Event>, Arc<ProxyStats>) {
    let mut tasks = JoinSet::new();
    let (mut sandbox, mut endpoint, stats) = start_relay(proxy, false, &mut tasks);
    let pieces = pieces.to_vec();
    tasks.spawn(async move {
        let mut received = Vec::new();
        while !received.windows(4).any(|window| window == b"\r\n\r\n") {
            if endpoint.read_buf(&mut received).await.unwrap_or(0) == 0 {
                return;
            }
        }
        for piece in pieces {
            sleep(PAUSE).await;
            let _ = endpoint.write_all(&piece).await;
        }
        sleep(PAUSE).await;
    });
    let started = Instant::now();
    sandbox.write_all(request.as_bytes()).await.unwrap();
    let mut events = Vec::new();
    loop {
        let mut bytes = vec![0; BUFFER];
        match sandbox.read(&mut bytes).await {
            Ok(count @ 1..) => events.push((started.elapsed(), bytes[..count].to_vec())),
            _ => return (events, stats),
        }
    }
}

/// A body that sends each piece after a pause.
struct PacedBody {
    pieces: Vec<Vec<u8>>,
    next: usize,
    pause: Pin<Box<Sleep>>,
}

impl Body for PacedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        std::task::ready!(self.pause.as_mut().poll(cx));
        self.pause = Box::pin(sleep(PAUSE));
        self.next += 1;
        let piece = self.pieces.get(self.next - 1).cloned();
        Poll::Ready(piece.map(|bytes| Ok(Frame::data(bytes.into()))))
    }
}

/// Sends a request of HTTP/2, and returns each data frame of the response.
pub async fn exchange_http2(proxy: &Arc<Proxy>, pieces: &[Vec<u8>]) -> Vec<Event> {
    let mut tasks = JoinSet::new();
    let (sandbox, endpoint, _) = start_relay(proxy, true, &mut tasks);
    let pieces = pieces.to_vec();
    tasks.spawn(async move {
        let service = service_fn(move |_: Request<Incoming>| {
            let pause = Box::pin(sleep(PAUSE));
            let body = PacedBody { pieces: pieces.clone(), next: 0, pause };
            async move { Ok::<_, Infallible>(Response::new(body)) }
        });
        let endpoint = TokioIo::new(endpoint);
        drop(server2::Builder::new(TokioExecutor::new()).serve_connection(endpoint, service).await);
    });
    let mut sender = Sender::new(sandbox, true, &mut tasks).await.unwrap();
    let request = Request::builder()
        .version(Version::HTTP_2)
        .uri("https://api.test/")
        .body(Full::default())
        .unwrap();
    let started = Instant::now();
    let mut body = sender.send_request(request).await.unwrap().into_body();
    let mut events = Vec::new();
    while let Some(frame) = body.frame().await {
        events.push((started.elapsed(), frame.unwrap().into_data().unwrap_or_default().to_vec()));
    }
    events
}
