//! Where microVMs can run: on this host, or on an emulated one.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use serde::Deserialize;

use crate::process::{last_lines, start_failure};
use crate::{nested, workspace};

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
        eprintln!(
            "microVMs run in the emulated KVM host, because here they cannot: {}",
            reasons.join("; ")
        );
    }
    Ok(diagnosis.ironclaw)
}

/// The time one part of a suite may take on an emulated host: five times what it takes on two quiet cores.
const PART_LIMIT: &str = "20m";

/// The time without a line of output after which an emulated host hangs: nextest speaks of a slow test every two minutes.
const PART_SILENCE: &str = "5m";

/// What `cargo xtask nested` exits with when one of these is up.
const TIMED_OUT: i32 = 124;

/// Emulated hosts that one part is given, if they hang.
const PART_TRIES: usize = 3;

/// What runs on an emulated host of its own.
pub struct Part {
    /// Options of `cargo xtask nested`.
    pub options: Vec<String>,
    /// The command and its arguments.
    pub command: Vec<String>,
}

/// Runs the parts on `hosts` emulated hosts at a time, a new host for each. What a part writes is seen when it has ended.
///
/// An emulated host can stand still with all that runs in it, if seldom since its QEMU is patched; a part that this
/// happens to is given another one, which is said.
///
/// The exit code is the first that is not 0.
pub fn nested_in_parallel(hosts: usize, parts: &[Part]) -> Result<ExitCode> {
    let xtask = std::env::current_exe().context("find this program")?;
    // Before what is said about it is kept until the end of a part.
    nested::prepare()?;
    let next = AtomicUsize::new(0);
    let ended = Mutex::new(ExitCode::SUCCESS);
    let work = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed) + 1;
            let Some(part) = parts.get(number - 1) else {
                return Ok(());
            };
            let output = nested_part(&xtask, number, part)?;
            let mut code = ended.lock().map_err(|_| anyhow!("another part could not be run"))?;
            io::stdout().write_all(&output.stdout)?;
            io::stderr().write_all(&output.stderr)?;
            eprintln!("part {number} of {}: {}", parts.len(), output.status);
            if *code == ExitCode::SUCCESS && !output.status.success() {
                *code = ExitCode::from(
                    output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
                );
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..hosts.min(parts.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().map_err(|_| anyhow!("the wait for an emulated host failed"))?
        })
    })?;
    ended.into_inner().map_err(|_| anyhow!("a part could not be run"))
}

fn nested_part(xtask: &Path, number: usize, part: &Part) -> Result<Output> {
    let mut tries = 0;
    loop {
        let mut nested = Command::new(xtask);
        nested
            .args(["nested", "--timeout", PART_LIMIT, "--silence", PART_SILENCE])
            .args(&part.options);
        // With the deterministic clock the next host would do the very same; a longer environment shifts it a little.
        nested.args(["--env", &format!("TRIES={}", "|".repeat(tries))]);
        nested.arg("--").args(&part.command);
        let output =
            nested.stdin(Stdio::null()).output().with_context(|| start_failure(&nested))?;
        tries += 1;
        if output.status.code() != Some(TIMED_OUT) || tries == PART_TRIES {
            return Ok(output);
        }
        eprintln!("part {number}: its emulated host hangs, another one tries:");
        eprintln!("{}", last_lines(&[output.stdout, output.stderr].concat(), 4));
    }
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
