//! Progress: a bar on a terminal, a line every ten percent elsewhere.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Read, stderr};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::process::{describe, last_lines, start_failure};

/// How much of what a failed command said last is shown.
const LAST_LINES: usize = 20;

/// One long piece of work, shown on stderr.
pub struct Progress {
    label: String,
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
    printed: u64,
    started: Instant,
}

impl Progress {
    /// Starts showing work of about `total` steps; 0 when nobody knows.
    pub fn start(label: &str, total: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
            let template = if total == 0 {
                "{spinner} {msg} [{elapsed}]"
            } else {
                "{msg} [{bar:30}] {pos}/{len} [{elapsed}]"
            };
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
        Self { label: label.to_owned(), bar, total, done: 0, printed: 0, started: Instant::now() }
    }

    /// One step further.
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
                let tenth = (self.done * 10 / self.total).min(9);
                if tenth > self.printed {
                    self.printed = tenth;
                    eprintln!(
                        "{}: {}0 % after {}",
                        self.label,
                        tenth,
                        HumanDuration(self.started.elapsed())
                    );
                }
            }
            None => {}
        }
    }

    /// Shows a command's work, one step for each line it prints that `is_step` says is one. An error carries the end of what
    /// it complained about.
    pub fn follow(
        command: &mut Command,
        label: &str,
        total: u64,
        is_step: impl Fn(&str) -> bool,
    ) -> Result<()> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| start_failure(command))?;
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
            let line = line.with_context(|| format!("read the output of {}", describe(command)))?;
            if is_step(&line) {
                progress.tick();
            }
            last.truncate(LAST_LINES - 1);
            last.push_front(line);
        }
        let status = child.wait().with_context(|| format!("wait for {}", describe(command)))?;
        let complaints = complaints.join().unwrap_or_default();
        if !status.success() {
            // Make passes on what a compiler complains about; ninja prints it.
            let complaints = match &complaints[..] {
                [] => last.into_iter().rev().collect::<Vec<_>>().join("\n"),
                complaints => last_lines(complaints, LAST_LINES),
            };
            bail!("{} failed ({status}):\n{complaints}", describe(command));
        }
        progress.finish();
        Ok(())
    }

    /// The work is done.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: done in {}", self.label, HumanDuration(self.started.elapsed()));
    }
}

impl Drop for Progress {
    // A failed build leaves a clean line for its error.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
