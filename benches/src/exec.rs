//! `chitin-bench exec`: small commands in a running sandbox.

use std::time::Instant;

use chitin::{Exit, Sandbox, TierSelection};
use serde::Serialize;
use tokio::io::AsyncReadExt;

use crate::args::{Common, Workload};
use crate::error::BenchError;
use crate::peer;
use crate::report::Report;
use crate::stats::{self, Figures, MILLISECOND, elapsed_ns, ns_between, print_rows};
use crate::turns::{RunCount, Turns, measure_in_turns};
use crate::{plot, tier_runs};

/// Arguments of `chitin-bench exec`.
#[derive(clap::Args)]
#[command(after_help = "\
Times are milliseconds since the request for the command. Three commands come first and are not \
counted.

With --tier, each run is a whole `chitin run`, from the start of its process to its first byte \
and to its end, in turns with the same command in the same container without Chitin (`runsc run`, \
`docker run`). `all` skips the tiers that this host does not have and names them. `chitin` must \
be in the directory of `chitin-bench`.

Examples:
  chitin-bench exec --runs 100
  chitin-bench exec --tier all --runs 20 --json exec.json
  chitin-bench exec -- python3 -c 'print(1)'")]
pub struct Args {
    /// Measure whole runs on this tier instead: ironclaw, nanoclaw, nemoclaw, or all
    #[arg(long, value_name = "T", conflicts_with_all = ["peer", "plot"])]
    tier: Option<TierSelection>,

    /// Number of commands, one after the other
    #[arg(long, value_name = "N", default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,

    #[command(flatten)]
    common: Common,

    #[command(flatten)]
    workload: Workload,
}

/// After this many commands, every page that a further one touches has been touched.
const WARM_UP: u32 = 3;

/// One command, in nanoseconds since the request for it.
#[derive(Serialize)]
struct CommandTimes {
    /// The first byte of output was read.
    output_ns: u64,
    /// The exit was read.
    exit_ns: u64,
}

/// Measures commands, in turns with the peer.
pub async fn measure_exec(args: Args) -> Result<(), BenchError> {
    let Args { tier, runs, common, workload } = args;
    if let Some(tiers) = tier {
        return tier_runs::measure_tiers(tiers, runs, &common, &workload).await;
    }
    let peer = common.find_peer(1)?;
    let sandbox = common.guest.builder().start().await?;
    let mut peer_guest = match &peer {
        Some(peer) => Some(peer.boot().await?),
        None => None,
    };
    let turns = measure_in_turns(
        RunCount { warm_up: WARM_UP, counted: runs },
        "commands",
        async || run_command(&sandbox, &workload).await,
        peer_guest.as_mut().map(|guest| async || run_peer_command(guest, &workload).await),
    )
    .await?;
    sandbox.stop().await?;
    if let Some(guest) = peer_guest {
        guest.stop().await?;
    }

    let title = format!("{runs} commands in one sandbox");
    println!("{title}; milliseconds since each was requested");
    let Turns { chitin, peer: peer_runs } = turns;
    let peer = peer.as_ref().map(|peer| (peer, summarize_commands(peer_runs)));
    let mut report = Report::new(summarize_commands(chitin), peer);
    report.memory_mib = Some(common.guest.memory);
    report.print("the same with", |figures| print_rows("phase", &figures.summary, MILLISECOND));
    common.output.write_files(&report, || {
        let Figures { summary, runs } = &report.figures;
        plot::draw_phases(&title, summary, runs.iter().map(|run| run.exit_ns).collect())
    })
}

async fn run_peer_command(
    guest: &mut peer::Guest,
    workload: &Workload,
) -> Result<CommandTimes, BenchError> {
    let requested = Instant::now();
    let ran = guest.run(&workload.to_peer_command()).await?;
    workload.check_exit(Exit::Code(ran.code), ran.has_printed)?;
    Ok(CommandTimes {
        output_ns: ns_between(requested, ran.output),
        exit_ns: ns_between(requested, ran.exit),
    })
}

async fn run_command(sandbox: &Sandbox, workload: &Workload) -> Result<CommandTimes, BenchError> {
    let requested = Instant::now();
    let mut process = workload.to_command(sandbox).spawn()?;
    let (mut first, mut rest) = ([0], Vec::new());
    let mut printed = 0;
    let mut output_ns = elapsed_ns(requested);
    if let Some(stdout) = &mut process.stdout {
        // An error here also fails the wait below, which gives the reason.
        printed = stdout.read(&mut first).await.unwrap_or(0);
        output_ns = elapsed_ns(requested);
        let _ = stdout.read_to_end(&mut rest).await;
    }
    let (exit, _) = process.wait().await?;
    let exit_ns = elapsed_ns(requested);
    workload.check_exit(exit, printed > 0)?;
    Ok(CommandTimes { output_ns, exit_ns })
}

fn summarize_commands(runs: Vec<CommandTimes>) -> Figures<CommandTimes> {
    let times = runs.iter().map(|run| (run.output_ns, run.exit_ns));
    Figures { summary: stats::summarize_output_and_exit(times), runs }
}
