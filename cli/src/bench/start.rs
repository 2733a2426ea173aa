//! Sandboxes from nothing, or from a template, to the end of a command.

use std::time::Instant;

use chitin::{Builder, Phases, Pool};
use serde::Serialize;
use tokio::io::AsyncReadExt;

use super::stats::{self, Row};
use super::{Guest, Output, Temporary, Workload, plot, progress};
use crate::failure::Failure;

const MILLISECOND: f64 = 1e6;

/// Arguments of `chitin bench boot`.
#[derive(clap::Args)]
#[command(
    after_help = "Times are milliseconds since the monitor's process was started. `spread` is (max - min) / median. One boot more than asked
for comes first and is not counted.

Examples:
  chitin bench boot --runs 20 --plot boot.svg
  cargo xtask nested --icount -- target/release/chitin bench boot --runs 5    # deterministic clock"
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
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

/// Arguments of `chitin bench restore`.
#[derive(clap::Args)]
#[command(
    after_help = "The template is built for it and removed afterwards, unless one is named. Times are as for `bench boot`, but that with --pool
they count from when the pool was asked.

Examples:
  chitin bench restore --runs 20
  chitin bench restore --pool
  chitin bench restore --warm-up 'python3 -c \"import json, ssl\"' -- python3 -c 'print(1)'
  chitin bench restore --template py"
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

    /// Take them from a pool of monitors that wait
    #[arg(long)]
    pool: bool,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    summary: Vec<Row>,
    runs: Vec<Run>,
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
    // The first boot finds the files not yet in the page cache, and KVM and allocator cold.
    let runs = run_all(args.runs, &Source::Builder(builder), &args.workload).await?;
    let title = format!("{} cold boots, {} vCPU, {} MiB", args.runs, args.cpus, args.guest.memory);
    report(&title, runs, &args.output)
}

pub async fn restore(args: RestoreArgs) -> Result<u8, Failure> {
    let builder = args.guest.builder();
    let built = match args.template {
        Some(_) => None,
        None => Some(Temporary::build(builder.clone(), args.warm_up, args.workload.argv.clone()).await?),
    };
    let name = args.template.or(built.as_ref().map(|built| built.name.clone())).unwrap_or_default();
    let builder = builder.template(&name);
    let source = match args.pool {
        // Two, so that one is always ready.
        true => Source::Pool(builder.pool(2).await?),
        false => Source::Builder(builder),
    };
    let runs = run_all(args.runs, &source, &args.workload).await?;
    let how = if args.pool { ", from a pool" } else { "" };
    report(&format!("{} copies of a template{how}", args.runs), runs, &args.output)
}

/// Where sandboxes come from.
enum Source {
    Builder(Builder),
    Pool(Pool),
}

/// Runs one sandbox after the other; the first is not counted.
async fn run_all(count: u32, source: &Source, workload: &Workload) -> Result<Vec<Run>, Failure> {
    let progress = progress(count, "sandboxes");
    run_once(source, workload).await?;
    let mut runs = Vec::new();
    for _ in 0..count {
        runs.push(run_once(source, workload).await?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(runs)
}

async fn run_once(source: &Source, workload: &Workload) -> Result<Run, Failure> {
    let sandbox = match source {
        Source::Builder(builder) => builder.clone().start().await?,
        Source::Pool(pool) => {
            // What is measured is a pool that had the time to fill up.
            pool.filled().await?;
            pool.start().await?
        }
    };
    let mut process = workload.command(&sandbox).spawn()?;
    let mut printed = Vec::new();
    if let Some(stdout) = &mut process.stdout {
        // What breaks this breaks the wait below too, and that says why.
        let _ = stdout.read_to_end(&mut printed).await;
    }
    let (exit, _) = process.wait().await?;
    workload.check(&exit, !printed.is_empty())?;
    let phases = sandbox.phases();
    let read = Instant::now();
    sandbox.stop().await?;
    let stopping = u64::try_from(read.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let gone_ns = phases.exit_ns.unwrap_or(0).saturating_add(stopping);
    Ok(Run { phases, gone_ns })
}

fn report(title: &str, runs: Vec<Run>, output: &Output) -> Result<u8, Failure> {
    println!("{title}; milliseconds since the start");
    let report = Report { chitin: env!("CARGO_PKG_VERSION"), summary: summarize(&runs), runs };
    stats::print("phase", &report.summary, MILLISECOND);
    output.write(&report, || {
        let exec = report.runs.iter().filter_map(|run| run.phases.exec_ns).collect();
        plot::phases(title, &report.summary, exec)
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
    phases.into_iter().filter_map(|(name, of)| Row::of(name, runs.iter().filter_map(of).collect())).collect()
}
