//! How long a monitor takes until its guest runs, whatever KVM is like.
//!
//! The guest is a real kernel whose first instructions are replaced: they write to the serial port and stop. So a
//! monitor does all that it does for that kernel, and what is timed is seen from outside, the same way for each monitor. That
//! works also where KVM only emulates.

mod kernel;

use std::fs;
use std::io;
use std::process::Stdio;
use std::time::{Duration, Instant};

use chitin::Artifacts;
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::peer::{PeerArgs, Scratch};
use super::stats::{self, Row};
use super::{Beside, Guest, Output, Report, plot, progress, since};
use crate::failure::Failure;

/// A monitor that has not entered its guest by then will not.
const LIMIT: Duration = Duration::from_secs(60);

/// Arguments of `chitin-bench enter`.
#[derive(clap::Args)]
#[command(
    after_help = "Milliseconds from starting the monitor's process to the first byte that its guest, a kernel with other first
instructions, writes to the serial port. Works also on a KVM that only emulates. The monitor is jailed unless told not to be;
Firecracker's jail is another program, and not measured.

Examples:
  chitin-bench enter --runs 50 --peer firecracker=./firecracker"
)]
pub struct Args {
    /// How many starts
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Figures {
    summary: Vec<Row>,
    /// Nanoseconds.
    runs: Vec<u64>,
}

impl Figures {
    fn of(runs: Vec<u64>) -> Figures {
        Figures { summary: Row::of("entered", runs.clone()).into_iter().collect(), runs }
    }
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let artifacts = Artifacts::locate();
    artifacts.check().map_err(chitin::Error::from)?;
    let peer = args.peer.peer(1, args.guest.memory)?;
    let scratch = Scratch::new("enter")?;
    let dir = scratch.path();
    let kernel = |path: &std::path::Path, name| {
        let failed = |source| Failure::Io {
            what: format!("make a trial kernel of {}", path.display()),
            source,
        };
        let bytes = fs::read(path).map_err(failed)?;
        let target = dir.join(name);
        let made = kernel::with_other_start(bytes).ok_or_else(|| {
            failed(io::Error::new(io::ErrorKind::InvalidData, "it is no 64-bit ELF `vmlinux`"))
        })?;
        fs::write(&target, made).map_err(failed)?;
        Ok::<_, Failure>(target)
    };
    let spec = json!({
        "kernel": kernel(&artifacts.kernel, "kernel")?, "root_image": artifacts.root_image,
        "memory_mib": args.guest.memory, "console": true, "jail": args.guest.jail.announced(),
    });
    let spec_path = dir.join("spec.json");
    write(&spec_path, &spec)?;
    let configuration_path = dir.join("firecracker.json");
    if let Some(peer) = &peer {
        let mut configuration = peer.configuration();
        configuration["boot-source"]["kernel_image_path"] =
            json!(kernel(peer.kernel(), "peer-kernel")?);
        write(&configuration_path, &configuration)?;
    }

    let progress = progress(args.runs, "starts");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..=args.runs {
        let mut command = Command::new(&artifacts.monitor);
        // The serial console is the monitor's standard error.
        command.arg(&spec_path).stdout(Stdio::null()).stderr(Stdio::piped());
        let once = start(command, "chitin-vmm").await?;
        let mut beside = None;
        if let Some(peer) = &peer {
            let mut command = peer.command(&configuration_path)?;
            // Its serial console is its standard output.
            command.stdout(Stdio::piped()).stderr(Stdio::null());
            beside = Some(start(command, "Firecracker").await?);
        }
        if run > 0 {
            ours.push(once);
            theirs.extend(beside);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();

    let title = format!("{} starts of a monitor, 1 vCPU, {} MiB", args.runs, args.guest.memory);
    println!("{title}; milliseconds to the guest's first instruction");
    let figures = Figures::of(ours);
    stats::print("phase", &figures.summary, 1e6);
    let peer = peer.map(|peer| {
        println!("the same with {}", peer.title());
        let figures = Figures::of(theirs);
        stats::print("phase", &figures.summary, 1e6);
        Beside::new(&peer, figures)
    });
    let report = Report::new(&args.guest, figures, peer);
    args.output.write(&report, || {
        plot::phases(&title, &report.figures.summary, report.figures.runs.clone())
    })?;
    Ok(0)
}

fn write(path: &std::path::Path, json: &serde_json::Value) -> Result<(), Failure> {
    fs::write(path, json.to_string())
        .map_err(|source| Failure::Io { what: format!("write {}", path.display()), source })
}

/// Starts a monitor, waits for what its guest writes, ends it, and returns how long that took, in nanoseconds.
async fn start(mut command: Command, name: &str) -> Result<u64, Failure> {
    let failed = |source| Failure::Io { what: format!("start {name}"), source };
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).kill_on_drop(true).spawn().map_err(failed)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut said = Vec::new();
    let seen = timeout(LIMIT, async {
        match (stdout, stderr) {
            (Some(pipe), _) => wait_for(pipe, &mut said).await,
            (None, Some(pipe)) => wait_for(pipe, &mut said).await,
            (None, None) => Ok(false),
        }
    });
    let seen = seen.await.unwrap_or(Ok(false)).map_err(failed)?;
    let took = since(started);
    // Its guest has ended by itself.
    if timeout(LIMIT, child.wait()).await.is_err() {
        child.kill().await.map_err(failed)?;
    }
    match seen {
        true => Ok(took),
        false => {
            let said = String::from_utf8_lossy(&said);
            Err(failed(io::Error::other(format!(
                "its guest was not entered; it said: {}",
                said.trim()
            ))))
        }
    }
}

/// Waits for the guest's byte; false if the pipe ends. What comes instead of it is an error message.
async fn wait_for(mut pipe: impl AsyncRead + Unpin, said: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        if pipe.read_buf(said).await? == 0 {
            return Ok(false);
        }
        if said.contains(&kernel::MARK) {
            return Ok(true);
        }
    }
}
