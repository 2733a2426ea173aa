//! `cargo xtask audit --mutate`: `chitin audit` must notice the absence of each protection.
//!
//! A mutation is a container of `nanoclaw` without one protection: its configuration is changed on
//! the way to the runtime, or its agent is built with a patch. The property that the protection is
//! for has to be reported as broken. A property without a mutation fails the run: "held" says
//! nothing if "broken" cannot happen.

mod mutations;
mod network;
pub mod runtime;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use self::mutations::{MUTATIONS, Mutation, Runtime, Surroundings};
use self::network::IsolatedNetwork;
use crate::build::{self, BuildPlan, Profile};
use crate::mutation::MutatedTree;
use crate::process::{find_on_path, new_command};
use crate::setup::{self, Purpose};
use crate::static_build::TARGET;
use crate::workspace;

/// The directory of the agent's patches, from the workspace root.
const PATCHES: &str = "integration/audit-mutations";

/// Check that `chitin audit` notices the absence of each protection
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Remove this protection, or each in turn; `list` prints their names
    #[arg(long, value_name = "NAME|all|list")]
    mutate: String,
}

/// Runs the audit on each chosen mutation.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.mutate == "list" {
        for Mutation { name, property, runtime, .. } in &MUTATIONS {
            println!("{name:<28} {property} ({})", runtime.name());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let chosen: Vec<&Mutation> = MUTATIONS
        .iter()
        .filter(|mutation| args.mutate == "all" || mutation.name == args.mutate)
        .collect();
    ensure!(!chosen.is_empty(), "no mutation `{}`: see `--mutate list`", args.mutate);
    setup::ensure_installed(&[Purpose::Nanoclaw])?;
    build::install_and_build(&BuildPlan {
        kernel: false,
        emulation: false,
        profile: Profile::Release,
        packages: &["chitin-cli"],
    })?;
    let chitin = Profile::Release.bin_dir().join("chitin");
    let agents = build_agents(&chosen)?;
    let network = IsolatedNetwork::create()?;
    let mut missed = Vec::new();
    for mutation in &chosen {
        let agent = mutation.patch.and_then(|patch| agents.get(patch));
        let trial = Trial::set_up(mutation, agent.map(PathBuf::as_path), &network)?;
        match trial.run_audit(&chitin)? {
            Some(evidence) => println!("{}: noticed: {evidence}", mutation.name),
            None => {
                println!("{}: NOT NOTICED", mutation.name);
                missed.push(mutation.name);
            }
        }
    }
    ensure!(missed.is_empty(), "the audit does not notice: {}", missed.join(", "));
    println!("{} mutations, each noticed", chosen.len());
    Ok(ExitCode::SUCCESS)
}

/// Builds an agent with each patch that a mutation needs.
fn build_agents(chosen: &[&Mutation]) -> Result<BTreeMap<&'static str, PathBuf>> {
    let mut agents = BTreeMap::new();
    let mut tree = None;
    for patch in chosen.iter().filter_map(|mutation| mutation.patch) {
        if agents.contains_key(patch) {
            continue;
        }
        let tree = match &tree {
            Some(tree) => tree,
            None => tree.insert(MutatedTree::create()?),
        };
        eprintln!("xtask: build the agent with {patch}.patch");
        let path = workspace::root_dir().join(PATCHES).join(format!("{patch}.patch"));
        let target =
            tree.build_with(&path, "agent", &["--target", TARGET, "--package", "chitin-agent"])?;
        let built = target.join(TARGET).join("agent/chitin-agent");
        let kept = target.join(format!("agent-{patch}"));
        fs::copy(&built, &kept).with_context(|| format!("copy {}", built.display()))?;
        agents.insert(patch, kept);
    }
    Ok(agents)
}

/// A directory with the runtimes of a mutation, and with what it hands to its containers.
struct Trial<'a> {
    mutation: &'a Mutation,
    dir: TempDir,
    runtimes: PathBuf,
}

impl<'a> Trial<'a> {
    fn set_up(
        mutation: &'a Mutation,
        agent: Option<&Path>,
        network: &IsolatedNetwork,
    ) -> Result<Self> {
        // Every user of the containers passes through it.
        let dir = tempfile::tempdir_in("/tmp").context("create a directory")?;
        set_mode(dir.path(), 0o755)?;
        let write = |name: &str, text: &str, mode: u32| -> Result<String> {
            let path = dir.path().join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            set_mode(&path, mode)?;
            Ok(path.to_string_lossy().into_owned())
        };
        let temp_dir = dir.path().join("tmp");
        fs::create_dir(&temp_dir)?;
        set_mode(&temp_dir, 0o755)?;
        let agent = match agent {
            Some(agent) => {
                let path = dir.path().join("agent");
                fs::copy(agent, &path).with_context(|| format!("copy {}", agent.display()))?;
                set_mode(&path, 0o755)?;
                Some(path.to_string_lossy().into_owned())
            }
            None => None,
        };
        let surroundings = Surroundings {
            temp_dir: temp_dir.to_string_lossy().into_owned(),
            file: write("file", "a line of the host\n", 0o666)?,
            version: write("version", &fs::read_to_string("/proc/version")?, 0o644)?,
            network: network.path().to_string_lossy().into_owned(),
            agent,
        };
        let json = write("surroundings.json", &serde_json::to_string(&surroundings)?, 0o644)?;
        let runtimes = dir.path().join("bin");
        fs::create_dir(&runtimes)?;
        let xtask = std::env::current_exe().context("find this program")?;
        for runtime in ["runsc", "crun", "runc"] {
            let script = match find_on_path(runtime) {
                Some(program) if runtime == mutation.runtime.name() => format!(
                    "exec '{}' audit-runtime '{}' '{json}' '{}' -- \"$@\"",
                    xtask.display(),
                    mutation.name,
                    program.display()
                ),
                _ => "echo it is not used in this trial >&2; exit 1".to_owned(),
            };
            write(&format!("bin/{runtime}"), &format!("#!/bin/sh\n{script}\n"), 0o755)?;
        }
        Ok(Self { mutation, dir, runtimes })
    }

    /// Returns the evidence if the property was reported as broken.
    fn run_audit(&self, chitin: &Path) -> Result<Option<String>> {
        let report = self.dir.path().join("report.json");
        let mut audit = new_command(chitin, ["audit", "--tier", "nanoclaw", "--memory", "64"]);
        audit.arg("--json").arg(&report);
        audit.env("CHITIN_RUNTIME_PATH", &self.runtimes);
        audit.env("TMPDIR", self.dir.path().join("tmp"));
        audit.env("CHITIN_ARTIFACTS", workspace::target_dir().join("artifacts"));
        let output = audit.output().context("run chitin audit")?;
        let failure = || {
            let text = String::from_utf8_lossy(&output.stderr);
            format!("{}: {} ended with {}: {text}", self.mutation.name, "the audit", output.status)
        };
        let text = fs::read(&report).with_context(failure)?;
        let report: Value = serde_json::from_slice(&text).with_context(failure)?;
        let tier = &report["tiers"][0];
        let wall = if self.mutation.runtime == Runtime::Runsc { "gvisor" } else { "namespaces" };
        ensure!(tier["wall"] == wall, "{}: {report}", failure());
        let findings = tier["findings"].as_array().into_iter().flatten();
        let mut findings = findings.filter(|finding| finding["property"] == self.mutation.property);
        let finding = findings.next().with_context(failure)?;
        let evidence = finding["evidence"].as_str().unwrap_or_default().to_owned();
        Ok((finding["verdict"] == "broken").then_some(evidence))
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::apply_patch;

    #[test]
    fn each_property_has_a_mutation() {
        let document = fs::read_to_string(workspace::root_dir().join("docs/tiers.md")).unwrap();
        let rows = document.lines().filter_map(|line| line.strip_prefix("| "));
        let properties: Vec<&str> = rows
            .filter_map(|row| row.split(" |").next())
            .filter(|name| *name != "property")
            .collect();
        assert!(properties.len() >= 20, "{properties:?}");
        for property in &properties {
            let mutated = MUTATIONS.iter().any(|mutation| mutation.property == *property);
            assert!(mutated, "{property}");
        }
        for mutation in &MUTATIONS {
            assert!(properties.contains(&mutation.property), "{}", mutation.name);
        }
    }

    #[test]
    fn each_patch_fits_the_agent_and_is_used() {
        for path in workspace::list_patches(PATCHES).unwrap() {
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("Removes: "), "{} has no title", path.display());
            let name = path.file_stem().unwrap().to_string_lossy();
            assert!(MUTATIONS.iter().any(|mutation| mutation.patch == Some(&name)), "{name}");
            apply_patch(&workspace::root_dir(), &path, &["--dry-run"]).unwrap();
        }
    }
}
