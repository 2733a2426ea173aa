//! `cargo xtask programs`: what tests run in sandboxes and the root image has not.

use std::process::ExitCode;

use anyhow::Result;

use crate::{clients, npm, pypi};

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
