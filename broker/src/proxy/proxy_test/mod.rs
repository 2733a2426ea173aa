mod connection;
mod framing;
mod limits;
mod oracle;
mod plain;
mod scope;

use http::header::AUTHORIZATION;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use zeroize::Zeroizing;

use super::blocked::{BlockReason, Location};
use super::body::MAX_BODY;
use super::encoding::{encode_base64, percent_encode};
use super::placeholder::Placeholders;
use super::selftest::Sender;
use super::*;
use crate::tls;
use connection::*;

#[tokio::test]
async fn headers_carry_the_value_out_and_never_back() {
    for h2 in [false, true] {
        let mut connection =
            connect(one_credential(), "api.test", "api.test", h2, echo_handler()).await.unwrap();
        let token = connection.placeholder("TOKEN");
        let (status, headers, body) = connection
            .request("/x?a=b", &[("authorization", &format!("Bearer {token}"))], "")
            .await;
        assert_eq!(status, StatusCode::OK, "{body}");
        assert_eq!(connection.last_request().header("authorization"), format!("Bearer {VALUE}"));
        assert_eq!(connection.last_request().header("accept-encoding"), "identity");
        assert_eq!(headers["x-echo"], format!("Bearer {}", "*".repeat(VALUE.len())));
        assert!(!body.contains("canary") && body.contains("*****"), "{body}");

        // The Basic scheme, as git and curl -u send it.
        let pair =
            String::from_utf8(encode_base64(format!("user:{token}").as_bytes(), false)).unwrap();
        let (status, headers, body) =
            connection.request("/", &[("authorization", &format!("Basic {pair}"))], "x").await;
        assert_eq!(status, StatusCode::OK);
        let right =
            String::from_utf8(encode_base64(format!("user:{VALUE}").as_bytes(), false)).unwrap();
        assert_eq!(connection.last_request().header("authorization"), format!("Basic {right}"));
        let inner = &right[8..right.len() - 4];
        assert!(
            !headers["x-echo"].to_str().unwrap().contains(inner) && !body.contains(inner),
            "{headers:?}"
        );

        // Several placeholders in one header, and one within a longer value.
        let headers =
            [("x-api-key", format!("{token}/{token}")), ("private-token", format!("a={token}; b"))];
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        connection.request("/", &headers, "").await;
        assert_eq!(connection.last_request().header("x-api-key"), format!("{VALUE}/{VALUE}"));
        assert_eq!(connection.last_request().header("private-token"), format!("a={VALUE}; b"));
        assert_eq!(
            (connection.stats.delivered_credentials(), connection.stats.request_count()),
            (vec!["TOKEN".to_owned()], 3)
        );
        assert!(connection.stats.blocked_requests().0.is_empty());
    }
}

#[tokio::test]
async fn proxied_values_are_not_logged() {
    let log = crate::log_test::LogCapture::start();
    for h2 in [false, true] {
        let proxy = one_credential();
        let connecting = connect(proxy.clone(), "api.test", "api.test", h2, echo_handler());
        let mut connection = connecting.await.unwrap();
        let token = connection.placeholder("TOKEN");
        connection.request("/", &[("x-api-key", &token)], "").await;
        assert_eq!(connection.last_request().header("x-api-key"), VALUE);
        // A request that is blocked.
        connection.request(&format!("/{token}"), &[], "").await;
        proxy.revoke("TOKEN");
        connection.request("/", &[("x-api-key", &token)], "").await;
        log.assert(&[], &[VALUE, &token]);
    }
}

#[tokio::test]
async fn rotation_and_revocation_apply_to_open_connections() {
    for h2 in [false, true] {
        let proxy = one_credential();
        let mut connection =
            connect(proxy.clone(), "api.test", "api.test", h2, echo_handler()).await.unwrap();
        let token = connection.placeholder("TOKEN");
        connection.request("/", &[("x-api-key", &token)], "").await;
        assert_eq!(connection.last_request().header("x-api-key"), VALUE);

        let hold = |value: &str| SecretValue::new(Zeroizing::new(value.into()), false).unwrap();
        assert_eq!(proxy.replace_value("TOKEN", hold("short")), Err(ValueError::TooShort));
        proxy.replace_value("TOKEN", hold(OTHER)).unwrap();
        let (status, headers, body) =
            connection.request("/", &[("x-api-key", &token), ("x", VALUE)], "").await;
        assert_eq!(
            (status, connection.last_request().header("x-api-key")),
            (StatusCode::OK, OTHER)
        );
        // Neither value is returned.
        assert_eq!(headers["x-echo"], "*".repeat(OTHER.len()));
        assert!(!body.contains("canary") && body.contains(&"*".repeat(VALUE.len())), "{body}");

        proxy.revoke("TOKEN");
        let (status, _, body) = connection.request("/", &[("x-api-key", &token)], "").await;
        assert_eq!((status, connection.received.lock().unwrap().len()), (StatusCode::FORBIDDEN, 2));
        assert_eq!(body, "chitin: the credential TOKEN was revoked or has expired\n");
        let (blocked, _) = connection.stats.blocked_requests();
        let [BlockReason::Revoked { credential }] = blocked.as_slice() else {
            panic!("{blocked:?}")
        };
        assert_eq!(credential, "TOKEN");
    }
}

#[tokio::test]
async fn misplaced_placeholder_blocks_the_request() {
    for h2 in [false, true] {
        for location in [
            Location::Path,
            Location::Query,
            Location::HeaderName,
            Location::Body,
            Location::Header(AUTHORIZATION),
        ] {
            let secrets = vec![
                ("TOKEN", scope(&["api.test:443"], false, false), VALUE),
                ("OTHER", scope(&["other.test:443"], true, true), OTHER),
            ];
            let proxy = Arc::new(proxy(secrets).unwrap());
            let connecting = connect(proxy, "api.test", "api.test", h2, echo_handler());
            let mut connection = connecting.await.unwrap();
            let token = connection.placeholder("TOKEN");
            let other = connection.placeholder("OTHER");
            let body = format!("{}{token}", "x".repeat(40_000));
            let (status, ..) = match &location {
                Location::Path => connection.request(&format!("/a/{token}/b"), &[], "").await,
                Location::Query => connection.request(&format!("/?key={token}"), &[], "").await,
                Location::HeaderName => connection.request("/", &[(&token, "x")], "").await,
                Location::Body => connection.request("/", &[], &body).await,
                _ => connection.request("/", &[("authorization", &other)], "").await,
            };
            assert_ne!(status, StatusCode::OK, "{location}");
            connection.assert_blocked(|reason| match reason {
                BlockReason::Misplaced { credential, location: found } => {
                    credential == "TOKEN" && *found == location
                }
                BlockReason::WrongHost { credential, location: found } => {
                    credential == "OTHER"
                        && *found == location
                        && *found == Location::Header(AUTHORIZATION)
                }
                _ => false,
            });
        }
    }
}

#[tokio::test]
async fn query_and_body_are_replaced_if_requested() {
    for h2 in [false, true] {
        let proxy = proxy(vec![("TOKEN", scope(&["*.api.test:443"], true, true), VALUE)]).unwrap();
        let mut connection =
            connect(Arc::new(proxy), "a.api.test", "a.api.test", h2, echo_handler()).await.unwrap();
        let token = connection.placeholder("TOKEN");
        let body = format!("{{\"key\": \"{token}\", \"again\": \"{token}\"}}");
        let (status, _, answer) =
            connection.request(&format!("/?key={token}&x=1"), &[], &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let encoded = String::from_utf8(percent_encode(VALUE.as_bytes())).unwrap();
        assert!(
            connection.last_request().line.ends_with(&format!("/?key={encoded}&x=1")),
            "{}",
            connection.last_request().line
        );
        assert_eq!(connection.last_request().body, body.replace(&token, VALUE));
        assert!(!answer.contains("canary"), "{answer}");
        let (status, ..) = connection.request("/", &[], &"x".repeat(MAX_BODY + 1)).await;
        assert_ne!(status, StatusCode::OK);
        assert_eq!(connection.stats.request_count(), 1);
    }
}

#[tokio::test]
async fn sni_and_host_must_match_the_connection() {
    for h2 in [false, true] {
        let connected =
            connect(one_credential(), "api.test", "www.api.test", h2, echo_handler()).await;
        assert!(matches!(connected, Err(Ok(ProxyError::OtherServerName))), "{:?}", connected.err());
    }
    for host in [
        "evil.test",
        "api.test.evil.test",
        "api.test:8443",
        "api.test@evil.test",
        "",
        "api.test, evil.test",
    ] {
        let mut connection =
            connect(one_credential(), "api.test", "api.test", false, echo_handler()).await.unwrap();
        let token = connection.placeholder("TOKEN");
        let (status, ..) =
            connection.request("/", &[("host", host), ("authorization", &token)], "").await;
        assert_eq!(status, StatusCode::MISDIRECTED_REQUEST, "{host}");
        connection.assert_blocked(|reason| matches!(reason, BlockReason::OtherHost));
    }
    for (path, hosts) in
        [("http://evil.test/", &["api.test"][..]), ("/", &["api.test", "evil.test"])]
    {
        let mut connection =
            connect(one_credential(), "api.test", "api.test", false, echo_handler()).await.unwrap();
        let headers: Vec<(&str, &str)> = hosts.iter().map(|host| ("host", *host)).collect();
        assert_eq!(connection.request(path, &headers, "").await.0, StatusCode::MISDIRECTED_REQUEST);
        connection.assert_blocked(|reason| matches!(reason, BlockReason::OtherHost));
    }
    let mut connection =
        connect(one_credential(), "api.test", "api.test", true, echo_handler()).await.unwrap();
    connection.host = "evil.test".into();
    assert_eq!(connection.request("/", &[], "").await.0, StatusCode::MISDIRECTED_REQUEST);
    connection.assert_blocked(|reason| matches!(reason, BlockReason::OtherHost));
}

#[tokio::test]
async fn connection_without_tls_is_refused() {
    let stats = Arc::new(ProxyStats::default());
    let (mut sandbox, near) = tokio::io::duplex(1024);
    let (far, mut endpoint) = tokio::io::duplex(1024);
    sandbox.write_all(b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await.unwrap();
    let outcome = one_credential().relay_connection(near, far, "api.test", 443, &stats).await;
    assert!(matches!(outcome, Err(ProxyError::NotTls)), "{outcome:?}");
    let mut seen = Vec::new();
    endpoint.read_to_end(&mut seen).await.unwrap();
    assert!(seen.is_empty());
}

#[tokio::test]
async fn endpoint_with_untrusted_certificate_is_refused() {
    // The host does not trust the CA of the certificate.
    let stats = Arc::new(ProxyStats::default());
    let (sandbox, near) = tokio::io::duplex(16 * 1024);
    let (far, endpoint) = tokio::io::duplex(16 * 1024);
    let proxy = one_credential();
    let trust = tls::client_config(Arc::new(tls::root_store(vec![proxy.authority.certificate()])));
    let mallory = CertificateAuthority::new(["api.test".to_owned()])
        .unwrap()
        .server_config("api.test", b"http/1.1")
        .unwrap();
    let accepting = TlsAcceptor::from(Arc::new(mallory)).accept(endpoint);
    let connector = TlsConnector::from(Arc::new(trust));
    let connecting = connector.connect(ServerName::try_from("api.test").unwrap(), sandbox);
    let (outcome, accepted, connected) = tokio::join!(
        proxy.relay_connection(near, far, "api.test", 443, &stats),
        accepting,
        connecting
    );
    assert!(matches!(outcome, Err(ProxyError::EndpointHandshake(_))), "{outcome:?}");
    assert!(accepted.is_err() && connected.is_err());
}

#[tokio::test]
async fn compressed_response_is_refused() {
    let handler: Handler = Arc::new(|_| {
        let builder = Response::builder().header("content-encoding", "gzip");
        builder.body(Full::from("not really")).unwrap()
    });
    let mut connection =
        connect(one_credential(), "api.test", "api.test", false, handler).await.unwrap();
    let (status, _, body) = connection.request("/", &[], "").await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(body.contains("compressed"), "{body}");
}

#[tokio::test]
async fn placeholder_is_blocked_after_a_redirect() {
    let handler: Handler = Arc::new(|_| {
        let builder = Response::builder().status(302).header("location", "https://evil.test/");
        builder.body(Full::default()).unwrap()
    });
    let mut connection =
        connect(one_credential(), "api.test", "api.test", true, handler).await.unwrap();
    let token = connection.placeholder("TOKEN");
    assert_eq!(
        connection.request("/", &[("authorization", &token)], "").await.0,
        StatusCode::FOUND
    );
    // The client follows on a connection that is not intercepted, where the placeholder may be
    // visible.
    let stats = Arc::new(ProxyStats::default());
    let (mut sandbox, near) = tokio::io::duplex(1024);
    let mut watched = connection.proxy.scan_stream(near, &stats);
    sandbox
        .write_all(
            format!("GET / HTTP/1.1\r\nHost: evil.test\r\nAuthorization: {}", &token[..20])
                .as_bytes(),
        )
        .await
        .unwrap();
    let mut buffer = [0; 1024];
    assert!(watched.read(&mut buffer).await.is_ok());
    sandbox.write_all(&token.as_bytes()[20..]).await.unwrap();
    assert!(watched.read(&mut buffer).await.is_err());
    let (blocked, _) = stats.blocked_requests();
    assert!(
        matches!(&blocked[0], BlockReason::NotIntercepted { credential } if credential == "TOKEN"),
        "{blocked:?}"
    );
}

#[tokio::test]
async fn websocket_is_relayed_and_scrubbed() {
    let handler: Handler = Arc::new(|_| {
        let builder = Response::builder()
            .status(101)
            .header("upgrade", "websocket")
            .header("connection", "upgrade")
            .header("sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        builder.body(Full::default()).unwrap()
    });
    let connection =
        connect(one_credential(), "api.test", "api.test", false, handler).await.unwrap();
    let token = connection.placeholder("TOKEN");
    let Sender::Http1(mut sender) = connection.sender else { panic!() };
    let request = Request::builder()
        .header("host", "api.test")
        .header("upgrade", "websocket")
        .header("connection", "keep-alive, Upgrade")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("sec-websocket-extensions", "permessage-deflate")
        .header("authorization", format!("Bearer {token}"))
        .body(Full::default())
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let received = connection.received.lock().unwrap().last().unwrap().clone();
    assert!(received.headers.get("sec-websocket-extensions").is_none());
    let mut stream = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    // The endpoint echoes; asterisks replace the value on the way back.
    let mut buffer = [0; 64];
    stream.write_all(&masked_frame(b"hello")).await.unwrap();
    stream.read_exact(&mut buffer[..7]).await.unwrap();
    assert_eq!(&buffer[..7], b"\x81\x05hello");
    stream.write_all(&masked_frame(VALUE.as_bytes())).await.unwrap();
    stream.read_exact(&mut buffer[..2 + VALUE.len()]).await.unwrap();
    assert_eq!(buffer[2..2 + VALUE.len()], *"*".repeat(VALUE.len()).as_bytes());
    stream.write_all(&masked_frame(token.as_bytes())).await.unwrap();
    let rest = stream.read(&mut buffer).await;
    assert!(matches!(rest, Ok(0) | Err(_)), "{rest:?}");
    let (blocked, _) = connection.stats.blocked_requests();
    let expected = Location::WebSocket;
    assert!(
        matches!(&blocked[0], BlockReason::Misplaced { location, .. } if *location == expected),
        "{blocked:?}"
    );
    assert_eq!(connection.stats.scrubbed_count(), 1);
}

/// Returns a text frame as a client sends it: masked, with zeros here.
fn masked_frame(payload: &[u8]) -> Vec<u8> {
    let length = 0x80 | u8::try_from(payload.len()).unwrap();
    [&[0x81, length, 0, 0, 0, 0][..], payload].concat()
}

#[tokio::test]
async fn large_bodies_are_relayed_unchanged() {
    let whole = Arc::new("0123456789abcdef".repeat(256 * 1024));
    for h2 in [false, true] {
        let answered = whole.clone();
        let handler: Handler =
            Arc::new(move |_| Response::new(Full::from(answered.as_bytes().to_vec())));
        let mut connection =
            connect(one_credential(), "api.test", "api.test", h2, handler).await.unwrap();
        let (status, headers, body) = connection.request("/", &[], &whole).await;
        assert_eq!(status, StatusCode::OK);
        assert!(body == *whole && connection.last_request().body == whole.as_bytes());
        assert_eq!(headers["content-length"], whole.len().to_string());
    }
}

#[test]
fn undeliverable_value_is_refused() {
    for (value, expected) in [
        ("short", ValueError::TooShort),
        (&"x".repeat(8193), ValueError::TooLong),
        ("two\r\nlines-of-it", ValueError::NotPrintable),
        ("schlüssel-1", ValueError::NotPrintable),
    ] {
        let made = proxy(vec![("TOKEN", scope(&["api.test:443"], false, false), value)]);
        let Err(error @ SetupError::Value { error: found, .. }) = &made else { panic!("{made:?}") };
        assert_eq!(*found, expected, "{value:?}");
        assert!(!error.to_string().contains(value), "{error}");
    }
}

#[tokio::test]
async fn self_test_detects_unreplaced_and_unscrubbed_values() {
    let hosts = scope(&["*.api.test:8443", "b.test:443"], true, true);
    let make = || proxy(vec![("TOKEN", hosts.clone(), VALUE)]).unwrap();
    make().self_test().await.unwrap();

    let mut broken = make();
    Arc::get_mut(&mut broken.store).unwrap().placeholders = Placeholders::default();
    let tested = broken.self_test().await;
    assert!(
        matches!(tested, Err(SetupError::SelfTest { error: SelfTestError::NotReplaced(_), .. })),
        "{tested:?}"
    );

    let mut broken = make();
    Arc::get_mut(&mut broken.store).unwrap().clear_patterns();
    let tested = broken.self_test().await;
    assert!(
        matches!(tested, Err(SetupError::SelfTest { error: SelfTestError::NotScrubbed, .. })),
        "{tested:?}"
    );
}
