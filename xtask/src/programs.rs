//! `cargo xtask programs`: what tests run in sandboxes and the root image has not.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{cache, clients, npm, pypi, workspace};

/// Fetch the programs that tests run in sandboxes, target/programs
#[derive(Debug, Default, clap::Args)]
pub struct Args {}

/// Fetches what is not in the cache.
pub fn run(_: &Args) -> Result<ExitCode> {
    npm::programs()?;
    pypi::packages()?;
    clients::programs()?;
    Ok(ExitCode::SUCCESS)
}

/// Has `target/programs/NAME` lead to what is in the cache.
pub fn publish(cached: &Path, name: &str) -> Result<()> {
    let dir = workspace::target_dir().join("programs");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let link = dir.join(name);
    cache::remove_link(&link)?;
    symlink(cached, &link).with_context(|| format!("create {}", link.display()))
}
