//! Progress: a bar on a terminal, a line every ten percent elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

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
                    eprintln!("{}: {}0 % after {}", self.label, tenth, HumanDuration(self.started.elapsed()));
                }
            }
            None => {}
        }
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
