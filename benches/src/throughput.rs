//! `chitin-bench throughput`: bytes through the channel, into the standard input of a command and
//! out of its standard output.

use std::time::{Duration, Instant};

use chitin::{Exit, Sandbox};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::args::Common;
use crate::error::BenchError;
use crate::report::Report;
use crate::stats::{MIB, Row, bytes_per_second, print_rows, to_f64};
use crate::turns::{RunCount, measure_in_turns};
use crate::{peer, plot};

/// Arguments of `chitin-bench throughput`.
#[derive(clap::Args)]
#[command(after_help = "\
Rates are MiB per second, from the first byte to the end of the command: `in` is what `cat \
>/dev/null` reads, `out` what `head -c SIZE /dev/zero` writes. One transfer in each direction \
comes first and is not counted.

Examples:
  chitin-bench throughput --size 256")]
pub struct Args {
    /// Number of transfers in each direction
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// MiB of each transfer
    #[arg(long, value_name = "MIB", default_value_t = 64,
        value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: u64,

    #[command(flatten)]
    common: Common,
}

/// Rates of all transfers, in bytes per second.
#[derive(Serialize)]
struct Figures {
    summary: Vec<Row>,
}

impl Figures {
    fn new(rates: Vec<(u64, u64)>) -> Figures {
        let (into, out) = rates.into_iter().unzip();
        let rows = [Row::summarize("in", into), Row::summarize("out", out)];
        Figures { summary: rows.into_iter().flatten().collect() }
    }
}

/// Measures transfers, in turns with the peer.
pub async fn measure_throughput(args: Args) -> Result<(), BenchError> {
    let Args { runs, size, common } = args;
    let peer = common.find_peer(1)?;
    let sandbox = common.guest.builder().start().await?;
    let mut peer_guest = match &peer {
        Some(peer) => Some(peer.boot().await?),
        None => None,
    };
    let rate = |took| bytes_per_second(size * MIB, took);
    let turns = measure_in_turns(
        // The first transfer finds buffers and the guest's page cache cold.
        RunCount { warm_up: 1, counted: runs },
        "transfers in each direction",
        async || {
            let into = rate(send_bytes(&sandbox, size).await?);
            Ok((into, rate(receive_bytes(&sandbox, size).await?)))
        },
        peer_guest.as_mut().map(|guest| {
            async || {
                let (into, out) = transfer_with_peer(guest, size).await?;
                Ok((rate(into), rate(out)))
            }
        }),
    )
    .await?;
    sandbox.stop().await?;
    if let Some(guest) = peer_guest {
        guest.stop().await?;
    }

    let title = format!("{size} MiB through standard input and output of a command");
    println!("{title}; MiB per second");
    let peer = peer.as_ref().map(|peer| (peer, Figures::new(turns.peer)));
    let mut report = Report::new(Figures::new(turns.chitin), peer);
    report.size_mib = Some(size);
    report.print("with the init of its guest alone, no command,", |figures| {
        print_rows("direction", &figures.summary, to_f64(MIB));
    });
    common.output.write_files(&report, || plot::draw_rates(&title, &report.figures.summary))
}

/// Sends to the guest of a peer and receives from it.
async fn transfer_with_peer(
    guest: &mut peer::Guest,
    mib: u64,
) -> Result<(Duration, Duration), BenchError> {
    let bytes = usize::try_from(mib * MIB).unwrap_or(usize::MAX);
    let started = Instant::now();
    guest.send_bytes(bytes).await?;
    let sent = started.elapsed();
    let first = guest.receive_bytes(bytes).await?;
    Ok((sent, first.elapsed()))
}

async fn send_bytes(sandbox: &Sandbox, mib: u64) -> Result<Duration, BenchError> {
    let piece = vec![0x5a; 64 * 1024];
    let mut process =
        sandbox.command("/bin/sh").args(["-c", "exec cat >/dev/null"]).piped_stdin().spawn()?;
    let started = Instant::now();
    if let Some(mut stdin) = process.stdin.take() {
        for _ in 0..mib * MIB / piece.len() as u64 {
            // An error here also fails the wait below, which gives the reason.
            if stdin.write_all(&piece).await.is_err() {
                break;
            }
        }
    }
    let (exit, _) = process.wait().await?;
    check_transfer(exit, true)?;
    Ok(started.elapsed())
}

async fn receive_bytes(sandbox: &Sandbox, mib: u64) -> Result<Duration, BenchError> {
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
    check_transfer(exit, received == mib * MIB)?;
    Ok(started.map_or(Duration::MAX, |started| started.elapsed()))
}

fn check_transfer(exit: Exit, is_complete: bool) -> Result<(), BenchError> {
    match exit {
        Exit::Code(0) if is_complete => Ok(()),
        exit => Err(BenchError::TransferFailed { exit }),
    }
}
