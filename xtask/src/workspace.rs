//! Where things are.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The workspace root.
pub fn root() -> PathBuf {
    // Cargo sets the variable for `cargo run`; a binary started by hand remembers where it was built.
    let manifest =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let mut root = PathBuf::from(manifest);
    root.pop();
    root
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Where finished kernels and images are published: `chitin` looks here, two directories above its own binary.
pub fn artifacts() -> PathBuf {
    target().join("artifacts")
}

/// Where built artifacts are kept, shared by all checkouts of the user.
pub fn cache() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("CHITIN_CACHE") {
        return Ok(root().join(dir));
    }
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))
        .ok_or_else(|| {
            anyhow::anyhow!(
                "no home directory: set CHITIN_CACHE to a directory for built artifacts"
            )
        })?;
    Ok(base.join("chitin"))
}

/// The patches in a directory below the root, by name.
pub fn patches(dir: &str) -> Result<Vec<PathBuf>> {
    let dir = root().join(dir);
    let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    paths.sort();
    Ok(paths)
}
