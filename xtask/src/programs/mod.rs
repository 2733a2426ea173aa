//! `cargo xtask programs`: programs that tests run in sandboxes and that the root image lacks.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{cache, pypi, workspace};

mod debian_clients;
mod npm;

/// Fetch the programs that tests run in sandboxes, target/programs
#[derive(Debug, Default, clap::Args)]
pub struct Args {}

/// Fetches the programs that are not in the cache.
pub fn run(_: &Args) -> Result<ExitCode> {
    npm::publish_programs()?;
    pypi::publish_programs()?;
    debian_clients::publish_programs()?;
    Ok(ExitCode::SUCCESS)
}

/// Links `target/programs/NAME` to a path in the cache.
pub fn publish_program(cached: &Path, name: &str) -> Result<()> {
    let dir = workspace::target_dir().join("programs");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let link = dir.join(name);
    cache::remove_link(&link)?;
    symlink(cached, &link).with_context(|| format!("create {}", link.display()))
}
