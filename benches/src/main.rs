//! `chitin-bench`: measures sandboxes by phase, their memory and their throughput, on request in
//! turns with another monitor.
#![forbid(unsafe_code)]

mod args;
mod egress;
mod entry;
mod error;
mod exec;
mod memory;
mod peer;
mod plot;
mod report;
mod start;
mod stats;
mod template;
mod throughput;
mod tier_runs;
mod turns;

use std::process::exit;

use clap::{Parser, Subcommand};

use crate::error::{BENCH_FAILED, BenchError};

/// Measure sandboxes: boot and restore times by phase, memory, and throughput.
#[derive(Parser)]
#[command(name = "chitin-bench", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start of a monitor, up to the first instruction of its guest; also works where KVM only
    /// emulates
    Enter(entry::Args),
    /// Cold boots, from the start of the monitor to the end of a small command
    Boot(start::BootArgs),
    /// Copies of a template, from the start of the monitor (or the request to a pool) to the end
    /// of a small command
    Restore(start::RestoreArgs),
    /// Small commands in a running sandbox, or whole runs on each tier
    Exec(exec::Args),
    /// Host memory taken by sandboxes after one command
    Memory(memory::Args),
    /// Bytes per second through standard input and output of a command
    Throughput(throughput::Args),
    /// HTTPS requests through the egress and the credential proxy of a sandbox, compared with the
    /// same requests from the host
    Egress(egress::Args),
}

fn main() {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        // A closed pipe is no reason to complain.
        let _ = error.print();
        exit(if error.use_stderr() { BENCH_FAILED } else { 0 })
    });
    if let Err(error) = execute(cli.command) {
        error.print();
        exit(BENCH_FAILED);
    }
}

fn execute(command: Command) -> Result<(), BenchError> {
    // One thread is enough: all the work is moving bytes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BenchError::io("start the async runtime"))?;
    let result = runtime.block_on(async {
        match command {
            Command::Enter(args) => entry::measure_entry(args).await,
            Command::Boot(args) => start::measure_boot(args).await,
            Command::Restore(args) => start::measure_restore(args).await,
            Command::Exec(args) => exec::measure_exec(args).await,
            Command::Memory(args) => memory::measure_memory(args).await,
            Command::Throughput(args) => throughput::measure_throughput(args).await,
            Command::Egress(args) => egress::measure_egress(args).await,
        }
    });
    runtime.shutdown_background();
    result
}
