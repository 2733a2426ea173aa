//! `cargo xtask hostile`: bare guests attack the monitor's devices.
//!
//! A bare guest is a few hundred instructions and needs no guest kernel, so that it runs on any
//! `/dev/kvm`, also on one that only emulates. On a machine without `/dev/kvm` it runs on the
//! emulated host. With `--mutate` the same attacks run on monitors without one of the checks, and
//! at least one attack has to succeed: this proves that the attacks can.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::build::Profile;
use crate::mutation::{MutatedTree, build_quietly};
use crate::process::{describe_start_failure, new_command};
use crate::{microvm, workspace};

/// The directory of the mutations, from the workspace root.
const MUTATIONS: &str = "integration/mutations";
/// The exit code of the attacks' program when an attack did not end as expected. Other failures
/// have other codes.
const ATTACK_FAILED: u8 = 1;

/// Attack the monitor from bare guests, and print the result of each attack
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Run only the attacks with this in their name
    filter: Option<String>,
    /// Attack monitors without a check: a name of integration/mutations, or `all`
    #[arg(long, value_name = "NAME")]
    mutate: Option<String>,
}

/// Builds the monitor and the attacks, and runs them.
pub fn run(args: &Args) -> Result<ExitCode> {
    build_quietly(workspace::root_dir(), &["--workspace", "--bin", "chitin-hostile"], &[])?;
    let filter = args.filter.as_deref();
    match args.mutate.as_deref() {
        None => {
            crate::build::build_monitor(Profile::Release)?;
            run_attacks(&workspace::target_dir().join("release/chitin-vmm"), filter)
        }
        Some(name) => attack_mutations(name, filter),
    }
}

/// Runs the attacks on a monitor, on this machine if it has any KVM.
fn run_attacks(monitor: &Path, filter: Option<&str>) -> Result<ExitCode> {
    let hostile = workspace::target_dir().join("debug/chitin-hostile");
    let words = [hostile.to_string_lossy(), monitor.to_string_lossy()];
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).chain(filter).collect();
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("hostile guests run in an emulated KVM host, because /dev/kvm cannot be opened");
        return microvm::run_nested(&[], &words);
    }
    let mut attack = new_command(words[0], &words[1..]);
    let status = attack.status().with_context(|| describe_start_failure(&attack))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(125)))
}

/// Removes one check from the monitor, or each in turn, and fails if no attack succeeds then.
fn attack_mutations(name: &str, filter: Option<&str>) -> Result<ExitCode> {
    let all = workspace::list_patches(MUTATIONS)?;
    let chosen: Vec<&PathBuf> = all
        .iter()
        .filter(|path| name == "all" || path.file_stem().is_some_and(|stem| stem == name))
        .collect();
    ensure!(!chosen.is_empty(), "{MUTATIONS} has no mutation `{name}`");
    let tree = MutatedTree::create()?;
    let mut missed = Vec::new();
    for path in &chosen {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let target = tree.build_with(path, "release", &["--package", "chitin-vmm"])?;
        println!("\nmutation: {name}");
        let code = run_attacks(&target.join("release/chitin-vmm"), filter)?;
        match code {
            code if code == ExitCode::from(ATTACK_FAILED) => println!("mutation {name}: noticed"),
            ExitCode::SUCCESS => missed.push(name),
            _ => bail!("the attacks on mutation {name} did not end"),
        }
    }
    ensure!(missed.is_empty(), "no attack notices these mutations: {}", missed.join(", "));
    println!("\n{} mutations, each noticed by at least one attack", chosen.len());
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::apply_patch;

    #[test]
    fn each_mutation_has_a_title_and_fits_the_monitor() {
        let all = workspace::list_patches(MUTATIONS).unwrap();
        assert!(all.len() >= 3);
        for path in all {
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("Removes: "), "{} has no title", path.display());
            apply_patch(&workspace::root_dir(), &path, &["--dry-run"]).unwrap();
        }
    }
}
