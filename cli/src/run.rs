//! `chitin run`: one command in one sandbox, with the manners of any other command.

use std::ffi::OsString;
use std::io;
use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use chitin::{
    Builder, Delivery, EgressLimits, Exit, Forward, Jail, Phases, Policy, Process, Sandbox,
    SecretSpec, SelectedTier, StartError, StreamReader, TierKind, Usage,
};
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{CHITIN_FAILED, Failure};
use crate::machine::Machine;
use crate::report::{Governed, Isolation, JailReport, Report};
use crate::tiers::announce;

/// How long a workload that was sent a signal may take to end.
const GRACE: Duration = Duration::from_secs(5);

/// One read of a workload's output: what its pipe holds.
const CHUNK: usize = 64 * 1024;

/// Where relative paths of the sandbox start, as for the workload itself.
const WORKDIR: &str = "/work";

/// Arguments of `chitin run`.
#[derive(clap::Args)]
#[command(
    after_help = "Exit code: the command's own; 124 time limit reached; 125 chitin failed; 126 not executable;
127 not found; 128+n ended by signal n.

Examples:
  chitin run -- python3 -c 'print(6 * 7)'
  head -c 1G /dev/urandom | chitin run -- sha256sum
  chitin run --copy-in agent.py:/work/ --copy-out /work/out:out -- python3 agent.py
  chitin run --fallback nanoclaw,nemoclaw -- python3 -c 'print(6 * 7)'
  chitin run --secret API_TOKEN=env:API_TOKEN -- sh -c 'wc -c < $API_TOKEN_FILE'
  chitin run --secret 'DB=vault://kv/app/db#password' -- python3 job.py
  chitin run --secret API_TOKEN=env:API_TOKEN@api.example.com -- python3 agent.py
  chitin run --secret AWS=vault://aws/creds/deploy --secret-endpoint AWS -- python3 deploy.py
  chitin run --allow api.example.com:443 --audit net.jsonl -- python3 agent.py
  chitin run -p 8080:8000 -- python3 -m http.server"
)]
pub struct Args {
    /// How to isolate the command: ironclaw (a microVM), nanoclaw (gVisor, else a container), nemoclaw (Docker); ironclaw,
    /// or what the policy says, if not given
    #[arg(long, value_name = "T")]
    tier: Option<TierKind>,

    /// What else will do where that cannot be had, in this order
    #[arg(long, value_name = "T,…", value_delimiter = ',')]
    fallback: Vec<TierKind>,

    /// Start a copy of this template instead of booting
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cpus", "memory", "console"])]
    template: Option<String>,

    /// Hold the sandbox to this policy; `chitin policy check` says what it allows
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,

    #[command(flatten)]
    machine: Machine,

    /// End the sandbox after so long, boot included: 90s, 5m, 1h
    #[arg(long, value_name = "DUR", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,

    /// Set an environment variable; K alone passes this host's value on
    #[arg(long, value_name = "K=V")]
    env: Vec<OsString>,

    /// Start in this directory
    #[arg(long, value_name = "DIR", default_value = WORKDIR)]
    workdir: OsString,

    /// Hand a credential over: env:VAR, file:PATH, exec:CMD or vault://MOUNT/PATH#FIELD; the workload reads the file that $NAME_FILE names. With
    /// @HOST, the value never enters: $NAME is a placeholder, replaced in the headers of requests to these hosts over TLS
    #[arg(long, value_name = "NAME=SRC[@HOST,…]")]
    secret: Vec<SecretSpec>,

    /// Put the secret NAME into the environment variable NAME instead, where everything the workload starts sees it
    #[arg(long, value_name = "NAME")]
    secret_env: Vec<String>,

    /// Answer AWS's SDKs in the sandbox when they ask for credentials: the secret NAME is a pair of keys, JSON or a vault's secret, and is
    /// read again when it is nearly over
    #[arg(long, value_name = "NAME")]
    secret_endpoint: Option<String>,

    /// Replace the placeholder of NAME in the query of URLs as well, which servers write to their logs
    #[arg(long, value_name = "NAME")]
    secret_query: Vec<String>,

    /// Replace the placeholder of NAME in bodies of up to 1 MiB as well
    #[arg(long, value_name = "NAME")]
    secret_body: Vec<String>,

    /// Let the workload connect to HOST:PORT, or to any host below a domain: '*.example.com:443'; TCP only
    #[arg(long, value_name = "HOST:PORT")]
    allow: Vec<String>,

    /// Let allowed hosts resolve to loopback and private addresses: for test servers; whoever owns the name picks the address
    #[arg(long)]
    allow_private: bool,

    /// Break connections off when so many bytes have passed, both ways and all of them together: 500k, 10M, 1G
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    egress_bytes: Option<NonZeroU64>,

    /// Let no more than so many bytes a second pass, both ways and all connections together
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    egress_rate: Option<NonZeroU64>,

    /// Connections at once, at most 128, which is what there is without this
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=128))]
    egress_connections: Option<u16>,

    /// Add a line of JSON to FILE for each attempt of the workload to reach something
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,

    /// Lead port HOST of this host's 127.0.0.1 to port GUEST in the sandbox
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST", value_parser = parse_ports)]
    publish: Vec<Ports>,

    /// Copy a file or directory in before the start; DST is what it becomes, DST/ what it goes into
    #[arg(long, value_name = "SRC:DST", value_parser = parse_copy_in)]
    copy_in: Vec<Copy>,

    /// Copy a file or directory out after the end; DST is what it becomes, DST/ what it goes into
    #[arg(long, value_name = "SRC:DST", value_parser = parse_copy_out)]
    copy_out: Vec<Copy>,

    /// Show the guest's serial console on standard error
    #[arg(long)]
    console: bool,

    /// Write a JSON record of the run
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// The command to run, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// `SRC:DST`, both sides resolved: a target that ends in a slash has the source's name added.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Copy {
    source: PathBuf,
    target: PathBuf,
}

/// `HOST:GUEST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    host: u16,
    guest: u16,
}

/// A number of bytes; `k`, `M` and `G` are powers of 1024.
fn parse_bytes(text: &str) -> Result<NonZeroU64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    number
        .and_then(NonZeroU64::new)
        .ok_or_else(|| "it is no number of bytes such as 4096, 500k, 10M or 1G".into())
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    let port = |text: &str| text.parse().ok().filter(|port| *port > 0);
    let ports = text
        .split_once(':')
        .and_then(|(host, guest)| Some(Ports { host: port(host)?, guest: port(guest)? }));
    ports.ok_or_else(|| "it is not HOST:GUEST, two ports from 1 to 65535".into())
}

fn parse_copy_in(text: &str) -> Result<Copy, String> {
    // The host's path may hold a colon, as Windows archives and timestamps do.
    let copy = text.rsplit_once(':').and_then(|(source, target)| copy(source, target));
    let Copy { source, target } = copy.ok_or("it is not SRC:DST")?;
    Ok(Copy { source, target: in_sandbox(&target) })
}

fn parse_copy_out(text: &str) -> Result<Copy, String> {
    let copy = text.split_once(':').and_then(|(source, target)| copy(source, target));
    let Copy { source, target } = copy.ok_or("it is not SRC:DST")?;
    Ok(Copy { source: in_sandbox(&source), target })
}

fn copy(source: &str, target: &str) -> Option<Copy> {
    if source.is_empty() || target.is_empty() {
        return None;
    }
    let mut copy = Copy { source: source.into(), target: target.into() };
    if target.ends_with('/') {
        copy.target.push(copy.source.file_name()?);
    }
    Some(copy)
}

fn in_sandbox(path: &Path) -> PathBuf {
    Path::new(WORKDIR).join(path)
}

/// What is known of a run so far; the report's raw material, also when the run fails.
#[derive(Default)]
struct Progress {
    chosen: Option<SelectedTier>,
    ended: Option<(Exit, Usage)>,
    phases: Phases,
    jail: Option<Jail>,
    /// When the time is up, and the limit that makes it.
    deadline: Option<(Instant, Duration)>,
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let mut progress = Progress::default();
    let policy = args.policy.as_ref().map(Policy::load).transpose().map_err(chitin::Error::from)?;
    let governed = policy.as_ref().map(Governed::of);
    let wanted =
        args.tier.or(policy.as_ref().map(|policy| policy.runtime)).unwrap_or(TierKind::Ironclaw);
    let outcome = run_sandbox(&args, policy, &mut progress).await;
    if let Some(path) = &args.report {
        let (exit, usage) =
            progress.ended.map_or((None, None), |(exit, usage)| (Some(exit), Some(usage)));
        let report = Report {
            chitin: env!("CARGO_PKG_VERSION"),
            tier: progress.chosen.as_ref().map_or_else(|| wanted.to_string(), SelectedTier::name),
            isolation: progress.chosen.as_ref().map(Isolation::of),
            policy: governed,
            command: args.command.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            exit_code: outcome.as_ref().map_or_else(Failure::exit_code, |code| *code),
            exit,
            usage,
            error: outcome.as_ref().err().map(Failure::line),
            jail: JailReport { on: args.machine.jail.wanted(), closed: progress.jail },
            phases: progress.phases,
        };
        match (report.write(path), &outcome) {
            (Err(error), Ok(_)) => return Err(error),
            // Two things have failed; the first is returned, and the second is not lost.
            (Err(error), Err(_)) => error.print(),
            (Ok(()), _) => {}
        }
    }
    outcome
}

async fn run_sandbox(
    args: &Args,
    policy: Option<Policy>,
    progress: &mut Progress,
) -> Result<u8, Failure> {
    let env = environment(&args.env)?;
    let secrets = secrets(args)?;
    for copy in &args.copy_in {
        // Before anything is booted for it.
        std::fs::symlink_metadata(&copy.source).map_err(|source| Failure::Io {
            what: format!("copy in {}", copy.source.display()),
            source,
        })?;
    }
    let listeners = listen(&args.publish).await?;
    let mut signals = Signals::listen()?;

    let mut builder = args.machine.shape(Sandbox::builder().console(args.console));
    if let Some(policy) = policy {
        builder = builder.policy(policy);
    }
    builder = builder.fallback(args.fallback.iter().copied());
    if let Some(tier) = args.tier {
        builder = builder.tier(tier);
    }
    if let Some(timeout) = args.timeout {
        progress.deadline = Instant::now().checked_add(timeout).map(|at| (at, timeout));
        builder = builder.timeout(timeout);
    }
    if let Some(template) = &args.template {
        builder = builder.template(template);
    }
    for secret in secrets {
        builder = builder.secret_spec(secret);
    }
    builder = args.allow.iter().fold(builder, Builder::allow).allow_private(args.allow_private);
    if let Some(path) = &args.audit {
        builder = builder.audit(path);
    }
    let usual = EgressLimits::default();
    builder = builder.egress_limits(EgressLimits {
        connections: args.egress_connections.map_or(usual.connections, usize::from),
        total_bytes: args.egress_bytes.map(NonZeroU64::get),
        bytes_per_second: args.egress_rate,
        ..usual
    });
    let started = tokio::select! {
        started = builder.start() => Ok(started?),
        number = signals.next() => Err(number),
    };
    let sandbox = match started {
        Ok(sandbox) => sandbox,
        Err(number) => {
            // The unfinished start was dropped, which ends what it has begun; what was issued for it must not outlive us.
            chitin::wait_for_cleanup().await;
            return Ok(128 + number);
        }
    };
    let chosen = sandbox.chosen();
    announce(chosen);
    progress.chosen = Some(chosen.clone());
    let forwards: Vec<Forward> =
        listeners.into_iter().map(|(listener, port)| sandbox.forward(listener, port)).collect();
    let outcome = work(&sandbox, args, env, &mut signals, progress).await;
    (progress.phases, progress.jail) = (sandbox.phases(), sandbox.jail());
    drop(forwards);
    let (stopped, troubles) = sandbox.end().await;
    for trouble in troubles {
        eprintln!("chitin: credentials: {trouble}");
    }
    let code = outcome?;
    stopped?;
    Ok(code)
}

/// Listens before anything is booted for it.
async fn listen(publish: &[Ports]) -> Result<Vec<(TcpListener, u16)>, Failure> {
    let mut listeners = Vec::new();
    for Ports { host, guest } in publish {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *host)).await;
        let failed = |source| Failure::Io {
            what: format!("-p {host}:{guest}: listen on 127.0.0.1:{host}"),
            source,
        };
        listeners.push((listener.map_err(failed)?, *guest));
    }
    Ok(listeners)
}

async fn work(
    sandbox: &Sandbox,
    args: &Args,
    env: Vec<(OsString, OsString)>,
    signals: &mut Signals,
    progress: &mut Progress,
) -> Result<u8, Failure> {
    let copying_in = async {
        for copy in &args.copy_in {
            sandbox.copy_in(&copy.source, &copy.target).await?;
        }
        Ok::<_, Failure>(())
    };
    tokio::select! {
        copied = copying_in => copied?,
        number = signals.next() => return Ok(128 + number),
    }

    let mut command =
        sandbox.command(&args.command[0]).args(&args.command[1..]).current_dir(&args.workdir);
    for (name, value) in env {
        command = command.env(name, value);
    }
    let process = command.piped_stdin().spawn()?;
    let attended = attend(process, signals, progress.deadline).await?;
    let Some((exit, usage)) = attended else { return Ok(128 + signals.last) };
    let code = exit_code(&exit, &args.command[0]);
    progress.ended = Some((exit, usage));

    let copying_out = async {
        if code == 0 {
            sandbox.copy_back().await?;
        }
        for copy in &args.copy_out {
            match sandbox.copy_out(&copy.source, &copy.target).await {
                Ok(_) => {}
                // A workload that failed may not have made it, and its own exit code says more.
                Err(error) if code != 0 => Failure::from(error).print(),
                Err(error) => return Err(Failure::from(error)),
            }
        }
        Ok::<_, Failure>(code)
    };
    tokio::select! {
        code = copying_out => code,
        number = signals.next() => Ok(128 + number),
    }
}

/// Connects the process with our own standard streams until it ends and all it said is delivered. `None`: a signal came,
/// and either did not happen.
///
/// Whoever reads us may stop to, and then writing takes for ever: that counts against the time limit as well.
async fn attend(
    mut process: Process,
    signals: &mut Signals,
    deadline: Option<(Instant, Duration)>,
) -> Result<Option<(Exit, Usage)>, Failure> {
    let stdin = process.stdin.take().map(|mut stdin| {
        tokio::spawn(async move {
            // Errors are ends: ours has nothing more to give, or the workload wants no more.
            let mut ours = BufReader::with_capacity(CHUNK, tokio::io::stdin());
            let _ = tokio::io::copy_buf(&mut ours, &mut stdin).await;
            let _ = stdin.shutdown().await;
        })
    });
    let (stdout, stderr) = (own(io::stdout())?, own(io::stderr())?);
    let stdout = process.stdout.take().map(|output| tokio::spawn(deliver(output, stdout)));
    let stderr = process.stderr.take().map(|output| tokio::spawn(deliver(output, stderr)));

    let ended = end_of(&mut process, signals).await;
    if let Some(stdin) = stdin {
        stdin.abort();
    }
    for (name, delivery) in [("output", stdout), ("error", stderr)] {
        let Some(delivery) = delivery else { continue };
        if matches!(ended, Ok(None)) {
            // It is still running, and what it goes on to say is not waited for.
            delivery.abort();
            continue;
        }
        let abort = delivery.abort_handle();
        let left = match &ended {
            // The sandbox is gone, and what it said last is waited for only for so long.
            Err(_) => Some(GRACE),
            Ok(_) => deadline.map(|(at, _)| at.saturating_duration_since(Instant::now())),
        };
        let delivered = tokio::select! {
            delivered = within(left, delivery) => delivered,
            _ = signals.next() => {
                abort.abort();
                return Ok(None);
            }
        };
        match (delivered, deadline) {
            (Some(Ok(Ok(())) | Err(_)), _) => {}
            (Some(Ok(Err(source))), _) => {
                return Err(Failure::Io { what: format!("write to standard {name}"), source });
            }
            (None, Some((_, limit))) if ended.is_ok() => {
                abort.abort();
                return Err(chitin::Error::Timeout { limit }.into());
            }
            (None, _) => abort.abort(),
        }
    }
    ended
}

/// What comes of it in time; without a limit there is always time.
async fn within<T>(limit: Option<Duration>, future: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, future).await.ok(),
        None => Some(future.await),
    }
}

async fn end_of(
    process: &mut Process,
    signals: &mut Signals,
) -> Result<Option<(Exit, Usage)>, Failure> {
    tokio::select! {
        ended = process.wait() => return Ok(Some(ended?)),
        number = signals.next() => process.signal(number),
    }
    let mut grace = pin!(tokio::time::sleep(GRACE));
    tokio::select! {
        ended = process.wait() => Ok(Some(ended?)),
        () = &mut grace => Ok(None),
        // Whoever asks twice means it.
        _ = signals.next() => Ok(None),
    }
}

/// Writes all of a stream. A reader that has gone is passed on to the workload, as a shell's pipe would.
/// A standard stream as a file: what is written to it is passed on as it is, where standard output would look for the end of a
/// line in it first.
fn own(stream: impl AsFd) -> Result<tokio::fs::File, Failure> {
    let failed = |source| Failure::Io { what: "share standard output".into(), source };
    Ok(tokio::fs::File::from_std(stream.as_fd().try_clone_to_owned().map_err(failed)?.into()))
}

async fn deliver(stream: StreamReader, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(CHUNK, stream);
    match tokio::io::copy_buf(&mut stream, &mut to).await {
        Ok(_) => Ok(()),
        // BrokenPipe is our reader; ConnectionReset is the sandbox's end, which is reported with its reason.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn exit_code(exit: &Exit, program: &OsString) -> u8 {
    match exit {
        Exit::Code(code) => *code,
        Exit::Signal(number) => 128u8.saturating_add(*number),
        Exit::NotStarted { error, failure } => {
            eprintln!("chitin: start {} in the sandbox: {failure}", program.display());
            match error {
                StartError::NotFound => 127,
                StartError::NotExecutable => 126,
                StartError::Other => CHITIN_FAILED,
            }
        }
    }
}

fn environment(given: &[OsString]) -> Result<Vec<(OsString, OsString)>, Failure> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let pair = |bytes: &[u8]| {
        let equals = bytes.iter().position(|byte| *byte == b'=')?;
        Some((
            OsString::from_vec(bytes[..equals].into()),
            OsString::from_vec(bytes[equals + 1..].into()),
        ))
    };
    given
        .iter()
        .map(|text| match pair(text.as_bytes()) {
            Some((name, _)) if name.is_empty() => {
                Err(Failure::Usage(format!("--env {}: the name is empty", text.display())))
            }
            Some(pair) => Ok(pair),
            None => match std::env::var_os(text) {
                Some(value) => Ok((text.clone(), value)),
                None => Err(Failure::Usage(format!(
                    "--env {0}: {0} is not set here; give {0}=VALUE",
                    text.display()
                ))),
            },
        })
        .collect()
}

fn secrets(args: &Args) -> Result<Vec<SecretSpec>, Failure> {
    let mut secrets = args.secret.clone();
    for name in &args.secret_env {
        let Some(secret) = secrets.iter_mut().find(|secret| secret.name == *name) else {
            return Err(Failure::Usage(format!(
                "--secret-env {name}: there is no --secret {name}=SRC"
            )));
        };
        if matches!(secret.delivery, Delivery::Proxy(_)) {
            let what = "it is for hosts, so its value does not enter: leave one of both out";
            return Err(Failure::Usage(format!("--secret-env {name}: {what}")));
        }
        secret.delivery = Delivery::Env;
    }
    if let Some(name) = &args.secret_endpoint {
        let usage = |what: &str| Failure::Usage(format!("--secret-endpoint {name}: {what}"));
        let Some(secret) = secrets.iter_mut().find(|secret| secret.name == *name) else {
            return Err(usage(&format!("there is no --secret {name}=SRC")));
        };
        if secret.delivery != Delivery::Memory {
            return Err(usage("it is delivered in another way already: leave one of both out"));
        }
        secret.delivery = Delivery::Endpoint;
    }
    for (option, names) in
        [("--secret-query", &args.secret_query), ("--secret-body", &args.secret_body)]
    {
        for name in names {
            let secret = secrets.iter_mut().find(|secret| secret.name == *name);
            let Some(Delivery::Proxy(reach)) = secret.map(|secret| &mut secret.delivery) else {
                return Err(Failure::Usage(format!(
                    "{option} {name}: there is no --secret {name}=SRC@HOST"
                )));
            };
            reach.query |= option == "--secret-query";
            reach.body |= option == "--secret-body";
        }
    }
    Ok(secrets)
}

/// The signals that mean "end", which are for the workload to hear first.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// The number of the last one that came.
    last: u8,
}

impl Signals {
    fn listen() -> Result<Signals, Failure> {
        let listen = |kind| {
            signal(kind).map_err(|source| Failure::Io { what: "listen for signals".into(), source })
        };
        Ok(Signals {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            last: 0,
        })
    }

    /// The number of the next signal.
    async fn next(&mut self) -> u8 {
        self.last = tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
        };
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_name_a_target_or_a_place_to_go_into() {
        let copy =
            |source: &str, target: &str| Ok(Copy { source: source.into(), target: target.into() });
        assert_eq!(parse_copy_in("data/a.csv:/work/b.csv"), copy("data/a.csv", "/work/b.csv"));
        assert_eq!(parse_copy_in("data/a.csv:/work/"), copy("data/a.csv", "/work/a.csv"));
        assert_eq!(parse_copy_in("a:b:/x"), copy("a:b", "/x"));
        assert_eq!(parse_copy_in("a.py:b.py"), copy("a.py", "/work/b.py"));
        assert_eq!(parse_copy_out("out:reports/"), copy("/work/out", "reports/out"));
        assert_eq!(parse_copy_out("/tmp/x:y"), copy("/tmp/x", "y"));
        for bad in ["", "a", "a:", ":b", "..:/work/"] {
            assert!(parse_copy_in(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bytes_have_units() {
        let bytes = |text| parse_bytes(text).map(NonZeroU64::get);
        for (text, number) in [("1", 1), ("500k", 500 << 10), ("10M", 10 << 20), ("3G", 3 << 30)] {
            assert_eq!(bytes(text), Ok(number));
        }
        for bad in ["", "0", "0M", "-1", "1.5G", "G", "1T", "10 M", "18446744073709551615k", "1ä"]
        {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_come_in_pairs() {
        assert_eq!(parse_ports("8080:80"), Ok(Ports { host: 8080, guest: 80 }));
        for bad in
            ["", "80", "0:80", "80:0", "70000:80", "80:70000", "a:80", "80:", "-1:80", "1:2:3"]
        {
            assert!(parse_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_environment_is_pairs_or_names_that_are_set() {
        let given = ["A=1", "B=", "C=x=y"].map(OsString::from);
        let pairs = [("A", "1"), ("B", ""), ("C", "x=y")].map(|(k, v)| (k.into(), v.into()));
        assert_eq!(environment(&given).unwrap(), pairs);
        for bad in ["=1", "CHITIN_NO_SUCH"] {
            assert!(environment(&[bad.into()]).is_err(), "{bad}");
        }
    }
}
