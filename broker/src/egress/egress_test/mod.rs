mod agent;

use std::io;
use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chitin_spec::{Delivery, EgressLimits, SecretSpec};
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::task::TaskTracker;

use super::refusal::Refusal;
use super::*;
use crate::audit_log::{ConnectionRecord, Verdict};
use crate::credentials::fetch_credentials;
use agent::{
    FixedResolver, bind_listener, make_broker, run_script, run_script_with, spec_allowing,
    start_echo_server,
};

#[tokio::test]
async fn bytes_are_relayed_unchanged_and_counted() {
    let port = start_echo_server().await;
    let names = FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]);
    // The preface of HTTP/2, and more bytes than any window has.
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00".to_vec();
    sent.extend((0..=255u8).cycle().take(2_000_000));
    let bytes = sent.clone();
    let (answer, lines) =
        run_script(spec_allowing(&[format!("a.test:{port}")]), names, move |agent| {
            let stream = agent.dial("a.test", port);
            agent.send(stream, &bytes);
            agent.wait_for_end(stream)
        })
        .await;
    assert!(answer.unwrap() == sent);
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    assert_eq!((line["host"].as_str(), line["port"].as_u64()), (Some("a.test"), Some(port.into())));
    assert_eq!((line["verdict"].as_str(), line["reason"].as_str()), (Some("allowed"), None));
    assert_eq!(line["address"].as_str(), Some("127.0.0.1"));
    assert_eq!(
        (line["sent"].as_u64(), line["received"].as_u64()),
        (Some(2_000_033), Some(2_000_033))
    );
    assert!(line["time"].as_str().unwrap().ends_with('Z') && line["duration_ms"].is_u64());
}

/// Returns verdict and reason of one dial that is refused or fails.
async fn dial_refused(
    spec: EgressSpec,
    names: Box<FixedResolver>,
    host: &str,
    port: u16,
) -> (String, String) {
    let name = host.to_owned();
    let (answer, lines) = run_script(spec, names, move |agent| {
        let stream = agent.dial(&name, port);
        agent.wait_for_end(stream)
    })
    .await;
    assert_eq!(answer, None, "{host}");
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    (line["verdict"].as_str().unwrap().to_owned(), line["reason"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn host_enforces_the_policy_for_every_dial() {
    let port = start_echo_server().await;
    let spec = || {
        spec_allowing(&[
            format!("a.test:{port}"),
            format!("*.b.test:{port}"),
            format!("*.0.0.x1:{port}"),
        ])
    };
    let everything: &[&[&str]] = &[&["127.0.0.1"]];
    let long = "a".repeat(65536);
    let cases = [
        ("c.test", port, "the policy does not list it"),
        ("b.test", port, "the policy does not list it"),
        ("a.test", 22, "the policy does not list it"),
        ("a.test", 0, "the policy does not list it"),
        ("localhost", port, "the policy does not list it"),
        ("127.0.0.1", port, "an IP address is not accepted"),
        ("169.254.169.254", 80, "an IP address is not accepted"),
        ("2130706433", port, "an IP address is not accepted"),
        ("x.0x7f000001", port, "an IP address is not accepted"),
        ("::1", port, "not a valid host name"),
        ("a.test\0.b.test", port, "not a valid host name"),
        ("A.test", port, "not a valid host name"),
        ("a.test.", port, "not a valid host name"),
        (".b.test", port, "not a valid host name"),
        ("ä.b.test", port, "not a valid host name"),
        ("", port, "not a valid host name"),
        (&long, port, "not a valid host name"),
    ];
    for (host, port, reason) in cases {
        let names = FixedResolver::new(&[
            ("a.test", everything),
            ("b.test", everything),
            ("c.test", everything),
        ]);
        let expected = ("refused".to_owned(), reason.to_owned());
        assert_eq!(dial_refused(spec(), names, host, port).await, expected, "{:.40}", host);
    }
}

#[tokio::test]
async fn name_with_special_purpose_address_is_refused() {
    let port = start_echo_server().await;
    let cases = [
        ("127.0.0.1", "a loopback address, which needs --allow-private"),
        ("::ffff:127.0.0.1", "a loopback address, which needs --allow-private"),
        ("10.0.0.1", "a private address, which needs --allow-private"),
        ("100.64.0.1", "a private address, which needs --allow-private"),
        ("169.254.169.254", "a cloud's metadata address"),
        ("fd00:ec2::254", "a cloud's metadata address"),
        ("0.0.0.0", "a reserved address"),
        ("224.0.0.1", "a multicast address"),
    ];
    for (address, words) in cases {
        let answers: &[&[&str]] = &[&[address]];
        let spec =
            EgressSpec { allow_private: false, ..spec_allowing(&[format!("a.test:{port}")]) };
        let (verdict, reason) =
            dial_refused(spec, FixedResolver::new(&[("a.test", answers)]), "a.test", port).await;
        assert_eq!(
            (verdict.as_str(), reason),
            ("refused", format!("the name resolves to {words}"))
        );
    }
    // No option allows these.
    for address in ["169.254.169.254", "fd00:ec2::254", "0.0.0.0", "::", "fe80::1"] {
        let answers: &[&[&str]] = &[&[address]];
        let spec = spec_allowing(&[format!("a.test:{port}")]);
        let (verdict, _) =
            dial_refused(spec, FixedResolver::new(&[("a.test", answers)]), "a.test", port).await;
        assert_eq!(verdict, "refused", "{address}");
    }
}

#[tokio::test]
async fn rebound_name_is_checked_on_every_dial() {
    let port = start_echo_server().await;
    // The answers of a rebinding server: an allowed address, then others. Each dial is one lookup.
    let names =
        FixedResolver::new(&[("a.test", &[&["127.0.0.1"], &["169.254.169.254"], &["127.0.0.1"]])]);
    let ((), lines) = run_script(spec_allowing(&[format!("a.test:{port}")]), names, move |agent| {
        let first = agent.dial("a.test", port);
        agent.send(first, b"hello");
        assert_eq!(agent.wait_for_end(first).as_deref(), Some(b"hello".as_slice()));
        let second = agent.dial("a.test", port);
        assert_eq!(agent.wait_for_end(second), None);
    })
    .await;
    let address = |verdict: &str| {
        lines.iter().find(|line| line["verdict"] == verdict).unwrap()["address"].clone()
    };
    assert_eq!((lines.len(), address("allowed")), (2, "127.0.0.1".into()));
    assert_eq!(address("refused"), serde_json::Value::Null);
    // Of several addresses, only allowed ones are dialled.
    let (verdict, reason) = dial_refused(
        EgressSpec { allow_private: false, ..spec_allowing(&[format!("b.test:{port}")]) },
        FixedResolver::new(&[("b.test", &[&["127.0.0.1", "10.0.0.1"]])]),
        "b.test",
        port,
    )
    .await;
    assert_eq!(verdict, "refused");
    assert!(reason.contains("--allow-private"), "{reason}");
}

#[tokio::test]
async fn failed_dial_records_its_reason() {
    // A port on which no server listens.
    let (gone, port) = bind_listener().await;
    drop(gone);
    let spec = || spec_allowing(&[format!("a.test:{port}")]);
    let failed = |reason: &str| ("failed".to_owned(), reason.to_owned());
    let dialled =
        dial_refused(spec(), FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]), "a.test", port)
            .await;
    assert_eq!(dialled, failed("connect: Connection refused (os error 111)"));
    let dialled = dial_refused(spec(), FixedResolver::new(&[]), "a.test", port).await;
    assert_eq!(dialled, failed("the name does not resolve: entity not found"));
    let dialled =
        dial_refused(spec(), FixedResolver::new(&[("a.test", &[&[]])]), "a.test", port).await;
    assert_eq!(dialled, failed("the name has no address"));
    let dialled =
        dial_refused(spec(), FixedResolver::new(&[("a.test", &[])]), "a.test", port).await;
    assert_eq!(dialled, failed("the name did not resolve within 10 s"));
}

#[tokio::test]
async fn silent_address_leaves_time_for_the_next() {
    let port = start_echo_server().await;
    // A full backlog neither accepts nor refuses connections.
    let full = socket_with_full_backlog(port);
    let names = FixedResolver::new(&[("a.test", &[&["127.0.0.9", "127.0.0.1"]])]);
    let began = Instant::now();
    let (answer, lines) =
        run_script(spec_allowing(&[format!("a.test:{port}")]), names, move |agent| {
            let stream = agent.dial("a.test", port);
            agent.send(stream, b"hello");
            agent.wait_for_end(stream)
        })
        .await;
    assert_eq!(answer.as_deref(), Some(b"hello".as_slice()));
    assert_eq!(lines[0]["address"], "127.0.0.1");
    assert!(began.elapsed() > Duration::from_secs(4), "{:?}", began.elapsed());
    drop(full);
}

fn socket_with_full_backlog(port: u16) -> Vec<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket_with};
    let address = std::net::SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 9), port);
    let socket = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap()
    };
    let mut sockets = vec![socket()];
    bind(&sockets[0], &address).unwrap();
    listen(&sockets[0], 0).unwrap();
    for _ in 0..4 {
        let client = socket();
        let _ = connect(&client, &address);
        sockets.push(client);
    }
    sockets
}

#[tokio::test]
async fn reset_is_relayed_and_recorded_both_ways() {
    let (listener, port) = bind_listener().await;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // Reset only after the connection was made.
        stream.read_exact(&mut [0]).await.unwrap();
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"y").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.map_err(|error| error.kind())
    });
    let names = FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]);
    let ((), lines) = run_script(spec_allowing(&[format!("a.test:{port}")]), names, move |agent| {
        let stream = agent.dial("a.test", port);
        agent.write(stream, b"x");
        assert_eq!(agent.wait_for_end(stream), None);
        let stream = agent.dial("a.test", port);
        agent.write(stream, b"x");
        agent.wait_for(|streams| (!streams[&stream].data.is_empty()).then_some(()));
        // The workload exits.
        agent.reset(stream);
        let stream = agent.dial("other.test", port);
        assert_eq!(agent.wait_for_end(stream), None);
    })
    .await;
    let ended = tokio::time::timeout(Duration::from_secs(10), server).await.expect("in time");
    assert_eq!(ended.unwrap(), Err(io::ErrorKind::ConnectionReset));
    let connected = lines.iter().filter(|line| line["verdict"] == "allowed");
    let reasons: Vec<_> = connected.map(|line| line["reason"].as_str().unwrap()).collect();
    assert_eq!(
        reasons,
        ["the endpoint reset the connection: connection reset", "the sandbox reset the connection"]
    );
}

#[tokio::test]
async fn endless_response_is_cut_at_the_byte_limits() {
    let (listener, port) = bind_listener().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move { while stream.write_all(&[0; 4096]).await.is_ok() {} });
        }
    });
    let everything: &[&[&str]] = &[&["127.0.0.1"]];
    let limits = EgressLimits {
        connection_bytes: Some(1_000_000),
        total_bytes: Some(1_500_000),
        ..EgressLimits::default()
    };
    let spec = EgressSpec { limits, ..spec_allowing(&[format!("a.test:{port}")]) };
    let ((), lines) =
        run_script(spec, FixedResolver::new(&[("a.test", everything)]), move |agent| {
            for _ in 0..3 {
                let stream = agent.dial("a.test", port);
                assert_eq!(agent.wait_for_end(stream), None);
                assert!(agent.wait_for(|streams| Some(streams[&stream].data.len())) <= 1_000_000);
            }
        })
        .await;
    let reasons: Vec<_> = lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    let total = "the sandbox reached its limit of 1500000 bytes";
    let expected = [
        "the connection reached its limit of 1000000 bytes",
        total,
        "the sandbox reached its limit of bytes",
    ];
    assert_eq!(reasons, expected);
}

#[tokio::test]
async fn byte_rate_is_limited() {
    let port = start_echo_server().await;
    let limits =
        EgressLimits { bytes_per_second: NonZeroU64::new(100_000), ..EgressLimits::default() };
    let spec = EgressSpec { limits, ..spec_allowing(&[format!("a.test:{port}")]) };
    let began = Instant::now();
    let (answer, _) =
        run_script(spec, FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]), move |agent| {
            let stream = agent.dial("a.test", port);
            agent.send(stream, &[1; 150_000]);
            agent.wait_for_end(stream)
        })
        .await;
    assert_eq!(answer.unwrap().len(), 150_000);
    // 300,000 bytes both ways, 100,000 of them as a burst.
    assert!(began.elapsed() > Duration::from_millis(1900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn connections_are_limited_in_number_and_rate() {
    // The kernel accepts, and no server answers.
    let (_listener, port) = bind_listener().await;
    let limits = EgressLimits { connections: 3, dials_per_second: 2, ..EgressLimits::default() };
    let spec = EgressSpec { limits, ..spec_allowing(&[format!("a.test:{port}")]) };
    let (open, lines) =
        run_script(spec, FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]), move |agent| {
            let streams: Vec<_> = (0..12).map(|_| agent.dial("a.test", port)).collect();
            agent.wait_for(|inboxes| {
                let open = streams.iter().filter(|stream| !inboxes[*stream].reset).count();
                (streams.len() - open >= 9).then_some(open)
            })
        })
        .await;
    assert_eq!(open, 3);
    let count = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    assert_eq!(count("too many concurrent connections"), 5);
    assert_eq!(count("too many new connections a second"), 4);
    // The three end with the sandbox, connected by then or not, and are recorded.
    assert_eq!(count("the sandbox reset the connection") + count("the sandbox ended"), 3);
}

#[tokio::test]
async fn flood_of_dials_is_bounded_and_counted() {
    let port = start_echo_server().await;
    let ((), lines) = run_script(
        spec_allowing(&[format!("a.test:{port}")]),
        FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]),
        move |agent| {
            for number in 0..5000 {
                let stream =
                    agent.dial(if number % 2 == 0 { "a.test" } else { "evil.example" }, port);
                agent.reset(stream);
            }
            // The rest of the flood is processed, and the buckets refill.
            std::thread::sleep(Duration::from_secs(2));
            let stream = agent.dial("a.test", port);
            agent.send(stream, b"still here");
            assert_eq!(agent.wait_for_end(stream).as_deref(), Some(b"still here".as_slice()));
        },
    )
    .await;
    let dialled = lines.iter().filter(|line| line["verdict"] == "allowed").count();
    assert!((1..1500).contains(&dialled) && lines.len() < 4000, "{dialled} of {}", lines.len());
    let omitted: u64 = lines.iter().filter_map(|line| line["omitted"].as_u64()).sum();
    assert_eq!(lines.len() as u64 + omitted, 5001);
}

#[tokio::test]
async fn denied_name_is_recorded() {
    let spec = spec_allowing(&["a.test:443".into()]);
    let ((), lines) = run_script(spec, FixedResolver::new(&[]), |agent| {
        agent.deny("evil.example");
        // The refusal of a second request shows that the first was processed.
        let stream = agent.dial("x", 1);
        assert_eq!(agent.wait_for_end(stream), None);
    })
    .await;
    assert_eq!(
        (lines[0]["host"].as_str(), lines[0]["port"].as_u64()),
        (Some("evil.example"), None)
    );
    assert_eq!(lines[0]["verdict"], "refused");
}

#[tokio::test]
async fn aws_endpoint_is_served_locally_and_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let (source, audit) = (dir.path().join("keys"), dir.path().join("audit"));
    std::fs::write(
        &source,
        r#"{"AccessKeyId":"ASIA1","SecretAccessKey":"canary-5e0c","SessionToken":"t"}"#,
    )
    .unwrap();
    let secret: SecretSpec = format!("AWS=file:{}", source.display()).parse().unwrap();
    let secret = SecretSpec { delivery: Delivery::Endpoint, ..secret };
    let fetched =
        fetch_credentials(&[secret], &Default::default(), &TaskTracker::new()).await.unwrap();
    let token = fetched
        .values
        .iter()
        .find(|value| value.name == "AWS_CONTAINER_AUTHORIZATION_TOKEN")
        .unwrap();
    let token = String::from_utf8(token.value.to_bytes().expose().to_vec()).unwrap();
    // No other endpoint is allowed.
    let spec = EgressSpec { audit: Some(audit.clone()), ..EgressSpec::default() };
    let mut broker = make_broker(&spec, FixedResolver::new(&[]));
    broker.aws_server = fetched.aws_server;
    let endpoint =
        chitin_protocol::Endpoint { host: "localhost".into(), wildcard: false, port: 9911 };
    assert_eq!(broker.wire_endpoints(), [endpoint]);
    let request = move |token: &str| {
        let head = "GET /credentials/AWS HTTP/1.1\r\nHost: 127.0.0.1:9911\r\n";
        format!("{head}Authorization: {token}\r\n\r\n")
    };
    let (answers, lines) = run_script_with(broker, &audit, move |agent| {
        let mut ask = |host, port, token: &str| {
            let stream = agent.dial(host, port);
            agent.send(stream, request(token).as_bytes());
            agent.wait_for_end(stream).map(|answer| String::from_utf8(answer).unwrap())
        };
        [
            ask("localhost", 9911, &token),
            ask("localhost", 9911, "no"),
            ask("localhost", 9912, &token),
            ask("a.localhost", 9911, &token),
        ]
    })
    .await;
    let [Some(given), Some(refused), None, None] = answers else { panic!("{answers:?}") };
    assert!(given.starts_with("HTTP/1.1 200 OK") && given.contains("canary-5e0c"), "{given}");
    assert!(refused.starts_with("HTTP/1.1 401") && !refused.contains("canary"), "{refused}");
    let verdicts: Vec<_> = lines.iter().map(|line| line["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["allowed", "refused", "refused", "refused"], "{lines:?}");
    assert_eq!(
        (&lines[0]["credentials"][0], &lines[0]["host"]),
        (&"AWS".into(), &"localhost".into())
    );
    assert!(lines.iter().all(|line| !line.to_string().contains("canary")), "{lines:?}");
}

#[tokio::test]
async fn unwritable_audit_log_refuses_every_dial() {
    let port = start_echo_server().await;
    let spec = EgressSpec {
        audit: Some("/dev/full".into()),
        ..spec_allowing(&[format!("a.test:{port}")])
    };
    let broker = make_broker(&spec, FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]));
    assert!(broker.dialer.dial("a.test", port).await.is_ok());
    broker.audit.record_connection(ConnectionRecord::new("a", None, Verdict::Refused, None));
    assert!(matches!(broker.dialer.dial("a.test", port).await, Err(Refusal::Audit)));
    let missing = EgressSpec { audit: Some("/nonexistent/audit".into()), ..EgressSpec::default() };
    let error = missing.validate().unwrap_err();
    let EgressError::Audit { path, source } = error else { panic!("{error:?}") };
    assert_eq!(path, Path::new("/nonexistent/audit"));
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn refused_proxied_connection_is_not_allowed() {
    let port = start_echo_server().await;
    let dir = tempfile::tempdir().unwrap();
    let (source, audit) = (dir.path().join("secret"), dir.path().join("audit"));
    std::fs::write(&source, "canary-77a1b2c3").unwrap();
    let secret = format!("T=file:{}@a.test:{port}", source.display()).parse().unwrap();
    let fetched =
        fetch_credentials(&[secret], &Default::default(), &TaskTracker::new()).await.unwrap();
    let reported = Arc::new(Mutex::new(Vec::new()));
    let sink = reported.clone();
    let observer =
        RefusalObserver::new(move |refused| sink.lock().unwrap().push(refused.to_string()));
    let spec = EgressSpec {
        audit: Some(audit.clone()),
        observer: Some(observer),
        ..spec_allowing(&[format!("a.test:{port}")])
    };
    let mut broker = make_broker(&spec, FixedResolver::new(&[("a.test", &[&["127.0.0.1"]])]));
    broker.proxy = fetched.proxy;
    let (_, lines) = run_script_with(broker, &audit, move |agent| {
        let stream = agent.dial("a.test", port);
        agent.send(stream, b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
        agent.wait_for_end(stream)
    })
    .await;
    let verdicts: Vec<_> = lines.iter().map(|line| line["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["refused"], "{lines:?}");
    let reported = reported.lock().unwrap();
    assert!(matches!(reported.as_slice(), [line] if line.contains("TLS only")), "{reported:?}");
}
