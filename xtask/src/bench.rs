//! `cargo xtask bench`: every figure that is quoted, measured with the deterministic clock and compared with the committed
//! one.
//!
//! `benches/figures.json` holds the medians, `docs/benchmarks.md` the tables, each between two comments that name it. The
//! tables are written anew each time; the committed medians change only on request.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{microvm, setup, workspace};

/// How much worse than the committed one a median may be, in percent. Two runs of the same build differ by less than one.
const TOLERANCE: f64 = 3.0;

/// Measure everything with the deterministic clock, and compare with the committed figures
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Make these the committed figures
    #[arg(long)]
    update: bool,
}

/// One benchmark: arguments of `chitin bench`.
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

const MILLISECONDS: f64 = 1e6;
const KIB: f64 = 1024.0;
const MIB: f64 = 1048576.0;

const BENCHES: [Bench; 7] = [
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
        arguments: "restore --pool --runs 31",
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
        name: "throughput",
        arguments: "throughput --size 32 --runs 3",
        unit: MIB,
        rising: true,
        compared: &["in", "out"],
    },
    Bench {
        name: "memory",
        arguments: "memory",
        unit: KIB,
        rising: false,
        compared: &["booted guest", "booted monitor", "copied guest", "copied monitor"],
    },
];

/// What `--json` of `chitin bench` says, as far as it is needed here.
#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    summary: Vec<Row>,
    #[serde(default)]
    booted: Vec<Row>,
    #[serde(default)]
    copied: Vec<Row>,
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
    let code = setup::run(&setup::Args::default())?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    microvm::build()?;
    let dir = workspace::target().join("nested-out/bench");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let code = measure(&dir)?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }

    let path = workspace::root().join("docs/benchmarks.md");
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

    let committed = workspace::root().join("benches/figures.json");
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
        eprintln!("bench: {} figures, none more than {TOLERANCE} % worse than committed", figures.len());
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{} figures are worse; `cargo xtask bench --update` accepts them", worse.len());
}

/// Runs all of them on one emulated host.
fn measure(dir: &Path) -> Result<ExitCode> {
    let chitin = workspace::target().join("release/chitin");
    // In memory: what a copy reads of its template is not what is measured.
    let mut script = "set -e; export CHITIN_TEMPLATES=/dev/shm/templates; ".to_owned();
    for bench in &BENCHES {
        let arguments = bench
            .arguments
            .replace("{warm-up}", "'python3 -c \"import json, ssl\"'")
            .replace("{print}", "'print(1)'");
        // What follows `--` belongs to the command.
        let (options, command) = arguments.split_once(" -- ").unwrap_or((&arguments, ""));
        let json = dir.join(bench.name).with_extension("json");
        let dashes = if command.is_empty() { "" } else { "--" };
        let _ = write!(
            script,
            "echo; '{}' bench {options} --json '{}' {dashes} {command}; ",
            chitin.display(),
            json.display()
        );
    }
    // As its command, the program would be copied into memory; in a script it has to be named.
    let preload = chitin.display().to_string();
    microvm::nested_with(
        &["--icount", "--timeout", "30m", "--preload", &preload],
        &["/bin/sh", "-c", &script],
    )
}

fn rows(path: &PathBuf) -> Result<Vec<Row>> {
    let json = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let report: Report = serde_json::from_slice(&json).with_context(|| format!("in {}", path.display()))?;
    let named = |group: &str, rows: Vec<Row>| {
        let name = |row: Row| Row { name: format!("{group} {}", row.name), ..row };
        rows.into_iter().map(name).collect::<Vec<_>>()
    };
    Ok([report.summary, named("booted", report.booted), named("copied", report.copied)].concat())
}

fn table(rows: &[Row], unit: f64) -> String {
    let mut text = String::from("| | min | median | p99 | spread |\n|---|---|---|---|---|\n");
    for Row { name, min, median, p99, max } in rows {
        let (spread, digits) = (100.0 * (max - min) / median.max(1.0), if unit == KIB { 0 } else { 2 });
        let [min, median, p99] = [min, median, p99].map(|value| format!("{:.digits$}", value / unit));
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
        let rising = BENCHES.iter().any(|bench| bench.rising && name.split(' ').next() == Some(bench.name));
        match now.get(name) {
            None => lines.push(format!("{name}: not measured any more")),
            Some(now) => {
                let change = 100.0 * (now - before) / before.max(f64::EPSILON);
                let worse = if rising { -change } else { change };
                if worse > TOLERANCE {
                    lines.push(format!("{name}: {now:.3} instead of {before:.3}, {worse:.1} % worse"));
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
        let figures = |values: [(&str, f64); 3]| values.map(|(name, value)| (name.to_owned(), value)).into();
        let before = figures([("boot agent", 100.0), ("throughput in", 100.0), ("gone", 1.0)]);
        let now = figures([("boot agent", 104.0), ("throughput in", 104.0), ("new", 1.0)]);
        let lines = compare(&before, &now);
        assert_eq!(
            lines,
            ["boot agent: 104.000 instead of 100.000, 4.0 % worse", "gone: not measured any more"]
        );
        assert_eq!(compare(&now, &now), Vec::<String>::new());
        assert_eq!(
            compare(&before, &figures([("boot agent", 1.0), ("throughput in", 96.0), ("gone", 1.0)])).len(),
            1
        );
    }

    #[test]
    fn the_document_has_a_place_for_every_table() {
        let path = workspace::root().join("docs/benchmarks.md");
        let mut text = fs::read_to_string(path).unwrap();
        for bench in &BENCHES {
            text = replace(&text, bench.name, "new\n").unwrap();
        }
        assert_eq!(text.matches("new\n<!-- end of").count(), BENCHES.len());
    }
}
