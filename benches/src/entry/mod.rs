//! `chitin-bench enter`: time from the start of a monitor to the first instruction of its guest.
//!
//! The guest is a real kernel whose first instructions are replaced: they write to the serial port
//! and stop. A monitor therefore does all the work that this kernel needs, and the time is taken
//! from outside, the same way for each monitor. This also works where KVM only emulates.

mod probe_kernel;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use std::{fs, io};

use chitin::Artifacts;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use self::probe_kernel::{MARKER, patch_entry_points};
use crate::args::Common;
use crate::error::BenchError;
use crate::peer::Peer;
use crate::plot;
use crate::report::Report;
use crate::stats::{Figures, MILLISECOND, Row, elapsed_ns, print_rows};
use crate::turns::{RunCount, measure_in_turns};

/// A monitor that has not entered its guest by then never will.
const LIMIT: Duration = Duration::from_secs(60);

/// Arguments of `chitin-bench enter`.
#[derive(clap::Args)]
#[command(after_help = "\
Times are milliseconds from the start of the monitor's process to the first byte that its guest \
writes to the serial port. The guest is the kernel of Chitin with other first instructions, so \
this also works with a KVM that only emulates. The monitor is jailed unless --no-jail is given; \
the jail of Firecracker is a separate program and is not measured.

Examples:
  chitin-bench enter --runs 50 --peer firecracker=./firecracker")]
pub struct Args {
    /// Number of starts, one after the other
    #[arg(long, value_name = "N", default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    #[command(flatten)]
    common: Common,
}

/// Measures starts of the monitor, in turns with the peer.
pub async fn measure_entry(args: Args) -> Result<(), BenchError> {
    let Args { runs, common } = args;
    let memory = common.guest.memory;
    let artifacts = Artifacts::locate();
    artifacts.check().map_err(chitin::Error::from)?;
    let peer = common.find_peer(1)?;
    let scratch = tempfile::Builder::new()
        .prefix("chitin-enter-")
        .tempdir()
        .map_err(BenchError::io("create a directory for temporary files (see TMPDIR)"))?;
    let spec = scratch.path().join("spec.json");
    write_spec(&spec, &artifacts, &common, scratch.path())?;
    let config = scratch.path().join("firecracker.json");
    if let Some(peer) = &peer {
        write_peer_config(&config, peer, scratch.path())?;
    }

    let turns = measure_in_turns(
        RunCount { warm_up: 1, counted: runs },
        "starts",
        async || {
            let mut command = Command::new(&artifacts.monitor);
            // The serial console is the standard error of the monitor.
            command.arg(&spec).stdout(Stdio::null()).stderr(Stdio::piped());
            time_to_marker(command, "chitin-vmm").await
        },
        peer.as_ref().map(|peer| {
            async || {
                let mut command = peer.boot_command(&config)?;
                // The serial console is the standard output of Firecracker.
                command.stdout(Stdio::piped()).stderr(Stdio::null());
                time_to_marker(command, "Firecracker").await
            }
        }),
    )
    .await?;

    let title = format!("{runs} starts of a monitor, 1 vCPU, {memory} MiB");
    println!("{title}; milliseconds to the guest's first instruction");
    let peer = peer.as_ref().map(|peer| (peer, summarize_starts(turns.peer)));
    let mut report = Report::new(summarize_starts(turns.chitin), peer);
    report.memory_mib = Some(memory);
    report.print("the same with", |figures| print_rows("phase", &figures.summary, MILLISECOND));
    common.output.write_files(&report, || {
        let Figures { summary, runs } = &report.figures;
        plot::draw_phases(&title, summary, runs.clone())
    })
}

fn summarize_starts(runs: Vec<u64>) -> Figures<u64> {
    Figures { summary: Row::summarize("entered", runs.clone()).into_iter().collect(), runs }
}

/// Writes what the monitor of Chitin is started with.
fn write_spec(
    path: &Path,
    artifacts: &Artifacts,
    common: &Common,
    dir: &Path,
) -> Result<(), BenchError> {
    let spec = json!({
        "kernel": write_probe_kernel(&artifacts.kernel, dir.join("kernel"))?,
        "root_image": artifacts.root_image,
        "memory_mib": common.guest.memory,
        "console": true,
        "jail": common.guest.jail(),
    });
    write_json(path, &spec)
}

/// Writes what the peer is started with.
fn write_peer_config(path: &Path, peer: &Peer, dir: &Path) -> Result<(), BenchError> {
    let mut config = peer.config();
    let kernel = write_probe_kernel(peer.kernel(), dir.join("peer-kernel"))?;
    config["boot-source"]["kernel_image_path"] = json!(kernel);
    write_json(path, &config)
}

/// Writes a copy of a kernel with other first instructions.
fn write_probe_kernel(kernel: &Path, target: PathBuf) -> Result<PathBuf, BenchError> {
    let failed = || BenchError::io(format!("make a probe kernel from {}", kernel.display()));
    let bytes = fs::read(kernel).map_err(failed())?;
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "not a 64-bit ELF `vmlinux`");
    let patched = patch_entry_points(bytes).ok_or_else(|| failed()(invalid()))?;
    fs::write(&target, patched).map_err(failed())?;
    Ok(target)
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<(), BenchError> {
    fs::write(path, json.to_string()).map_err(BenchError::io(format!("write {}", path.display())))
}

/// Starts a monitor, waits for the marker of its guest, ends the monitor, and returns the
/// nanoseconds up to the marker.
async fn time_to_marker(mut command: Command, name: &str) -> Result<u64, BenchError> {
    let failed = || BenchError::io(format!("start {name}"));
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).kill_on_drop(true).spawn().map_err(failed())?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut printed = Vec::new();
    let seen = timeout(LIMIT, async {
        match (stdout, stderr) {
            (Some(pipe), _) => wait_for_marker(pipe, &mut printed).await,
            (None, Some(pipe)) => wait_for_marker(pipe, &mut printed).await,
            (None, None) => Ok(false),
        }
    });
    let seen = seen.await.unwrap_or(Ok(false)).map_err(failed())?;
    let took = elapsed_ns(started);
    // The guest ends itself by a triple fault.
    if timeout(LIMIT, child.wait()).await.is_err() {
        child.kill().await.map_err(failed())?;
    }
    if seen {
        return Ok(took);
    }
    let printed = String::from_utf8_lossy(&printed);
    let reason = format!("it did not enter its guest; last output: {}", printed.trim());
    Err(failed()(io::Error::other(reason)))
}

/// Reads until the marker; returns false if the pipe ends first. Other output is an error message.
async fn wait_for_marker(
    mut pipe: impl AsyncRead + Unpin,
    printed: &mut Vec<u8>,
) -> io::Result<bool> {
    loop {
        if pipe.read_buf(printed).await? == 0 {
            return Ok(false);
        }
        if printed.contains(&MARKER) {
            return Ok(true);
        }
    }
}
