//! `cargo xtask fuzz`: fuzzes every parser that a guest or a file can reach, for a limited time.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::parts::{Part, run_parts};
use crate::process::{announce_and_run, capture_output, new_command};
use crate::workspace;

/// The length of the longest input that a target can use: the headers of a kernel, some packets, a
/// saved state.
const MAX_INPUT_BYTES: u32 = 16 * 1024;

/// The time after which an input counts as a hang; one takes less than a millisecond.
const INPUT_LIMIT_S: u32 = 10;

/// More than the bounds of any target need, together with the sanitizer.
const MEMORY_LIMIT_MIB: u32 = 2048;

/// Seconds for each target.
pub const SECONDS: u32 = 20;

/// Fuzz the parsers that a guest or a file can reach
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = SECONDS)]
    seconds: u32,
    /// Fuzz only this target: mmio, vsock, protocol, tree, kernel, template, proxy, archive, dns,
    /// policy or control
    target: Option<String>,
}

/// Builds the targets and runs them, one for each processor at a time.
pub fn run(args: &Args) -> Result<ExitCode> {
    announce_and_run(&mut build_command())?;
    let mut parts = parts(args.seconds)?;
    if let Some(target) = &args.target {
        let names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
        parts.retain(|part| part.name == part_name(target));
        ensure!(!parts.is_empty(), "no fuzz target `{target}`; there are {}", names.join(", "));
    }
    let lanes = thread::available_parallelism().map_or(1, usize::from);
    if run_parts(lanes, &parts, &|_| {})? != ExitCode::SUCCESS {
        bail!("a target found something: the input is in target/fuzz-artifacts");
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the command that builds all targets.
pub fn build_command() -> Command {
    cargo_fuzz("build")
}

/// Returns a part for each target. Inputs that fail go to `target/fuzz-artifacts`, inputs that
/// reach new code to `target/fuzz-corpus`; each run starts with those and the seeds of the tree.
pub fn parts(seconds: u32) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for name in list_targets()? {
        let corpus = workspace::target_dir().join("fuzz-corpus").join(&name);
        let artifacts = workspace::target_dir().join("fuzz-artifacts").join(&name);
        for dir in [&corpus, &artifacts] {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let mut command = cargo_fuzz("run");
        command.arg(&name).arg(corpus).arg(fuzz_dir().join("seeds").join(&name)).arg("--");
        command.args([
            format!("-max_total_time={seconds}"),
            format!("-max_len={MAX_INPUT_BYTES}"),
            format!("-timeout={INPUT_LIMIT_S}"),
            format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"),
            // A slash at the end makes it a directory.
            format!("-artifact_prefix={}/", artifacts.display()),
            "-print_final_stats=1".into(),
        ]);
        parts.push(Part::local(part_name(&name), command));
    }
    Ok(parts)
}

fn part_name(target: &str) -> String {
    format!("fuzz {target}")
}

/// Returns the names of the targets, as cargo-fuzz lists them.
fn list_targets() -> Result<Vec<String>> {
    let mut list = new_command("cargo", ["fuzz", "list", "--fuzz-dir", "."]);
    Ok(capture_output(list.current_dir(fuzz_dir()))?.lines().map(str::to_owned).collect())
}

fn cargo_fuzz(action: &str) -> Command {
    let mut fuzz = new_command("cargo", ["fuzz", action, "--fuzz-dir", ".", "--target-dir"]);
    fuzz.arg(workspace::target_dir().join("fuzz")).current_dir(fuzz_dir());
    // Instrumentation is an unstable option; this variable makes a stable compiler accept it.
    fuzz.env("RUSTC_BOOTSTRAP", "1");
    fuzz
}

fn fuzz_dir() -> PathBuf {
    workspace::root_dir().join("fuzz")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fuzz_target_has_seeds() {
        let mut targets = 0;
        for source in fs::read_dir(fuzz_dir().join("targets")).unwrap() {
            let name = source.unwrap().path().file_stem().unwrap().to_owned();
            let seeds =
                fs::read_dir(fuzz_dir().join("seeds").join(&name)).map_or(0, Iterator::count);
            assert!(seeds > 0, "{} has no seeds", name.display());
            targets += 1;
        }
        assert!(targets >= 11);
    }
}
