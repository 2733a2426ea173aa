//! HTTP between both sides of an intercepted connection.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;

use hyper::client::conn::{http1 as client1, http2 as client2};
use hyper::server::conn::{http1 as server1, http2 as server2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;

use super::rewrite::answer_request;
use super::upstream_context::UpstreamContext;

/// Maximum size of all headers of one message. Servers have limits of 8 to 64 KiB.
const MAX_HEADERS: usize = 64 * 1024;

/// Maximum number of concurrent requests on one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;

/// Relays HTTP/1.1.
pub(super) async fn relay_http1<S, E>(
    context: Arc<UpstreamContext>,
    sandbox: S,
    endpoint: E,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, client) = client1::Builder::new()
        .preserve_header_case(true)
        .max_header_size(MAX_HEADERS)
        .max_buf_size(2 * MAX_HEADERS)
        .handshake(TokioIo::new(endpoint))
        .await?;
    let sender = Arc::new(Mutex::new(sender));
    let service = service_fn(|request| {
        let (context, sender) = (context.clone(), sender.clone());
        async move {
            let send = |request| async move {
                let mut sender = sender.lock().await;
                sender.ready().await?;
                sender.send_request(request).await
            };
            Ok::<_, Infallible>(answer_request(context, request, send).await)
        }
    });
    let server = server1::Builder::new()
        .preserve_header_case(true)
        // Idle connections are not closed: their number is limited.
        .header_read_timeout(None)
        .max_header_size(MAX_HEADERS)
        .max_buf_size(2 * MAX_HEADERS)
        .serve_connection(TokioIo::new(sandbox), service)
        .with_upgrades();
    relay(server, client.with_upgrades(), |server| server.graceful_shutdown()).await
}

/// Relays HTTP/2.
pub(super) async fn relay_http2<S, E>(
    context: Arc<UpstreamContext>,
    sandbox: S,
    endpoint: E,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let max_headers = u32::try_from(MAX_HEADERS).unwrap_or(u32::MAX);
    let (sender, client) = client2::Builder::new(TokioExecutor::new())
        .max_header_list_size(max_headers)
        .handshake(TokioIo::new(endpoint))
        .await?;
    let service = service_fn(|request| {
        let (context, mut sender) = (context.clone(), sender.clone());
        async move {
            let send = |request| async move {
                sender.ready().await?;
                sender.send_request(request).await
            };
            Ok::<_, Infallible>(answer_request(context, request, send).await)
        }
    });
    let server = server2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(max_headers)
        .serve_connection(TokioIo::new(sandbox), service);
    relay(server, client, |server| server.graceful_shutdown()).await
}

/// Drives both connections until the server side has ended.
async fn relay<S>(
    server: S,
    client: impl Future<Output = hyper::Result<()>>,
    start_shutdown: impl FnOnce(Pin<&mut S>),
) -> hyper::Result<()>
where
    S: Future<Output = hyper::Result<()>>,
{
    let (mut server, mut client) = (pin!(server), pin!(client));
    tokio::select! {
        served = &mut server => return served,
        _ = &mut client => {}
    }
    // The endpoint has closed its side. Responses that it has sent are still delivered.
    start_shutdown(server.as_mut());
    server.await
}
