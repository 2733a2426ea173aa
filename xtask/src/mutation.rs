//! Builds of the workspace without one of its checks. Whatever tests the check must notice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::process::{self, capture_output, new_command};
use crate::workspace;

/// A copy of the workspace that patches are applied to.
pub struct MutatedTree {
    tree: PathBuf,
    target: PathBuf,
}

impl MutatedTree {
    /// Brings the copy up to date.
    pub fn create() -> Result<Self> {
        let scratch = workspace::target_dir().join("mutations");
        let tree = scratch.join("tree");
        copy_tree(&tree)?;
        Ok(Self { tree, target: scratch.join("target") })
    }

    /// Builds with a patch, and removes it from the copy. Returns the build directory.
    ///
    /// The test is of one check, not of the optimizer: without LTO the build takes a third of the
    /// time.
    pub fn build_with(&self, patch: &Path, profile: &str, args: &[&str]) -> Result<PathBuf> {
        apply_patch(&self.tree, patch, &[])?;
        let target = self.target.to_string_lossy();
        let lto = format!("CARGO_PROFILE_{}_LTO", profile.to_uppercase());
        let units = format!("CARGO_PROFILE_{}_CODEGEN_UNITS", profile.to_uppercase());
        let args: Vec<&str> =
            ["--profile", profile].into_iter().chain(args.iter().copied()).collect();
        let built = build_quietly(
            self.tree.clone(),
            &args,
            &[("CARGO_TARGET_DIR", &target), (&lto, "off"), (&units, "16")],
        );
        apply_patch(&self.tree, patch, &["--reverse"])?;
        built?;
        Ok(self.target.clone())
    }
}

/// Copies the files of the workspace. An unchanged file keeps its time, so that it is not built
/// again.
fn copy_tree(to: &Path) -> Result<()> {
    let root = workspace::root_dir();
    let listed = capture_output(
        new_command("git", ["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(&root),
    )?;
    for name in listed.split('\0').filter(|name| !name.is_empty()) {
        let (source, target) = (root.join(name), to.join(name));
        // git lists a removed file as well.
        let Ok(content) = fs::read(&source) else { continue };
        if fs::read(&target).is_ok_and(|there| there == content) {
            continue;
        }
        let dir = target.parent().unwrap_or(to);
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        fs::write(&target, content).with_context(|| format!("write {}", target.display()))?;
    }
    Ok(())
}

/// Applies a patch to the files below a directory.
pub fn apply_patch(tree: &Path, path: &Path, options: &[&str]) -> Result<()> {
    let file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut patch = Command::new("patch");
    patch
        .args(["--strip=1", "--no-backup-if-mismatch", "--fuzz=0", "--silent", "--force"])
        .args(options);
    capture_output(patch.current_dir(tree).stdin(Stdio::from(file)))?;
    Ok(())
}

/// Runs `cargo build` and prints only warnings and errors.
pub fn build_quietly(dir: PathBuf, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let mut build = new_command("cargo", ["build", "--quiet"]);
    process::run_command(build.args(args).envs(env.iter().copied()).current_dir(dir))
}
