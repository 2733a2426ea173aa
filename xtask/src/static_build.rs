//! Programs of the guest: static, small, and the same bytes wherever they are built.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace;

/// What they are built for.
pub const TARGET: &str = "x86_64-unknown-linux-musl";

/// Builds the packages and returns the directory of their binaries.
pub fn build(packages: &[&str]) -> Result<PathBuf> {
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map_or_else(|| std::env::home_dir().unwrap_or_default().join(".cargo"), PathBuf::from);
    // Panic messages carry source paths: without this, an image would depend on where it was built.
    let remap = [(&workspace::root(), "/chitin"), (&cargo_home, "/cargo")]
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    let config = format!("target.{TARGET}.rustflags={}", serde_json::to_string(&remap)?);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root()).args([
        "build",
        "--quiet",
        "--profile",
        "agent",
        "--target",
        TARGET,
    ]);
    packages.iter().for_each(|package| {
        cargo.args(["--package", package]);
    });
    let status = cargo
        .arg("--config")
        .arg(config)
        .arg("--target-dir")
        .arg(workspace::target())
        .status()
        .context("run cargo")?;
    let names = packages.join(", ");
    ensure!(
        status.success(),
        "{names}: no such build; if the target is missing: `rustup target add {TARGET}` or `cargo xtask setup`"
    );
    Ok(workspace::target().join(TARGET).join("agent"))
}
