//! Sandboxes from nothing, or from a template, to the end of a command.

use std::str::FromStr;
use std::time::Instant;

use chitin::{Builder, Phases, Pool, Sandbox};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::peer::{Peer, PeerArgs, Saved};
use super::stats::{self, Row};
use super::{Beside, Guest, Output, Temporary, Workload, nanoseconds, plot, progress, since};
use crate::failure::Failure;

const MILLISECOND: f64 = 1e6;

/// Arguments of `chitin-bench boot`.
#[derive(clap::Args)]
#[command(
    after_help = "Times are milliseconds since the monitor's process was started. `spread` is (max - min) / median. One boot more than asked
for comes first and is not counted.

With a peer, its `agent` is the first byte of its guest's init.

Examples:
  chitin-bench boot --runs 20 --plot boot.svg
  chitin-bench boot --peer firecracker=./firecracker
  cargo xtask nested --icount -- target/release/chitin-bench boot --runs 5    # deterministic clock"
)]
pub struct BootArgs {
    /// How many boots
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

/// Arguments of `chitin-bench restore`.
#[derive(clap::Args)]
#[command(
    after_help = "The template is built for it and removed afterwards, unless one is named. Times are as for `chitin-bench boot`, but that with --pool
they count from when the pool was asked.

Examples:
  chitin-bench restore --runs 20
  chitin-bench restore --pool
  chitin-bench restore --warm-up 'python3 -c \"import json, ssl\"' -- python3 -c 'print(1)'
  chitin-bench restore --template py
  chitin-bench restore --pool --warm-up \"$(cat examples/warm-python.sh)\" --ask '8000=print(1)'"
)]
pub struct RestoreArgs {
    /// How many copies, one after the other
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// A template that is there already
    #[arg(long, value_name = "NAME", conflicts_with = "memory")]
    template: Option<String>,

    /// Command that warms up the one that is built
    #[arg(long, value_name = "CMD", conflicts_with = "template")]
    warm_up: Option<String>,

    /// Instead of running the command, which then only runs when the template is built: connect to a server that the warm-up
    /// has left running, send a text, and read the answer
    #[arg(long, value_name = "PORT=TEXT", conflicts_with = "peer")]
    ask: Option<Ask>,

    /// Take them from a pool of monitors that wait
    #[arg(long)]
    pool: bool,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

/// What is asked of a server in the sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ask {
    port: u16,
    text: String,
}

impl FromStr for Ask {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let (port, text) = words.split_once('=').ok_or("a port, `=`, and what is sent to it")?;
        let port = port.parse().map_err(|_| format!("`{port}` is no port: 1 to 65535"))?;
        Ok(Ask { port, text: text.into() })
    }
}

/// What is measured in each sandbox.
struct Job<'a> {
    workload: &'a Workload,
    ask: Option<&'a Ask>,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    #[serde(flatten)]
    figures: Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Beside<Figures>>,
}

#[derive(Serialize)]
struct Figures {
    summary: Vec<Row>,
    runs: Vec<Run>,
}

impl Figures {
    fn of(runs: Vec<Run>) -> Figures {
        Figures { summary: summarize(&runs), runs }
    }
}

#[derive(Serialize)]
struct Run {
    #[serde(flatten)]
    phases: Phases,
    /// The monitor's process is gone.
    gone_ns: u64,
}

pub async fn boot(args: BootArgs) -> Result<u8, Failure> {
    let builder = args.guest.builder().vcpus(args.cpus);
    let peer = args.peer.peer(args.cpus, args.guest.memory)?;
    let beside = peer.as_ref().map(|peer| (peer, None));
    // The first boot finds the files not yet in the page cache, and KVM and allocator cold.
    let job = Job { workload: &args.workload, ask: None };
    let runs = run_all(args.runs, &Source::Builder(Box::new(builder)), &job, beside).await?;
    let title = format!("{} cold boots, {} vCPU, {} MiB", args.runs, args.cpus, args.guest.memory);
    report(&title, runs, peer.as_ref(), &args.output)
}

pub async fn restore(args: RestoreArgs) -> Result<u8, Failure> {
    let builder = args.guest.builder();
    let peer = args.peer.peer(1, args.guest.memory)?;
    let saved = match &peer {
        Some(peer) => Some(peer.save(&args.workload.words()).await?),
        None => None,
    };
    let built = match args.template {
        Some(_) => None,
        None => {
            Some(Temporary::build(builder.clone(), args.warm_up, args.workload.argv.clone()).await?)
        }
    };
    let name = args.template.or(built.as_ref().map(|built| built.name.clone())).unwrap_or_default();
    let builder = builder.template(&name);
    let source = match args.pool {
        // Two, so that one is always ready.
        true => Source::Pool(builder.pool(2).await?),
        false => Source::Builder(Box::new(builder)),
    };
    let beside = peer.as_ref().map(|peer| (peer, saved.as_ref()));
    let job = Job { workload: &args.workload, ask: args.ask.as_ref() };
    let runs = run_all(args.runs, &source, &job, beside).await?;
    let how = if args.pool { ", from a pool" } else { "" };
    report(&format!("{} copies of a template{how}", args.runs), runs, peer.as_ref(), &args.output)
}

/// Where sandboxes come from.
enum Source {
    Builder(Box<Builder>),
    Pool(Pool),
}

/// Ours, and a peer's.
type Runs = (Vec<Run>, Vec<Run>);

/// A peer, and the guest that it restores; without one it boots.
type Other<'a> = (&'a Peer, Option<&'a Saved>);

/// Runs one sandbox after the other, in turns with the peer; the first is not counted.
async fn run_all(
    count: u32,
    source: &Source,
    job: &Job<'_>,
    peer: Option<Other<'_>>,
) -> Result<Runs, Failure> {
    let progress = progress(count, "sandboxes");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..=count {
        let once = run_once(source, job).await?;
        let beside = match peer {
            Some(peer) => Some(run_peer(peer, job.workload).await?),
            None => None,
        };
        if run > 0 {
            ours.push(once);
            theirs.extend(beside);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    Ok((ours, theirs))
}

async fn run_peer((peer, saved): Other<'_>, workload: &Workload) -> Result<Run, Failure> {
    let mut guest = match saved {
        Some(saved) => peer.restore(saved).await?,
        None => peer.boot().await?,
    };
    let ran = guest.run(&workload.words()).await?;
    workload.check(&chitin::Exit::Code(ran.code), ran.printed)?;
    let at = |moment| Some(nanoseconds(guest.started, moment));
    let phases = Phases {
        agent_ns: at(guest.hello),
        exec_ns: at(ran.output),
        exit_ns: at(ran.exit),
        ..Phases::default()
    };
    let read = Instant::now();
    guest.stop().await?;
    let gone_ns = phases.exit_ns.unwrap_or(0).saturating_add(since(read));
    Ok(Run { phases, gone_ns })
}

async fn run_once(source: &Source, job: &Job<'_>) -> Result<Run, Failure> {
    let sandbox = match source {
        Source::Builder(builder) => Builder::clone(builder).start().await?,
        Source::Pool(pool) => {
            // What is measured is a pool that had the time to fill up.
            pool.filled().await?;
            pool.start().await?
        }
    };
    match job.ask {
        Some(ask) => answer(&sandbox, ask).await?,
        None => command(&sandbox, job.workload).await?,
    }
    let phases = sandbox.phases();
    let read = Instant::now();
    sandbox.stop().await?;
    let done = phases.exit_ns.or(phases.exec_ns).unwrap_or(0);
    Ok(Run { phases, gone_ns: done.saturating_add(since(read)) })
}

async fn command(sandbox: &Sandbox, workload: &Workload) -> Result<(), Failure> {
    let mut process = workload.command(sandbox).spawn()?;
    let mut printed = Vec::new();
    if let Some(stdout) = &mut process.stdout {
        // What breaks this breaks the wait below too, and that says why.
        let _ = stdout.read_to_end(&mut printed).await;
    }
    let (exit, _) = process.wait().await?;
    workload.check(&exit, !printed.is_empty())
}

async fn answer(sandbox: &Sandbox, ask: &Ask) -> Result<(), Failure> {
    let failed =
        |source| Failure::Io { what: format!("ask at port {} of the sandbox", ask.port), source };
    let mut tunnel = sandbox.connect(ask.port).await?;
    tunnel.write_all(ask.text.as_bytes()).await.map_err(failed)?;
    tunnel.shutdown().await.map_err(failed)?;
    let mut answer = Vec::new();
    tunnel.read_to_end(&mut answer).await.map_err(failed)?;
    match answer.is_empty() {
        false => Ok(()),
        true => {
            Err(Failure::Usage(format!("port {} answers nothing: nothing to measure", ask.port)))
        }
    }
}

fn report(
    title: &str,
    (ours, theirs): Runs,
    peer: Option<&Peer>,
    output: &Output,
) -> Result<u8, Failure> {
    println!("{title}; milliseconds since the start");
    let figures = Figures::of(ours);
    stats::print("phase", &figures.summary, MILLISECOND);
    let peer = peer.map(|peer| {
        let figures = Figures::of(theirs);
        println!("the same with {}", peer.title());
        stats::print("phase", &figures.summary, MILLISECOND);
        Beside::new(peer, figures)
    });
    let report = Report { chitin: env!("CARGO_PKG_VERSION"), figures, peer };
    output.write(&report, || {
        let Figures { summary, runs } = &report.figures;
        plot::phases(title, summary, runs.iter().filter_map(|run| run.phases.exec_ns).collect())
    })?;
    Ok(0)
}

fn summarize(runs: &[Run]) -> Vec<Row> {
    type Phase = (&'static str, fn(&Run) -> Option<u64>);
    let phases: [Phase; 6] = [
        ("entered", |run| run.phases.entered_ns),
        ("kernel", |run| run.phases.kernel_ns),
        ("agent", |run| run.phases.agent_ns),
        ("exec", |run| run.phases.exec_ns),
        ("exit", |run| run.phases.exit_ns),
        ("gone", |run| Some(run.gone_ns)),
    ];
    phases
        .into_iter()
        .filter_map(|(name, of)| Row::of(name, runs.iter().filter_map(of).collect()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_has_a_port_and_may_be_anything() {
        let ask = |words: &str| words.parse::<Ask>();
        assert_eq!(ask("80=a=b"), Ok(Ask { port: 80, text: "a=b".into() }));
        for wrong in ["80", "=x", "65536=x", "-1=x", "x=80"] {
            assert!(ask(wrong).is_err(), "{wrong}");
        }
    }
}
