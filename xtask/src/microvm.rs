//! The host of microVMs: this machine where KVM is usable, an emulated KVM host elsewhere.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Deserialize;

use crate::nested;
use crate::process::{describe_start_failure, new_command};
use crate::setup::{self, Purpose};

/// The part of `chitin doctor --json` that is needed here.
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

/// The part of `chitin-vmm --probe` that is needed here.
#[derive(Deserialize)]
struct Probe {
    usable: bool,
}

/// Reports whether `/dev/kvm` can be opened. Where it can, it may still be an emulation that is too
/// slow or incomplete.
pub fn kvm_opens() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Reports whether the monitor in this directory can run its probe guest. Needs neither kernel nor
/// image, so that it can be asked before they are built.
pub fn probe_passes(bin_dir: &Path) -> bool {
    let probe = new_command(bin_dir.join("chitin-vmm"), ["--probe"]).output();
    probe
        .ok()
        .and_then(|probe| serde_json::from_slice::<Probe>(&probe.stdout).ok())
        .is_some_and(|probe| probe.usable)
}

/// Asks the `chitin doctor` of this directory whether microVMs run on this machine, and prints the
/// reason in one line if they do not.
pub fn is_usable(bin_dir: &Path) -> Result<bool> {
    let mut doctor = new_command(bin_dir.join("chitin"), ["doctor", "--json"]);
    let answer = doctor.output().with_context(|| describe_start_failure(&doctor))?;
    let diagnosis: Diagnosis =
        serde_json::from_slice(&answer.stdout).context("read the output of chitin doctor")?;
    if !diagnosis.ironclaw {
        let failed = diagnosis.checks.iter().filter(|check| !check.ok);
        let reasons = failed.map(|check| format!("{}: {}", check.name, check.detail));
        eprintln!(
            "microVMs run in an emulated KVM host, because this machine cannot run them: {}",
            reasons.collect::<Vec<_>>().join("; ")
        );
    }
    Ok(diagnosis.ironclaw)
}

/// Installs and builds the emulated KVM host.
pub fn prepare_emulated_host() -> Result<()> {
    setup::ensure_installed(&[Purpose::Emulation])?;
    nested::prepare().map(drop)
}

/// Runs a command on the emulated KVM host, with options of `cargo xtask nested`.
pub fn run_nested(options: &[&str], command: &[impl AsRef<str>]) -> Result<ExitCode> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: nested::Args,
    }
    prepare_emulated_host()?;
    let words = ["nested"].iter().chain(options).chain(&["--"]).copied();
    nested::run(&Line::try_parse_from(words.chain(command.iter().map(AsRef::as_ref)))?.args)
}
