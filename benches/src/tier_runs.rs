//! `chitin-bench exec --tier`: whole runs of `chitin run` on each tier, in turns with the same
//! command in the same container without Chitin.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use chitin::doctor::probe_tier;
use chitin::{
    Artifacts, BaselineContainer, Capabilities, Sandbox, TierKind, TierSelection, Unavailable,
    printable,
};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::args::{Common, GuestArgs, Workload};
use crate::error::BenchError;
use crate::stats::{self, Figures, MILLISECOND, Row, elapsed_ns, ns_between, print_rows, scale};
use crate::turns::new_progress_bar;

/// Runs that are not counted: the first one on a host probes runtimes and unpacks or imports the
/// root.
const WARM_UP: u32 = 2;

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    memory_mib: u64,
    tiers: Vec<TierFigures>,
}

/// The figures of one tier.
#[derive(Serialize)]
struct TierFigures {
    tier: TierKind,
    #[serde(flatten)]
    capabilities: Capabilities,
    /// Runs of Chitin.
    chitin: Figures<Run>,
    /// The parts of these runs.
    parts: Vec<Row>,
    /// Runs of the same container without Chitin; a microVM has no such baseline.
    bare: Option<Figures<Run>>,
    /// Medians of Chitin, divided by those of the baseline.
    ratio: Option<Ratio>,
}

#[derive(Serialize, Clone, Copy)]
struct Ratio {
    output: f64,
    exit: f64,
}

/// One run, in nanoseconds since the start of its process.
#[derive(Debug, Serialize, Clone, Copy)]
struct Run {
    /// The first byte of its output was read.
    output_ns: u64,
    /// It has ended and left nothing behind.
    exit_ns: u64,
    /// The phases that `chitin run` reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    phases: Option<Phases>,
}

/// Phases from a report of `chitin run`, in nanoseconds since the start of the monitor or the
/// container.
#[derive(Debug, Serialize, Deserialize, Clone, Copy)]
struct Phases {
    agent_ns: u64,
    exec_ns: u64,
    exit_ns: u64,
}

/// Measures the selected tiers, prints the tables and writes the files.
pub async fn measure_tiers(
    tiers: TierSelection,
    runs: u32,
    common: &Common,
    workload: &Workload,
) -> Result<(), BenchError> {
    let mut measured = Vec::new();
    for tier in tiers.to_vec() {
        match find_tier(tier).await {
            Ok(capabilities) => {
                let runner = TierRunner::new(tier, &common.guest, workload)?;
                measured.push(runner.measure(capabilities, runs).await?);
            }
            Err(unavailable) => {
                let error = BenchError::TierUnavailable { tier, unavailable };
                if tiers != TierSelection::All {
                    return Err(error);
                }
                error.print();
            }
        }
    }
    if measured.is_empty() {
        return Err(BenchError::NoTier);
    }
    print_tables(&measured, runs);
    print_medians(&measured);
    let chitin = env!("CARGO_PKG_VERSION");
    let report = Report { chitin, memory_mib: common.guest.memory, tiers: measured };
    common.output.write_files(&report, String::new)
}

async fn find_tier(tier: TierKind) -> Result<Capabilities, Unavailable> {
    let found = probe_tier(tier, &Artifacts::locate()).await;
    let unknown = || Unavailable { reason: String::new(), remedy: String::new() };
    found.capabilities.ok_or_else(|| found.unavailable.unwrap_or_else(unknown))
}

/// Runs one command on one tier, by `chitin run` and by the baseline.
struct TierRunner<'a> {
    tier: TierKind,
    guest: &'a GuestArgs,
    argv: Vec<OsString>,
    /// `chitin`, in the directory of this program.
    program: PathBuf,
    scratch: tempfile::TempDir,
}

impl TierRunner<'_> {
    fn new<'a>(
        tier: TierKind,
        guest: &'a GuestArgs,
        workload: &Workload,
    ) -> Result<TierRunner<'a>, BenchError> {
        let this = std::env::current_exe().map_err(BenchError::io("find this program"))?;
        let scratch = tempfile::tempdir().map_err(BenchError::io("create a directory"))?;
        let (argv, program) = (workload.to_argv(), this.with_file_name("chitin"));
        Ok(TierRunner { tier, guest, argv, program, scratch })
    }

    async fn measure(
        &self,
        capabilities: Capabilities,
        runs: u32,
    ) -> Result<TierFigures, BenchError> {
        let mut baseline: Option<BaselineContainer> = None;
        let (mut chitin, mut bare) = (Vec::new(), Vec::new());
        let progress = new_progress_bar(runs, self.tier.name());
        for run in 0..WARM_UP + runs {
            let with_chitin = self.run_chitin().await?;
            if baseline.is_none() {
                // The first run has imported the image that the baseline needs.
                baseline = self.find_baseline().await?;
            }
            let without = match &baseline {
                Some(baseline) => Some(time_command(baseline.command()).await?),
                None => None,
            };
            if run >= WARM_UP {
                chitin.push(with_chitin);
                bare.extend(without);
                progress.inc(1);
            }
        }
        progress.finish_and_clear();
        let chitin = summarize_runs(chitin);
        let bare = baseline.map(|_| summarize_runs(bare));
        let ratio = bare.as_ref().map(|bare| Ratio {
            output: find_median(&chitin, "output") / find_median(bare, "output"),
            exit: find_median(&chitin, "exit") / find_median(bare, "exit"),
        });
        let parts = summarize_parts(&chitin.runs);
        Ok(TierFigures { tier: self.tier, capabilities, parts, chitin, bare, ratio })
    }

    async fn run_chitin(&self) -> Result<Run, BenchError> {
        let report = self.scratch.path().join("report.json");
        let mut command = Command::new(&self.program);
        command.args(["run", "--tier", self.tier.name()]).args(self.guest.to_run_args());
        command.arg("--report").arg(&report).arg("--").args(&self.argv);
        let mut run = time_command(command).await?;
        run.phases = Some(read_phases(&report)?);
        Ok(run)
    }

    async fn find_baseline(&self) -> Result<Option<BaselineContainer>, BenchError> {
        let argv: Vec<String> =
            self.argv.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let builder = Sandbox::builder().tier(self.tier).memory_mib(self.guest.memory);
        Ok(builder.create_baseline(&argv).await?)
    }
}

/// Runs a command and measures from the start of its process to its end.
async fn time_command(mut command: Command) -> Result<Run, BenchError> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let failed = || BenchError::io(format!("run {program}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().map_err(failed())?;
    let (mut first, mut rest, mut messages) = ([0], Vec::new(), String::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read_messages = async {
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_string(&mut messages).await;
        }
    };
    let read_output = async {
        let mut output = None;
        if let Some(mut stdout) = stdout {
            if stdout.read(&mut first).await.unwrap_or(0) > 0 {
                output = Some(Instant::now());
            }
            let _ = stdout.read_to_end(&mut rest).await;
        }
        (output, child.wait().await, elapsed_ns(started))
    };
    let ((output, status, exit_ns), ()) = tokio::join!(read_output, read_messages);
    let status = status.map_err(failed())?;
    match output {
        Some(output) if status.success() => {
            Ok(Run { output_ns: ns_between(started, output), exit_ns, phases: None })
        }
        None if status.success() => Err(BenchError::NoOutput),
        _ => {
            let message = messages.lines().last().unwrap_or("it prints no reason").to_owned();
            Err(BenchError::ProgramFailed { program, status, message })
        }
    }
}

fn read_phases(report: &Path) -> Result<Phases, BenchError> {
    #[derive(Deserialize)]
    struct Part {
        phases: Phases,
    }
    let failed = || BenchError::io(format!("read {}", report.display()));
    let json = std::fs::read(report).map_err(failed())?;
    let part: Part = serde_json::from_slice(&json).map_err(|error| failed()(error.into()))?;
    Ok(part.phases)
}

fn summarize_runs(runs: Vec<Run>) -> Figures<Run> {
    let times = runs.iter().map(|run| (run.output_ns, run.exit_ns));
    Figures { summary: stats::summarize_output_and_exit(times), runs }
}

/// Returns the median of one row in milliseconds.
fn find_median(figures: &Figures<Run>, name: &str) -> f64 {
    let row = figures.summary.iter().find(|row| row.name == name);
    row.map_or(f64::NAN, |row| scale(row.median, MILLISECOND))
}

/// Divides runs into five parts: until the container is started, until the agent answers, until
/// the first byte of the command, until its end, and the clean-up after it.
fn summarize_parts(runs: &[Run]) -> Vec<Row> {
    let part = |name, part: fn(&Run, &Phases) -> u64| {
        let values = runs.iter().filter_map(|run| Some(part(run, run.phases.as_ref()?)));
        Row::summarize(name, values.collect())
    };
    let rows = [
        part("before", |run, phases| run.output_ns.saturating_sub(phases.exec_ns)),
        part("agent", |_, phases| phases.agent_ns),
        part("command", |_, phases| phases.exec_ns.saturating_sub(phases.agent_ns)),
        part("end", |_, phases| phases.exit_ns.saturating_sub(phases.exec_ns)),
        part("after", |run, phases| {
            let end = phases.exit_ns.saturating_sub(phases.exec_ns);
            run.exit_ns.saturating_sub(run.output_ns).saturating_sub(end)
        }),
    ];
    rows.into_iter().flatten().collect()
}

fn print_tables(measured: &[TierFigures], runs: u32) {
    println!("{runs} runs of each kind, in turns; milliseconds since the start of each process");
    for TierFigures { tier, capabilities, chitin, parts, bare, .. } in measured {
        let Capabilities { implementation, version, .. } = capabilities;
        println!("\n{}", printable(&format!("{tier} ({implementation} {version})")));
        print_rows("phase", &chitin.summary, MILLISECOND);
        if let Some(bare) = bare {
            println!("the same container without Chitin");
            print_rows("phase", &bare.summary, MILLISECOND);
        }
        println!("parts of the time with Chitin");
        print_rows("part", parts, MILLISECOND);
    }
}

fn print_medians(measured: &[TierFigures]) {
    println!(
        "\n{:<10} {:>10} {:>10} {:>7} {:>10} {:>10} {:>7}",
        "medians", "output", "bare", "ratio", "exit", "bare", "ratio"
    );
    let or_dash = |number: Option<f64>| number.map_or("-".into(), |number| format!("{number:.3}"));
    for TierFigures { tier, chitin, bare, ratio, .. } in measured {
        print!("{tier:<10}");
        let ratios = [ratio.map(|ratio| ratio.output), ratio.map(|ratio| ratio.exit)];
        for (name, ratio) in ["output", "exit"].into_iter().zip(ratios) {
            let bare = or_dash(bare.as_ref().map(|bare| find_median(bare, name)));
            let ratio = or_dash(ratio);
            print!(" {:>10.3} {bare:>10} {ratio:>7}", find_median(chitin, name));
        }
        println!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_to_total_time() {
        let phases = Phases { agent_ns: 30, exec_ns: 45, exit_ns: 50 };
        let run = Run { output_ns: 60, exit_ns: 80, phases: Some(phases) };
        let parts: Vec<u64> = summarize_parts(&[run]).iter().map(|row| row.median).collect();
        assert_eq!(parts, [15, 30, 15, 5, 15]);
        assert_eq!(parts.iter().sum::<u64>(), run.exit_ns);
    }

    #[tokio::test]
    async fn timed_command_must_succeed_and_print() {
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let run = time_command(sh("echo x; sleep 0.05")).await.unwrap();
        assert!(run.exit_ns >= run.output_ns + 40_000_000, "{} {}", run.output_ns, run.exit_ns);
        let error = time_command(sh("echo x; echo why >&2; exit 3")).await.unwrap_err();
        let BenchError::ProgramFailed { status, message, .. } = error else { panic!("{error}") };
        assert_eq!((status.code(), message.as_str()), (Some(3), "why"));
        let error = time_command(sh("true")).await.unwrap_err();
        assert!(matches!(error, BenchError::NoOutput), "{error}");
    }
}
