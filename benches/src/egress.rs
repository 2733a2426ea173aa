//! Requests over TLS to a server of this process: from this host, through a sandbox's egress, and through its proxy of credentials.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use chitin::{
    Builder, Delivery, ECHO, EgressLimits, Exit, ProxyScope, Sandbox, SecretSource, SecretSpec,
    TierKind,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde::Serialize;

use super::stats::{self, Row};
use super::{Guest, Output, plot, progress, since};
use crate::failure::Failure;

const MIB: u64 = 1 << 20;

/// What a small answer holds.
const SMALL: u64 = 1024;

/// What each request holds, or the placeholder of.
const VARIABLE: &str = "CHITIN_BENCH_KEY";
const KEY: &str = "bench-0123456789abcdef";

/// Round trips of commands, to compare a connection with.
const COMMANDS: u32 = 20;

/// The client, here and there: `PORT PLAIN COUNT BYTES CERTIFICATE`. A line for each request, nanoseconds: until all was
/// received, and from the first byte of the answer on; then the same of connections that get one byte. The first of each finds
/// everything cold, and is not counted.
const CLIENT: &str = "
import os, socket, ssl, sys, time
port, plain, count, size = map(int, sys.argv[1:5])
context = ssl.create_default_context(cadata=sys.argv[5] or None)
request = 'GET /%d HTTP/1.1\\r\\nHost: localhost:%d\\r\\nX-Key: %s\\r\\nConnection: close\\r\\n\\r\\n' % (size, port, os.environ['CHITIN_BENCH_KEY'])
buffer = bytearray(1 << 18)
now = time.perf_counter_ns
for i in range(count + 1):
    began = now()
    with socket.create_connection(('127.0.0.1', port)) as s, context.wrap_socket(s, server_hostname='localhost') as t:
        t.sendall(request.encode())
        got = t.recv_into(buffer)
        first = now()
        while n := t.recv_into(buffer):
            got += n
        ended = now()
    if got <= size:
        sys.exit('an answer of %d bytes' % got)
    if i:
        print(ended - began, ended - first)
for i in range(count + 1):
    began = now()
    with socket.create_connection(('127.0.0.1', plain)) as s:
        s.sendall(b'x')
        s.recv(1)
        ended = now()
    if i:
        print(ended - began, 0)
";

/// Arguments of `chitin-bench egress`.
#[derive(clap::Args)]
#[command(
    after_help = "A request is a connection, a TLS handshake, and an answer of 1 KiB or of SIZE; the client is the same Python program in all three
places, the server a thread of this process. `egress` passes TLS on, `proxy` takes it apart to replace a placeholder.

Examples:
  chitin-bench egress --size 100
  chitin-bench egress --tier nanoclaw --runs 200"
)]
pub struct Args {
    /// How many small requests, one after the other
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// MiB of the large answer
    #[arg(long, value_name = "MIB", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=4096))]
    size: u64,

    /// How many large ones
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    large: u32,

    /// How to isolate the sandbox
    #[arg(long, value_name = "T", default_value_t = TierKind::Ironclaw)]
    tier: TierKind,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    tier: String,
    runs: u32,
    size_mib: u64,
    /// Nanoseconds of a small request.
    requests: Vec<Row>,
    /// Nanoseconds of a large one, from the first byte of its answer on; and the same in bytes per second.
    answers: Vec<Row>,
    rates: Vec<Row>,
    /// Nanoseconds: a connection that gets a byte, and the round trip of a command.
    connections: Vec<Row>,
}

/// Where requests come from.
enum Place {
    Host(Command),
    Sandbox(Sandbox),
}

/// What one place has measured.
struct Measured {
    requests: Vec<u64>,
    answers: Vec<u64>,
    connections: Vec<u64>,
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let server = Server::start()?;
    let dir = tempfile::tempdir().map_err(failed("create a directory"))?;
    let path = dir.path().join("key");
    std::fs::write(&path, KEY).map_err(failed("write a credential"))?;
    let endpoint = format!("localhost:{}", server.port);
    let plain = format!("localhost:{}", server.plain);
    // The limit on connections a second is for floods, and this is one.
    let limits = EgressLimits { dials_per_second: 10_000, ..EgressLimits::default() };
    let builder =
        || args.guest.builder().tier(args.tier).allow_private(true).egress_limits(limits.clone());
    let open = |builder: Builder| builder.allow(&endpoint).allow(&plain);
    let hosts = vec![endpoint.parse().map_err(Failure::Usage)?];
    let delivery = Delivery::Proxy(ProxyScope { hosts, query: false, body: false });
    let secret = SecretSpec { name: VARIABLE.into(), source: SecretSource::File(path), delivery };

    let progress = progress(3, "places");
    let host =
        measure(&Place::Host(Command::new("python3")), &args, &server, &server.certificate).await?;
    progress.inc(1);
    let sandbox = open(builder()).start().await?;
    let mut commands = Vec::new();
    for _ in 0..COMMANDS {
        let asked = Instant::now();
        sandbox.command(ECHO).arg("chitin").output().await?;
        commands.push(since(asked));
    }
    let place = Place::Sandbox(sandbox);
    let egress = measure(&place, &args, &server, &server.certificate).await?;
    place.end().await?;
    progress.inc(1);
    let place = Place::Sandbox(
        open(builder()).secret_spec(secret).trust(&server.certificate).start().await?,
    );
    let proxy = measure(&place, &args, &server, "").await?;
    place.end().await?;
    progress.finish_and_clear();

    let rows = |of: &dyn Fn(&Measured) -> Vec<u64>| {
        let places = [("host", &host), ("egress", &egress), ("proxy", &proxy)];
        places.into_iter().filter_map(|(name, place)| Row::of(name, of(place))).collect::<Vec<_>>()
    };
    let rate = |took: &u64| stats::rate(args.size * MIB, Duration::from_nanos(*took));
    let requests = rows(&|place| place.requests.clone());
    let answers = rows(&|place| place.answers.clone());
    let rates = rows(&|place| place.answers.iter().map(rate).collect());
    let mut connections = rows(&|place| place.connections.clone());
    connections.extend(Row::of("command", commands));
    let report = Report {
        chitin: env!("CARGO_PKG_VERSION"),
        tier: args.tier.to_string(),
        runs: args.runs,
        size_mib: args.size,
        requests,
        answers,
        rates,
        connections,
    };
    let title = format!("{} requests of 1 KiB over TLS, {}", args.runs, args.tier);
    println!("{title}; milliseconds each");
    stats::print("from", &report.requests, 1e6);
    println!("answers of {} MiB; MiB per second", args.size);
    stats::print("from", &report.rates, stats::scaled(MIB, 1.0));
    println!("connections that get a byte, and commands; milliseconds each");
    stats::print("from", &report.connections, 1e6);
    compare(&report);
    args.output.write(&report, || plot::rates(&title, &report.rates))?;
    Ok(0)
}

/// In a sentence.
fn compare(report: &Report) {
    let median =
        |rows: &[Row], name| rows.iter().find(|row| row.name == name).map_or(0, |row| row.median);
    let added = |name| {
        stats::scaled(median(&report.requests, name), 1e6)
            - stats::scaled(median(&report.requests, "host"), 1e6)
    };
    let part = |name| {
        let whole = median(&report.rates, "host").max(1);
        100.0 * stats::scaled(median(&report.rates, name), 1.0) / stats::scaled(whole, 1.0)
    };
    for name in ["egress", "proxy"] {
        println!(
            "{name}: {:.3} ms more for each request, {:.0} % of the rate",
            added(name),
            part(name)
        );
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| Failure::Io { what: what.into(), source }
}

async fn measure(
    place: &Place,
    args: &Args,
    server: &Server,
    trusted: &str,
) -> Result<Measured, Failure> {
    let small = place.client(server, args.runs, SMALL, trusted).await?;
    let large = place.client(server, args.large, args.size * MIB, trusted).await?;
    let runs = args.runs as usize;
    Ok(Measured {
        requests: small.iter().take(runs).map(|(all, _)| *all).collect(),
        connections: small.iter().skip(runs).map(|(all, _)| *all).collect(),
        answers: large.iter().take(args.large as usize).map(|(_, took)| *took).collect(),
    })
}

impl Place {
    /// Runs the client; what its lines say.
    async fn client(
        &self,
        server: &Server,
        count: u32,
        bytes: u64,
        trusted: &str,
    ) -> Result<Vec<(u64, u64)>, Failure> {
        let numbers = [u64::from(server.port), u64::from(server.plain), u64::from(count), bytes];
        let numbers = numbers.map(|number| number.to_string());
        let words =
            ["-c", CLIENT].into_iter().chain(numbers.iter().map(String::as_str)).chain([trusted]);
        let (good, stdout, stderr) = match self {
            Place::Host(python) => {
                let mut command = Command::new(python.get_program());
                command.args(words).env(VARIABLE, KEY).stdin(Stdio::null());
                let output =
                    command.output().map_err(failed("start python3, the client on this host"))?;
                (output.status.success(), output.stdout, output.stderr)
            }
            Place::Sandbox(sandbox) => {
                let mut command = sandbox.command("python3").args(words);
                if !trusted.is_empty() {
                    command = command.env(VARIABLE, KEY);
                }
                let output = command.output().await?;
                (output.exit == Exit::Code(0), output.stdout, output.stderr)
            }
        };
        let text = String::from_utf8_lossy(&stdout);
        let line = |line: &str| {
            let (all, rest) = line.split_once(' ')?;
            Some((all.parse().ok()?, rest.parse().ok()?))
        };
        let lines: Option<Vec<(u64, u64)>> = text.lines().map(line).collect();
        match lines {
            Some(lines) if good && lines.len() == 2 * count as usize => Ok(lines),
            _ => {
                let why = String::from_utf8_lossy(&stderr);
                let last = why.lines().last().unwrap_or("it said nothing").to_owned();
                Err(Failure::Usage(format!("the client of the measurement went wrong: {last}")))
            }
        }
    }

    async fn end(self) -> Result<(), Failure> {
        match self {
            Place::Host(_) => Ok(()),
            Place::Sandbox(sandbox) => Ok(sandbox.stop().await?),
        }
    }
}

/// Answers `GET /N` with N bytes, over TLS; and, at another port, each byte with one.
struct Server {
    port: u16,
    plain: u16,
    /// PEM.
    certificate: String,
}

impl Server {
    fn start() -> Result<Server, Failure> {
        let other = |error: &dyn std::fmt::Display| Failure::Io {
            what: "make a server".into(),
            source: io::Error::other(error.to_string()),
        };
        let key = rcgen::generate_simple_self_signed(["localhost".to_owned()])
            .map_err(|error| other(&error))?;
        let private =
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()));
        let config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .map_err(|error| other(&error))?
                .with_no_client_auth()
                .with_single_cert(vec![key.cert.der().clone()], private)
                .map_err(|error| other(&error))?;
        let config = Arc::new(config);
        let tls = listen(move |socket| answer(&config, socket))?;
        let plain = listen(|mut socket| {
            let mut byte = [0];
            socket.read_exact(&mut byte)?;
            socket.write_all(&byte)
        })?;
        Ok(Server { port: tls, plain, certificate: key.cert.pem() })
    }
}

/// Listens on a free port, with a thread for each connection.
fn listen(
    serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) -> Result<u16, Failure> {
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed("listen on 127.0.0.1"))?;
    let port = listener.local_addr().map_err(failed("listen on 127.0.0.1"))?.port();
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let serve = serve.clone();
            // What goes wrong here is seen by the client, which says so.
            thread::spawn(move || socket.set_nodelay(true).and_then(|()| serve(socket)));
        }
    });
    Ok(port)
}

fn answer(config: &Arc<ServerConfig>, socket: TcpStream) -> io::Result<()> {
    let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    let (mut request, mut piece) = (Vec::new(), [0; 4096]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    let text = String::from_utf8_lossy(&request);
    let length = text.strip_prefix("GET /").and_then(|rest| rest.split(' ').next()?.parse().ok());
    let mut left: u64 = length.unwrap_or(0);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {left}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let piece = vec![b'x'; 64 * 1024];
    while left > 0 {
        let count = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&piece[..count])?;
        left -= count as u64;
    }
    stream.conn.send_close_notify();
    stream.flush()
}
