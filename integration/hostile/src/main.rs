//! `cargo xtask hostile`: lets guests attack the monitor, and prints the outcome of each attack.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use chitin_hostile::attacks::{self, Attack, CARRIED_ON, CUT_OFF, Expected};
use chitin_hostile::driver::{Driver, TRANSMIT, payload_header};
use chitin_hostile::host::{HostBehavior, HostileGuest, Outcome};
use chitin_hostile::program::Program;
use chitin_vmm::EndReason;

/// The most memory that a monitor may have resident, with the guest's: three times the largest that
/// was measured.
const MAX_PEAK_KIB: u64 = 48 * 1024;

/// The longest silence of the bystander. It sends every 50 ms where KVM only emulates.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);

/// Harmless guests run one after the other to look for leaks: a descriptor lost with each would
/// show.
const LEAK_TEST_GUESTS: usize = 500;

/// The exit code of a failure other than an attack's.
const EXIT_ERROR: u8 = 125;

fn main() -> ExitCode {
    match run_from_args() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hostile: {error:#}");
            ExitCode::from(EXIT_ERROR)
        }
    }
}

/// Returns whether every attack had the expected outcome.
fn run_from_args() -> Result<bool> {
    let mut args = std::env::args_os().skip(1);
    let monitor = PathBuf::from(args.next().context("usage: chitin-hostile MONITOR [FILTER]")?);
    let filter = args.next().unwrap_or_default();
    let filter = filter.to_str().context("the filter is not UTF-8")?;
    let attacks = attacks::all();
    let chosen: Vec<&Attack> =
        attacks.iter().filter(|attack| attack.name.contains(filter)).collect();
    ensure!(!chosen.is_empty(), "no attack has `{filter}` in its name");

    let failed = run_attacks(&monitor, &chosen)?;
    if filter.is_empty() {
        let start = Instant::now();
        check_leaks(&monitor)?;
        let name = format!("{LEAK_TEST_GUESTS} guests, one after the other");
        println!("{name:<58} nothing left ({:.1} s)", start.elapsed().as_secs_f64());
    }
    Ok(failed == 0)
}

/// Runs attacks beside a guest that keeps the rules. Returns how many failed.
fn run_attacks(monitor: &Path, attacks: &[&Attack]) -> Result<usize> {
    let mut bystander = Bystander::start(monitor)?;
    let mut failed = 0;
    let mut peak_kib = 0;
    println!("{:<58} outcome", "attack");
    for attack in attacks {
        let start = Instant::now();
        let result = run_guest(monitor, attack).and_then(|outcome| {
            peak_kib = peak_kib.max(outcome.peak_kib);
            check_outcome(attack.expected, &outcome)?;
            bystander.wait_for_heartbeat()?;
            Ok(outcome)
        });
        match result {
            Ok(outcome) => {
                let (outcome, seconds) = (describe(&outcome), start.elapsed().as_secs_f64());
                println!("{:<58} {outcome} ({seconds:.1} s)", attack.name);
            }
            Err(error) => {
                failed += 1;
                println!("{:<58} FAILED: {error:#}", attack.name);
            }
        }
    }
    let heartbeats = bystander.stop()?;
    println!(
        "{} attacks, {failed} failed; at most {} MiB resident; {heartbeats} heartbeats of the bystander",
        attacks.len(),
        peak_kib / 1024,
    );
    Ok(failed)
}

fn run_guest(monitor: &Path, attack: &Attack) -> Result<Outcome> {
    HostileGuest::start(monitor, attack.program(), attack.host)?.wait()
}

/// Runs many guests, and compares the resources of this process and of the host before and after.
fn check_leaks(monitor: &Path) -> Result<()> {
    let harmless = attacks::harmless();
    let before = (count_entries("/proc/self/fd")?, chitin_cgroups());
    for number in 0..LEAK_TEST_GUESTS {
        run_guest(monitor, &harmless)
            .and_then(|outcome| check_outcome(harmless.expected, &outcome))
            .with_context(|| format!("guest {number} of {LEAK_TEST_GUESTS}"))?;
    }
    let after = (count_entries("/proc/self/fd")?, chitin_cgroups());
    ensure!(
        before == after,
        "descriptors and cgroups before {LEAK_TEST_GUESTS} guests: {before:?}, after: {after:?}"
    );
    Ok(())
}

fn count_entries(dir: &str) -> Result<usize> {
    Ok(fs::read_dir(dir).with_context(|| format!("list {dir}"))?.count())
}

/// Returns the cgroups of all hierarchies with `chitin` in their name.
fn chitin_cgroups() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = dirs.pop() {
        // A directory that cannot be listed has been removed meanwhile, or there are no cgroups.
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
    found
}

fn check_outcome(expected: Expected, outcome: &Outcome) -> Result<()> {
    let Outcome { reason, detail, log, fault, peak_kib, .. } = outcome;
    let reset_with = |words| *reason == EndReason::Reset && log == words;
    let right = match expected {
        Expected::Harmless => reset_with(CARRIED_ON) && fault.is_none(),
        Expected::CarriedOn(expected) => reset_with(CARRIED_ON) && *fault == Some(expected),
        Expected::CutOff(expected) => reset_with(CUT_OFF) && *fault == expected,
        Expected::Ended(expected) => {
            *reason == EndReason::Fault
                && *fault == Some(expected)
                && *detail == Some(expected.to_string())
        }
    };
    if !right {
        bail!("expected {expected:?}, not {outcome:?}");
    }
    ensure!(*peak_kib <= MAX_PEAK_KIB, "{peak_kib} KiB resident, at most {MAX_PEAK_KIB} expected");
    Ok(())
}

/// Describes an outcome in a few words.
fn describe(outcome: &Outcome) -> String {
    let mut words = match outcome.reason {
        EndReason::Fault => "ended".to_owned(),
        _ => outcome.log.clone(),
    };
    if let Some(fault) = &outcome.fault {
        words.push_str(&format!("; {fault}"));
    }
    if outcome.faults > 1 {
        words.push_str(&format!(", and {} more", outcome.faults - 1));
    }
    words
}

/// A guest that keeps the rules and sends one byte after the other, its heartbeats.
struct Bystander {
    guest: HostileGuest,
    heartbeats: u64,
}

impl Bystander {
    /// Starts it and waits for the first heartbeat.
    fn start(monitor: &Path) -> Result<Self> {
        let guest = HostileGuest::start(monitor, heartbeat_program(), HostBehavior::AnswersPings)?;
        let mut this = Self { guest, heartbeats: 0 };
        this.wait_for_heartbeat().context("before any attack")?;
        Ok(this)
    }

    /// Waits for a heartbeat after the last one that was seen.
    fn wait_for_heartbeat(&mut self) -> Result<()> {
        let deadline = Instant::now() + SILENCE_LIMIT;
        loop {
            let heartbeats = self.guest.received_bytes();
            if heartbeats > self.heartbeats {
                self.heartbeats = heartbeats;
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the bystander has fallen silent");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops it and checks that nothing disturbed it. Returns the number of its heartbeats.
    fn stop(self) -> Result<u64> {
        let end = self.guest.stop().context("stop the bystander")?;
        let undisturbed = end.reason == EndReason::Stopped && end.faults == 0;
        ensure!(undisturbed, "the bystander was disturbed: {end:?}");
        Ok(self.heartbeats)
    }
}

fn heartbeat_program() -> Program {
    let mut program = Program::new();
    let mut driver = Driver::vsock(0);
    driver.start(&mut program);
    driver.connect(&mut program);
    driver.fill_transmit_ring(&mut program, &[&payload_header(b".").to_bytes()[..], b"."].concat());
    program.repeat_forever(|program| {
        program.add_to_u16(driver.available_index(TRANSMIT), 1);
        driver.notify(program, TRANSMIT);
        driver.wait_until_used(program, TRANSMIT);
        program.repeat(20_000, |_| {});
    });
    program
}
