//! `cargo xtask fuzz`: feeds every parser that a guest or a file can reach, for a while.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process::{command, output, run_aloud};
use crate::workspace;

/// Inputs are as long as what a target can use: a kernel's headers, some packets, a state.
const MAX_INPUT_BYTES: u32 = 16 * 1024;

/// One input takes less than a millisecond; this is one that hangs.
const INPUT_LIMIT_S: u32 = 10;

/// More than any target needs for what it is bounded to, with the sanitizer's own.
const MEMORY_LIMIT_MIB: u32 = 2048;

/// Fuzz the parsers that a guest or a file can reach
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = 20)]
    seconds: u32,
    /// Only this one: mmio, vsock, protocol, tree, kernel or template
    target: Option<String>,
}

impl Default for Args {
    fn default() -> Self {
        Self { seconds: 20, target: None }
    }
}

/// Builds the targets, and runs them one after the other.
///
/// What is found goes to `target/fuzz-artifacts`, what is learned to `target/fuzz-corpus`; each run starts with both that
/// and the seeds of the tree.
pub fn run(args: &Args) -> Result<ExitCode> {
    let dir = workspace::root().join("fuzz");
    let all = targets()?;
    let chosen: Vec<&String> = all
        .iter()
        .filter(|name| args.target.as_ref().is_none_or(|target| target == *name))
        .collect();
    ensure!(!chosen.is_empty(), "no such fuzz target; there are {}", all.join(", "));
    cargo_fuzz("build", &[])?;
    for name in chosen {
        let corpus = workspace::target().join("fuzz-corpus").join(name);
        let artifacts = workspace::target().join("fuzz-artifacts").join(name);
        for dir in [&corpus, &artifacts] {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let seeds = dir.join("seeds").join(name);
        let words = [name.into(), corpus.into_os_string(), seeds.into_os_string(), "--".into()];
        let mut words: Vec<_> =
            words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        words.extend([
            format!("-max_total_time={}", args.seconds),
            format!("-max_len={MAX_INPUT_BYTES}"),
            format!("-timeout={INPUT_LIMIT_S}"),
            format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"),
            // With a slash at its end it is a directory.
            format!("-artifact_prefix={}/", artifacts.display()),
            "-print_final_stats=1".into(),
        ]);
        cargo_fuzz("run", &words)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The names of the targets, as cargo-fuzz lists them.
fn targets() -> Result<Vec<String>> {
    let mut list = command("cargo", ["fuzz", "list", "--fuzz-dir", "."]);
    Ok(output(list.current_dir(workspace::root().join("fuzz")))?
        .lines()
        .map(str::to_owned)
        .collect())
}

fn cargo_fuzz(action: &str, words: &[String]) -> Result<()> {
    let mut fuzz = Command::new("cargo");
    fuzz.args(["fuzz", action, "--fuzz-dir", ".", "--target-dir"]).arg(target_dir()).args(words);
    // Instrumentation is an option that only unstable compilers have, and stable ones if they are told to be.
    fuzz.env("RUSTC_BOOTSTRAP", "1")
        .current_dir(workspace::root().join("fuzz"))
        .stdin(Stdio::null());
    run_aloud(&mut fuzz).context("what was found is in target/fuzz-artifacts")
}

fn target_dir() -> PathBuf {
    workspace::target().join("fuzz")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_seeds() {
        let dir = workspace::root().join("fuzz");
        let mut sources = 0;
        for source in fs::read_dir(dir.join("targets")).unwrap() {
            let name = source.unwrap().path().file_stem().unwrap().to_owned();
            let seeds = fs::read_dir(dir.join("seeds").join(&name)).map_or(0, Iterator::count);
            assert!(seeds > 0, "{} has no seeds", name.display());
            sources += 1;
        }
        assert!(sources >= 6);
    }
}
