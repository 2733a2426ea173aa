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

use super::budget::{LARGE_WINDOW, Reservation};
use super::exchange::answer_request;
use super::upstream_context::UpstreamContext;

/// Maximum size of all headers of one message. Servers have limits of 8 to 64 KiB.
const MAX_HEADERS: usize = 32 * 1024;

/// Maximum size of each buffer of HTTP/1: all headers, and a line before them.
const MAX_BUFFER: usize = MAX_HEADERS + 8 * 1024;

/// Window of a connection of HTTP/2 for which no larger one is available, and of every one from the
/// sandbox, which is near: the smallest that the protocol has.
const SMALL_WINDOW: u32 = 65_535;

/// Largest frame of HTTP/2: the smallest limit that the protocol has.
const MAX_FRAME: u32 = 16 * 1024;

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
        // Some servers compare names in the usual case.
        .title_case_headers(true)
        .max_header_size(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER)
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
        .title_case_headers(true)
        // Idle connections are not closed: their number is limited.
        .header_read_timeout(None)
        .max_header_size(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER)
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
    let large: Option<Reservation> = context.budget.try_reserve_window();
    let window = match large {
        Some(_) => u32::try_from(LARGE_WINDOW).unwrap_or(SMALL_WINDOW),
        None => SMALL_WINDOW,
    };
    let (sender, client) = client2::Builder::new(TokioExecutor::new())
        .initial_connection_window_size(window)
        .initial_stream_window_size(window.div_ceil(2).max(SMALL_WINDOW))
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(MAX_FRAME as usize)
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
        .initial_connection_window_size(SMALL_WINDOW)
        .initial_stream_window_size(SMALL_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(MAX_FRAME as usize)
        .max_header_list_size(max_headers)
        .serve_connection(TokioIo::new(sandbox), service);
    let relayed = relay(server, client, |server| server.graceful_shutdown()).await;
    drop(large);
    relayed
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
