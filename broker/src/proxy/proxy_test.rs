use bytes::Bytes;
use http::header::{HOST, HeaderMap};
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

use super::message::MAX_BODY;
use super::placeholder::{base64, percent_encoded};
use super::selftest::Sender;
use super::*;
use crate::tls;

const VALUE: &str = "canary-3f9/a1+\"c07e";
const OTHER: &str = "canary-of-another-1";

fn endpoint(text: &str) -> Endpoint {
    text.parse().unwrap()
}

fn reach(hosts: &[&str], query: bool, body: bool) -> ProxyScope {
    ProxyScope { hosts: hosts.iter().map(|host| endpoint(host)).collect(), query, body }
}

fn proxy(values: Vec<(&str, ProxyScope, &str)>) -> Result<Proxy, SetupError> {
    let hold = |value: &str| SecretValue::new(Zeroizing::new(value.into()), false).unwrap();
    let values = values
        .into_iter()
        .map(|(name, reach, value)| (name.to_owned(), reach, hold(value)))
        .collect();
    let mut next = 0u8;
    Proxy::new(values, tls::client(tls::system_roots()), move |bytes| {
        next += 1;
        bytes.fill(next);
        Ok(())
    })
}

/// What an endpoint was sent: its first line, its headers, its body.
#[derive(Debug, Clone)]
struct Sent {
    line: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Sent {
    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }
}

/// A sandbox's connection through a proxy to an endpoint that answers what it is told to.
struct Setup {
    proxy: Arc<Proxy>,
    account: Arc<Account>,
    sent: Arc<Mutex<Vec<Sent>>>,
    sender: Sender,
    host: String,
    h2: bool,
    _tasks: JoinSet<()>,
}

type Answer = Arc<dyn Fn(&Sent) -> Response<Full<Bytes>> + Send + Sync>;

/// Connects to `host`, with `sni`, over the protocol.
async fn connect(
    proxy: Arc<Proxy>,
    host: &str,
    sni: &str,
    h2: bool,
    answer: Answer,
) -> Result<Setup, String> {
    let mut tasks = JoinSet::new();
    let authority = Authority::new([host.to_owned()]).unwrap();
    let protocol: &[u8] = if h2 { b"h2" } else { b"http/1.1" };
    let server = authority.server(host, protocol).unwrap();
    let (sandbox, near) = tokio::io::duplex(16 * 1024);
    let (far, ours) = tokio::io::duplex(16 * 1024);
    let sent: Arc<Mutex<Vec<Sent>>> = Arc::default();
    let log = sent.clone();
    tasks.spawn(async move {
        let service = service_fn(move |mut request: Request<Incoming>| {
            let (log, answer) = (log.clone(), answer.clone());
            async move {
                let upgraded = request
                    .headers()
                    .contains_key("upgrade")
                    .then(|| hyper::upgrade::on(&mut request));
                let (head, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                let sent = Sent {
                    line: format!("{} {}", head.method, head.uri),
                    headers: head.headers,
                    body,
                };
                let response = answer(&sent);
                log.lock().unwrap().push(sent);
                if let Some(upgraded) = upgraded {
                    // Echoes.
                    tokio::spawn(async move {
                        let mut stream = TokioIo::new(upgraded.await.unwrap());
                        let mut buffer = [0; 1024];
                        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                            stream.write_all(&buffer[..count]).await.unwrap();
                            stream.flush().await.unwrap();
                        }
                    });
                }
                Ok::<_, hyper::Error>(response)
            }
        });
        let Ok(stream) = TlsAcceptor::from(Arc::new(server)).accept(ours).await else { return };
        let stream = TokioIo::new(stream);
        if h2 {
            drop(
                server2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await,
            );
        } else {
            drop(server1::Builder::new().serve_connection(stream, service).with_upgrades().await);
        }
    });
    let account = Arc::new(Account::default());
    let trust = Arc::new(tls::client(Arc::new(tls::roots_of(vec![authority.certificate()]))));
    let (running, name, tally) = (proxy.clone(), host.to_owned(), account.clone());
    let ended = Arc::new(Mutex::new(None));
    let end = ended.clone();
    tasks.spawn(async move {
        let outcome = running.run_with(trust, near, far, &name, 443, &tally).await;
        *end.lock().unwrap() = Some(outcome);
    });
    let mut trust = tls::client(Arc::new(tls::roots_of(vec![proxy.authority.certificate()])));
    trust.alpn_protocols = vec![protocol.to_vec()];
    let name = ServerName::try_from(sni.to_owned()).unwrap();
    let stream = match TlsConnector::from(Arc::new(trust)).connect(name, sandbox).await {
        Ok(stream) => stream,
        Err(error) => {
            tokio::task::yield_now().await;
            let outcome = ended.lock().unwrap().take();
            return Err(
                outcome.map_or(error.to_string(), |outcome| outcome.unwrap_err().to_string())
            );
        }
    };
    let sender = Sender::new(stream, h2, &mut tasks).await.unwrap();
    Ok(Setup { proxy, account, sent, sender, host: host.to_owned(), h2, _tasks: tasks })
}

impl Setup {
    fn placeholder(&self, name: &str) -> String {
        self.proxy.placeholders().find(|(other, _)| *other == name).unwrap().1.to_owned()
    }

    async fn ask(
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
        let (head, body) = match self.sender.send(request).await {
            Ok(response) => response.into_parts(),
            Err(_) => return (StatusCode::IM_A_TEAPOT, HeaderMap::new(), String::new()),
        };
        let body = body.collect().await.map(|whole| whole.to_bytes()).unwrap_or_default();
        (head.status, head.headers, String::from_utf8(body.to_vec()).unwrap())
    }

    fn last(&self) -> Sent {
        self.sent.lock().unwrap().last().unwrap().clone()
    }

    /// That the endpoint has never seen any of what it should not.
    fn nothing_was_sent(&self, words: &str) {
        assert!(self.sent.lock().unwrap().is_empty(), "{:?}", self.sent);
        let (blocked, _) = self.account.blocked();
        assert!(blocked.iter().any(|why| why.contains(words)), "no `{words}` in {blocked:?}");
        assert!(!format!("{blocked:?}").contains("canary"), "{blocked:?}");
    }
}

fn echo() -> Answer {
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

fn one() -> Arc<Proxy> {
    Arc::new(proxy(vec![("TOKEN", reach(&["api.test:443"], false, false), VALUE)]).unwrap())
}

#[tokio::test]
async fn headers_go_out_with_the_value_and_come_back_without() {
    for h2 in [false, true] {
        let mut setup = connect(one(), "api.test", "api.test", h2, echo()).await.unwrap();
        let token = setup.placeholder("TOKEN");
        let (status, headers, body) =
            setup.ask("/x?a=b", &[("authorization", &format!("Bearer {token}"))], "").await;
        assert_eq!(status, StatusCode::OK, "{body}");
        assert_eq!(setup.last().header("authorization"), format!("Bearer {VALUE}"));
        assert_eq!(setup.last().header("accept-encoding"), "identity");
        assert_eq!(headers["x-echo"], format!("Bearer {}", "*".repeat(VALUE.len())));
        assert!(!body.contains("canary") && body.contains("*****"), "{body}");

        // As git and curl -u say it; both halves may be placeholders.
        let pair = String::from_utf8(base64(format!("user:{token}").as_bytes(), false)).unwrap();
        let (status, headers, body) =
            setup.ask("/", &[("authorization", &format!("Basic {pair}"))], "x").await;
        assert_eq!(status, StatusCode::OK);
        let right = String::from_utf8(base64(format!("user:{VALUE}").as_bytes(), false)).unwrap();
        assert_eq!(setup.last().header("authorization"), format!("Basic {right}"));
        let inner = &right[8..right.len() - 4];
        assert!(
            !headers["x-echo"].to_str().unwrap().contains(inner) && !body.contains(inner),
            "{headers:?}"
        );

        // Several at once, and one within something else.
        let headers =
            [("x-api-key", format!("{token}/{token}")), ("cookie", format!("a={token}; b=c"))];
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        setup.ask("/", &headers, "").await;
        assert_eq!(setup.last().header("x-api-key"), format!("{VALUE}/{VALUE}"));
        assert_eq!(setup.last().header("cookie"), format!("a={VALUE}; b=c"));
        assert_eq!(
            (setup.account.delivered(), setup.account.requests()),
            (vec!["TOKEN".to_owned()], 3)
        );
        assert!(setup.account.blocked().0.is_empty());
    }
}

#[tokio::test]
async fn proxied_values_are_not_logged() {
    let log = crate::log_test::LogCapture::start();
    for h2 in [false, true] {
        let proxy = one();
        let mut setup = connect(proxy.clone(), "api.test", "api.test", h2, echo()).await.unwrap();
        let token = setup.placeholder("TOKEN");
        setup.ask("/", &[("x-api-key", &token)], "").await;
        assert_eq!(setup.last().header("x-api-key"), VALUE);
        // A request that is stopped.
        setup.ask(&format!("/{token}"), &[], "").await;
        proxy.revoke("TOKEN");
        setup.ask("/", &[("x-api-key", &token)], "").await;
        log.assert(&[], &[VALUE, &token]);
    }
}

#[tokio::test]
async fn a_value_is_replaced_and_taken_back_while_a_connection_lasts() {
    for h2 in [false, true] {
        let proxy = one();
        let mut setup = connect(proxy.clone(), "api.test", "api.test", h2, echo()).await.unwrap();
        let token = setup.placeholder("TOKEN");
        setup.ask("/", &[("x-api-key", &token)], "").await;
        assert_eq!(setup.last().header("x-api-key"), VALUE);

        let hold = |value: &str| SecretValue::new(Zeroizing::new(value.into()), false).unwrap();
        assert!(proxy.replace("TOKEN", hold("short")).unwrap_err().contains("less than 8 bytes"));
        proxy.replace("TOKEN", hold(OTHER)).unwrap();
        let (status, headers, body) =
            setup.ask("/", &[("x-api-key", &token), ("x", VALUE)], "").await;
        assert_eq!((status, setup.last().header("x-api-key")), (StatusCode::OK, OTHER));
        // Neither comes back.
        assert_eq!(headers["x-echo"], "*".repeat(OTHER.len()));
        assert!(!body.contains("canary") && body.contains(&"*".repeat(VALUE.len())), "{body}");

        proxy.revoke("TOKEN");
        let (status, _, body) = setup.ask("/", &[("x-api-key", &token)], "").await;
        assert_eq!((status, setup.sent.lock().unwrap().len()), (StatusCode::FORBIDDEN, 2));
        assert_eq!(body, "chitin: the credential TOKEN was taken back, or is over\n");
        assert_eq!(setup.account.blocked().0, ["the credential TOKEN was taken back, or is over"]);
    }
}

#[tokio::test]
async fn a_placeholder_in_any_other_place_stops_the_request() {
    for h2 in [false, true] {
        for place in ["path", "query", "name", "body", "other"] {
            let values = vec![
                ("TOKEN", reach(&["api.test:443"], false, false), VALUE),
                ("OTHER", reach(&["other.test:443"], true, true), OTHER),
            ];
            let proxy = Arc::new(proxy(values).unwrap());
            let mut setup = connect(proxy, "api.test", "api.test", h2, echo()).await.unwrap();
            let (token, other) = (setup.placeholder("TOKEN"), setup.placeholder("OTHER"));
            let (status, words) = match place {
                "path" => (
                    setup.ask(&format!("/a/{token}/b"), &[], "").await.0,
                    "TOKEN stands in the path",
                ),
                "query" => (
                    setup.ask(&format!("/?key={token}"), &[], "").await.0,
                    "TOKEN stands in the query",
                ),
                "name" => {
                    (setup.ask("/", &[(token.as_str(), "x")], "").await.0, "in a header's name")
                }
                "other" => {
                    let status = setup.ask("/", &[("authorization", &other)], "").await.0;
                    (
                        status,
                        "OTHER was sent to a host that it is not for, in the header authorization",
                    )
                }
                _ => (
                    setup.ask("/", &[], &format!("{}{token}", "x".repeat(40_000))).await.0,
                    "TOKEN stands in the body",
                ),
            };
            assert_ne!(status, StatusCode::OK, "{place}");
            setup.nothing_was_sent(words);
        }
    }
}

#[tokio::test]
async fn query_and_body_are_replaced_where_that_is_asked_for() {
    for h2 in [false, true] {
        let proxy = proxy(vec![("TOKEN", reach(&["*.api.test:443"], true, true), VALUE)]).unwrap();
        let mut setup =
            connect(Arc::new(proxy), "a.api.test", "a.api.test", h2, echo()).await.unwrap();
        let token = setup.placeholder("TOKEN");
        let body = format!("{{\"key\": \"{token}\", \"again\": \"{token}\"}}");
        let (status, _, answer) = setup.ask(&format!("/?key={token}&x=1"), &[], &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let encoded = String::from_utf8(percent_encoded(VALUE.as_bytes())).unwrap();
        assert!(
            setup.last().line.ends_with(&format!("/?key={encoded}&x=1")),
            "{}",
            setup.last().line
        );
        assert_eq!(setup.last().body, body.replace(&token, VALUE));
        assert!(!answer.contains("canary"), "{answer}");
        let (status, ..) = setup.ask("/", &[], &"x".repeat(MAX_BODY + 1)).await;
        assert_ne!(status, StatusCode::OK);
        assert_eq!(setup.account.requests(), 1);
    }
}

#[tokio::test]
async fn sni_host_and_connection_are_one_name() {
    for h2 in [false, true] {
        let error = connect(one(), "api.test", "www.api.test", h2, echo()).await.err().unwrap();
        assert!(error.contains("another host"), "{error}");
    }
    for host in [
        "evil.test",
        "api.test.evil.test",
        "api.test:8443",
        "api.test@evil.test",
        "",
        "api.test, evil.test",
    ] {
        let mut setup = connect(one(), "api.test", "api.test", false, echo()).await.unwrap();
        let token = setup.placeholder("TOKEN");
        let (status, ..) = setup.ask("/", &[("host", host), ("authorization", &token)], "").await;
        assert_eq!(status, StatusCode::MISDIRECTED_REQUEST, "{host}");
        setup.nothing_was_sent("another host");
    }
    for (path, hosts) in
        [("http://evil.test/", &["api.test"][..]), ("/", &["api.test", "evil.test"])]
    {
        let mut setup = connect(one(), "api.test", "api.test", false, echo()).await.unwrap();
        let headers: Vec<(&str, &str)> = hosts.iter().map(|host| ("host", *host)).collect();
        assert_eq!(setup.ask(path, &headers, "").await.0, StatusCode::MISDIRECTED_REQUEST);
        setup.nothing_was_sent("another host");
    }
    let mut setup = connect(one(), "api.test", "api.test", true, echo()).await.unwrap();
    setup.host = "evil.test".into();
    assert_eq!(setup.ask("/", &[], "").await.0, StatusCode::MISDIRECTED_REQUEST);
    setup.nothing_was_sent("another host");
}

#[tokio::test]
async fn what_is_no_tls_reaches_nobody() {
    let account = Arc::new(Account::default());
    let (mut sandbox, near) = tokio::io::duplex(1024);
    let (far, mut endpoint) = tokio::io::duplex(1024);
    sandbox.write_all(b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").await.unwrap();
    let outcome = one().run(near, far, "api.test", 443, &account).await;
    assert!(matches!(outcome, Err(ProxyError::NotTls)), "{outcome:?}");
    let mut seen = Vec::new();
    endpoint.read_to_end(&mut seen).await.unwrap();
    assert!(seen.is_empty());
}

#[tokio::test]
async fn an_endpoint_that_is_not_who_it_says_gets_nothing() {
    // Its certificate is of an authority that this host does not trust.
    let account = Arc::new(Account::default());
    let (sandbox, near) = tokio::io::duplex(16 * 1024);
    let (far, endpoint) = tokio::io::duplex(16 * 1024);
    let proxy = one();
    let trust = tls::client(Arc::new(tls::roots_of(vec![proxy.authority.certificate()])));
    let mallory =
        Authority::new(["api.test".to_owned()]).unwrap().server("api.test", b"http/1.1").unwrap();
    let accepting = TlsAcceptor::from(Arc::new(mallory)).accept(endpoint);
    let connector = TlsConnector::from(Arc::new(trust));
    let connecting = connector.connect(ServerName::try_from("api.test").unwrap(), sandbox);
    let (outcome, accepted, connected) =
        tokio::join!(proxy.run(near, far, "api.test", 443, &account), accepting, connecting);
    assert!(matches!(outcome, Err(ProxyError::Endpoint(_))), "{outcome:?}");
    assert!(accepted.is_err() && connected.is_err());
}

#[tokio::test]
async fn a_response_that_cannot_be_looked_through_does_not_pass() {
    let answer: Answer = Arc::new(|_| {
        let builder = Response::builder().header("content-encoding", "gzip");
        builder.body(Full::from("not really")).unwrap()
    });
    let mut setup = connect(one(), "api.test", "api.test", false, answer).await.unwrap();
    let (status, _, body) = setup.ask("/", &[], "").await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(body.contains("compressed"), "{body}");
}

#[tokio::test]
async fn a_redirect_leaves_with_its_placeholder_and_is_stopped_there() {
    let answer: Answer = Arc::new(|_| {
        let builder = Response::builder().status(302).header("location", "https://evil.test/");
        builder.body(Full::default()).unwrap()
    });
    let mut setup = connect(one(), "api.test", "api.test", true, answer).await.unwrap();
    let token = setup.placeholder("TOKEN");
    assert_eq!(setup.ask("/", &[("authorization", &token)], "").await.0, StatusCode::FOUND);
    // What follows it goes on a connection that nobody takes apart, where TLS hides the placeholder, or does not.
    let account = Arc::new(Account::default());
    let (mut sandbox, near) = tokio::io::duplex(1024);
    let mut watched = setup.proxy.watched(near, &account);
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
    assert!(
        account.blocked().0[0].contains("TOKEN was sent to a host that it is not for"),
        "{account:?}"
    );
}

#[tokio::test]
async fn a_websocket_passes_and_is_looked_through() {
    let answer: Answer = Arc::new(|_| {
        let builder = Response::builder()
            .status(101)
            .header("upgrade", "websocket")
            .header("connection", "upgrade");
        builder.body(Full::default()).unwrap()
    });
    let setup = connect(one(), "api.test", "api.test", false, answer).await.unwrap();
    let token = setup.placeholder("TOKEN");
    let Sender::Http1(mut sender) = setup.sender else { panic!() };
    let request = Request::builder()
        .header("host", "api.test")
        .header("upgrade", "websocket")
        .header("connection", "upgrade")
        .header("authorization", format!("Bearer {token}"))
        .body(Full::default())
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut stream = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    // The endpoint echoes; had it said the value, stars would come back.
    let mut buffer = [0; 64];
    stream.write_all(b"hello").await.unwrap();
    let count = stream.read(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..count], b"hello");
    stream.write_all(VALUE.as_bytes()).await.unwrap();
    stream.read_exact(&mut buffer[..VALUE.len()]).await.unwrap();
    assert_eq!(buffer[..VALUE.len()], *"*".repeat(VALUE.len()).as_bytes());
    stream.write_all(token.as_bytes()).await.unwrap();
    let rest = stream.read(&mut buffer).await;
    assert!(matches!(rest, Ok(0) | Err(_)), "{rest:?}");
    assert!(setup.account.blocked().0[0].contains("in an upgraded connection"));
}

#[tokio::test]
async fn large_bodies_pass_both_ways_as_they_are() {
    let whole = Arc::new("0123456789abcdef".repeat(256 * 1024));
    for h2 in [false, true] {
        let answered = whole.clone();
        let answer: Answer =
            Arc::new(move |_| Response::new(Full::from(answered.as_bytes().to_vec())));
        let mut setup = connect(one(), "api.test", "api.test", h2, answer).await.unwrap();
        let (status, headers, body) = setup.ask("/", &[], &whole).await;
        assert_eq!(status, StatusCode::OK);
        assert!(body == *whole && setup.last().body == whole.as_bytes());
        assert_eq!(headers["content-length"], whole.len().to_string());
    }
}

#[test]
fn a_value_that_no_proxy_can_deliver_is_refused() {
    for (value, words) in [
        ("short", "less than 8 bytes"),
        ("two\r\nlines-of-it", "no HTTP header"),
        ("schlüssel-1", "no HTTP header"),
    ] {
        let error = proxy(vec![("TOKEN", reach(&["api.test:443"], false, false), value)])
            .unwrap_err()
            .to_string();
        assert!(error.contains(words) && !error.contains(value), "{error}");
    }
}

#[tokio::test]
async fn the_self_test_passes_and_notices_that_nothing_is_replaced() {
    let hosts = reach(&["*.api.test:8443", "b.test:443"], true, true);
    Arc::new(proxy(vec![("TOKEN", hosts.clone(), VALUE)]).unwrap()).self_test().await.unwrap();
    // A proxy that has forgotten its placeholders.
    let mut broken = proxy(vec![("TOKEN", hosts.clone(), VALUE)]).unwrap();
    broken.placeholders = Placeholders::default();
    let error = Arc::new(broken).self_test().await.unwrap_err().to_string();
    assert!(error.contains("the endpoint did not get the value"), "{error}");
    let mut broken = proxy(vec![("TOKEN", hosts, VALUE)]).unwrap();
    broken.needles = Needles::default().into();
    let error = Arc::new(broken).self_test().await.unwrap_err().to_string();
    assert!(error.contains("the value came back"), "{error}");
}
