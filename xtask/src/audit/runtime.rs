//! `cargo xtask audit-runtime`: a container runtime that changes the configuration of each container
//! and then is the real one.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::mutations::{MUTATIONS, Surroundings};

/// The runtime of a mutation of the audit
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name of the mutation
    mutation: String,
    /// The file with its surroundings
    surroundings: PathBuf,
    /// The real runtime
    program: PathBuf,
    /// Its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Changes the bundle that the arguments name, if any, and executes the runtime.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut words = args.arguments.iter();
    if words.any(|word| word == "--bundle")
        && let Some(bundle) = words.next()
    {
        change_bundle(args, Path::new(bundle))?;
    }
    let error = Command::new(&args.program).args(&args.arguments).exec();
    Err(error).with_context(|| format!("execute {}", args.program.display()))
}

fn change_bundle(args: &Args, bundle: &Path) -> Result<()> {
    let mutation = MUTATIONS.iter().find(|mutation| mutation.name == args.mutation);
    let mutation = mutation.with_context(|| format!("no mutation `{}`", args.mutation))?;
    let surroundings: Surroundings = serde_json::from_slice(&fs::read(&args.surroundings)?)?;
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let before = config.clone();
    (mutation.edit)(&mut config, &surroundings);
    if let Some(agent) = &surroundings.agent
        && let Some(mounts) = config["mounts"].as_array_mut()
    {
        mounts.push(json!({
            "destination": "/init", "type": "bind", "source": agent, "options": ["bind", "ro"],
        }));
    }
    ensure!(config != before, "the mutation `{}` changes nothing", mutation.name);
    fs::write(&path, serde_json::to_vec(&config)?)
        .with_context(|| format!("write {}", path.display()))
}
