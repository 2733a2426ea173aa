//! Whole runs, tier by tier, beside the same command in the same container without Chitin.

use std::process::{ExitStatus, Stdio};
use std::time::Instant;

use chitin::doctor::Availability;
use chitin::{Artifacts, BaselineContainer, Capabilities, ECHO, Sandbox, TierKind};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::stats::{self, Row, scaled};
use super::{Guest, Output, Workload, nanoseconds, progress, since};
use crate::failure::{Failure, printable};
use crate::tiers::Tiers;

const MILLISECOND: f64 = 1e6;

/// Runs that are not counted: the first one on a host tries runtimes out, unpacks or imports the root.
const UNCOUNTED: u32 = 2;

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    memory_mib: u64,
    tiers: Vec<Measured>,
}

/// One tier.
#[derive(Serialize)]
struct Measured {
    tier: TierKind,
    #[serde(flatten)]
    capabilities: Capabilities,
    /// The runs of Chitin.
    chitin: Figures,
    /// Where their time went.
    parts: Vec<Row>,
    /// The program that the tier is made of, by itself; a microVM has none.
    bare: Option<Figures>,
    /// Medians, Chitin's by the other's.
    ratio: Option<Ratio>,
}

#[derive(Serialize)]
struct Figures {
    summary: Vec<Row>,
    runs: Vec<Run>,
}

#[derive(Serialize, Clone, Copy)]
struct Ratio {
    output: f64,
    exit: f64,
}

/// One run; nanoseconds since its process was started.
#[derive(Debug, Serialize, Clone, Copy)]
struct Run {
    /// The first byte of its output was read.
    output_ns: u64,
    /// It has ended, and left nothing.
    exit_ns: u64,
    /// What `chitin run` says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    phases: Option<Phases>,
}

/// Of a report of `chitin run`; nanoseconds since the monitor or the container was started.
#[derive(Debug, Serialize, Deserialize, Clone, Copy)]
struct Phases {
    agent_ns: u64,
    exec_ns: u64,
    exit_ns: u64,
}

impl Figures {
    fn of(runs: Vec<Run>) -> Figures {
        let summary = stats::output_and_exit(runs.iter().map(|run| (run.output_ns, run.exit_ns)));
        Figures { summary, runs }
    }

    fn median(&self, name: &str) -> f64 {
        self.summary
            .iter()
            .find(|row| row.name == name)
            .map_or(f64::NAN, |row| scaled(row.median, MILLISECOND))
    }

    /// What comes before the container is started, until the agent answers, until the command's first byte, until its end, and
    /// what is cleared away behind it.
    fn parts(&self) -> Vec<Row> {
        let each = |part: fn(&Run, &Phases) -> u64| {
            self.runs.iter().filter_map(|run| Some(part(run, run.phases.as_ref()?))).collect()
        };
        let rows = [
            Row::of("before", each(|run, phases| run.output_ns.saturating_sub(phases.exec_ns))),
            Row::of("agent", each(|_, phases| phases.agent_ns)),
            Row::of("command", each(|_, phases| phases.exec_ns.saturating_sub(phases.agent_ns))),
            Row::of("end", each(|_, phases| phases.exit_ns.saturating_sub(phases.exec_ns))),
            Row::of(
                "after",
                each(|run, phases| {
                    (run.exit_ns.saturating_sub(run.output_ns))
                        .saturating_sub(phases.exit_ns.saturating_sub(phases.exec_ns))
                }),
            ),
        ];
        rows.into_iter().flatten().collect()
    }
}

/// Measures each tier that is meant, and prints the tables.
pub async fn run(
    tiers: Tiers,
    runs: u32,
    guest: &Guest,
    workload: &Workload,
    output: &Output,
) -> Result<u8, Failure> {
    let mut measured = Vec::new();
    for tier in tiers.list() {
        let found = Availability::find(tier, &Artifacts::locate()).await;
        match (found.capabilities, found.unavailable) {
            (Some(capabilities), _) => {
                measured.push(measure(tier, capabilities, runs, guest, workload).await?);
            }
            (None, unavailable) => {
                let why = unavailable.map(|why| why.to_string()).unwrap_or_default();
                let line = printable(&format!("{tier} cannot be measured: {why}"));
                if tiers != Tiers::All {
                    return Err(Failure::Usage(line));
                }
                eprintln!("chitin: {line}");
            }
        }
    }
    if measured.is_empty() {
        return Err(Failure::Usage("no tier can be measured here".into()));
    }
    show(&measured, runs);
    let report =
        Report { chitin: env!("CARGO_PKG_VERSION"), memory_mib: guest.memory, tiers: measured };
    output.write(&report, String::new)?;
    Ok(0)
}

async fn measure(
    tier: TierKind,
    capabilities: Capabilities,
    runs: u32,
    guest: &Guest,
    workload: &Workload,
) -> Result<Measured, Failure> {
    let argv = argv(workload);
    let scratch = tempfile::tempdir()
        .map_err(|source| Failure::Io { what: "create a directory".into(), source })?;
    let report = scratch.path().join("report.json");
    let program = std::env::current_exe()
        .map_err(|source| Failure::Io { what: "find this program".into(), source })?
        .with_file_name("chitin");
    let ours = || {
        let mut command = Command::new(&program);
        command.args(["run", "--tier", tier.name(), "--memory", &guest.memory.to_string()]);
        if !guest.jail.wanted() {
            command.arg("--no-jail");
        }
        command.arg("--report").arg(&report).arg("--").args(&argv);
        command
    };
    let mut bare: Option<BaselineContainer> = None;
    let (mut chitin, mut other) = (Vec::new(), Vec::new());
    let progress = progress(runs, tier.name());
    for run in 0..UNCOUNTED + runs {
        let mut once = time(ours()).await?;
        once.phases = phases(&report)?;
        if bare.is_none() {
            // Now the image is there.
            bare = Sandbox::builder().tier(tier).memory_mib(guest.memory).bare(&argv).await?;
        }
        let beside = match &bare {
            Some(bare) => Some(time(bare.command()).await?),
            None => None,
        };
        if run >= UNCOUNTED {
            chitin.push(once);
            other.extend(beside);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let chitin = Figures::of(chitin);
    let bare = bare.map(|_| Figures::of(other));
    let ratio = bare.as_ref().map(|bare| Ratio {
        output: chitin.median("output") / bare.median("output"),
        exit: chitin.median("exit") / bare.median("exit"),
    });
    Ok(Measured { tier, capabilities, parts: chitin.parts(), chitin, bare, ratio })
}

/// The command, for every kind of run.
fn argv(workload: &Workload) -> Vec<String> {
    match workload.argv.is_empty() {
        true => vec![ECHO.into(), "chitin".into()],
        false => workload.argv.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
    }
}

/// Runs a command from the start of its process to its end.
async fn time(mut command: Command) -> Result<Run, Failure> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let failed = |source| Failure::Io { what: format!("run {name}"), source };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().map_err(failed)?;
    let (mut first, mut rest, mut said) = ([0], Vec::new(), String::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let talking = async {
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_string(&mut said).await;
        }
    };
    let working = async {
        let mut output = None;
        if let Some(mut stdout) = stdout {
            if stdout.read(&mut first).await.unwrap_or(0) > 0 {
                output = Some(Instant::now());
            }
            let _ = stdout.read_to_end(&mut rest).await;
        }
        (output, child.wait().await, since(started))
    };
    let ((output, status, exit_ns), ()) = tokio::join!(working, talking);
    let status = status.map_err(failed)?;
    match output {
        Some(output) if status.success() => {
            Ok(Run { output_ns: nanoseconds(started, output), exit_ns, phases: None })
        }
        _ => Err(went_wrong(&name, status, &said)),
    }
}

fn went_wrong(name: &str, status: ExitStatus, said: &str) -> Failure {
    let said = said.lines().last().unwrap_or("the command has printed nothing: nothing to measure");
    Failure::Usage(format!("{name} went wrong ({status}): {said}"))
}

/// What a report says of where the time went.
fn phases(report: &std::path::Path) -> Result<Option<Phases>, Failure> {
    #[derive(Deserialize)]
    struct Part {
        phases: Phases,
    }
    let failed = |source| Failure::Io { what: format!("read {}", report.display()), source };
    let json = std::fs::read(report).map_err(failed)?;
    let part: Part = serde_json::from_slice(&json).map_err(|error| failed(error.into()))?;
    Ok(Some(part.phases))
}

fn show(measured: &[Measured], runs: u32) {
    println!("{runs} runs of each kind, in turns; milliseconds since each process was started");
    for Measured { tier, capabilities, chitin, parts, bare, .. } in measured {
        println!();
        println!(
            "{}",
            printable(&format!(
                "{tier} ({} {})",
                capabilities.implementation, capabilities.version
            ))
        );
        stats::print("phase", &chitin.summary, MILLISECOND);
        if let Some(bare) = bare {
            println!("the same container without Chitin");
            stats::print("phase", &bare.summary, MILLISECOND);
        }
        println!("where Chitin's time went");
        stats::print("part", parts, MILLISECOND);
    }
    println!(
        "\n{:<10} {:>10} {:>10} {:>7} {:>10} {:>10} {:>7}",
        "medians", "output", "bare", "ratio", "exit", "bare", "ratio"
    );
    for Measured { tier, chitin, bare, ratio, .. } in measured {
        print!("{tier:<10}");
        for (name, ratio) in
            [("output", ratio.map(|ratio| ratio.output)), ("exit", ratio.map(|ratio| ratio.exit))]
        {
            let bare = bare
                .as_ref()
                .map_or_else(|| "-".into(), |bare| format!("{:.3}", bare.median(name)));
            let ratio = ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}"));
            print!(" {:>10.3} {bare:>10} {ratio:>7}", chitin.median(name));
        }
        println!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_to_the_whole() {
        let phases = Phases { agent_ns: 30, exec_ns: 45, exit_ns: 50 };
        let run = Run { output_ns: 60, exit_ns: 80, phases: Some(phases) };
        let parts: Vec<u64> = Figures::of(vec![run]).parts().iter().map(|row| row.median).collect();
        assert_eq!(parts, [15, 30, 15, 5, 15]);
        assert_eq!(parts.iter().sum::<u64>(), run.exit_ns);
    }

    #[tokio::test]
    async fn a_command_is_timed_unless_it_fails_or_prints_nothing() {
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let run = time(sh("echo x; sleep 0.05")).await.unwrap();
        assert!(run.exit_ns >= run.output_ns + 40_000_000, "{} {}", run.output_ns, run.exit_ns);
        assert!(
            time(sh("echo x; echo why >&2; exit 3"))
                .await
                .unwrap_err()
                .to_string()
                .ends_with("3): why")
        );
        assert!(time(sh("true")).await.unwrap_err().to_string().contains("printed nothing"));
    }
}
