//! Progress of long work: a bar on a terminal, a line for every tenth elsewhere.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Read, stderr};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

use crate::process::{check_status, describe_start_failure, display_command, last_lines};

/// Lines of a failed command's output that its error repeats.
const LAST_LINES: usize = 20;

/// The bars of all work in progress, one line each.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints a line to standard error, above the bars.
pub fn print_note(line: &str) {
    BARS.suspend(|| eprintln!("{line}"));
}

/// One long piece of work, shown on standard error.
pub struct Progress {
    label: String,
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
    printed_tenths: u64,
    started: Instant,
}

impl Progress {
    /// Starts to show work of about `total` steps; 0 if the number is unknown.
    pub fn start(label: &str, total: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
            let template = if total == 0 {
                "{spinner} {msg} [{elapsed}]"
            } else {
                "{msg} [{bar:30}] {pos}/{len} [{elapsed}]"
            };
            let bar = BARS.add(bar);
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(label.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() {
            eprintln!("{label} …");
        }
        let started = Instant::now();
        Self { label: label.to_owned(), bar, total, done: 0, printed_tenths: 0, started }
    }

    /// Counts one finished step.
    pub fn tick(&mut self) {
        self.done += 1;
        match &self.bar {
            Some(bar) => {
                if self.done > self.total {
                    bar.set_length(self.done);
                }
                bar.set_position(self.done);
            }
            None if self.total > 0 => {
                let tenths = (self.done * 10 / self.total).min(9);
                if tenths > self.printed_tenths {
                    self.printed_tenths = tenths;
                    let elapsed = HumanDuration(self.started.elapsed());
                    eprintln!("{}: {tenths}0 % after {elapsed}", self.label);
                }
            }
            None => {}
        }
    }

    /// Runs a command whose standard output has a line for each step, of which `is_step` is true.
    /// The error ends with the last lines of its output.
    pub fn follow(
        command: &mut Command,
        label: &str,
        total: u64,
        is_step: impl Fn(&str) -> bool,
    ) -> Result<()> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| describe_start_failure(command))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let complaints = thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut stderr) = stderr {
                let _ = stderr.read_to_end(&mut text);
            }
            text
        });
        let mut progress = Self::start(label, total);
        let mut last = VecDeque::new();
        for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
            let line =
                line.with_context(|| format!("read the output of {}", display_command(command)))?;
            if is_step(&line) {
                progress.tick();
            }
            last.truncate(LAST_LINES - 1);
            last.push_front(line);
        }
        let status =
            child.wait().with_context(|| format!("wait for {}", display_command(command)))?;
        let complaints = complaints.join().unwrap_or_default();
        if !status.success() {
            // Make passes on the compiler's standard error; ninja prints it to standard output.
            let complaints = match &complaints[..] {
                [] => last.into_iter().rev().collect::<Vec<_>>().join("\n"),
                complaints => last_lines(complaints, LAST_LINES),
            };
            bail!("{} failed ({status}):\n{complaints}", display_command(command));
        }
        progress.finish();
        Ok(())
    }

    /// Runs a Cargo command, one step for each crate it compiles. Warnings and errors are printed
    /// as they come.
    pub fn follow_cargo(command: &mut Command, label: &str, total: u64) -> Result<()> {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| describe_start_failure(command))?;
        let mut progress = Self::start(label, total);
        for line in child.stderr.take().into_iter().flat_map(|lines| BufReader::new(lines).lines())
        {
            let line =
                line.with_context(|| format!("read the output of {}", display_command(command)))?;
            match classify_cargo_line(&line) {
                CargoLine::Step => progress.tick(),
                CargoLine::Status => {}
                CargoLine::Message => print_note(&line),
            }
        }
        let status =
            child.wait().with_context(|| format!("wait for {}", display_command(command)))?;
        check_status(command, status)?;
        progress.finish();
        Ok(())
    }

    /// Reports that the work is done.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        print_note(&format!("{}: done in {}", self.label, HumanDuration(self.started.elapsed())));
    }
}

impl Drop for Progress {
    // A failed build leaves an empty line for its error.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A line of Cargo's standard error.
#[derive(Debug, PartialEq, Eq)]
enum CargoLine {
    /// A crate begins to compile.
    Step,
    /// Cargo reports its own state.
    Status,
    /// Warnings, errors and everything else that the user should read.
    Message,
}

fn classify_cargo_line(line: &str) -> CargoLine {
    // Cargo aligns the verb of a status line at column 12; the text of a diagnostic never begins
    // with one of these verbs.
    match line.trim_start().split(' ').next().unwrap_or_default() {
        "Compiling" | "Checking" => CargoLine::Step,
        "" | "Adding" | "Downloaded" | "Downloading" | "Finished" | "Fresh" | "Locking"
        | "Updating" => CargoLine::Status,
        _ => CargoLine::Message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_lines_are_told_apart() {
        for (line, class) in [
            ("   Compiling libc v0.2.191", CargoLine::Step),
            ("    Finished `release` profile [optimized] target(s) in 1s", CargoLine::Status),
            (" Downloading crates ...", CargoLine::Status),
            ("", CargoLine::Status),
            ("error[E0425]: cannot find function `f`", CargoLine::Message),
            ("warning: unused variable", CargoLine::Message),
            ("  --> src/main.rs:1:1", CargoLine::Message),
        ] {
            assert_eq!(classify_cargo_line(line), class, "{line:?}");
        }
    }

    #[test]
    fn failed_command_ends_with_its_output() {
        let mut command = crate::process::new_command("sh", ["-c", "echo broken; exit 3"]);
        let error = Progress::follow(&mut command, "test", 0, |_| false).unwrap_err().to_string();
        assert!(error.ends_with("broken"), "{error}");
    }
}
