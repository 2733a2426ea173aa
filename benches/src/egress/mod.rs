//! `chitin-bench egress`: HTTPS requests to a server of this process, from the host, through the
//! egress of a sandbox, and through its credential proxy.

mod client;
mod server;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use chitin::{
    Builder, Delivery, ECHO, EgressLimits, ProxyScope, SecretSource, SecretSpec, TierKind,
};
use serde::Serialize;

use self::client::{ClientTimes, KEY, KEY_VARIABLE, Location};
use self::server::Server;
use crate::args::{GuestArgs, OutputArgs};
use crate::error::BenchError;
use crate::plot;
use crate::stats::{
    KIB, MIB, MILLISECOND, Row, bytes_per_second, elapsed_ns, print_rows, scale, to_f64,
};
use crate::turns::new_progress_bar;

/// Commands whose round trips a connection is compared with.
const COMMANDS: u32 = 20;

/// Arguments of `chitin-bench egress`.
#[derive(clap::Args)]
#[command(after_help = "\
A request is a connection, a TLS handshake, and an answer of 1 KiB or of SIZE. The client is the \
same Python program in all three places, the server a thread of this process. `egress` forwards \
the TLS connection; `proxy` terminates it to replace the placeholder of a credential.

Examples:
  chitin-bench egress --size 100
  chitin-bench egress --tier nanoclaw --runs 200")]
pub struct Args {
    /// Number of small requests, one after the other
    #[arg(long, value_name = "N", default_value_t = 50,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// MiB of the large answer
    #[arg(long, value_name = "MIB", default_value_t = 100,
        value_parser = clap::value_parser!(u64).range(1..=4096))]
    size: u64,

    /// Number of large answers, one after the other
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=100))]
    large: u32,

    /// Tier of the sandboxes: ironclaw, nanoclaw or nemoclaw
    #[arg(long, value_name = "T", default_value_t = TierKind::Ironclaw)]
    tier: TierKind,

    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    tier: String,
    runs: u32,
    size_mib: u64,
    /// Nanoseconds of a small request.
    requests: Vec<Row>,
    /// Nanoseconds of a large answer, from its first byte on.
    answers: Vec<Row>,
    /// The same in bytes per second.
    rates: Vec<Row>,
    /// Nanoseconds of a connection that receives one byte, and of the round trip of a command.
    connections: Vec<Row>,
}

/// Measures all three places, prints the tables and writes the files.
pub async fn measure_egress(args: Args) -> Result<(), BenchError> {
    let server = Server::start()?;
    let progress = new_progress_bar(3, "places");
    let host = measure_location(&Location::Host, &args, &server, &server.certificate).await?;
    progress.inc(1);
    let (egress, commands) = measure_forwarding(&args, &server).await?;
    progress.inc(1);
    let proxy = measure_proxy(&args, &server).await?;
    progress.finish_and_clear();

    let report =
        summarize(&args, [("host", &host), ("egress", &egress), ("proxy", &proxy)], commands);
    let title = format!("{} requests of 1 KiB over TLS, {}", args.runs, args.tier);
    println!("{title}; milliseconds each");
    print_rows("from", &report.requests, MILLISECOND);
    println!("answers of {} MiB; MiB per second", args.size);
    print_rows("from", &report.rates, to_f64(MIB));
    println!("connections that receive one byte, and commands; milliseconds each");
    print_rows("from", &report.connections, MILLISECOND);
    print_comparison(&report);
    args.output.write_files(&report, || plot::draw_rates(&title, &report.rates))
}

/// Measures a sandbox that forwards TLS, and the round trips of commands in it.
async fn measure_forwarding(
    args: &Args,
    server: &Server,
) -> Result<(ClientTimes, Vec<u64>), BenchError> {
    let sandbox = builder(args, server).start().await?;
    let mut commands = Vec::new();
    for _ in 0..COMMANDS {
        let requested = Instant::now();
        sandbox.command(ECHO).arg("chitin").output().await?;
        commands.push(elapsed_ns(requested));
    }
    let location = Location::Sandbox(Box::new(sandbox));
    let times = measure_location(&location, args, server, &server.certificate).await?;
    location.stop().await?;
    Ok((times, commands))
}

/// Measures a sandbox whose proxy replaces the placeholder of a credential.
async fn measure_proxy(args: &Args, server: &Server) -> Result<ClientTimes, BenchError> {
    let dir = tempfile::tempdir().map_err(BenchError::io("create a directory"))?;
    let path = dir.path().join("key");
    std::fs::write(&path, KEY).map_err(BenchError::io("write a credential"))?;
    let builder =
        builder(args, server).secret_spec(proxied_secret(path, server)?).trust(&server.certificate);
    let location = Location::Sandbox(Box::new(builder.start().await?));
    let times = measure_location(&location, args, server, "").await?;
    location.stop().await?;
    Ok(times)
}

/// Returns a builder of sandboxes that may connect to the server.
fn builder(args: &Args, server: &Server) -> Builder {
    // The limit on connections a second stops floods, and this is one.
    let limits = EgressLimits { dials_per_second: 10_000, ..EgressLimits::default() };
    args.guest
        .builder()
        .tier(args.tier)
        .allow_private(true)
        .egress_limits(limits)
        .allow(format!("localhost:{}", server.tls_port))
        .allow(format!("localhost:{}", server.plain_port))
}

/// Returns a credential that is replaced in requests to the server.
fn proxied_secret(path: PathBuf, server: &Server) -> Result<SecretSpec, BenchError> {
    let host = format!("localhost:{}", server.tls_port).parse().map_err(|error| {
        BenchError::io("name the server as an endpoint")(io::Error::other(error))
    })?;
    let scope = ProxyScope { hosts: vec![host], ..ProxyScope::default() };
    let source = SecretSource::File(path);
    Ok(SecretSpec { name: KEY_VARIABLE.into(), source, delivery: Delivery::Proxy(scope) })
}

async fn measure_location(
    location: &Location,
    args: &Args,
    server: &Server,
    certificate: &str,
) -> Result<ClientTimes, BenchError> {
    let small = location.run_client(server, args.runs, KIB, certificate).await?;
    let large = location.run_client(server, args.large, args.size * MIB, certificate).await?;
    Ok(ClientTimes { answers: large.answers, ..small })
}

fn summarize(args: &Args, places: [(&'static str, &ClientTimes); 3], commands: Vec<u64>) -> Report {
    let rows = |field: &dyn Fn(&ClientTimes) -> Vec<u64>| {
        let rows = places.iter().filter_map(|(name, times)| Row::summarize(name, field(times)));
        rows.collect::<Vec<_>>()
    };
    let rate = |took: &u64| bytes_per_second(args.size * MIB, Duration::from_nanos(*took));
    let mut connections = rows(&|times| times.connections.clone());
    connections.extend(Row::summarize("command", commands));
    Report {
        chitin: env!("CARGO_PKG_VERSION"),
        tier: args.tier.to_string(),
        runs: args.runs,
        size_mib: args.size,
        requests: rows(&|times| times.requests.clone()),
        answers: rows(&|times| times.answers.clone()),
        rates: rows(&|times| times.answers.iter().map(rate).collect()),
        connections,
    }
}

/// Prints the cost of egress and of the proxy, each in one sentence.
fn print_comparison(report: &Report) {
    let median =
        |rows: &[Row], name| rows.iter().find(|row| row.name == name).map_or(0, |row| row.median);
    let host_time = scale(median(&report.requests, "host"), MILLISECOND);
    let host_rate = to_f64(median(&report.rates, "host").max(1));
    for name in ["egress", "proxy"] {
        let added = scale(median(&report.requests, name), MILLISECOND) - host_time;
        let percent = 100.0 * scale(median(&report.rates, name), host_rate);
        println!("{name}: {added:.3} ms more for each request, {percent:.0} % of the rate");
    }
}
