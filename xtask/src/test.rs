//! `cargo xtask test`: every check and every test there is, ending in the summaries of those that run containers, on this host,
//! and of those that boot microVMs.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context, Result};

use crate::process::{describe, output, run_aloud, start_failure};
use crate::{build, fuzz, hostile, microvm, programs, setup, vault, workspace};

/// Emulated hosts at once, of 4 GiB each.
const MAX_HOSTS: usize = 4;
/// Parts of the suite that each of them runs one after the other.
const PARTS_PER_HOST: usize = 3;
/// The tests that hold a clock to milliseconds, which mean something only where no other work counts.
const DETERMINISTIC: &[&str] =
    &["-E", "test(copies_tell_the_time) | test(a_connection_costs_about_as_much_as_a_command)"];
/// So many guests that they take as long as all others; and those.
const MANY: &[&str] = &["-E", "test(nothing_is_left_of_five_hundred_microvms)"];
const FEW: &[&str] = &["-E", "not test(nothing_is_left_of_five_hundred_microvms)"];

/// Run every check and every test
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the tests whose names hold this; no lints, no units
    filter: Option<String>,
}

/// Installs and builds what is missing, then tests.
pub fn run(args: &Args) -> Result<ExitCode> {
    let code = setup::run(&setup::Args::default())?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    if args.filter.is_none() {
        cargo(&["fmt", "--all", "--check"])?;
        cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    }
    build::run(&build::Args::default())?;
    programs::run(&programs::Args::default())?;
    if args.filter.is_none() {
        vault::run(&vault::Args::default())?;
        cargo(&["nextest", "run", "--workspace", "--exclude", "chitin-integration"])?;
        cargo(&["test", "--workspace", "--doc", "--quiet"])?;
        let code = hostile::run(&hostile::Args::default())?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
        fuzz::run(&fuzz::Args::default())?;
    }
    let containers = containers(args.filter.as_deref())?;
    let microvms = integration(args.filter.as_deref())?;
    Ok(if containers == ExitCode::SUCCESS { microvms } else { containers })
}

/// The tests of the container tiers, which need no KVM, beside a Docker daemon of their own.
fn containers(filter: Option<&str>) -> Result<ExitCode> {
    let with_daemon =
        ["run", "--quiet", "--package", "chitin-integration", "--bin", "with-dockerd", "--"];
    let test = ["cargo", "nextest", "run", "--profile", "containers", "--no-tests", "pass"];
    let mut command = Command::new("cargo");
    command
        .args(with_daemon)
        .args(test)
        .args(filter)
        .current_dir(workspace::root())
        .stdin(Stdio::null());
    eprintln!("running: {}", describe(&command));
    let status = command.status().with_context(|| start_failure(&command))?;
    // The tests of the other tiers are still worth a run.
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tests that boot microVMs, on this host or on the emulated one.
fn integration(filter: Option<&str>) -> Result<ExitCode> {
    let package = ["--package", "chitin-integration"];
    let profile = ["--profile", "microvm", "--no-tests", "pass"];
    if microvm::usable()? {
        return cargo(&[&["nextest", "run"], &package[..], &profile, filter.as_slice()].concat());
    }
    // Compiled here: the emulated host has the same files but a CPU a hundred times slower. It gets the two lists that
    // cargo would make for nextest.
    let dir = workspace::target().join("nested-out");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let binaries = dir.join("binaries.json");
    let metadata = dir.join("metadata.json");
    let list = ["nextest", "list", "--list-type", "binaries-only", "--message-format", "json"];
    save(&binaries, Command::new("cargo").args([&list, &package[..]].concat()))?;
    save(&metadata, Command::new("cargo").args(["metadata", "--format-version", "1"]))?;
    let mut command = vec!["cargo-nextest", "nextest", "run"];
    let (binaries, metadata) = (binaries.to_string_lossy(), metadata.to_string_lossy());
    command.extend(["--binaries-metadata", &binaries, "--cargo-metadata", &metadata]);
    command.extend(profile);
    // A test that fails is tried again there, and called flaky if it passes then: with other work on this machine the
    // emulated host is so slow that its own clock runs out.
    command.extend(["--retries", "2"]);
    // A CPU of the emulated host is one thread here, so there is one such host for each of ours, up to a memory's worth.
    let hosts = thread::available_parallelism().map_or(1, |count| count.get().min(MAX_HOSTS));
    // A few parts for each host, so that one that hangs costs little; a filter is for a few tests.
    let count = hosts * PARTS_PER_HOST;
    command.extend(filter);
    let part = |options: &[&str], more: &[&str]| microvm::Part {
        options: options.iter().map(|word| (*word).to_owned()).collect(),
        command: command.iter().chain(more).map(|word| (*word).to_owned()).collect(),
    };
    if filter.is_some() {
        return microvm::nested_in_parallel(hosts, &[part(&[], &[])]);
    }
    let mut parts = vec![part(&[], MANY)];
    parts.extend((1..=count).map(|number| {
        part(&[], &[FEW, &["--partition", &format!("count:{number}/{count}")]].concat())
    }));
    parts.push(part(&["--icount"], DETERMINISTIC));
    microvm::nested_in_parallel(hosts, &parts)
}

fn cargo(args: &[&str]) -> Result<ExitCode> {
    let mut command = Command::new("cargo");
    run_aloud(command.args(args).current_dir(workspace::root()).stdin(Stdio::null()))?;
    Ok(ExitCode::SUCCESS)
}

fn save(path: &Path, command: &mut Command) -> Result<()> {
    let text = output(command.current_dir(workspace::root()).stdin(Stdio::null()))?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// The sources of this workspace, as one text.
    fn sources() -> String {
        let mut text = String::new();
        let folders = [
            "protocol",
            "tree",
            "vmm",
            "guest-agent",
            "spec",
            "policy",
            "broker",
            "tiers",
            "sandbox",
            "cli",
            "integration",
        ];
        let mut dirs: Vec<PathBuf> =
            folders.iter().map(|name| workspace::root().join(name)).collect();
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    text.push_str(&fs::read_to_string(&path).unwrap());
                }
            }
        }
        text
    }

    #[test]
    fn every_claim_of_the_threat_model_names_tests_that_exist() {
        let model = fs::read_to_string(workspace::root().join("docs/threat-model.md")).unwrap();
        let sources = sources();
        let mut claims = 0;
        let mut inside = false;
        for line in model.lines() {
            let Some((claim, tests)) = line
                .strip_prefix("| ")
                .and_then(|line| line.strip_suffix(" |"))
                .and_then(|line| line.split_once(" | "))
            else {
                inside = line.starts_with("|---") && inside;
                continue;
            };
            if tests == "tried by" {
                inside = true;
                continue;
            }
            if !inside {
                continue;
            }
            let functions = tests.split('`').skip(1).step_by(2);
            let attacks = tests.split('"').skip(1).step_by(2);
            let mut named = 0;
            for test in functions {
                assert!(
                    sources.contains(&format!("fn {test}(")),
                    "{claim}: there is no test `{test}`"
                );
                named += 1;
            }
            for attack in attacks {
                assert!(
                    sources.contains(&format!("\"{attack}\",")),
                    "{claim}: there is no attack \"{attack}\""
                );
                named += 1;
            }
            assert!(named > 0, "{claim}: nothing tries to break it");
            claims += 1;
        }
        assert!(claims > 20, "only {claims} claims were found");
    }
}
