//! Commands in a sandbox that runs.

use std::time::Instant;

use chitin::Sandbox;
use serde::Serialize;
use tokio::io::AsyncReadExt;

use super::stats::{self, Row};
use super::{Guest, Output, Workload, plot, progress};
use crate::failure::Failure;

/// Arguments of `chitin bench exec`.
#[derive(clap::Args)]
#[command(
    after_help = "Times are milliseconds since the command was asked for. A few commands come first and are not counted.

Examples:
  chitin bench exec --runs 100
  chitin bench exec -- python3 -c 'print(1)'"
)]
pub struct Args {
    /// How many commands, one after the other
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

/// Commands that are not counted: after them, what every further one touches has been touched.
const UNCOUNTED: u32 = 3;

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    memory_mib: u64,
    summary: Vec<Row>,
    runs: Vec<Run>,
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
    let sandbox = args.guest.builder().start().await?;
    for _ in 0..UNCOUNTED {
        run_once(&sandbox, &args.workload).await?;
    }
    let progress = progress(args.runs, "commands");
    let mut runs = Vec::new();
    for _ in 0..args.runs {
        runs.push(run_once(&sandbox, &args.workload).await?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    sandbox.stop().await?;
    let rows = [
        Row::of("output", runs.iter().map(|run| run.output_ns).collect()),
        Row::of("exit", runs.iter().map(|run| run.exit_ns).collect()),
    ];
    let summary = rows.into_iter().flatten().collect();
    let report = Report { chitin: env!("CARGO_PKG_VERSION"), memory_mib: args.guest.memory, summary, runs };
    let title = format!("{} commands in one sandbox", args.runs);
    println!("{title}; milliseconds since each was asked for");
    stats::print("phase", &report.summary, 1e6);
    args.output.write(&report, || {
        plot::phases(&title, &report.summary, report.runs.iter().map(|run| run.exit_ns).collect())
    })?;
    Ok(0)
}

async fn run_once(sandbox: &Sandbox, workload: &Workload) -> Result<Run, Failure> {
    let asked = Instant::now();
    let since = || u64::try_from(asked.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut process = workload.command(sandbox).spawn()?;
    let (mut first, mut rest) = ([0], Vec::new());
    let mut printed = 0;
    let mut output_ns = since();
    if let Some(stdout) = &mut process.stdout {
        // What breaks this breaks the wait below too, and that says why.
        printed = stdout.read(&mut first).await.unwrap_or(0);
        output_ns = since();
        let _ = stdout.read_to_end(&mut rest).await;
    }
    let (exit, _) = process.wait().await?;
    let exit_ns = since();
    workload.check(&exit, printed > 0)?;
    Ok(Run { output_ns, exit_ns })
}
