//! Bytes through the channel: into a command's standard input, and out of its standard output.

use std::time::{Duration, Instant};

use chitin::{Exit, Sandbox};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::peer::{self, PeerArgs};
use super::stats::{self, Row};
use super::{Beside, Guest, Output, plot, progress};
use crate::failure::Failure;

const MIB: u64 = 1 << 20;

/// Arguments of `chitin-bench throughput`.
#[derive(clap::Args)]
#[command(
    after_help = "MiB per second, from the first byte to the end of the command: `in` is what `cat >/dev/null` reads, `out` what
`head -c SIZE /dev/zero` writes.

Examples:
  chitin-bench throughput --size 256"
)]
pub struct Args {
    /// How often, in each direction
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// MiB to be moved each time
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: u64,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    size_mib: u64,
    #[serde(flatten)]
    figures: Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Beside<Figures>>,
}

/// Bytes per second.
#[derive(Serialize, Default)]
struct Figures {
    summary: Vec<Row>,
}

impl Figures {
    fn of(rates: Vec<(u64, u64)>) -> Figures {
        let (into, out) = rates.into_iter().unzip();
        Figures {
            summary: [Row::of("in", into), Row::of("out", out)].into_iter().flatten().collect(),
        }
    }
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let peer = args.peer.peer(1, args.guest.memory)?;
    let sandbox = args.guest.builder().start().await?;
    let mut other = match &peer {
        Some(peer) => Some(peer.boot().await?),
        None => None,
    };
    let bytes = args.size * MIB;
    let progress = progress(2 * args.runs, "transfers");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    // The first of each finds buffers and the guest's page cache cold, and is not counted.
    for run in 0..=args.runs {
        let rates = |(into, out)| (stats::rate(bytes, into), stats::rate(bytes, out));
        let once = rates((send(&sandbox, args.size).await?, receive(&sandbox, args.size).await?));
        let beside = match &mut other {
            Some(guest) => Some(rates(exchange(guest, args.size).await?)),
            None => None,
        };
        if run > 0 {
            ours.push(once);
            theirs.extend(beside);
            progress.inc(2);
        }
    }
    progress.finish_and_clear();
    sandbox.stop().await?;
    if let Some(guest) = other {
        guest.stop().await?;
    }
    let title = format!("{} MiB through a command's standard input and output", args.size);
    println!("{title}; MiB per second");
    let print =
        |figures: &Figures| stats::print("direction", &figures.summary, stats::scaled(MIB, 1.0));
    let figures = Figures::of(ours);
    print(&figures);
    let peer = peer.map(|peer| {
        println!("with its guest's init alone, no command, {}", peer.title());
        let figures = Figures::of(theirs);
        print(&figures);
        Beside::new(&peer, figures)
    });
    let report = Report { chitin: env!("CARGO_PKG_VERSION"), size_mib: args.size, figures, peer };
    args.output.write(&report, || plot::rates(&title, &report.figures.summary))?;
    Ok(0)
}

/// To a peer's guest, and from it.
async fn exchange(guest: &mut peer::Guest, mib: u64) -> Result<(Duration, Duration), Failure> {
    let bytes = usize::try_from(mib * MIB).unwrap_or(usize::MAX);
    let started = Instant::now();
    guest.send(bytes).await?;
    let sent = started.elapsed();
    let first = guest.receive(bytes).await?;
    Ok((sent, first.elapsed()))
}

async fn send(sandbox: &Sandbox, mib: u64) -> Result<Duration, Failure> {
    let piece = vec![0x5a; 64 * 1024];
    let mut process =
        sandbox.command("/bin/sh").args(["-c", "exec cat >/dev/null"]).piped_stdin().spawn()?;
    let started = Instant::now();
    if let Some(mut stdin) = process.stdin.take() {
        for _ in 0..mib * MIB / piece.len() as u64 {
            // What breaks this breaks the wait below too, and that says why.
            if stdin.write_all(&piece).await.is_err() {
                break;
            }
        }
    }
    let (exit, _) = process.wait().await?;
    check(&exit, true)?;
    Ok(started.elapsed())
}

async fn receive(sandbox: &Sandbox, mib: u64) -> Result<Duration, Failure> {
    let bytes = (mib * MIB).to_string();
    let mut process = sandbox.command("/usr/bin/head").args(["-c", &bytes, "/dev/zero"]).spawn()?;
    let mut received = 0;
    let mut piece = vec![0; 64 * 1024];
    let mut started = None;
    if let Some(stdout) = &mut process.stdout {
        while let Ok(count @ 1..) = stdout.read(&mut piece).await {
            started.get_or_insert_with(Instant::now);
            received += count as u64;
        }
    }
    let (exit, _) = process.wait().await?;
    check(&exit, received == mib * MIB)?;
    Ok(started.map_or(Duration::MAX, |started| started.elapsed()))
}

fn check(exit: &Exit, all: bool) -> Result<(), Failure> {
    match exit {
        Exit::Code(0) if all => Ok(()),
        _ => Err(Failure::Usage(format!("the transfer went wrong: {exit:?}"))),
    }
}
