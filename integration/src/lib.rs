//! The vocabulary of the end-to-end tests: `chitin run`, its sandbox, and the host around it.
//!
//! Tests that boot microVMs need a usable KVM. `cargo xtask test` runs them on the host if
//! `chitin doctor` finds one, and in the emulated KVM host otherwise. Tests of the container tiers
//! need root, an OCI runtime and a separate Docker daemon, which `with-dockerd` starts. On other
//! hosts they fail with the reason; they are never skipped.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

pub use chitin::TierKind;
pub use command::{Chitin, Outcome, chitin, run, run_sh};
pub use docker::Dockerd;
pub use host_resources::HostResources;
pub use podman::Podman;
pub use running::Running;
pub use tier_under_test::{Policy, TierUnderTest};

pub mod canary;
mod command;
mod daemon_process;
pub mod docker;
mod host_resources;
mod podman;
mod running;
mod tier_under_test;

/// The time limit of one `chitin`. A boot takes seconds on the emulated host, and twenty
/// concurrent ones take two minutes.
pub const LIMIT: Duration = Duration::from_secs(300);

/// The time in which a monitor must end after the process that started it.
const CLEANUP_LIMIT: Duration = Duration::from_secs(20);

/// Returns the path of a release binary: in `$CHITIN_BIN_DIR`, else in `target/release`.
pub fn binary_path(name: &str) -> PathBuf {
    let dir = std::env::var_os("CHITIN_BIN_DIR")
        .map_or_else(|| workspace_dir().join("target/release"), PathBuf::from);
    dir.join(name)
}

/// Returns the root directory of the workspace.
pub fn workspace_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Returns a program that `cargo xtask programs` downloads, for sandboxes to run.
///
/// # Panics
/// It was not downloaded.
pub fn program_path(name: &str) -> PathBuf {
    let path = fs::canonicalize(workspace_dir().join("target/programs").join(name));
    path.unwrap_or_else(|_| panic!("no target/programs/{name}: run `cargo xtask programs`"))
}

/// Returns the `SRC:DST` that copies a program into the working directory of a sandbox.
pub fn program_copy(name: &str) -> String {
    format!("{}:{name}", program_path(name).display())
}

/// Writes a file and returns its path as text.
///
/// # Errors
/// The file cannot be written.
pub fn write_file(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> io::Result<String> {
    let path = dir.join(name);
    fs::write(&path, content)?;
    Ok(path.into_os_string().into_string().expect("UTF-8 path"))
}

/// Writes a shell script that can be executed.
///
/// # Errors
/// The file cannot be written.
pub fn write_script(dir: &Path, name: &str, script: &str) -> io::Result<()> {
    let path = write_file(dir, name, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Links built artifacts of these names into a directory.
///
/// # Errors
/// A link cannot be created.
pub fn link_artifacts(dir: &Path, names: &[&str]) -> io::Result<()> {
    let built = workspace_dir().join("target/artifacts");
    names.iter().try_for_each(|name| symlink(built.join(name), dir.join(name)))
}

/// Reads a file of one JSON value per line, such as an audit log.
///
/// # Errors
/// The file cannot be read, or a line is not JSON.
pub fn read_json_lines(path: &Path) -> io::Result<Vec<Value>> {
    let text = fs::read_to_string(path)?;
    text.lines().map(|line| serde_json::from_str(line).map_err(io::Error::from)).collect()
}

/// Returns bytes without a short period, the same in every run.
pub fn pseudo_random_bytes(length: u32) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Returns a builder of library sandboxes with the files that `cargo xtask` builds.
pub fn sandbox_builder() -> chitin::Builder {
    let built = workspace_dir().join("target/artifacts");
    chitin::Sandbox::builder().artifacts(chitin::Artifacts {
        kernel: built.join("vmlinux"),
        root_image: built.join("root.img"),
        monitor: binary_path("chitin-vmm"),
    })
}

/// Returns the time since 1970, to compare with a guest's clock.
pub fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970")
}

/// Returns seconds since 1970, to compare with a guest's clock.
pub fn unix_time() -> u64 {
    since_epoch().as_secs()
}
