//! A server of the Vault API for tests of credentials: `rvault` of the crate `rusty_vault`, compiled once.
//!
//! Not a dependency: three hundred packages, and OpenSSL, for one test binary. It is compiled without optimization, which
//! is half of the time.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::process::{command, output, run_aloud};
use crate::{cache, workspace};

const VERSION: &str = "0.2.1";

/// Build the server of the Vault API that tests of credentials ask, target/artifacts/rvault
#[derive(Debug, Default, clap::Args)]
pub struct Args {}

/// Builds it if it is not in the cache.
pub fn run(_: &Args) -> Result<ExitCode> {
    let compiler = output(&mut command("rustc", ["--version"]))?;
    let key = cache::Key::new("rvault", 1).text("version", VERSION).text("compiler", compiler.trim());
    let entry = cache::entry("rvault", key, |dir| {
        eprintln!(
            "building rvault {VERSION}, the server that the tests of vaults ask: several minutes, once"
        );
        let mut install = command(
            "cargo",
            ["install", "rusty_vault", "--debug", "--quiet", "--version", VERSION, "--root"],
        );
        install.arg(dir);
        // What it is made of is gigabytes, and of no use afterwards.
        let scratch = tempfile::tempdir_in(workspace::target()).context("create a directory")?;
        install.arg("--target-dir").arg(scratch.path());
        run_aloud(&mut install)
    })?;
    println!("{}", cache::publish(&entry.join("bin/rvault"), "rvault")?.display());
    Ok(ExitCode::SUCCESS)
}
