//! `chitin bench`: how long things take, by phase.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use chitin::{Builder, Exit, Phases, Sandbox, Templates};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::io::AsyncReadExt;

use crate::failure::Failure;
use crate::jail::NoJail;
use crate::report::write_json;

/// What to measure.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Cold boots: from starting the monitor to the exit of `echo`
    Boot(BootArgs),
    /// Copies of a template: from starting the monitor to the exit of `echo`
    Restore(RestoreArgs),
    /// Round trips on a running sandbox: from asking for `echo` to its exit
    Exec(ExecArgs),
}

/// Arguments of `chitin bench boot`.
#[derive(clap::Args)]
#[command(
    after_help = "Times are milliseconds since the monitor's process was started. `spread` is (max - min) / median. One boot more than asked
for comes first and is not counted.

Examples:
  chitin bench boot --runs 20
  cargo xtask nested --icount -- target/release/chitin bench boot --runs 5    # deterministic clock"
)]
pub struct BootArgs {
    /// How many boots
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,

    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,

    #[command(flatten)]
    jail: NoJail,

    /// Write every run and the summary as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Arguments of `chitin bench restore`.
#[derive(clap::Args)]
#[command(
    after_help = "The template is built for it and removed afterwards, unless one is named. Times are as for `bench boot`.

Examples:
  chitin bench restore --runs 20
  chitin bench restore --template py"
)]
pub struct RestoreArgs {
    /// How many copies, one after the other
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// A template that is there already
    #[arg(long, value_name = "NAME")]
    template: Option<String>,

    /// Memory in MiB of the one that is built
    #[arg(long, value_name = "MIB", default_value_t = 128, conflicts_with = "template")]
    memory: u64,

    #[command(flatten)]
    jail: NoJail,

    /// Write every run and the summary as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Arguments of `chitin bench exec`.
#[derive(clap::Args)]
#[command(
    after_help = "Times are milliseconds since the command was asked for. A few commands come first and are not counted.

Examples:
  chitin bench exec --runs 100"
)]
pub struct ExecArgs {
    /// How many commands, one after the other
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,

    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,

    #[command(flatten)]
    jail: NoJail,

    /// Write every run and the summary as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Commands that are not counted: after them, what every further one touches has been touched.
const UNCOUNTED_EXECS: u32 = 3;

#[derive(Serialize)]
struct ExecReport {
    chitin: &'static str,
    memory_mib: u64,
    summary: Vec<Row>,
    runs: Vec<Exec>,
}

/// One command; nanoseconds since it was asked for.
#[derive(Serialize)]
struct Exec {
    /// The first byte of its output was read.
    output_ns: u64,
    /// Its end was read.
    exit_ns: u64,
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

/// One phase over all runs; nanoseconds.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct Row {
    phase: &'static str,
    min_ns: u64,
    median_ns: u64,
    p99_ns: u64,
    max_ns: u64,
}

pub async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Boot(args) => boot(args).await,
        Command::Restore(args) => restore(args).await,
        Command::Exec(args) => exec(args).await,
    }
}

async fn boot(args: BootArgs) -> Result<u8, Failure> {
    let jail = args.jail.announced();
    let sandbox = || Sandbox::builder().vcpus(args.cpus).memory_mib(args.memory).jail(jail);
    // The first boot finds the files not yet in the page cache, and KVM and allocator cold.
    let runs = run_all(args.runs, sandbox).await?;
    println!("{} cold boots, {} vCPU, {} MiB; milliseconds since spawn", args.runs, args.cpus, args.memory);
    report(runs, args.json.as_deref())
}

async fn restore(args: RestoreArgs) -> Result<u8, Failure> {
    let templates = Templates::locate().map_err(chitin::Error::from)?;
    let jail = args.jail.announced();
    let built = match args.template {
        Some(_) => None,
        None => {
            let name = format!("bench-{}", std::process::id());
            Sandbox::builder().memory_mib(args.memory).jail(jail).build_template(&name, None).await?;
            Some(name)
        }
    };
    let name = args.template.or(built.clone()).unwrap_or_default();
    let runs = run_all(args.runs, || Sandbox::builder().template(&name).jail(jail)).await;
    if let Some(built) = built {
        templates.remove(&built).map_err(chitin::Error::from)?;
    }
    println!("{} copies of a template; milliseconds since spawn", args.runs);
    report(runs?, args.json.as_deref())
}

/// Runs one sandbox after the other; the first is not counted.
async fn run_all(count: u32, sandbox: impl Fn() -> Builder) -> Result<Vec<Run>, Failure> {
    let progress = progress(count);
    run_once(sandbox()).await?;
    let mut runs = Vec::new();
    for _ in 0..count {
        runs.push(run_once(sandbox()).await?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(runs)
}

fn report(runs: Vec<Run>, json: Option<&Path>) -> Result<u8, Failure> {
    let report = Report { chitin: env!("CARGO_PKG_VERSION"), summary: summarize(&runs), runs };
    print_table(&report.summary);
    if let Some(path) = json {
        write_json(path, &report)?;
    }
    Ok(0)
}

async fn exec(args: ExecArgs) -> Result<u8, Failure> {
    let builder = Sandbox::builder().memory_mib(args.memory).jail(args.jail.announced());
    let sandbox = builder.start().await?;
    for _ in 0..UNCOUNTED_EXECS {
        exec_once(&sandbox).await?;
    }
    let mut runs = Vec::new();
    for _ in 0..args.runs {
        runs.push(exec_once(&sandbox).await?);
    }
    sandbox.stop().await;
    let rows = [
        row("output", runs.iter().map(|run| run.output_ns).collect()),
        row("exit", runs.iter().map(|run| run.exit_ns).collect()),
    ];
    let summary = rows.into_iter().flatten().collect();
    let report = ExecReport { chitin: env!("CARGO_PKG_VERSION"), memory_mib: args.memory, summary, runs };
    println!("{} commands in one sandbox; milliseconds since each was asked for", args.runs);
    print_table(&report.summary);
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    Ok(0)
}

async fn exec_once(sandbox: &Sandbox) -> Result<Exec, Failure> {
    let asked = Instant::now();
    let since = || u64::try_from(asked.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut process = sandbox.command("/bin/echo").arg("chitin").spawn()?;
    let mut line = [0; 7];
    let read = match &mut process.stdout {
        Some(stdout) => stdout.read_exact(&mut line).await,
        None => Ok(0),
    };
    let output_ns = since();
    let (exit, _) = process.wait().await?;
    let exit_ns = since();
    if exit != Exit::Code(0) || read.is_err() || &line != b"chitin\n" {
        return Err(Failure::Usage(format!("echo in the sandbox went wrong: {exit:?}")));
    }
    Ok(Exec { output_ns, exit_ns })
}

fn print_table(rows: &[Row]) {
    println!("{:<8} {:>10} {:>10} {:>10} {:>8}", "phase", "min", "median", "p99", "spread");
    for row in rows {
        println!(
            "{:<8} {:>10.3} {:>10.3} {:>10.3} {:>7.2}%",
            row.phase,
            millis(row.min_ns),
            millis(row.median_ns),
            millis(row.p99_ns),
            100.0 * millis(row.max_ns - row.min_ns) / millis(row.median_ns.max(1)),
        );
    }
}

async fn run_once(sandbox: Builder) -> Result<Run, Failure> {
    let sandbox = sandbox.start().await?;
    let output = sandbox.command("/bin/echo").arg("chitin").output().await?;
    if output.exit != Exit::Code(0) || output.stdout != b"chitin\n" {
        return Err(Failure::Usage(format!("echo in the sandbox went wrong: {output:?}")));
    }
    let phases = sandbox.phases();
    let read = Instant::now();
    sandbox.stop().await;
    let stopping = u64::try_from(read.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let gone_ns = phases.exit_ns.unwrap_or(0).saturating_add(stopping);
    Ok(Run { phases, gone_ns })
}

fn progress(runs: u32) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} sandboxes")
        .unwrap_or(ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(runs.into()), target).with_style(style)
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
    phases.into_iter().filter_map(|(phase, of)| row(phase, runs.iter().filter_map(of).collect())).collect()
}

fn row(phase: &'static str, mut values: Vec<u64>) -> Option<Row> {
    values.sort_unstable();
    // Nearest rank: the smallest value that at least so many percent of all do not exceed.
    let rank = |percent: usize| values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied();
    Some(Row {
        phase,
        min_ns: *values.first()?,
        median_ns: rank(50)?,
        p99_ns: rank(99)?,
        max_ns: *values.last()?,
    })
}

#[expect(clippy::cast_precision_loss, reason = "for display, with three decimals")]
fn millis(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let expected = Row { phase: "x", min_ns: 1, median_ns: 50, p99_ns: 99, max_ns: 100 };
        assert_eq!(row("x", (1..=100).rev().collect()), Some(expected));
        let expected = Row { phase: "x", min_ns: 7, median_ns: 7, p99_ns: 7, max_ns: 7 };
        assert_eq!(row("x", vec![7]), Some(expected));
        assert_eq!(row("x", vec![]), None);
    }
}
