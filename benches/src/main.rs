//! `chitin-bench`: how long things take, by phase, and what they take of the host.

mod egress;
mod enter;
mod exec;
mod failure;
mod jail;
mod memory;
mod peer;
mod plot;
mod report;
mod start;
mod stats;
mod throughput;
mod tier_runs;
mod tiers;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::exit;
use std::time::Instant;

use chitin::{Builder, ECHO, Exit, Sandbox, Templates, Warming};
use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::failure::{CHITIN_FAILED, Failure};
use crate::jail::NoJail;
use crate::report::write_json;

use peer::{Described, Peer};

/// Measures sandboxes, in turns with other monitors where asked.
#[derive(Parser)]
#[command(name = "chitin-bench", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to measure.
#[derive(clap::Subcommand)]
enum Command {
    /// A monitor's start: from starting its process to its guest's first instruction, which needs no guest that works
    Enter(enter::Args),
    /// Cold boots: from starting the monitor to the end of a small command
    Boot(start::BootArgs),
    /// Copies of a template: from starting the monitor, or asking a pool, to the end of a small command
    Restore(start::RestoreArgs),
    /// Round trips on a running sandbox, or whole runs on several tiers: from asking for a small command to its end
    Exec(exec::Args),
    /// Memory that sandboxes take of the host, after one command
    Memory(memory::Args),
    /// Bytes per second through a command's standard input and output
    Throughput(throughput::Args),
    /// Requests over TLS through a sandbox's egress and its proxy of credentials, beside the same from this host
    Egress(egress::Args),
}

fn main() {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        exit(if error.use_stderr() { CHITIN_FAILED.into() } else { 0 })
    });
    exit(match execute(cli.command) {
        Ok(code) => code.into(),
        Err(failure) => {
            failure.print();
            CHITIN_FAILED.into()
        }
    });
}

fn execute(command: Command) -> Result<u8, Failure> {
    // One thread does: all the work is moving bytes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::Io { what: "start the runtime".into(), source })?;
    let code = runtime.block_on(run(command));
    runtime.shutdown_background();
    code
}

async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Enter(args) => enter::run(args).await,
        Command::Boot(args) => start::boot(args).await,
        Command::Restore(args) => start::restore(args).await,
        Command::Exec(args) => exec::run(args).await,
        Command::Memory(args) => memory::run(args).await,
        Command::Throughput(args) => throughput::run(args).await,
        Command::Egress(args) => egress::run(args).await,
    }
}

/// What the sandboxes are.
#[derive(clap::Args)]
struct Guest {
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,

    #[command(flatten)]
    jail: NoJail,
}

impl Guest {
    fn builder(&self) -> Builder {
        Sandbox::builder().memory_mib(self.memory).jail(self.jail.announced())
    }
}

/// Nanoseconds since then.
fn since(moment: Instant) -> u64 {
    nanoseconds(moment, Instant::now())
}

fn nanoseconds(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

/// What is run in the sandboxes.
#[derive(clap::Args, Clone)]
struct Workload {
    /// The command to run instead of an echo of some bytes; it has to print something
    #[arg(value_name = "CMD", trailing_var_arg = true)]
    argv: Vec<OsString>,
}

impl Workload {
    fn command(&self, sandbox: &Sandbox) -> chitin::Command {
        match self.argv.split_first() {
            Some((program, arguments)) => sandbox.command(program).args(arguments),
            None => sandbox.command(ECHO).arg("chitin"),
        }
    }

    /// The same for a peer's guest.
    fn words(&self) -> Vec<u8> {
        peer::words(&self.argv)
    }

    /// Whether the command did what it was to do.
    fn check(&self, exit: &Exit, printed: bool) -> Result<(), Failure> {
        match (exit, printed) {
            (Exit::Code(0), true) => Ok(()),
            (Exit::Code(0), false) => {
                Err(Failure::Usage("the command prints nothing: nothing to measure".into()))
            }
            _ => Err(Failure::Usage(format!("the command in the sandbox went wrong: {exit:?}"))),
        }
    }
}

/// Where the results go, beside the table.
#[derive(clap::Args)]
struct Output {
    /// Write every run and the summary as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the phases and how the times are distributed
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl Output {
    fn write(&self, report: &impl Serialize, plot: impl FnOnce() -> String) -> Result<(), Failure> {
        if let Some(path) = &self.json {
            write_json(path, report)?;
        }
        if let Some(path) = &self.plot {
            let what = || format!("write {}", path.display());
            std::fs::write(path, plot()).map_err(|source| Failure::Io { what: what(), source })?;
        }
        Ok(())
    }
}

/// What a report says of another monitor, measured in the same run.
#[derive(Serialize)]
struct Beside<T> {
    #[serde(flatten)]
    peer: Described,
    #[serde(flatten)]
    figures: T,
}

impl<T> Beside<T> {
    fn new(peer: &Peer, figures: T) -> Self {
        Self { peer: peer.described(), figures }
    }
}

/// What is said of sandboxes of one size.
#[derive(Serialize)]
struct Report<T> {
    chitin: &'static str,
    memory_mib: u64,
    #[serde(flatten)]
    figures: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Beside<T>>,
}

impl<T> Report<T> {
    fn new(guest: &Guest, figures: T, peer: Option<Beside<T>>) -> Self {
        Self { chitin: env!("CARGO_PKG_VERSION"), memory_mib: guest.memory, figures, peer }
    }
}

/// A template that is there as long as this is.
struct Temporary {
    templates: Templates,
    name: String,
}

impl Temporary {
    /// Builds one whose copies will run this first.
    async fn build(
        builder: Builder,
        warm_up: Option<String>,
        first: Vec<OsString>,
    ) -> Result<Temporary, Failure> {
        let templates = Templates::locate().map_err(chitin::Error::from)?;
        let name = format!("bench-{}", std::process::id());
        let warming = Warming { warm_up, first };
        builder.build_template(&name, &warming).await?;
        Ok(Temporary { templates, name })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = self.templates.remove(&self.name) {
            eprintln!("chitin: {}", Failure::Sandbox(error.into()).line());
        }
    }
}

fn progress(runs: u32, what: &'static str) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template(&format!("{{bar:40}} {{pos}}/{{len}} {what}"))
        .unwrap_or(ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(runs.into()), target).with_style(style)
}
