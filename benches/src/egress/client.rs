use std::process::{Command, Stdio};

use chitin::{Exit, Sandbox};

use super::server::Server;
use crate::error::BenchError;

/// The program, run as `python3 -c CLIENT TLS-PORT PLAIN-PORT COUNT BYTES CERTIFICATE`.
const CLIENT: &str = include_str!("client.py");

/// The variable that holds the value of the request's header, or its placeholder.
pub const KEY_VARIABLE: &str = "CHITIN_BENCH_KEY";
pub const KEY: &str = "bench-0123456789abcdef";

/// The place that requests come from.
pub enum Location {
    Host,
    Sandbox(Box<Sandbox>),
}

/// Times of one run of the client, in nanoseconds.
pub struct ClientTimes {
    /// Each request, to its last byte.
    pub requests: Vec<u64>,
    /// Each answer, from its first byte on.
    pub answers: Vec<u64>,
    /// Each connection that receives one byte.
    pub connections: Vec<u64>,
}

impl Location {
    /// Runs the client for `count` requests of `bytes` each.
    ///
    /// `certificate` is the one that it trusts in addition to those of its system. Without it, it
    /// trusts these alone and has the placeholder of a credential as its key.
    pub async fn run_client(
        &self,
        server: &Server,
        count: u32,
        bytes: u64,
        certificate: &str,
    ) -> Result<ClientTimes, BenchError> {
        let numbers =
            [u64::from(server.tls_port), u64::from(server.plain_port), count.into(), bytes];
        let numbers = numbers.map(|number| number.to_string());
        let arguments = ["-c", CLIENT]
            .into_iter()
            .chain(numbers.iter().map(String::as_str))
            .chain([certificate]);
        let (succeeded, stdout, stderr) = match self {
            Location::Host => {
                let mut command = Command::new("python3");
                command.args(arguments).env(KEY_VARIABLE, KEY).stdin(Stdio::null());
                let output =
                    command.output().map_err(BenchError::io("start python3 on this host"))?;
                (output.status.success(), output.stdout, output.stderr)
            }
            Location::Sandbox(sandbox) => {
                let mut command = sandbox.command("python3").args(arguments);
                if !certificate.is_empty() {
                    command = command.env(KEY_VARIABLE, KEY);
                }
                let output = command.output().await?;
                (output.exit == Exit::Code(0), output.stdout, output.stderr)
            }
        };
        parse_times(&stdout, count).filter(|_| succeeded).ok_or_else(|| {
            let reason = String::from_utf8_lossy(&stderr);
            let message = reason.lines().last().unwrap_or("it prints no reason").to_owned();
            BenchError::ClientFailed { message }
        })
    }

    /// Ends the sandbox.
    pub async fn stop(self) -> Result<(), BenchError> {
        match self {
            Location::Host => Ok(()),
            Location::Sandbox(sandbox) => Ok(sandbox.stop().await?),
        }
    }
}

/// Parses `count` lines of requests and as many of connections.
fn parse_times(output: &[u8], count: u32) -> Option<ClientTimes> {
    let text = String::from_utf8_lossy(output);
    let parse_line = |line: &str| {
        let (total, answer) = line.split_once(' ')?;
        Some((total.parse().ok()?, answer.parse().ok()?))
    };
    let lines: Vec<(u64, u64)> = text.lines().map(parse_line).collect::<Option<_>>()?;
    let count = usize::try_from(count).ok()?;
    let (requests, connections) = lines.split_at_checked(count)?;
    (connections.len() == count).then(|| ClientTimes {
        requests: requests.iter().map(|(total, _)| *total).collect(),
        answers: requests.iter().map(|(_, answer)| *answer).collect(),
        connections: connections.iter().map(|(total, _)| *total).collect(),
    })
}
