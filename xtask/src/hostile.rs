//! `cargo xtask hostile`: bare guests attack the monitor's devices.
//!
//! They are a few hundred instructions each and need no guest kernel, so that they run on any `/dev/kvm`, also on one that
//! only emulates; where there is none, on the emulated host. With `--mutate` the same attacks meet monitors of which one
//! check was removed, and at least one has to succeed: what proves that the attacks can.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::build::Profile;
use crate::process::{self, capture_output, describe_start_failure, new_command};
use crate::{microvm, workspace};

/// Where the mutations are, from the workspace root.
const MUTATIONS: &str = "integration/mutations";
/// Exit code of the attacks' program when one did not come out as expected; other failures have other codes.
const ATTACK_FAILED: u8 = 1;

/// Have bare guests attack the monitor, and print what became of each
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only the attacks whose names hold this
    filter: Option<String>,
    /// Attack monitors without a check instead: a name of integration/mutations, or `all`
    #[arg(long, value_name = "NAME")]
    mutate: Option<String>,
}

/// Builds the monitor and the attacks, and runs them.
pub fn run(args: &Args) -> Result<ExitCode> {
    build(workspace::root_dir(), &["--package", "chitin-hostile"], &[])?;
    let filter = args.filter.as_deref();
    match args.mutate.as_deref() {
        None => {
            crate::build::build_monitor(Profile::Release)?;
            attack(&workspace::target_dir().join("release/chitin-vmm"), filter)
        }
        Some(name) => mutate(name, filter),
    }
}

/// Runs the attacks on a monitor, here if there is any KVM.
fn attack(monitor: &Path, filter: Option<&str>) -> Result<ExitCode> {
    let hostile = workspace::target_dir().join("debug/chitin-hostile");
    let words = [hostile.to_string_lossy(), monitor.to_string_lossy()];
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).chain(filter).collect();
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!(
            "hostile guests run in the emulated KVM host, because /dev/kvm cannot be opened here"
        );
        return microvm::run_nested(&[], &words);
    }
    let mut attack = new_command(words[0], &words[1..]);
    let status = attack.status().with_context(|| describe_start_failure(&attack))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(125)))
}

/// Takes one check out of the monitor, or each in turn, and fails if no attack notices.
fn mutate(name: &str, filter: Option<&str>) -> Result<ExitCode> {
    let all = workspace::list_patches(MUTATIONS)?;
    let chosen: Vec<&PathBuf> = all
        .iter()
        .filter(|path| name == "all" || path.file_stem().is_some_and(|stem| stem == name))
        .collect();
    ensure!(!chosen.is_empty(), "no mutation `{name}` in {MUTATIONS}");
    let scratch = workspace::target_dir().join("mutations");
    let tree = scratch.join("tree");
    copy_tree(&tree)?;
    let mut missed = Vec::new();
    for path in &chosen {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        patch(&tree, path, &[])?;
        // What is tested is one check, not the optimizer: without its work the build takes a third of the time.
        let target = scratch.join("target");
        build(
            tree.clone(),
            &["--release", "--package", "chitin-vmm"],
            &[
                ("CARGO_TARGET_DIR", &target.to_string_lossy()),
                ("CARGO_PROFILE_RELEASE_LTO", "off"),
                ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
            ],
        )?;
        println!("\nmutation: {name}");
        let code = attack(&target.join("release/chitin-vmm"), filter)?;
        patch(&tree, path, &["--reverse"])?;
        match code {
            code if code == ExitCode::from(ATTACK_FAILED) => println!("mutation {name}: noticed"),
            ExitCode::SUCCESS => missed.push(name),
            _ => bail!("the attacks on mutation {name} did not run to their end"),
        }
    }
    ensure!(
        missed.is_empty(),
        "no attack notices what these mutations remove: {}",
        missed.join(", ")
    );
    println!("\n{} mutations, each noticed by at least one attack", chosen.len());
    Ok(ExitCode::SUCCESS)
}

/// Copies what belongs to the workspace. What is the same already keeps its time, so that it need not be built again.
fn copy_tree(to: &Path) -> Result<()> {
    let root = workspace::root_dir();
    let listed = capture_output(
        new_command("git", ["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(&root),
    )?;
    for name in listed.split('\0').filter(|name| !name.is_empty()) {
        let (source, target) = (root.join(name), to.join(name));
        // A file that was removed is still listed.
        let Ok(content) = fs::read(&source) else { continue };
        if fs::read(&target).is_ok_and(|there| there == content) {
            continue;
        }
        let dir = target.parent().unwrap_or(to);
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        fs::write(&target, content).with_context(|| format!("write {}", target.display()))?;
    }
    Ok(())
}

fn patch(tree: &Path, path: &Path, options: &[&str]) -> Result<()> {
    let file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut patch = Command::new("patch");
    patch
        .args(["--strip=1", "--no-backup-if-mismatch", "--fuzz=0", "--silent", "--force"])
        .args(options);
    capture_output(patch.current_dir(tree).stdin(Stdio::from(file)))?;
    Ok(())
}

fn build(dir: PathBuf, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let mut build = new_command("cargo", ["build", "--quiet"]);
    process::run_command(build.args(args).envs(env.iter().copied()).current_dir(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mutation_says_what_it_removes_and_fits_the_monitor() {
        let all = workspace::list_patches(MUTATIONS).unwrap();
        assert!(all.len() >= 3);
        for path in all {
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("Removes: "), "{} says nothing", path.display());
            patch(&workspace::root_dir(), &path, &["--dry-run"]).unwrap();
        }
    }
}
