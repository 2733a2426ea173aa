//! `cargo xtask hostile`: has guests attack the monitor, and prints what became of each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use chitin_hostile::attacks::{self, Attack, CARRIED_ON, CUT_OFF, Expected};
use chitin_hostile::driver::{Driver, TRANSMIT, data};
use chitin_hostile::host::{Guest, Host, Outcome};
use chitin_hostile::program::Program;
use chitin_vmm::EndReason;

/// The most that a monitor may have resident, with what its guest touches: three times what the largest takes.
const MAX_PEAK_KIB: u64 = 48 * 1024;

/// How long the guest beside the hostile ones may be silent. It speaks every 50 ms where KVM only emulates.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);

/// Guests that come and go before it is looked at what they leave: a descriptor lost with each would show.
const LIVES: usize = 500;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hostile: {error:#}");
            ExitCode::from(125)
        }
    }
}

/// Whether everything came out as expected.
fn run() -> Result<bool> {
    let mut args = std::env::args_os().skip(1);
    let monitor = PathBuf::from(args.next().context("usage: chitin-hostile MONITOR [FILTER]")?);
    let filter = args.next().unwrap_or_default();
    let filter = filter.to_str().context("a filter of text")?;
    let attacks = attacks::all();
    let chosen: Vec<&Attack> =
        attacks.iter().filter(|attack| attack.name.contains(filter)).collect();
    ensure!(!chosen.is_empty(), "no attack has `{filter}` in its name");

    let bystander = Guest::start(&monitor, heartbeat(), Host::Answers)?;
    let mut pulse = Pulse { heard: Arc::clone(&bystander.heard), last: 0 };
    pulse.beats().context("before any attack")?;
    let mut failed = 0;
    let mut peak_kib = 0;
    println!("{:<58} outcome", "attack");
    for attack in &chosen {
        let start = Instant::now();
        let result = Guest::start(&monitor, attack.program(), attack.host).and_then(Guest::outcome);
        let verdict = result.and_then(|outcome| {
            peak_kib = peak_kib.max(outcome.peak_kib);
            judge(attack.expected, &outcome)?;
            pulse.beats()?;
            Ok(in_words(&outcome))
        });
        match verdict {
            Ok(words) => {
                println!("{:<58} {words} ({:.1} s)", attack.name, start.elapsed().as_secs_f64())
            }
            Err(error) => {
                failed += 1;
                println!("{:<58} FAILED: {error:#}", attack.name);
            }
        }
    }
    let end = bystander.stop().context("the guest beside them")?;
    ensure!(
        end.reason == EndReason::Stopped && end.faults == 0,
        "the guest beside them was disturbed: {end:?}"
    );
    println!(
        "{} attacks, {failed} failed; at most {} MiB resident; the guest beside them spoke {} times",
        chosen.len(),
        peak_kib / 1024,
        pulse.last
    );
    if filter.is_empty() {
        let start = Instant::now();
        many(&monitor)?;
        println!(
            "{:<58} nothing left ({:.1} s)",
            format!("{LIVES} guests, one after the other"),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(failed == 0)
}

/// Runs many guests, and compares what this process and the host have before and after.
fn many(monitor: &Path) -> Result<()> {
    let harmless = attacks::harmless();
    let before = (count("/proc/self/fd")?, cgroups()?);
    for life in 0..LIVES {
        let outcome =
            Guest::start(monitor, harmless.program(), harmless.host).and_then(Guest::outcome);
        let judged = outcome.and_then(|outcome| judge(harmless.expected, &outcome));
        judged.with_context(|| format!("guest {life} of {LIVES}"))?;
    }
    let after = (count("/proc/self/fd")?, cgroups()?);
    ensure!(
        before == after,
        "descriptors and cgroups before {LIVES} guests: {before:?}, after: {after:?}"
    );
    Ok(())
}

fn count(dir: &str) -> Result<usize> {
    Ok(fs::read_dir(dir).with_context(|| format!("list {dir}"))?.count())
}

/// Cgroups of ours, wherever they are mounted.
fn cgroups() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = dirs.pop() {
        // One that is not there, or no longer, has nothing in it.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(entry.path());
                if entry.file_name().to_string_lossy().contains("chitin") {
                    found.push(entry.path());
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

fn judge(expected: Expected, outcome: &Outcome) -> Result<()> {
    let Outcome { reason, detail, log, fault, peak_kib, .. } = outcome;
    let (detail, fault) = (detail.as_deref(), fault.as_deref());
    let right = match expected {
        Expected::Harmless => *reason == EndReason::Reset && log == CARRIED_ON && fault.is_none(),
        Expected::CarriedOn(why) => {
            *reason == EndReason::Reset && log == CARRIED_ON && fault == Some(why)
        }
        Expected::CutOff(why) => *reason == EndReason::Reset && log == CUT_OFF && fault == why,
        Expected::Ended(why) => {
            *reason == EndReason::Fault && detail == Some(why) && fault == Some(why)
        }
    };
    if !right {
        bail!("expected {expected:?}, not {outcome:?}");
    }
    ensure!(*peak_kib <= MAX_PEAK_KIB, "{peak_kib} KiB resident, at most {MAX_PEAK_KIB} expected");
    Ok(())
}

fn in_words(outcome: &Outcome) -> String {
    let mut words = match outcome.reason {
        EndReason::Fault => "ended".to_owned(),
        _ => outcome.log.clone(),
    };
    if let Some(fault) = &outcome.fault {
        words.push_str(&format!("; GuestFault: {fault}"));
    }
    if outcome.faults > 1 {
        words.push_str(&format!(" and {} more", outcome.faults - 1));
    }
    words
}

/// A guest that keeps the rules, and says so all the time.
fn heartbeat() -> Program {
    let mut program = Program::new();
    let mut driver = Driver::vsock(0);
    driver.start(&mut program);
    driver.connect(&mut program);
    driver.spread(&mut program, &[&data(b".").to_bytes()[..], b"."].concat());
    program.forever(|program| {
        program.add16(driver.available(TRANSMIT), 1);
        driver.kick(program, TRANSMIT);
        driver.taken(program, TRANSMIT);
        program.repeat(20_000, |_| {});
    });
    program
}

/// What is heard of it.
struct Pulse {
    heard: Arc<AtomicU64>,
    last: u64,
}

impl Pulse {
    /// Waits until there is more to be heard than the last time.
    fn beats(&mut self) -> Result<()> {
        let deadline = Instant::now() + SILENCE_LIMIT;
        loop {
            let now = self.heard.load(Ordering::Relaxed);
            if now > self.last {
                self.last = now;
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the guest beside it has fallen silent");
            thread::sleep(Duration::from_millis(2));
        }
    }
}
