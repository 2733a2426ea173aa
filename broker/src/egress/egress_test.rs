use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;

use chitin_protocol::{Connection, Direction, Event, Guest, StreamId, ToHost};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

use super::*;

/// The agent of a guest that does what the test says.
struct Agent {
    socket: StdStream,
    connection: Connection<Guest>,
    data: HashMap<StreamId, Vec<u8>>,
    ended: Vec<StreamId>,
    reset: Vec<StreamId>,
}

impl Agent {
    fn dial(&mut self, host: &str, port: u16) -> StreamId {
        let stream = self.connection.open_stream(Direction::Both).unwrap();
        self.connection.send_message(&ToHost::Dial { host: host.into(), port, stream }).unwrap();
        stream
    }

    fn flush(&mut self) {
        while !self.connection.pending_output().is_empty() {
            let count = self.socket.write(self.connection.pending_output()).unwrap();
            self.connection.consume_output(count);
        }
    }

    fn turn(&mut self) {
        self.flush();
        let count = self.socket.read(self.connection.input_buffer()).unwrap();
        assert!(count > 0, "the host has closed the channel");
        self.connection.commit_input(count);
        loop {
            let (stream, count) = match self.connection.next_event().unwrap() {
                None => return,
                Some(Event::Data { stream, bytes }) => {
                    self.data.entry(stream).or_default().extend(bytes);
                    (stream, bytes.len())
                }
                Some(Event::End { stream }) => {
                    self.ended.push(stream);
                    continue;
                }
                Some(Event::Reset { stream }) => {
                    self.reset.push(stream);
                    continue;
                }
                Some(_) => continue,
            };
            self.connection.return_credit(stream, count);
        }
    }

    /// Sends all of it, and the end.
    fn send(&mut self, stream: StreamId, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.reset.contains(&stream) {
            bytes = &bytes[self.connection.send_data(stream, bytes)..];
            if !bytes.is_empty() {
                self.turn();
            }
        }
        self.connection.end_stream(stream);
    }

    /// What came on the stream, once it has ended; `None` if it was reset.
    fn received(&mut self, stream: StreamId) -> Option<Vec<u8>> {
        while !self.ended.contains(&stream) && !self.reset.contains(&stream) {
            self.turn();
        }
        (!self.reset.contains(&stream)).then(|| self.data.remove(&stream).unwrap_or_default())
    }
}

/// Names that are what the test says they are; the second answer to a name may be another.
#[derive(Debug, Default)]
struct Names {
    names: HashMap<&'static str, Vec<Vec<IpAddr>>>,
    asked: Mutex<HashMap<String, usize>>,
}

impl Names {
    fn of(names: &[(&'static str, &[&[&str]])]) -> Box<Names> {
        let parse =
            |answer: &&[&str]| answer.iter().map(|address| address.parse().unwrap()).collect();
        let names = names
            .iter()
            .map(|(name, answers)| (*name, answers.iter().map(parse).collect()))
            .collect();
        Box::new(Names { names, asked: Mutex::default() })
    }
}

impl Resolve for Names {
    fn resolve(&self, host: &str) -> resolve::Answer<'_> {
        let mut asked = self.asked.lock().unwrap();
        let times = asked.entry(host.to_owned()).or_default();
        let answers = self.names.get(host).cloned();
        let turn = *times;
        *times += 1;
        Box::pin(async move {
            let mut answers = answers.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            if answers.is_empty() {
                // It never answers.
                std::future::pending::<()>().await;
            }
            Ok(answers.swap_remove(turn.min(answers.len() - 1)))
        })
    }
}

fn allowing(endpoints: &[String]) -> Spec {
    let mut spec = Spec { allow_private: true, ..Spec::default() };
    spec.allow(endpoints.iter().map(|endpoint| endpoint.parse().unwrap()));
    spec
}

/// Runs the script against a broker, and gives the lines of its audit.
async fn against<T: Send + 'static>(
    mut spec: Spec,
    names: Box<Names>,
    script: impl FnOnce(&mut Agent) -> T + Send + 'static,
) -> (T, Vec<serde_json::Value>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    spec.audit = Some(path.clone());
    let broker = broker(&spec, names);
    with_broker(broker, &path, script).await
}

fn broker(spec: &Spec, names: Box<Names>) -> Broker {
    Broker::with(spec, Arc::new(spec.open_audit().unwrap()), names)
}

async fn with_broker<T: Send + 'static>(
    broker: Broker,
    audit: &Path,
    script: impl FnOnce(&mut Agent) -> T + Send + 'static,
) -> (T, Vec<serde_json::Value>) {
    let broker = Arc::new(broker);
    let (ours, socket) = StdStream::pair().unwrap();
    let channel = Channel::new(ours);
    let serving = tokio::spawn(broker.serve(channel.clone(), channel.knocks()));
    let agent = tokio::task::spawn_blocking(move || {
        let (data, ended, reset) = Default::default();
        let mut agent = Agent { socket, connection: Connection::new(), data, ended, reset };
        script(&mut agent)
    });
    let limit = Duration::from_secs(20);
    let outcome = tokio::time::timeout(limit, agent).await.expect("in time").unwrap();
    channel.close();
    tokio::time::timeout(limit, serving).await.expect("in time").unwrap();
    (outcome, lines(audit))
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A server that answers each connection with what came on it, to the end.
async fn echo() -> u16 {
    let (listener, port) = listener().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    port
}

#[tokio::test]
async fn bytes_pass_as_they_are_and_are_counted() {
    let port = echo().await;
    let names = Names::of(&[("a.test", &[&["127.0.0.1"]])]);
    // What an HTTP/2 client sends first, and a good deal more than any window.
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00".to_vec();
    sent.extend((0..=255u8).cycle().take(2_000_000));
    let bytes = sent.clone();
    let (answer, lines) = against(allowing(&[format!("a.test:{port}")]), names, move |agent| {
        let stream = agent.dial("a.test", port);
        agent.send(stream, &bytes);
        agent.received(stream)
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

/// The reason and verdict of one dial that comes to nothing.
async fn refusal(spec: Spec, names: Box<Names>, host: &str, port: u16) -> (String, String) {
    let name = host.to_owned();
    let (answer, lines) = against(spec, names, move |agent| {
        let stream = agent.dial(&name, port);
        agent.received(stream)
    })
    .await;
    assert_eq!(answer, None, "{host}");
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    (line["verdict"].as_str().unwrap().to_owned(), line["reason"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn the_policy_is_checked_again() {
    let port = echo().await;
    let spec = || {
        allowing(&[
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
        ("127.0.0.1", port, "an address is not a name"),
        ("169.254.169.254", 80, "an address is not a name"),
        ("2130706433", port, "an address is not a name"),
        ("x.0x7f000001", port, "an address is not a name"),
        ("::1", port, "no host has such a name"),
        ("a.test\0.b.test", port, "no host has such a name"),
        ("A.test", port, "no host has such a name"),
        ("a.test.", port, "no host has such a name"),
        (".b.test", port, "no host has such a name"),
        ("ä.b.test", port, "no host has such a name"),
        ("", port, "no host has such a name"),
        (&long, port, "no host has such a name"),
    ];
    for (host, port, reason) in cases {
        let names =
            Names::of(&[("a.test", everything), ("b.test", everything), ("c.test", everything)]);
        let expected = ("refused".to_owned(), reason.to_owned());
        assert_eq!(refusal(spec(), names, host, port).await, expected, "{:.40}", host);
    }
}

#[tokio::test]
async fn a_name_that_is_not_public_is_refused_after_it_was_resolved() {
    let port = echo().await;
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
        let spec = Spec { allow_private: false, ..allowing(&[format!("a.test:{port}")]) };
        let (verdict, reason) =
            refusal(spec, Names::of(&[("a.test", answers)]), "a.test", port).await;
        assert_eq!((verdict.as_str(), reason), ("refused", format!("it resolves to {words}")));
    }
    // No option lets these through.
    for address in ["169.254.169.254", "fd00:ec2::254", "0.0.0.0", "::", "fe80::1"] {
        let answers: &[&[&str]] = &[&[address]];
        let spec = allowing(&[format!("a.test:{port}")]);
        let (verdict, _) = refusal(spec, Names::of(&[("a.test", answers)]), "a.test", port).await;
        assert_eq!(verdict, "refused", "{address}");
    }
}

#[tokio::test]
async fn a_name_that_changes_its_mind_is_checked_each_time_and_dialled_as_checked() {
    let port = echo().await;
    // Public first, then this host, as a rebinding server answers; there is one lookup a dial, so the second is a dial's own.
    let names = Names::of(&[("a.test", &[&["127.0.0.1"], &["169.254.169.254"], &["127.0.0.1"]])]);
    let ((), lines) = against(allowing(&[format!("a.test:{port}")]), names, move |agent| {
        let first = agent.dial("a.test", port);
        agent.send(first, b"hello");
        assert_eq!(agent.received(first).as_deref(), Some(b"hello".as_slice()));
        let second = agent.dial("a.test", port);
        assert_eq!(agent.received(second), None);
    })
    .await;
    let address = |verdict: &str| {
        lines.iter().find(|line| line["verdict"] == verdict).unwrap()["address"].clone()
    };
    assert_eq!((lines.len(), address("allowed")), (2, "127.0.0.1".into()));
    assert_eq!(address("refused"), serde_json::Value::Null);
    // Of several addresses only those are dialled that may be.
    let (verdict, reason) = refusal(
        Spec { allow_private: false, ..allowing(&[format!("b.test:{port}")]) },
        Names::of(&[("b.test", &[&["127.0.0.1", "10.0.0.1"]])]),
        "b.test",
        port,
    )
    .await;
    assert_eq!(verdict, "refused");
    assert!(reason.contains("--allow-private"), "{reason}");
}

#[tokio::test]
async fn what_cannot_be_reached_says_why() {
    // A port that was free a moment ago.
    let (gone, port) = listener().await;
    drop(gone);
    let spec = || allowing(&[format!("a.test:{port}")]);
    let failed = |reason: &str| ("failed".to_owned(), reason.to_owned());
    let dialled =
        refusal(spec(), Names::of(&[("a.test", &[&["127.0.0.1"]])]), "a.test", port).await;
    assert_eq!(dialled, failed("connect: Connection refused (os error 111)"));
    let dialled = refusal(spec(), Names::of(&[]), "a.test", port).await;
    assert_eq!(dialled, failed("it does not resolve: entity not found"));
    let dialled = refusal(spec(), Names::of(&[("a.test", &[&[]])]), "a.test", port).await;
    assert_eq!(dialled, failed("it has no address"));
    let dialled = refusal(spec(), Names::of(&[("a.test", &[])]), "a.test", port).await;
    assert_eq!(dialled, failed("it did not resolve within 10 s"));
}

#[tokio::test]
async fn a_silent_address_leaves_the_next_its_time() {
    let port = echo().await;
    // A backlog that is full takes no connection, and refuses none.
    let full = socket_with_full_backlog(port);
    let names = Names::of(&[("a.test", &[&["127.0.0.9", "127.0.0.1"]])]);
    let began = Instant::now();
    let (answer, lines) = against(allowing(&[format!("a.test:{port}")]), names, move |agent| {
        let stream = agent.dial("a.test", port);
        agent.send(stream, b"hello");
        agent.received(stream)
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
async fn an_endpoint_that_resets_or_is_reset_is_told_from_one_that_ends() {
    let (listener, port) = listener().await;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // Not before the connection has been made.
        stream.read_exact(&mut [0]).await.unwrap();
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"y").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.map_err(|error| error.kind())
    });
    let names = Names::of(&[("a.test", &[&["127.0.0.1"]])]);
    let ((), lines) = against(allowing(&[format!("a.test:{port}")]), names, move |agent| {
        let stream = agent.dial("a.test", port);
        agent.connection.send_data(stream, b"x");
        assert_eq!(agent.received(stream), None);
        let stream = agent.dial("a.test", port);
        agent.connection.send_data(stream, b"x");
        while !agent.data.contains_key(&stream) {
            agent.turn();
        }
        // The workload dies.
        agent.connection.reset_stream(stream);
        let stream = agent.dial("other.test", port);
        assert_eq!(agent.received(stream), None);
    })
    .await;
    let ended = tokio::time::timeout(Duration::from_secs(10), server).await.expect("in time");
    assert_eq!(ended.unwrap(), Err(io::ErrorKind::ConnectionReset));
    let connected = lines.iter().filter(|line| line["verdict"] == "allowed");
    let reasons: Vec<_> = connected.map(|line| line["reason"].as_str().unwrap()).collect();
    assert_eq!(
        reasons,
        ["the endpoint broke it off: connection reset", "the sandbox broke it off"]
    );
}

#[tokio::test]
async fn an_endpoint_that_answers_for_ever_meets_the_limits() {
    let (listener, port) = listener().await;
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
    let spec = Spec { limits, ..allowing(&[format!("a.test:{port}")]) };
    let ((), lines) = against(spec, Names::of(&[("a.test", everything)]), move |agent| {
        for _ in 0..3 {
            let stream = agent.dial("a.test", port);
            assert_eq!(agent.received(stream), None);
            assert!(agent.data.remove(&stream).unwrap_or_default().len() <= 1_000_000);
        }
    })
    .await;
    let reasons: Vec<_> = lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    let total = "the sandbox's limit of 1500000 bytes was reached";
    let expected = [
        "the limit of 1000000 bytes a connection was reached",
        total,
        "the sandbox's limit of bytes was reached",
    ];
    assert_eq!(reasons, expected);
}

#[tokio::test]
async fn bytes_a_second_are_kept_to() {
    let port = echo().await;
    let limits =
        EgressLimits { bytes_per_second: NonZeroU64::new(100_000), ..EgressLimits::default() };
    let spec = Spec { limits, ..allowing(&[format!("a.test:{port}")]) };
    let began = Instant::now();
    let (answer, _) = against(spec, Names::of(&[("a.test", &[&["127.0.0.1"]])]), move |agent| {
        let stream = agent.dial("a.test", port);
        agent.send(stream, &[1; 150_000]);
        agent.received(stream)
    })
    .await;
    assert_eq!(answer.unwrap().len(), 150_000);
    // 300,000 bytes both ways, 100,000 of them at once.
    assert!(began.elapsed() > Duration::from_millis(1900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn connections_have_a_number_and_a_rate() {
    // It accepts in the kernel and never answers.
    let (_listener, port) = listener().await;
    let limits = EgressLimits { connections: 3, dials_per_second: 2, ..EgressLimits::default() };
    let spec = Spec { limits, ..allowing(&[format!("a.test:{port}")]) };
    let (open, lines) = against(spec, Names::of(&[("a.test", &[&["127.0.0.1"]])]), move |agent| {
        let streams: Vec<_> = (0..12).map(|_| agent.dial("a.test", port)).collect();
        while agent.reset.len() < 9 {
            agent.turn();
        }
        streams.iter().filter(|stream| !agent.reset.contains(stream)).count()
    })
    .await;
    assert_eq!(open, 3);
    let count = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    assert_eq!(count("too many connections at once"), 5);
    assert_eq!(count("too many connections in a short time"), 4);
    // The three end with the sandbox, connected by then or not, and are written down.
    assert_eq!(count("the sandbox broke it off") + count("the sandbox ended"), 3);
}

#[tokio::test]
async fn a_flood_of_dials_costs_little_and_hides_nothing_that_was_connected() {
    let port = echo().await;
    let ((), lines) = against(
        allowing(&[format!("a.test:{port}")]),
        Names::of(&[("a.test", &[&["127.0.0.1"]])]),
        move |agent| {
            for number in 0..5000 {
                let stream =
                    agent.dial(if number % 2 == 0 { "a.test" } else { "evil.example" }, port);
                agent.connection.reset_stream(stream);
                agent.flush();
            }
            // What is left of it is dealt with, and then there is room again.
            std::thread::sleep(Duration::from_secs(2));
            let stream = agent.dial("a.test", port);
            agent.send(stream, b"still here");
            assert_eq!(agent.received(stream).as_deref(), Some(b"still here".as_slice()));
        },
    )
    .await;
    let dialled = lines.iter().filter(|line| line["verdict"] == "allowed").count();
    assert!((1..1500).contains(&dialled) && lines.len() < 4000, "{dialled} of {}", lines.len());
    let omitted: u64 = lines.iter().filter_map(|line| line["omitted"].as_u64()).sum();
    assert_eq!(lines.len() as u64 + omitted, 5001);
}

#[tokio::test]
async fn refused_names_are_written_down_and_dials_without_egress_are_a_breach() {
    let spec = allowing(&["a.test:443".into()]);
    let ((), lines) = against(spec, Names::of(&[]), |agent| {
        agent.connection.send_message(&ToHost::Denied { host: "evil.example".into() }).unwrap();
        // Something that is answered, so that it has been heard.
        let stream = agent.dial("x", 1);
        assert_eq!(agent.received(stream), None);
    })
    .await;
    assert_eq!(
        (lines[0]["host"].as_str(), lines[0]["port"].as_u64()),
        (Some("evil.example"), None)
    );
    assert_eq!(lines[0]["verdict"], "refused");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let channel = Channel::new(ours.into_std().unwrap());
    let mut connection = Connection::<Guest>::new();
    let stream = connection.open_stream(Direction::Both).unwrap();
    connection.send_message(&ToHost::Dial { host: "a.test".into(), port: 443, stream }).unwrap();
    let mut theirs = theirs;
    theirs.write_all(connection.pending_output()).await.unwrap();
    let why = channel.closed().await;
    assert_eq!(
        why,
        crate::channel::Closed::Fault(chitin_protocol::Unexpected::EgressNotEnabled.into())
    );
}

#[tokio::test]
async fn an_endpoint_for_keys_leads_nowhere_and_is_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let (source, audit) = (dir.path().join("keys"), dir.path().join("audit"));
    std::fs::write(
        &source,
        r#"{"AccessKeyId":"ASIA1","SecretAccessKey":"canary-5e0c","SessionToken":"t"}"#,
    )
    .unwrap();
    let secret: crate::SecretSpec = format!("AWS=file:{}", source.display()).parse().unwrap();
    let secret = crate::SecretSpec { delivery: crate::Delivery::Endpoint, ..secret };
    let fetched = crate::credential::fetch(&[secret], &Default::default()).await.unwrap();
    let token = fetched
        .values
        .iter()
        .find(|value| value.name == "AWS_CONTAINER_AUTHORIZATION_TOKEN")
        .unwrap();
    let token = String::from_utf8(token.value.to_bytes().expose().to_vec()).unwrap();
    // Nothing else is allowed.
    let spec = Spec { audit: Some(audit.clone()), ..Spec::default() };
    let broker = Broker { keys: fetched.endpoint, ..broker(&spec, Names::of(&[])) };
    let endpoint =
        chitin_protocol::Endpoint { host: "localhost".into(), wildcard: false, port: 9911 };
    assert_eq!(broker.wire(), [endpoint]);
    let request = move |token: &str| {
        format!(
            "GET /credentials/AWS HTTP/1.1\r\nHost: 127.0.0.1:9911\r\nAuthorization: {token}\r\n\r\n"
        )
    };
    let (answers, lines) = with_broker(broker, &audit, move |agent| {
        let mut ask = |host, port, token: &str| {
            let stream = agent.dial(host, port);
            agent.send(stream, request(token).as_bytes());
            agent.received(stream).map(|answer| String::from_utf8(answer).unwrap())
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
async fn what_cannot_be_written_down_is_not_done() {
    let port = echo().await;
    let spec = Spec { audit: Some("/dev/full".into()), ..allowing(&[format!("a.test:{port}")]) };
    let broker = broker(&spec, Names::of(&[("a.test", &[&["127.0.0.1"]])]));
    assert!(broker.dial("a.test", port).await.is_ok());
    broker.audit.write(Line::new("a", None, Verdict::Refused, None));
    assert!(matches!(broker.dial("a.test", port).await, Err(Refusal::Audit)));
    let missing = Spec { audit: Some("/nonexistent/audit".into()), ..Spec::default() };
    let error = missing.check().unwrap_err();
    assert_eq!(error.to_string(), "write the audit of connections to /nonexistent/audit");
}

#[test]
fn endpoints_are_names_and_ports() {
    let good = [
        ("api.example.com:443", "api.example.com:443"),
        ("API.Example.COM:443", "api.example.com:443"),
        ("*.example.com:8443", "*.example.com:8443"),
        ("bücher.example:443", "xn--bcher-kva.example:443"),
        ("*.BÜCHER.example:443", "*.xn--bcher-kva.example:443"),
        ("localhost:80", "localhost:80"),
        ("1.a:65535", "1.a:65535"),
    ];
    for (text, endpoint) in good {
        assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), endpoint, "{text}");
    }
    let long = format!("{}:443", "a.".repeat(32_768));
    let label = format!("{}.test:443", "a".repeat(64));
    let name = format!("{}a.test:443", "a.".repeat(125));
    let bad = [
        ("api.example.com", "there is no port"),
        ("a.test:0", "from 1 to 65535"),
        ("a.test:70000", "from 1 to 65535"),
        ("a.test:", "from 1 to 65535"),
        ("a.test:https", "from 1 to 65535"),
        ("a\0.test:443", "letters, digits"),
        ("a\u{1b}[2J.test:443", "letters, digits"),
        (":443", "letters, digits"),
        ("a..test:443", "letters, digits"),
        ("-a.test:443", "letters, digits"),
        ("a.*.test:443", "letters, digits"),
        ("*.com:443", "top-level"),
        ("*:443", "letters, digits"),
        ("127.0.0.1:443", "an address"),
        ("[::1]:443", "an address"),
        ("::1:443", "an address"),
        ("127.1:443", "an address"),
        ("2130706433:443", "an address"),
        ("0x7f000001:443", "an address"),
        ("*.0.0.1:443", "an address"),
        ("\u{fffd}.test:443", "no name"),
        (&long, "at most 253 bytes"),
        (&name, "at most 253 bytes"),
        (&label, "letters, digits"),
    ];
    for (text, words) in bad {
        let error = text.parse::<Endpoint>().unwrap_err();
        assert!(error.contains(words), "{error}");
        assert!(error.len() < 1000 && !error.contains(['\0', '\u{1b}', '\n']), "{error}");
    }
}
