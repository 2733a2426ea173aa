//! What sandboxes take of the host's memory.
//!
//! A monitor's mappings are of two kinds: those of the guest (its RAM and its root image), which it keeps out of core dumps
//! (`dd` among the `VmFlags` of `/proc/PID/smaps`, see proc_pid_smaps(5)), and its own.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::peer::{Peer, PeerArgs};
use super::stats::{self, Row};
use super::{Beside, Guest, Output, Report, Temporary, Workload, plot};
use crate::failure::Failure;

/// Arguments of `chitin-bench memory`.
#[derive(clap::Args)]
#[command(
    after_help = "KiB of each monitor, after the first command in its sandbox, while all of them live. `guest` is the guest's memory that nobody
shares; `shared` what it uses of kernel, root image and template, once for all of them; `monitor` all else.

Examples:
  chitin-bench memory --sandboxes 8
  chitin-bench memory -- python3 -c 'print(1)'"
)]
pub struct Args {
    /// How many sandboxes at once, booted and copied each
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    sandboxes: u32,

    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    output: Output,

    #[command(flatten)]
    workload: Workload,
}

#[derive(Serialize)]
struct Figures {
    booted: Vec<Row>,
    copied: Vec<Row>,
}

impl Figures {
    fn print(&self) {
        stats::print("booted", &self.booted, 1024.0);
        stats::print("copied", &self.copied, 1024.0);
    }
}

/// Bytes of one monitor.
#[derive(Debug, Default, PartialEq, Eq)]
struct Use {
    guest: u64,
    shared: u64,
    monitor: u64,
    /// Its share of what it shares, and all else.
    proportional: u64,
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let peer = args.peer.peer(1, args.guest.memory)?;
    let builder = args.guest.builder();
    let booted = measure(&builder, &args).await?;
    let template = Temporary::build(builder.clone(), None, args.workload.argv.clone()).await?;
    let copied = measure(&builder.template(&template.name), &args).await?;
    println!("{} sandboxes of {} MiB each; KiB", args.sandboxes, args.guest.memory);
    let figures = Figures { booted, copied };
    figures.print();
    let peer = match &peer {
        Some(peer) => {
            let figures = measure_peer(peer, &args).await?;
            println!("the same with {}", peer.title());
            figures.print();
            Some(Beside::new(peer, figures))
        }
        None => None,
    };
    let report = Report::new(&args.guest, figures, peer);
    args.output.write(&report, || plot::memory(&report.figures.booted, &report.figures.copied))?;
    Ok(0)
}

async fn measure_peer(peer: &Peer, args: &Args) -> Result<Figures, Failure> {
    let words = args.workload.words();
    let saved = peer.save(&words).await?;
    let mut both = Vec::new();
    for saved in [None, Some(&saved)] {
        let mut guests = Vec::new();
        for _ in 0..args.sandboxes {
            let mut guest = match saved {
                Some(saved) => peer.restore(saved).await?,
                None => peer.boot().await?,
            };
            let ran = guest.run(&words).await?;
            args.workload.check(&chitin::Exit::Code(ran.code), ran.printed)?;
            guests.push(guest);
        }
        let of = |mapping: &Mapping<'_>| peer.is_guests(mapping.path, mapping.bytes);
        let used =
            guests.iter().filter_map(|guest| guest.pid()).map(|pid| used(pid, &of)).collect();
        both.push(rows(used)?);
        for guest in guests {
            guest.stop().await?;
        }
    }
    let copied = both.pop().unwrap_or_default();
    Ok(Figures { booted: both.pop().unwrap_or_default(), copied })
}

async fn measure(builder: &chitin::Builder, args: &Args) -> Result<Vec<Row>, Failure> {
    let mut sandboxes = Vec::new();
    for _ in 0..args.sandboxes {
        let sandbox = builder.clone().start().await?;
        let output = args.workload.command(&sandbox).output().await?;
        args.workload.check(&output.exit, !output.stdout.is_empty())?;
        sandboxes.push(sandbox);
    }
    let used = children(std::process::id()).and_then(|monitors| {
        monitors.iter().map(|pid| used(*pid, &|mapping| mapping.undumped)).collect()
    });
    let rows = rows(used)?;
    for sandbox in sandboxes {
        sandbox.stop().await?;
    }
    Ok(rows)
}

fn rows(used: io::Result<Vec<Use>>) -> Result<Vec<Row>, Failure> {
    let used = used.map_err(|source| Failure::Io {
        what: "read the memory maps of monitors, which is for root alone".into(),
        source,
    })?;
    let rows = |name, of: fn(&Use) -> u64| Row::of(name, used.iter().map(of).collect());
    Ok([
        rows("guest", |used| used.guest),
        rows("shared", |used| used.shared),
        rows("monitor", |used| used.monitor),
        rows("pss", |used| used.proportional),
    ]
    .into_iter()
    .flatten()
    .collect())
}

/// Processes that this one started.
fn children(parent: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{parent}/task"))? {
        // A task that has ended has no children any more.
        let list = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(found)
}

/// One mapping of a process.
struct Mapping<'a> {
    /// Of a file, else empty.
    path: &'a str,
    /// Its length.
    bytes: u64,
    /// Whether it is left out of core dumps.
    undumped: bool,
}

/// One monitor with whatever it has started itself. What it has beside the guest (a keeper) has no guest memory of its own.
fn used(pid: u32, guests: &dyn Fn(&Mapping<'_>) -> bool) -> io::Result<Use> {
    let smaps = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let mut sum = parse(&smaps, guests);
    for child in children(pid)? {
        let more = used(child, guests)?;
        sum.guest += more.guest;
        sum.shared = sum.shared.max(more.shared);
        sum.monitor += more.monitor;
        sum.proportional += more.proportional;
    }
    Ok(sum)
}

/// Sums up the fields of `/proc/PID/smaps`, which are in KiB.
fn parse(smaps: &str, guests: &dyn Fn(&Mapping<'_>) -> bool) -> Use {
    let mut sum = Use::default();
    let (mut path, mut size, mut private, mut resident, mut proportional) = ("", 0, 0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let bytes = || words.next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0) * 1024;
        match name {
            "Size:" => size = { bytes }(),
            "Rss:" => resident = { bytes }(),
            "Pss:" => proportional = { bytes }(),
            // What was written to, which is the guest's own even where nobody else maps the rest of the file.
            "Anonymous:" => private = { bytes }(),
            "VmFlags:" => {
                let undumped = line.split_whitespace().any(|flag| flag == "dd");
                if guests(&Mapping { path, bytes: size, undumped }) {
                    sum.guest += private;
                    sum.shared += resident - private.min(resident);
                } else {
                    sum.monitor += resident;
                }
                sum.proportional += proportional;
                (private, resident, proportional) = (0, 0, 0);
            }
            // Address, rights, offset, device, inode, and the path.
            range if range.contains('-') => path = words.nth(4).unwrap_or_default(),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_that_are_not_dumped_are_the_guests() {
        let smaps = "\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0 
Size:             131072 kB
Rss:                 100 kB
Pss:                  90 kB
Pss_Dirty:            60 kB
Anonymous:            60 kB
VmFlags: rd wr mr mw me dd nr nh 
7f0010000000-7f0010001000 r-xp 00000000 fe:00 12 /usr/bin/chitin-vmm
Size:                  4 kB
Rss:                   4 kB
Pss:                   2 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me 
";
        let kib = |count: u64| count * 1024;
        let expected =
            Use { guest: kib(60), shared: kib(40), monitor: kib(4), proportional: kib(92) };
        assert_eq!(parse(smaps, &|mapping| mapping.undumped), expected);
        let expected = Use { guest: 0, shared: kib(4), monitor: kib(100), proportional: kib(92) };
        assert_eq!(parse(smaps, &|mapping| mapping.path == "/usr/bin/chitin-vmm"), expected);
        let expected =
            Use { guest: kib(60), shared: kib(40), monitor: kib(4), proportional: kib(92) };
        assert_eq!(parse(smaps, &|mapping| mapping.bytes == 128 << 20), expected);
    }
}
