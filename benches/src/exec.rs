//! Commands in a sandbox that runs.

use std::time::Instant;

use chitin::Sandbox;
use serde::Serialize;
use tokio::io::AsyncReadExt;

use super::peer::{self, PeerArgs};
use super::stats::{self, Row};
use super::{
    Beside, Guest, Output, Report, Workload, nanoseconds, plot, progress, since, tier_runs,
};
use crate::failure::Failure;
use crate::tiers::Tiers;

/// Arguments of `chitin-bench exec`.
#[derive(clap::Args)]
#[command(
    after_help = "Times are milliseconds since the command was asked for. A few commands come first and are not counted.

With --tier, each run is a `chitin run` of its own, from the start of its process to the first byte and to its end, in turns with
the same command in the same container without Chitin: `runsc run`, `docker run`. With `all`, tiers that this host does not have
are named and left out.

Examples:
  chitin-bench exec --runs 100
  chitin-bench exec --tier all --runs 20 --json exec.json
  chitin-bench exec -- python3 -c 'print(1)'"
)]
pub struct Args {
    /// Whole runs on this tier instead: ironclaw, nanoclaw, nemoclaw, or all that this host has
    #[arg(long, value_name = "T", conflicts_with_all = ["peer", "plot"])]
    tier: Option<Tiers>,

    /// How many commands, one after the other
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

/// Commands that are not counted: after them, what every further one touches has been touched.
const UNCOUNTED: u32 = 3;

#[derive(Serialize)]
struct Figures {
    summary: Vec<Row>,
    runs: Vec<Run>,
}

impl Figures {
    fn of(runs: Vec<Run>) -> Figures {
        let summary = stats::output_and_exit(runs.iter().map(|run| (run.output_ns, run.exit_ns)));
        Figures { summary, runs }
    }
}

/// One command; nanoseconds since it was asked for.
#[derive(Serialize)]
struct Run {
    /// The first byte of its output was read.
    output_ns: u64,
    /// Its end was read.
    exit_ns: u64,
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    if let Some(tiers) = args.tier {
        return tier_runs::run(tiers, args.runs, &args.guest, &args.workload, &args.output).await;
    }
    let peer = args.peer.peer(1, args.guest.memory)?;
    let sandbox = args.guest.builder().start().await?;
    let mut other = match &peer {
        Some(peer) => Some(peer.boot().await?),
        None => None,
    };
    let progress = progress(args.runs, "commands");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..UNCOUNTED + args.runs {
        let once = run_once(&sandbox, &args.workload).await?;
        let beside = match &mut other {
            Some(guest) => Some(run_peer(guest, &args.workload).await?),
            None => None,
        };
        if run >= UNCOUNTED {
            ours.push(once);
            theirs.extend(beside);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    sandbox.stop().await?;
    if let Some(guest) = other {
        guest.stop().await?;
    }
    let title = format!("{} commands in one sandbox", args.runs);
    println!("{title}; milliseconds since each was asked for");
    let figures = Figures::of(ours);
    stats::print("phase", &figures.summary, 1e6);
    let peer = peer.map(|peer| {
        let figures = Figures::of(theirs);
        println!("the same with {}", peer.title());
        stats::print("phase", &figures.summary, 1e6);
        Beside::new(&peer, figures)
    });
    let report = Report::new(&args.guest, figures, peer);
    args.output.write(&report, || {
        let Figures { summary, runs } = &report.figures;
        plot::phases(&title, summary, runs.iter().map(|run| run.exit_ns).collect())
    })?;
    Ok(0)
}

async fn run_peer(guest: &mut peer::Guest, workload: &Workload) -> Result<Run, Failure> {
    let asked = Instant::now();
    let ran = guest.run(&workload.words()).await?;
    workload.check(&chitin::Exit::Code(ran.code), ran.printed)?;
    Ok(Run { output_ns: nanoseconds(asked, ran.output), exit_ns: nanoseconds(asked, ran.exit) })
}

async fn run_once(sandbox: &Sandbox, workload: &Workload) -> Result<Run, Failure> {
    let asked = Instant::now();
    let mut process = workload.command(sandbox).spawn()?;
    let (mut first, mut rest) = ([0], Vec::new());
    let mut printed = 0;
    let mut output_ns = since(asked);
    if let Some(stdout) = &mut process.stdout {
        // What breaks this breaks the wait below too, and that says why.
        printed = stdout.read(&mut first).await.unwrap_or(0);
        output_ns = since(asked);
        let _ = stdout.read_to_end(&mut rest).await;
    }
    let (exit, _) = process.wait().await?;
    let exit_ns = since(asked);
    workload.check(&exit, printed > 0)?;
    Ok(Run { output_ns, exit_ns })
}
