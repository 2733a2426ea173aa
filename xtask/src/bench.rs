//! `cargo xtask bench`: measures every figure of the documentation with the deterministic clock,
//! updates the tables of `docs/benchmarks.md`, and compares the medians with the committed ones.

mod figures;
mod report;
mod suite;
mod tables;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use self::figures::{Figures, TOLERANCE, compare_figures, read_figures, write_figures};
use self::report::Report;
use self::suite::{BENCHES, PEER_BENCHES, ROOT_BENCHES, new_part, report_path};
use self::tables::{Document, format_peer_table, format_root_table, format_table};
use crate::build::{self, BuildPlan, Profile};
use crate::parts::run_parts;
use crate::{microvm, workspace};

/// Emulated hosts at the same time: each keeps one processor busy, and their clocks do not depend
/// on ours.
const HOSTS: usize = 2;

/// Measure everything with the deterministic clock, and compare with the committed figures
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Commit to the measured figures: write them to benches/figures.json
    #[arg(long)]
    update: bool,
    /// Measure only the comparison with another monitor, and write its tables
    #[arg(long, value_name = "firecracker=BIN", conflicts_with = "update")]
    peer: Option<String>,
}

/// Builds, measures, writes the tables, and fails if a figure is worse.
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
    match &args.peer {
        Some(peer) => measure_peer(peer, &dir),
        None => measure_chitin(&dir, args.update),
    }
}

fn measure_chitin(dir: &Path, update: bool) -> Result<ExitCode> {
    let parts: Vec<_> =
        BENCHES.iter().map(|bench| new_part(bench.name, bench.arguments, None, dir)).collect();
    let code = run_parts(HOSTS, &parts, &|_| {})?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    let mut document = Document::read()?;
    let mut figures = Figures::new();
    for bench in &BENCHES {
        let rows = Report::read(&report_path(dir, bench.name))?.rows();
        document.replace_table(bench.name, &format_table(&rows, bench.unit))?;
        for row in rows.iter().filter(|row| bench.compared.contains(&row.name.as_str())) {
            figures.insert(format!("{} {}", bench.name, row.name), row.median / bench.unit);
        }
    }
    document.write()?;
    if update {
        write_figures(&figures)?;
        return Ok(ExitCode::SUCCESS);
    }
    let worse = compare_figures(&read_figures()?, &figures);
    worse.iter().for_each(|line| eprintln!("bench: {line}"));
    if !worse.is_empty() {
        bail!("{} figures are worse; `cargo xtask bench --update` accepts them", worse.len());
    }
    let count = figures.len();
    eprintln!("bench: {count} figures, none more than {TOLERANCE} % worse than committed");
    Ok(ExitCode::SUCCESS)
}

/// Measures a peer in turns with Chitin, and writes the tables of both.
fn measure_peer(peer: &str, dir: &Path) -> Result<ExitCode> {
    let Some(("firecracker", binary)) = peer.split_once('=') else {
        bail!("the only peer is firecracker=BIN");
    };
    let binary = fs::canonicalize(binary).with_context(|| format!("find the peer {binary}"))?;
    type Formatter = fn(&Path) -> Result<String>;
    for (name, benches, format) in [
        ("peer", &PEER_BENCHES[..], format_peer_table as Formatter),
        ("root device", &ROOT_BENCHES[..], format_root_table),
    ] {
        let parts: Vec<_> = benches
            .iter()
            .map(|(name, arguments)| new_part(name, arguments, Some(&binary), dir))
            .collect();
        let code = run_parts(HOSTS, &parts, &|_| {})?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
        let mut document = Document::read()?;
        document.replace_table(name, &format(dir)?)?;
        document.write()?;
    }
    Ok(ExitCode::SUCCESS)
}
