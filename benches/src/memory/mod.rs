//! `chitin-bench memory`: host memory taken by sandboxes.

mod smaps;

use std::{io, process};

use chitin::{Builder, Exit};
use serde::Serialize;

use self::smaps::{Mapping, MemoryUse, find_children, read_memory_use};
use crate::args::{Common, Workload};
use crate::error::BenchError;
use crate::peer::Peer;
use crate::plot;
use crate::report::Report;
use crate::stats::{KIB, Row, print_rows, to_f64};
use crate::template::TemporaryTemplate;

/// Arguments of `chitin-bench memory`.
#[derive(clap::Args)]
#[command(after_help = "\
Figures are KiB of each monitor, after the first command in its sandbox, while all sandboxes \
live. `guest` is guest memory that the sandbox shares with no other; `shared` is its use of the \
kernel, the root image and the template, which the host holds once; `monitor` is the rest. Needs \
root.

Examples:
  chitin-bench memory --sandboxes 8
  chitin-bench memory -- python3 -c 'print(1)'")]
pub struct Args {
    /// Number of sandboxes at the same time, first booted, then copied
    #[arg(long, value_name = "N", default_value_t = 4,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    sandboxes: u32,

    #[command(flatten)]
    common: Common,

    #[command(flatten)]
    workload: Workload,
}

#[derive(Serialize)]
struct Figures {
    booted: Vec<Row>,
    copied: Vec<Row>,
}

/// Measures booted sandboxes and copies of a template, then those of the peer.
pub async fn measure_memory(args: Args) -> Result<(), BenchError> {
    let Common { guest, output, .. } = &args.common;
    let peer = args.common.find_peer(1)?;
    let builder = guest.builder();
    let booted = measure_sandboxes(&builder, &args).await?;
    let template =
        TemporaryTemplate::build(builder.clone(), None, args.workload.argv.clone()).await?;
    let copied = measure_sandboxes(&builder.template(&template.name), &args).await?;
    let peer_figures = match &peer {
        Some(peer) => Some((peer, measure_peer(peer, &args).await?)),
        None => None,
    };
    println!("{} sandboxes of {} MiB each; KiB", args.sandboxes, guest.memory);
    let mut report = Report::new(Figures { booted, copied }, peer_figures);
    report.memory_mib = Some(guest.memory);
    report.print("the same with", |figures| {
        print_rows("booted", &figures.booted, to_f64(KIB));
        print_rows("copied", &figures.copied, to_f64(KIB));
    });
    let Figures { booted, copied } = &report.figures;
    output.write_files(&report, || plot::draw_memory(booted, copied))
}

async fn measure_sandboxes(builder: &Builder, args: &Args) -> Result<Vec<Row>, BenchError> {
    let mut sandboxes = Vec::new();
    for _ in 0..args.sandboxes {
        let sandbox = builder.clone().start().await?;
        let output = args.workload.to_command(&sandbox).output().await?;
        args.workload.check_exit(output.exit, !output.stdout.is_empty())?;
        sandboxes.push(sandbox);
    }
    // The monitors are the only children of this process.
    let used = find_children(process::id()).and_then(|monitors| {
        monitors.iter().map(|pid| read_memory_use(*pid, &|mapping| mapping.dont_dump)).collect()
    });
    let rows = summarize_memory(used)?;
    for sandbox in sandboxes {
        sandbox.stop().await?;
    }
    Ok(rows)
}

async fn measure_peer(peer: &Peer, args: &Args) -> Result<Figures, BenchError> {
    let command = args.workload.to_peer_command();
    let snapshot = peer.save(&command).await?;
    let mut both = Vec::new();
    for snapshot in [None, Some(&snapshot)] {
        let mut guests = Vec::new();
        for _ in 0..args.sandboxes {
            let mut guest = match snapshot {
                Some(snapshot) => peer.restore(snapshot).await?,
                None => peer.boot().await?,
            };
            let ran = guest.run(&command).await?;
            args.workload.check_exit(Exit::Code(ran.code), ran.has_printed)?;
            guests.push(guest);
        }
        let is_guests = |mapping: &Mapping<'_>| peer.is_guest_mapping(mapping.path, mapping.bytes);
        let pids = guests.iter().filter_map(|guest| guest.pid());
        let used = pids.map(|pid| read_memory_use(pid, &is_guests)).collect();
        both.push(summarize_memory(used)?);
        for guest in guests {
            guest.stop().await?;
        }
    }
    let copied = both.pop().unwrap_or_default();
    Ok(Figures { booted: both.pop().unwrap_or_default(), copied })
}

fn summarize_memory(used: io::Result<Vec<MemoryUse>>) -> Result<Vec<Row>, BenchError> {
    let used =
        used.map_err(BenchError::io("read the memory maps of monitors, which needs root"))?;
    let row =
        |name, field: fn(&MemoryUse) -> u64| Row::summarize(name, used.iter().map(field).collect());
    let rows = [
        row("guest", |used| used.guest),
        row("shared", |used| used.shared),
        row("monitor", |used| used.monitor),
        row("pss", |used| used.proportional),
    ];
    Ok(rows.into_iter().flatten().collect())
}
