//! Limits of the proxy: scrub hits, earlier values, and the byte budget.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2 as client2;
use hyper::server::conn::http2 as server2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::super::blocked::BlockReason;
use super::super::budget::{BUDGET, MAX_CONNECTIONS};
use super::super::store::{MAX_EARLIER_VALUES, MAX_HITS};
use super::super::*;
use super::connection::*;
use super::plain::*;

#[tokio::test]
async fn requests_are_refused_after_too_many_hits() {
    for h2 in [false, true] {
        let proxy = one_credential();
        let connecting = connect(proxy.clone(), "api.test", "api.test", h2, echo_handler());
        let mut connection = connecting.await.unwrap();
        let mut hits = 0;
        // The workload guesses the value, and the endpoint echoes it.
        let status = loop {
            match connection.request("/", &[], VALUE).await.0 {
                StatusCode::OK if hits < 2 * MAX_HITS => hits += 1,
                status => break status,
            }
        };
        assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
        // The limit is refilled once a second.
        assert!((MAX_HITS..2 * MAX_HITS).contains(&hits), "{hits}");
        assert!(connection.stats.scrubbed_count() >= u64::from(MAX_HITS));
        let (blocked, _) = connection.stats.blocked_requests();
        assert!(matches!(blocked[0], BlockReason::ScrubLimit), "{blocked:?}");
    }
}

#[tokio::test]
async fn all_earlier_values_are_scrubbed() {
    let proxy = one_credential();
    let hold = |value: String| SecretValue::new(Zeroizing::new(value.into()), false).unwrap();
    let value = |index: usize| format!("rotated-value-{index:04}");
    for index in 0..MAX_EARLIER_VALUES {
        proxy.replace_value("TOKEN", hold(value(index))).unwrap();
    }
    let scrubs = |text: &str| {
        let mut bytes = text.as_bytes().to_vec();
        proxy.store.patterns().scrub(&mut bytes) && bytes.iter().all(|byte| *byte == b'*')
    };
    assert!(scrubs(VALUE));
    assert!((0..MAX_EARLIER_VALUES).all(|index| scrubs(&value(index))));
    // The oldest is forgotten, and no value is remembered twice.
    proxy.replace_value("TOKEN", hold(value(0))).unwrap();
    proxy.revoke("TOKEN");
    assert!(!scrubs(VALUE) || MAX_EARLIER_VALUES == 0);
    assert!((0..MAX_EARLIER_VALUES).all(|index| scrubs(&value(index))));
}

/// Returns the resident memory of this process in bytes.
fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Serves responses without an end, and counts their bytes.
async fn serve_endless(stream: tokio::io::DuplexStream, produced: Arc<AtomicU64>) {
    let service = service_fn(move |_: Request<Incoming>| {
        let produced = produced.clone();
        let frames = futures_util::stream::repeat_with(move || {
            let bytes = vec![b'\n'; 16 * 1024];
            produced.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(Bytes::from(bytes)))
        });
        async move { Ok::<_, Infallible>(Response::new(StreamBody::new(frames))) }
    });
    let mut builder = server2::Builder::new(TokioExecutor::new());
    builder.max_send_buf_size(16 * 1024);
    drop(builder.serve_connection(TokioIo::new(stream), service).await);
}

/// Opens connections with many streams each, of which the sandbox reads nothing.
#[tokio::test]
async fn unread_streams_stay_within_the_byte_budget() {
    const STREAMS: usize = 100;
    let proxy = one_credential();
    let (mut tasks, produced) = (JoinSet::new(), Arc::new(AtomicU64::new(0)));
    let before = resident_bytes();
    let mut senders = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let (sandbox, endpoint, _) = start_relay(&proxy, true, &mut tasks);
        tasks.spawn(serve_endless(endpoint, produced.clone()));
        // Its windows are as large as the protocol permits, and it drops nothing.
        let (mut sender, connection) = client2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(65_535)
            .handshake::<_, Full<Bytes>>(TokioIo::new(sandbox))
            .await
            .unwrap();
        tasks.spawn(async move { drop(connection.await) });
        for index in 0..STREAMS {
            let request = Request::builder()
                .version(Version::HTTP_2)
                .uri(format!("https://api.test/{index}"))
                .body(Full::default())
                .unwrap();
            sender.ready().await.unwrap();
            let sending = sender.send_request(request);
            tasks.spawn(async move {
                // The response is held, and its body is not read.
                let response = sending.await;
                std::future::pending::<()>().await;
                drop(response);
            });
        }
        senders.push(sender);
        assert!(proxy.budget.reserved() <= BUDGET);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (reserved, grown) = (proxy.budget.reserved(), resident_bytes().saturating_sub(before));
    let produced = usize::try_from(produced.load(Ordering::Relaxed)).unwrap();
    println!("reserved {reserved}, grown {grown}, produced {produced}, budget {BUDGET}");
    assert!(reserved <= BUDGET && reserved > BUDGET / 2);
    // Each of the 12,800 streams exists at the test's own two ends as well, with a task for each:
    // as much again as in the proxy.
    assert!(grown <= 2 * BUDGET, "{grown} over twice {BUDGET}");
    assert!(produced <= BUDGET, "{produced} over {BUDGET}");
    tasks.shutdown().await;
    drop(senders);
    for _ in 0..100 {
        if proxy.budget.reserved() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{} bytes stay reserved", proxy.budget.reserved());
}

#[tokio::test]
async fn requests_and_windows_share_the_budget() {
    let proxy = one_credential();
    let large: Vec<_> = (0..100).filter_map(|_| proxy.budget.try_reserve_window()).collect();
    assert!((8..16).contains(&large.len()), "{}", large.len());
    assert!(proxy.budget.try_reserve_request(None).is_some());
    drop(large);
    assert_eq!(proxy.budget.reserved(), 0);
    let mut requests = Vec::new();
    while let Some(request) = proxy.budget.try_reserve_request(None) {
        requests.push(request);
    }
    assert!(requests.len() > 256 && proxy.budget.reserved() < BUDGET);
    // Each connection keeps its share, and one request.
    let share = proxy.budget.reserve_connection().await;
    let first = proxy.budget.try_reserve_request(share.as_ref());
    assert!(first.is_some() && proxy.budget.try_reserve_request(share.as_ref()).is_none());
    drop(first);
    assert!(proxy.budget.try_reserve_request(share.as_ref()).is_some());
}
