//! Parts of a suite that run at the same time, one for each processor: commands on emulated KVM
//! hosts, of one thread each, and commands on this machine.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use crate::process::{describe_start_failure, new_command};

/// The time limit of a part: five times what the longest takes on two idle cores.
const PART_LIMIT: &str = "20m";

/// The time without output after which an emulated host counts as hung: nextest reports a slow
/// test every two minutes.
const PART_SILENCE: &str = "5m";

/// The exit code of `cargo xtask nested` when one of the two limits is reached.
const TIMED_OUT: i32 = 124;

/// Emulated hosts that a part is given if they hang.
const MAX_TRIES: usize = 3;

/// A command with a name, which precedes each line of its output.
#[derive(Debug)]
pub struct Part {
    /// The name.
    pub name: String,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// A command on a separate emulated host.
    Nested {
        /// Options of `cargo xtask nested`.
        options: Vec<String>,
        command: Vec<String>,
    },
    /// A command on this machine.
    Local(Mutex<Command>),
}

impl Part {
    /// Returns a part on an emulated host, with options of `cargo xtask nested`.
    pub fn nested(name: impl Into<String>, options: Vec<String>, command: Vec<String>) -> Self {
        Self { name: name.into(), work: Work::Nested { options, command } }
    }

    /// Returns a part on this machine.
    pub fn local(name: impl Into<String>, command: Command) -> Self {
        Self { name: name.into(), work: Work::Local(Mutex::new(command)) }
    }
}

/// Receives each line that a part writes.
pub type LineObserver<'a> = &'a (dyn Fn(&str) + Sync);

/// Runs the parts in their order, up to `lanes` at a time, and prints each line of their output as
/// it comes.
///
/// An emulated host can hang with all that runs in it, if rarely since its QEMU is patched. Its
/// part is then run again on another one, and that is printed.
///
/// Returns the first exit code other than 0.
pub fn run_parts(lanes: usize, parts: &[Part], observe: LineObserver<'_>) -> Result<ExitCode> {
    let xtask = std::env::current_exe().context("find this program")?;
    let next = AtomicUsize::new(0);
    let first_failure = Mutex::new(ExitCode::SUCCESS);
    let work = || -> Result<()> {
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let started = Instant::now();
            let status = run_part(&xtask, part, observe)?;
            eprintln!("[{}] {status} after {} s", part.name, started.elapsed().as_secs());
            let mut code = first_failure.lock().unwrap_or_else(PoisonError::into_inner);
            if *code == ExitCode::SUCCESS && !status.success() {
                let failure = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
                *code = ExitCode::from(failure);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..lanes.min(parts.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().map_err(|_| anyhow!("the thread of a part panicked"))?
        })
    })?;
    Ok(first_failure.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn run_part(xtask: &Path, part: &Part, observe: LineObserver<'_>) -> Result<ExitStatus> {
    let (options, command) = match &part.work {
        Work::Nested { options, command } => (options, command),
        Work::Local(command) => {
            let mut command = command.lock().unwrap_or_else(PoisonError::into_inner);
            return stream_output(&mut command, &part.name, observe);
        }
    };
    let mut tries = 0;
    loop {
        let mut nested =
            new_command(xtask, ["nested", "--timeout", PART_LIMIT, "--silence", PART_SILENCE]);
        nested.args(options);
        // On the deterministic clock the next host would repeat the same run; a longer environment
        // shifts it a little.
        nested.args(["--env", &format!("TRIES={}", "|".repeat(tries))]);
        nested.arg("--").args(command);
        let status = stream_output(&mut nested, &part.name, observe)?;
        tries += 1;
        if status.code() != Some(TIMED_OUT) || tries == MAX_TRIES {
            return Ok(status);
        }
        eprintln!("[{}] its emulated host hangs; trying another one", part.name);
    }
}

/// Runs a command and prints each line of its output as it comes, after a name in brackets.
pub fn stream_output(
    command: &mut Command,
    name: &str,
    observe: LineObserver<'_>,
) -> Result<ExitStatus> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| describe_start_failure(command))?;
    let Child { stdout, stderr, .. } = &mut child;
    let (stdout, stderr) = (stdout.take(), stderr.take());
    thread::scope(|scope| {
        let errors = scope.spawn(|| stderr.map(|stderr| print_lines(stderr, name, observe)));
        if let Some(stdout) = stdout {
            print_lines(stdout, name, observe);
        }
        errors.join()
    })
    .map_err(|_| anyhow!("the reader of {name} panicked"))?;
    child.wait().with_context(|| format!("wait for {name}"))
}

fn print_lines(source: impl Read, name: &str, observe: LineObserver<'_>) {
    for line in BufReader::new(source).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        eprintln!("[{name}] {line}");
        observe(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_are_observed() {
        let lines = Mutex::new(Vec::new());
        let mut command = new_command("sh", ["-c", "echo out; echo err >&2; printf end; exit 7"]);
        let status = stream_output(&mut command, "test", &|line| {
            lines.lock().unwrap().push(line.to_owned());
        })
        .unwrap();
        assert_eq!(status.code(), Some(7));
        let mut lines = lines.into_inner().unwrap();
        lines.sort();
        assert_eq!(lines, ["end", "err", "out"]);
    }
}
