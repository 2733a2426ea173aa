//! Paths of the workspace, and of the cache that all its checkouts share.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Returns the workspace root.
pub fn root_dir() -> PathBuf {
    // Cargo sets the variable for `cargo run`; a binary started by hand remembers the directory it
    // was built in.
    let manifest =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let mut root = PathBuf::from(manifest);
    root.pop();
    root
}

/// Returns Cargo's target directory.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root_dir().join("target"), |dir| root_dir().join(dir))
}

/// Returns the directory of finished kernels and images. `chitin` looks for them here, two
/// directories above its own binary.
pub fn artifacts_dir() -> PathBuf {
    target_dir().join("artifacts")
}

/// Returns the directory of built artifacts, which all checkouts of the user share.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("CHITIN_CACHE") {
        return Ok(root_dir().join(dir));
    }
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))
        .context("no home directory: set CHITIN_CACHE to a directory for built artifacts")?;
    Ok(base.join("chitin"))
}

/// Lists the patches in a directory below the root, sorted by name.
pub fn list_patches(dir: &str) -> Result<Vec<PathBuf>> {
    let dir = root_dir().join(dir);
    let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    paths.sort();
    Ok(paths)
}
