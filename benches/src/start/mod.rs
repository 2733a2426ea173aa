//! `chitin-bench boot` and `restore`: sandboxes from nothing, or from a template, to the end of a
//! command.

mod ask;
mod restore;

use std::time::Instant;

use chitin::{Builder, Exit, Phases, Pool, Sandbox};
use serde::Serialize;
use tokio::io::AsyncReadExt;

use self::ask::Ask;
pub use self::restore::{RestoreArgs, measure_restore};
use crate::args::{Common, OutputArgs, Workload};
use crate::error::BenchError;
use crate::peer::{Peer, Snapshot};
use crate::plot;
use crate::report::Report;
use crate::stats::{Figures, MILLISECOND, Row, elapsed_ns, ns_between, print_rows};
use crate::turns::{RunCount, Turns, measure_in_turns};

/// Arguments of `chitin-bench boot`.
#[derive(clap::Args)]
#[command(after_help = "\
Times are milliseconds since the start of the monitor's process. `spread` is (max - min) / \
median. One boot comes first and is not counted.

With a peer, `agent` is the first byte of the init of its guest.

Examples:
  chitin-bench boot --runs 20 --plot boot.svg
  chitin-bench boot --peer firecracker=./firecracker
  cargo xtask nested --icount -- target/release/chitin-bench boot --runs 5    # virtual clock")]
pub struct BootArgs {
    /// Number of boots, one after the other
    #[arg(long, value_name = "N", default_value_t = 10,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,

    #[command(flatten)]
    common: Common,

    #[command(flatten)]
    workload: Workload,
}

/// One sandbox.
#[derive(Serialize)]
struct StartTimes {
    #[serde(flatten)]
    phases: Phases,
    /// The process of the monitor has ended.
    gone_ns: u64,
}

/// The origin of sandboxes.
enum Source {
    Builder(Box<Builder>),
    Pool(Pool),
}

/// The work in each sandbox, which ends the measurement.
struct Job<'a> {
    workload: &'a Workload,
    /// A request to a running server instead of the command.
    ask: Option<&'a Ask>,
}

/// A peer, and the guest that it restores; without one it boots.
type PeerSource<'a> = (&'a Peer, Option<&'a Snapshot>);

/// Measures cold boots, in turns with the peer.
pub async fn measure_boot(args: BootArgs) -> Result<(), BenchError> {
    let BootArgs { runs, cpus, common, workload } = args;
    let builder = common.guest.builder().vcpus(cpus);
    let peer = common.find_peer(cpus)?;
    let job = Job { workload: &workload, ask: None };
    let source = Source::Builder(Box::new(builder));
    let peer_source = peer.as_ref().map(|peer| (peer, None));
    let turns = measure_starts(runs, &source, &job, peer_source).await?;
    let title = format!("{runs} cold boots, {cpus} vCPU, {} MiB", common.guest.memory);
    report_starts(&title, turns, peer.as_ref(), &common.output)
}

/// Starts one sandbox after the other, in turns with the peer.
async fn measure_starts(
    count: u32,
    source: &Source,
    job: &Job<'_>,
    peer: Option<PeerSource<'_>>,
) -> Result<Turns<StartTimes>, BenchError> {
    // The first one finds the files not yet in the page cache, and KVM and the allocator cold.
    let count = RunCount { warm_up: 1, counted: count };
    let measure = async || start_sandbox(source, job).await;
    let measure_peer = peer.map(|peer| async move || start_peer_guest(peer, job.workload).await);
    measure_in_turns(count, "sandboxes", measure, measure_peer).await
}

async fn start_peer_guest(
    (peer, snapshot): PeerSource<'_>,
    workload: &Workload,
) -> Result<StartTimes, BenchError> {
    let mut guest = match snapshot {
        Some(snapshot) => peer.restore(snapshot).await?,
        None => peer.boot().await?,
    };
    let ran = guest.run(&workload.to_peer_command()).await?;
    workload.check_exit(Exit::Code(ran.code), ran.has_printed)?;
    let at = |moment| Some(ns_between(guest.started, moment));
    let phases = Phases {
        agent_ns: at(guest.hello),
        exec_ns: at(ran.output),
        exit_ns: at(ran.exit),
        ..Phases::default()
    };
    let ended = Instant::now();
    guest.stop().await?;
    let gone_ns = phases.exit_ns.unwrap_or(0).saturating_add(elapsed_ns(ended));
    Ok(StartTimes { phases, gone_ns })
}

async fn start_sandbox(source: &Source, job: &Job<'_>) -> Result<StartTimes, BenchError> {
    let sandbox = match source {
        Source::Builder(builder) => Builder::clone(builder).start().await?,
        Source::Pool(pool) => {
            // The measured case is a pool that had the time to fill up.
            pool.wait_until_full().await?;
            pool.start().await?
        }
    };
    match job.ask {
        Some(ask) => ask.send_to(&sandbox).await?,
        None => run_command(&sandbox, job.workload).await?,
    }
    let phases = sandbox.phases();
    let ended = Instant::now();
    sandbox.stop().await?;
    let done = phases.exit_ns.or(phases.exec_ns).unwrap_or(0);
    Ok(StartTimes { phases, gone_ns: done.saturating_add(elapsed_ns(ended)) })
}

async fn run_command(sandbox: &Sandbox, workload: &Workload) -> Result<(), BenchError> {
    let mut process = workload.to_command(sandbox).spawn()?;
    let mut printed = Vec::new();
    if let Some(stdout) = &mut process.stdout {
        // An error here also fails the wait below, which gives the reason.
        let _ = stdout.read_to_end(&mut printed).await;
    }
    let (exit, _) = process.wait().await?;
    workload.check_exit(exit, !printed.is_empty())
}

fn report_starts(
    title: &str,
    turns: Turns<StartTimes>,
    peer: Option<&Peer>,
    output: &OutputArgs,
) -> Result<(), BenchError> {
    println!("{title}; milliseconds since the start");
    let peer = peer.map(|peer| (peer, summarize_starts(turns.peer)));
    let report = Report::new(summarize_starts(turns.chitin), peer);
    report.print("the same with", |figures| print_rows("phase", &figures.summary, MILLISECOND));
    output.write_files(&report, || {
        let Figures { summary, runs } = &report.figures;
        plot::draw_phases(
            title,
            summary,
            runs.iter().filter_map(|run| run.phases.exec_ns).collect(),
        )
    })
}

fn summarize_starts(runs: Vec<StartTimes>) -> Figures<StartTimes> {
    type Phase = (&'static str, fn(&StartTimes) -> Option<u64>);
    let phases: [Phase; 6] = [
        ("entered", |run| run.phases.entered_ns),
        ("kernel", |run| run.phases.kernel_ns),
        ("agent", |run| run.phases.agent_ns),
        ("exec", |run| run.phases.exec_ns),
        ("exit", |run| run.phases.exit_ns),
        ("gone", |run| Some(run.gone_ns)),
    ];
    let summary = phases
        .into_iter()
        .filter_map(|(name, phase)| Row::summarize(name, runs.iter().filter_map(phase).collect()))
        .collect();
    Figures { summary, runs }
}
