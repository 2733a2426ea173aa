//! `cargo xtask bench`: every figure that is quoted, measured with the deterministic clock and compared with the committed
//! one.
//!
//! `benches/figures.json` holds the medians, `docs/benchmarks.md` the tables, each between two comments that name it. The
//! tables are written anew each time; the committed medians change only on request.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::build::{self, BuildPlan, Profile};
use crate::parts::{Part, run_parts};
use crate::{microvm, workspace};

/// How much worse than the committed one a median may be, in percent. Two runs of the same build differ by less than one.
const TOLERANCE: f64 = 3.0;

/// Measure everything with the deterministic clock, and compare with the committed figures
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Make these the committed figures
    #[arg(long)]
    update: bool,
    /// Only measure another monitor beside this one, and write those tables
    #[arg(long, value_name = "firecracker=BIN", conflicts_with = "update")]
    peer: Option<String>,
}

/// Has the server of `examples/warm-python.sh` do once, while the template is built, what copies will have it do.
const ASKING: &str = "'import socket; s = socket.create_connection((\"127.0.0.1\", 8000)); s.sendall(b\"print(1)\"); \
                      s.shutdown(1); s.recv(9)'";

/// One benchmark: arguments of `chitin-bench`.
struct Bench {
    /// Its table, and the beginning of the names of its figures.
    name: &'static str,
    arguments: &'static str,
    /// What one unit of the table is, in those of the report.
    unit: f64,
    /// Whether more is better.
    rising: bool,
    /// The rows that are compared; the others only tell more about them.
    compared: &'static [&'static str],
}

/// Emulated hosts at a time: each keeps one processor busy, and their clocks do not run with ours.
const HOSTS: usize = 2;

const MILLISECONDS: f64 = 1e6;
const KIB: f64 = 1024.0;
const MIB: f64 = 1048576.0;

const BENCHES: [Bench; 10] = [
    Bench {
        name: "boot",
        arguments: "boot --runs 9",
        unit: MILLISECONDS,
        rising: false,
        compared: &["entered", "kernel", "agent", "exec"],
    },
    Bench {
        name: "restore",
        arguments: "restore --runs 15",
        unit: MILLISECONDS,
        rising: false,
        compared: &["entered", "agent", "exec"],
    },
    Bench {
        name: "pool",
        arguments: "restore --pool --runs 101",
        unit: MILLISECONDS,
        rising: false,
        compared: &["exec"],
    },
    Bench {
        name: "exec",
        arguments: "exec --runs 101",
        unit: MILLISECONDS,
        rising: false,
        compared: &["output", "exit"],
    },
    Bench {
        name: "python",
        arguments: "restore --runs 7 --warm-up {warm-up} -- python3 -c {print}",
        unit: MILLISECONDS,
        rising: false,
        compared: &["exec"],
    },
    Bench {
        name: "running python",
        arguments: "restore --runs 9 --warm-up {serve} --ask {question} -- python3 -c {asking}",
        unit: MILLISECONDS,
        rising: false,
        compared: &["exec"],
    },
    Bench {
        name: "running python, pool",
        arguments: "restore --pool --runs 31 --warm-up {serve} --ask {question} -- python3 -c {asking}",
        unit: MILLISECONDS,
        rising: false,
        compared: &["exec"],
    },
    Bench {
        name: "throughput",
        arguments: "throughput --size 32 --runs 3",
        unit: MIB,
        rising: true,
        compared: &["in", "out"],
    },
    Bench {
        name: "egress",
        arguments: "egress --runs 15 --size 8 --large 2",
        unit: MILLISECONDS,
        rising: false,
        // A connection is so short that a clock interrupt decides about it.
        compared: &["requests egress", "requests proxy", "answers egress", "answers proxy"],
    },
    Bench {
        name: "memory",
        arguments: "memory",
        unit: KIB,
        rising: false,
        compared: &["booted guest", "booted monitor", "copied guest", "copied monitor"],
    },
];

/// What is measured together with a peer: a name, and arguments of `chitin-bench`. None of it is compared with committed figures,
/// because not everybody has the peer.
const PEER_BENCHES: [(&str, &str); 6] = [
    ("peer-enter", "enter --runs 9"),
    ("peer-boot", "boot --runs 3"),
    ("peer-restore", "restore --runs 9"),
    ("peer-exec", "exec --runs 51"),
    ("peer-throughput", "throughput --size 16 --runs 3"),
    ("peer-memory", "memory --sandboxes 2"),
];

/// The root image over either device, in the peer.
const ROOT_BENCHES: [(&str, &str); 4] = [
    ("root-blk", "memory --sandboxes 1 --peer-root blk -- python3 -c {python}"),
    ("root-pmem", "memory --sandboxes 1 --peer-root pmem -- python3 -c {python}"),
    ("root-blk-boot", "boot --runs 3 --peer-root blk -- python3 -c {python}"),
    ("root-pmem-boot", "boot --runs 3 --peer-root pmem -- python3 -c {python}"),
];

/// Rows of the table of a peer: what it says, which bench and row of it, what one unit is, and how many decimals.
const PEER_ROWS: [(&str, &str, &str, f64, usize); 13] = [
    ("process start → the guest's first instruction", "peer-enter", "entered", MILLISECONDS, 2),
    ("cold boot → first byte of agent or init", "peer-boot", "agent", MILLISECONDS, 2),
    ("cold boot → first byte of a command", "peer-boot", "exec", MILLISECONDS, 2),
    ("copy → first byte of agent or init", "peer-restore", "agent", MILLISECONDS, 2),
    ("copy → first byte of a command", "peer-restore", "exec", MILLISECONDS, 2),
    ("a command in a running sandbox, first byte", "peer-exec", "output", MILLISECONDS, 2),
    ("a command in a running sandbox, its end", "peer-exec", "exit", MILLISECONDS, 2),
    ("MiB/s into the guest", "peer-throughput", "in", MIB, 1),
    ("MiB/s out of it", "peer-throughput", "out", MIB, 1),
    ("booted: KiB of guest memory of its own", "peer-memory", "booted guest", KIB, 0),
    ("booted: KiB of the monitor", "peer-memory", "booted monitor", KIB, 0),
    ("copied: KiB of guest memory of its own", "peer-memory", "copied guest", KIB, 0),
    ("copied: KiB of the monitor", "peer-memory", "copied monitor", KIB, 0),
];

/// The same for the two root devices.
const ROOT_ROWS: [(&str, &str, &str, f64, usize); 6] = [
    ("cold boot → first byte of init", "-boot", "agent", MILLISECONDS, 2),
    ("cold boot → first byte of Python's output", "-boot", "exec", MILLISECONDS, 2),
    ("booted, after Python: KiB of guest memory of its own", "", "booted guest", KIB, 0),
    ("booted, after Python: KiB shared by all guests", "", "booted shared", KIB, 0),
    ("copied, after Python again: KiB of guest memory of its own", "", "copied guest", KIB, 0),
    ("copied, after Python again: KiB shared by all guests", "", "copied shared", KIB, 0),
];

/// What `--json` of `chitin-bench` says, as far as it is needed here.
#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    summary: Vec<Row>,
    #[serde(default)]
    booted: Vec<Row>,
    #[serde(default)]
    copied: Vec<Row>,
    #[serde(default)]
    requests: Vec<Row>,
    #[serde(default)]
    answers: Vec<Row>,
    #[serde(default)]
    connections: Vec<Row>,
    peer: Option<Box<Report>>,
    /// Of a peer.
    #[serde(default)]
    version: String,
}

#[derive(Deserialize, Debug, Clone)]
struct Row {
    name: String,
    min: f64,
    median: f64,
    p99: f64,
    max: f64,
}

/// Builds, measures, writes the tables, and fails where a figure has become worse.
pub fn run(args: &Args) -> Result<ExitCode> {
    let plan = BuildPlan {
        kernel: true,
        emulation: false,
        profile: Profile::Release,
        packages: &["chitin-bench"],
    };
    build::install_and_build(&plan)?;
    microvm::prepare_emulated_host()?;
    let dir = workspace::target_dir().join("nested-out/bench");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    if let Some(peer) = &args.peer {
        return beside(peer, &dir);
    }
    let parts: Vec<_> =
        BENCHES.iter().map(|bench| part(bench.name, bench.arguments, None, &dir)).collect();
    let code = run_parts(HOSTS, &parts, &|_| {})?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }

    let path = workspace::root_dir().join("docs/benchmarks.md");
    let mut text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let mut figures = BTreeMap::new();
    for bench in &BENCHES {
        let rows = rows(&dir.join(bench.name).with_extension("json"))?;
        text = replace(&text, bench.name, &table(&rows, bench.unit))?;
        for row in rows.iter().filter(|row| bench.compared.contains(&row.name.as_str())) {
            figures.insert(format!("{} {}", bench.name, row.name), row.median / bench.unit);
        }
    }
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    eprintln!("bench: the tables of {} are written", path.display());

    let committed = workspace::root_dir().join("benches/figures.json");
    if args.update {
        let json = serde_json::to_string_pretty(&figures)? + "\n";
        fs::write(&committed, json).with_context(|| format!("write {}", committed.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let json = fs::read(&committed).with_context(|| format!("read {}", committed.display()))?;
    let before: BTreeMap<String, f64> =
        serde_json::from_slice(&json).with_context(|| format!("in {}", committed.display()))?;
    let worse = compare(&before, &figures);
    worse.iter().for_each(|line| eprintln!("bench: {line}"));
    if worse.is_empty() {
        eprintln!(
            "bench: {} figures, none more than {TOLERANCE} % worse than committed",
            figures.len()
        );
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{} figures are worse; `cargo xtask bench --update` accepts them", worse.len());
}

/// Measures a peer in turns with ours, and writes what came out side by side.
fn beside(peer: &str, dir: &Path) -> Result<ExitCode> {
    let Some(("firecracker", binary)) = peer.split_once('=') else {
        bail!("the one peer there is, is firecracker=BIN");
    };
    let binary = fs::canonicalize(binary).with_context(|| format!("find the peer {binary}"))?;
    for (name, benches, table) in [
        ("peer", &PEER_BENCHES[..], peer_table as Table),
        ("root device", &ROOT_BENCHES[..], root_table),
    ] {
        let parts: Vec<_> = benches
            .iter()
            .map(|(name, arguments)| part(name, arguments, Some(&binary), dir))
            .collect();
        let code = run_parts(HOSTS, &parts, &|_| {})?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
        let path = workspace::root_dir().join("docs/benchmarks.md");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let text = replace(&text, name, &table(dir)?)?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        eprintln!("bench: the table `{name}` of {} is written", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a table of the reports in a directory.
type Table = fn(&Path) -> Result<String>;

/// One bench on an emulated host of its own, which writes what it measures to a file of its name.
fn part(name: &str, arguments: &str, peer: Option<&Path>, dir: &Path) -> Part {
    let tool = workspace::target_dir().join("release/chitin-bench");
    let serve = workspace::root_dir().join("examples/warm-python.sh");
    let arguments = arguments
        .replace("{warm-up}", "'python3 -c \"import json, ssl\"'")
        .replace("{print}", "'print(1)'")
        .replace("{python}", "'import json, ssl; print(1)'")
        .replace("{serve}", &format!("\"$(cat '{}')\"", serve.display()))
        .replace("{question}", "'8000=print(1)'")
        .replace("{asking}", ASKING);
    // What follows `--` belongs to the command.
    let (arguments, command) = arguments.split_once(" -- ").unwrap_or((&arguments, ""));
    let beside =
        peer.map(|peer| format!("--peer firecracker='{}'", peer.display())).unwrap_or_default();
    // In memory: what a copy reads of its template is not what is measured.
    let script = format!(
        "export CHITIN_TEMPLATES=/dev/shm/templates TMPDIR=/dev/shm; exec '{}' {arguments} {beside} --json '{}' {} {command}",
        tool.display(),
        dir.join(name).with_extension("json").display(),
        if command.is_empty() { "" } else { "--" },
    );
    let mut options = vec!["--icount".to_owned()];
    // As its command, the program would be copied into memory; in a script it has to be named.
    for program in [Some(tool.as_path()), peer].into_iter().flatten() {
        options.extend(["--preload".to_owned(), program.display().to_string()]);
    }
    let command = ["/bin/sh", "-c", &script].map(str::to_owned).into();
    Part::nested(name, options, command)
}

fn peer_table(dir: &Path) -> Result<String> {
    let mut text = String::new();
    for (title, name, row, unit, digits) in PEER_ROWS {
        let report = read(&dir.join(name).with_extension("json"))?;
        let peer = report.peer.as_deref().context("a report without its peer")?;
        if text.is_empty() {
            let _ = writeln!(
                text,
                "| | Chitin | {} | Chitin ÷ Firecracker |\n|---|---|---|---|",
                peer.version
            );
        }
        let (ours, theirs) = (median(&report, row)? / unit, median(peer, row)? / unit);
        let ratio = ours / theirs.max(f64::EPSILON);
        let _ = writeln!(text, "| {title} | {ours:.digits$} | {theirs:.digits$} | {ratio:.2} |");
    }
    Ok(text)
}

fn root_table(dir: &Path) -> Result<String> {
    let mut text = String::from("| | virtio-blk | virtio-pmem, DAX |\n|---|---|---|\n");
    for (title, suffix, row, unit, digits) in ROOT_ROWS {
        let value = |device: &str| {
            let report = read(&dir.join(format!("root-{device}{suffix}")).with_extension("json"))?;
            let peer = report.peer.as_deref().context("a report without its peer")?;
            Ok::<_, anyhow::Error>(median(peer, row)? / unit)
        };
        let (blk, pmem) = (value("blk")?, value("pmem")?);
        let _ = writeln!(text, "| {title} | {blk:.digits$} | {pmem:.digits$} |");
    }
    Ok(text)
}

fn median(report: &Report, row: &str) -> Result<f64> {
    let found = all_rows(report).into_iter().find(|found| found.name == row);
    Ok(found.with_context(|| format!("a report without the row `{row}`"))?.median)
}

fn rows(path: &Path) -> Result<Vec<Row>> {
    Ok(all_rows(&read(path)?))
}

fn read(path: &Path) -> Result<Report> {
    let json = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&json).with_context(|| format!("in {}", path.display()))
}

fn all_rows(report: &Report) -> Vec<Row> {
    let named = |group: &str, rows: &[Row]| {
        let name = |row: &Row| Row { name: format!("{group} {}", row.name), ..row.clone() };
        rows.iter().map(name).collect::<Vec<_>>()
    };
    let groups = [
        ("booted", &report.booted),
        ("copied", &report.copied),
        ("requests", &report.requests),
        ("answers", &report.answers),
        ("connections", &report.connections),
    ];
    let groups = groups.into_iter().flat_map(|(group, rows)| named(group, rows));
    report.summary.iter().cloned().chain(groups).collect()
}

fn table(rows: &[Row], unit: f64) -> String {
    let mut text = String::from("| | min | median | p99 | spread |\n|---|---|---|---|---|\n");
    for Row { name, min, median, p99, max } in rows {
        let (spread, digits) =
            (100.0 * (max - min) / median.max(1.0), if unit == KIB { 0 } else { 2 });
        let [min, median, p99] =
            [min, median, p99].map(|value| format!("{:.digits$}", value / unit));
        let _ = writeln!(text, "| {name} | {min} | {median} | {p99} | {spread:.1} % |");
    }
    text
}

/// Puts a table between its two comments.
fn replace(text: &str, name: &str, table: &str) -> Result<String> {
    let (open, close) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
    let found = text.find(&open).zip(text.find(&close));
    let (start, end) =
        found.with_context(|| format!("docs/benchmarks.md has no place for the table `{name}`"))?;
    Ok(format!("{}{table}{}", &text[..start + open.len()], &text[end..]))
}

/// A line for each figure that has become worse, or is gone.
fn compare(before: &BTreeMap<String, f64>, now: &BTreeMap<String, f64>) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, before) in before {
        let rising =
            BENCHES.iter().any(|bench| bench.rising && name.split(' ').next() == Some(bench.name));
        match now.get(name) {
            None => lines.push(format!("{name}: not measured any more")),
            Some(now) => {
                let change = 100.0 * (now - before) / before.max(f64::EPSILON);
                let worse = if rising { -change } else { change };
                if worse > TOLERANCE {
                    lines.push(format!(
                        "{name}: {now:.3} instead of {before:.3}, {worse:.1} % worse"
                    ));
                }
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_is_more_time_and_less_throughput() {
        let figures =
            |values: [(&str, f64); 3]| values.map(|(name, value)| (name.to_owned(), value)).into();
        let before = figures([("boot agent", 100.0), ("throughput in", 100.0), ("gone", 1.0)]);
        let now = figures([("boot agent", 104.0), ("throughput in", 104.0), ("new", 1.0)]);
        let lines = compare(&before, &now);
        assert_eq!(
            lines,
            ["boot agent: 104.000 instead of 100.000, 4.0 % worse", "gone: not measured any more"]
        );
        assert_eq!(compare(&now, &now), Vec::<String>::new());
        assert_eq!(
            compare(
                &before,
                &figures([("boot agent", 1.0), ("throughput in", 96.0), ("gone", 1.0)])
            )
            .len(),
            1
        );
    }

    #[test]
    fn every_row_beside_a_peer_comes_from_a_bench() {
        for (_, name, ..) in PEER_ROWS {
            assert!(PEER_BENCHES.iter().any(|(bench, _)| *bench == name), "{name}");
        }
        for (_, suffix, ..) in ROOT_ROWS {
            for device in ["blk", "pmem"] {
                let name = format!("root-{device}{suffix}");
                assert!(ROOT_BENCHES.iter().any(|(bench, _)| *bench == name), "{name}");
            }
        }
    }

    #[test]
    fn the_document_has_a_place_for_every_table() {
        let path = workspace::root_dir().join("docs/benchmarks.md");
        let mut text = fs::read_to_string(path).unwrap();
        for bench in &BENCHES {
            text = replace(&text, bench.name, "new\n").unwrap();
        }
        for table in ["peer", "root device"] {
            text = replace(&text, table, "new\n").unwrap();
        }
        assert_eq!(text.matches("new\n<!-- end of").count(), BENCHES.len() + 2);
    }
}
