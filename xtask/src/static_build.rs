//! Static programs of guests: the same source gives the same bytes on every machine.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::process::new_command;
use crate::progress::Progress;
use crate::{setup, workspace};

/// The Rust target of static programs.
pub const TARGET: &str = "x86_64-unknown-linux-musl";

/// Builds the packages and returns the directory of their binaries.
pub fn build_static(packages: &[&str], label: &str, crates: u64) -> Result<PathBuf> {
    // Panic messages contain source paths: without this, an image would depend on the directory it
    // was built in.
    let remap = [(&workspace::root_dir(), "/chitin"), (&setup::cargo_home(), "/cargo")]
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    let config = format!("target.{TARGET}.rustflags={}", serde_json::to_string(&remap)?);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut cargo = new_command(cargo, ["build", "--profile", "agent", "--target", TARGET]);
    cargo.current_dir(workspace::root_dir());
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    cargo.arg("--config").arg(config).arg("--target-dir").arg(workspace::target_dir());
    Progress::follow_cargo(&mut cargo, label, crates).with_context(|| {
        format!(
            "if the Rust target is missing: `rustup target add {TARGET}` or `cargo xtask setup`"
        )
    })?;
    Ok(workspace::target_dir().join(TARGET).join("agent"))
}
