//! Messages that could pass unscrubbed are refused, or rebuilt without the part that could.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2 as server2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinSet;

use super::super::blocked::{BlockReason, Side};
use super::super::selftest::Sender;
use super::connection::*;
use super::plain::*;

const VALUE: &str = "Canary-3f9a1c07e";
const GET: &str = "GET / HTTP/1.1\r\nhost: api.test\r\nconnection: close\r\n\r\n";

/// Sends a request, and returns the whole output and the reasons of blocked messages.
async fn exchange(request: &str, response: &str) -> (String, Vec<BlockReason>) {
    let proxy = proxy_of(VALUE);
    let (events, stats) = exchange_http1(&proxy, request, &[response.as_bytes().to_vec()]).await;
    let bytes: Vec<u8> = events.into_iter().flat_map(|(_, bytes)| bytes).collect();
    (String::from_utf8_lossy(&bytes).into_owned(), stats.blocked_requests().0)
}

#[tokio::test(start_paused = true)]
async fn reason_phrase_is_not_forwarded() {
    let sent = format!("HTTP/1.1 401 no such token: {VALUE}\r\ncontent-length: 0\r\n\r\n");
    let (output, blocked) = exchange(GET, &sent).await;
    assert!(output.starts_with("HTTP/1.1 401 Unauthorized\r\n") && blocked.is_empty(), "{output}");
    assert!(!output.contains(VALUE));
}

#[tokio::test(start_paused = true)]
async fn response_is_refused_if_it_cannot_be_scrubbed() {
    type Expected = fn(&BlockReason) -> bool;
    let compressed: Expected = |reason| matches!(reason, BlockReason::Compressed);
    let encoding: Expected = |reason| matches!(reason, BlockReason::TransferEncoding);
    let charset: Expected = |reason| matches!(reason, BlockReason::Charset);
    let status: Expected = |reason| matches!(reason, BlockReason::Status(_));
    let length: Expected =
        |reason| matches!(reason, BlockReason::ResponseFraming(name) if *name == CONTENT_LENGTH);
    let media: Expected =
        |reason| matches!(reason, BlockReason::ResponseFraming(name) if *name == CONTENT_TYPE);
    for (head, expected) in [
        ("200 OK\r\ncontent-encoding: gzip", compressed),
        ("200 OK\r\ncontent-encoding: br", compressed),
        ("200 OK\r\ncontent-encoding: unknown", compressed),
        ("200 OK\r\ncontent-encoding: identity, gzip", compressed),
        ("200 OK\r\ncontent-encoding: identity\r\ncontent-encoding: gzip", compressed),
        ("200 OK\r\ngrpc-encoding: gzip", compressed),
        ("200 OK\r\ntransfer-encoding: gzip, chunked", encoding),
        ("200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked", encoding),
        ("200 OK\r\ncontent-type: text/plain; charset=utf-16", charset),
        ("200 OK\r\ncontent-type: text/plain; CharSet=\"UTF-7\"", charset),
        ("200 OK\r\ncontent-type: text/plain; charset=utf-8; charset=utf-32le", charset),
        ("206 Partial Content\r\ncontent-range: bytes 0-3/9", status),
        ("226 IM Used", status),
        ("101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade", status),
        ("600 Unknown", status),
        ("200 OK\r\ncontent-type: multipart/byteranges; boundary=x", media),
        ("200 OK\r\ncontent-type: a/b\r\ncontent-type: text/plain; charset=utf-16", media),
        ("200 OK\r\ncontent-length: 4\r\ncontent-length: 4", length),
        ("200 OK\r\ncontent-length: 4\r\ntransfer-encoding: chunked", length),
    ] {
        let (output, blocked) =
            exchange(GET, &format!("HTTP/1.1 {head}\r\n\r\n4\r\nabcd\r\n")).await;
        assert!(blocked.iter().any(expected), "{head}: {blocked:?} {output}");
        assert!(output.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{head}: {output}");
        assert!(!output.contains("abcd"), "{head}: {output}");
    }
}

#[tokio::test(start_paused = true)]
async fn known_framings_and_charsets_are_relayed() {
    for head in [
        "200 OK\r\ncontent-length: 4",
        "200 OK\r\ncontent-length: 4\r\ncontent-encoding: IDENTITY",
        "200 OK\r\ncontent-length: 4\r\ncontent-type: text/html; charset=UTF-8",
        "299 Whatever\r\ncontent-length: 4\r\ncontent-type: text/html;charset=ISO-8859-1",
        "404 Not Found\r\nx-a: b",
    ] {
        let (output, blocked) = exchange(GET, &format!("HTTP/1.1 {head}\r\n\r\nabcd")).await;
        assert!(output.ends_with("abcd") || output.contains("4\r\nabcd\r\n"), "{output}");
        assert!(blocked.is_empty(), "{blocked:?}");
    }
    let request = GET.replace("GET", "HEAD");
    let (output, blocked) =
        exchange(&request, "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n").await;
    assert!(output.contains("\r\nContent-Length: 9\r\n") && blocked.is_empty(), "{output}");
}

#[tokio::test(start_paused = true)]
async fn informational_responses_and_trailers_do_not_pass() {
    let sent = format!(
        "HTTP/1.1 103 Early {VALUE}\r\nlink: <{VALUE}>\r\n\r\nHTTP/1.1 200 OK\r\ntrailer: x-t\r\n\
         transfer-encoding: chunked\r\n{VALUE}: 1\r\nx-{VALUE}-y: a {VALUE} b\r\n\r\n\
         0\r\nx-t: {VALUE}\r\n\r\n"
    );
    let request = "GET / HTTP/1.1\r\nhost: api.test\r\nte: trailers\r\nconnection: close\r\n\r\n";
    let (output, blocked) = exchange(request, &sent).await;
    let stars = "*".repeat(VALUE.len());
    let output = output.to_ascii_lowercase();
    assert!(output.contains(&format!("\r\nx-{stars}-y: a {stars} b\r\n")), "{output}");
    assert!(output.contains(&format!("\r\n{stars}: 1\r\n")), "{output}");
    assert!(!output.contains(&VALUE.to_ascii_lowercase()) && !output.contains("103"), "{output}");
    assert!(!output.contains("x-t") && blocked.is_empty(), "{output}");
}

#[tokio::test]
async fn trailers_of_http2_are_scrubbed() {
    let mut tasks = JoinSet::new();
    let (sandbox, endpoint, stats) = start_relay(&proxy_of(VALUE), true, &mut tasks);
    tasks.spawn(async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(request.headers()["grpc-accept-encoding"], "identity");
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-message", VALUE.parse().unwrap());
            let frames = [Frame::data(Bytes::from_static(b"x")), Frame::trailers(trailers)];
            let frames = frames.map(Ok::<_, std::convert::Infallible>);
            let body = StreamBody::new(futures_util::stream::iter(frames));
            Ok::<_, std::convert::Infallible>(Response::new(body))
        });
        let builder = server2::Builder::new(TokioExecutor::new());
        drop(builder.serve_connection(TokioIo::new(endpoint), service).await);
    });
    let mut sender = Sender::new(sandbox, true, &mut tasks).await.unwrap();
    let request = Request::builder()
        .version(Version::HTTP_2)
        .uri("https://api.test/")
        .header("te", "trailers")
        .header("grpc-accept-encoding", "gzip")
        .body(Full::default())
        .unwrap();
    let body = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap();
    let trailers = body.trailers().unwrap();
    assert_eq!(trailers["grpc-message"], "*".repeat(VALUE.len()));
    assert_eq!(stats.scrubbed_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn unknown_requests_are_refused() {
    type Expected = fn(&BlockReason) -> bool;
    let method: Expected = |reason| matches!(reason, BlockReason::Method(_));
    let upgrade: Expected = |reason| matches!(reason, BlockReason::Upgrade);
    let length: Expected = |reason| matches!(reason, BlockReason::RequestFraming(_));
    let key = "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==";
    for (head, expected) in [
        ("TRACE / HTTP/1.1".to_owned(), method),
        ("BREW / HTTP/1.1".to_owned(), method),
        ("GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c".to_owned(), upgrade),
        ("GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: tcp".to_owned(), upgrade),
        (
            format!("GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket, tcp\r\n{key}"),
            upgrade,
        ),
        (format!("POST / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n{key}"), upgrade),
        (format!("GET / HTTP/1.1\r\nupgrade: websocket\r\n{key}"), upgrade),
        ("GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket".to_owned(), upgrade),
        ("POST / HTTP/1.1\r\ntransfer-encoding: gzip, chunked".to_owned(), length),
    ] {
        let sent = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcd";
        let (output, blocked) = exchange(&format!("{head}\r\nhost: api.test\r\n\r\n"), sent).await;
        assert!(blocked.iter().any(expected), "{head}: {blocked:?} {output}");
        assert!(!output.contains("abcd"), "{head}: {output}");
    }
}

#[tokio::test]
async fn requests_for_parts_or_encodings_are_rewritten() {
    for h2 in [false, true] {
        let mut connection =
            connect(one_credential(), "api.test", "api.test", h2, echo_handler()).await.unwrap();
        let mut headers = vec![
            ("range", "bytes=0-3"),
            ("if-range", "\"x\""),
            ("accept-encoding", "gzip, br"),
            ("accept-charset", "utf-16"),
            ("a-im", "vcdiff"),
            ("grpc-accept-encoding", "gzip"),
            ("x-kept", "yes"),
        ];
        if !h2 {
            let listed = "keep-alive, x-listed, te, authorization";
            headers.extend([("te", "gzip"), ("connection", listed), ("x-listed", "a")]);
        }
        assert_eq!(connection.request("/", &headers, "").await.0, StatusCode::OK);
        let received = connection.last_request().headers;
        let removed = ["range", "if-range", "accept-charset", "a-im", "te", "x-listed"];
        for name in removed.iter().chain(&["connection"]) {
            assert!(received.get(*name).is_none(), "{name}: {received:?}");
        }
        assert_eq!(received["accept-encoding"], "identity");
        assert_eq!(received["grpc-accept-encoding"], "identity");
        assert_eq!(received["x-kept"], "yes");
    }
}

#[tokio::test(start_paused = true)]
async fn websocket_handshake_with_an_extension_is_refused() {
    let request = "GET / HTTP/1.1\r\nhost: api.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let accept = "connection: upgrade\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
    for headers in [
        format!("upgrade: websocket\r\n{accept}\r\nsec-websocket-extensions: permessage-deflate"),
        format!("upgrade: h2c\r\n{accept}"),
        "upgrade: websocket\r\nconnection: upgrade".to_owned(),
    ] {
        let (output, blocked) =
            exchange(request, &format!("HTTP/1.1 101 x\r\n{headers}\r\n\r\n\u{1}abc")).await;
        assert!(matches!(blocked[..], [BlockReason::Handshake]), "{headers}: {blocked:?}");
        assert!(output.starts_with("HTTP/1.1 502") && !output.contains("abc"), "{output}");
    }
    // A compressed message without a handshake for it.
    let (output, blocked) = exchange(
        request,
        &format!("HTTP/1.1 101 x\r\nupgrade: websocket\r\n{accept}\r\n\r\n\u{41}\u{3}abc"),
    )
    .await;
    assert!(matches!(blocked[..], [BlockReason::WebSocketFrame(Side::Endpoint)]), "{blocked:?}");
    assert!(output.starts_with("HTTP/1.1 101 Switching") && !output.contains("abc"), "{output}");
}
