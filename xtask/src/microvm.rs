//! Where microVMs can run: on this host, or on an emulated one.

use std::io::{self, Write};
use std::process::{Command, ExitCode, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use serde::Deserialize;

use crate::process::{command, run, start_failure};
use crate::{kernel, nested, rootfs, workspace};

#[derive(Deserialize)]
struct Diagnosis {
    ironclaw: bool,
    checks: Vec<Check>,
}

#[derive(Deserialize)]
struct Check {
    name: String,
    ok: bool,
    detail: String,
}

/// Builds all that a microVM is made of: kernel, root image, and `chitin` and its monitor as they are shipped.
pub fn build() -> Result<()> {
    kernel::run(&kernel::Args::default())?;
    rootfs::run(&rootfs::Args::default())?;
    let mut build =
        command("cargo", ["build", "--release", "--package", "chitin-cli", "--package", "chitin-vmm"]);
    run(build.current_dir(workspace::root()))
}

/// Asks `chitin doctor`, and says in one line why not where it is not.
pub fn usable() -> Result<bool> {
    let mut command = Command::new(workspace::target().join("release/chitin"));
    command.args(["doctor", "--json"]).stdin(Stdio::null());
    let asked = command.output().with_context(|| start_failure(&command))?;
    let diagnosis: Diagnosis =
        serde_json::from_slice(&asked.stdout).context("read what chitin doctor says")?;
    let reasons: Vec<String> = diagnosis
        .checks
        .iter()
        .filter(|check| !check.ok)
        .map(|check| format!("{}: {}", check.name, check.detail))
        .collect();
    if !diagnosis.ironclaw {
        eprintln!("microVMs run in the emulated KVM host, because here they cannot: {}", reasons.join("; "));
    }
    Ok(diagnosis.ironclaw)
}

/// The time one part of a suite may take on an emulated host: two and a half times what it was seen to take.
const PART_LIMIT: &str = "25m";

/// What `cargo xtask nested` exits with when that time is up.
const TIMED_OUT: i32 = 124;

/// Runs `count` commands, each on an emulated host of its own. The first one's output is seen as it comes, that of the
/// others when they have ended.
///
/// An emulated host has been seen to stand still, with all that runs in it; why is not known. A command that has not ended
/// in time is therefore given one more host, which is said.
///
/// The exit code is the first that is not 0.
pub fn nested_in_parallel(count: usize, command: impl Fn(usize) -> Vec<String>) -> Result<ExitCode> {
    let xtask = std::env::current_exe().context("find this program")?;
    let run = move |part: usize, command: Vec<String>| -> Result<Output> {
        let once = || {
            let mut nested = Command::new(&xtask);
            nested.args(["nested", "--timeout", PART_LIMIT, "--"]).args(&command).stdin(Stdio::null());
            if part > 0 {
                nested.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            let child = nested.spawn().with_context(|| start_failure(&nested))?;
            child.wait_with_output().context("wait for an emulated host")
        };
        let output = once()?;
        if output.status.code() != Some(TIMED_OUT) {
            return Ok(output);
        }
        eprintln!(
            "part {} has not ended within {PART_LIMIT}: its emulated host hangs, another one tries",
            part + 1
        );
        once()
    };
    // All at once: a pipe that is full would stop its host.
    let waiting: Vec<_> = (0..count)
        .map(|part| {
            let (run, command) = (run.clone(), command(part));
            thread::spawn(move || run(part, command))
        })
        .collect();
    let mut code = ExitCode::SUCCESS;
    for waiting in waiting {
        let output = waiting.join().map_err(|_| anyhow!("the wait for an emulated host failed"))??;
        io::stdout().write_all(&output.stdout)?;
        io::stderr().write_all(&output.stderr)?;
        if code == ExitCode::SUCCESS && !output.status.success() {
            code = ExitCode::from(output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1));
        }
    }
    Ok(code)
}

/// Runs a command on the emulated host, with options of `cargo xtask nested`.
pub fn nested_with(options: &[&str], command: &[impl AsRef<str>]) -> Result<ExitCode> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: nested::Args,
    }
    let words = ["nested"].iter().chain(options).chain(&["--"]).copied();
    nested::run(&Line::try_parse_from(words.chain(command.iter().map(AsRef::as_ref)))?.args)
}
