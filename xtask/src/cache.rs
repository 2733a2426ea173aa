//! Artifacts that are built once and kept under the hash of all their inputs.
//!
//! An entry is a directory `<kind>-<hash>`. It is built in `<kind>-<hash>.partial` and renamed when
//! complete, so that an existing entry is whole. A lock for each kind makes a second builder wait
//! and then find the entry. An entry never changes: its files are made read-only, because
//! [`publish_file`] creates hard links to them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::progress::print_note;
use crate::workspace;

/// The hash of all inputs of an artifact.
pub struct Key(Sha256);

impl Key {
    /// Starts a key for one kind of artifact. Raise `recipe` when the way of building it changes.
    pub fn new(kind: &str, recipe: u32) -> Self {
        Self(Sha256::new()).with_text("what", kind).with_text("recipe", &recipe.to_string())
    }

    /// Adds a named input.
    pub fn with_text(self, name: &str, value: &str) -> Self {
        self.with_bytes(name, value.as_bytes())
    }

    /// Adds a named input. The lengths are hashed as well, so that two lists of inputs cannot join
    /// to the same bytes.
    pub fn with_bytes(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds the contents of a file under its name.
    pub fn with_file(self, path: &Path) -> Result<Self> {
        let contents = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(self.with_bytes(&name, &contents))
    }

    /// Adds the contents of files, each under its name.
    pub fn with_files(self, paths: &[PathBuf]) -> Result<Self> {
        paths.iter().try_fold(self, |key, path| key.with_file(path))
    }

    /// Returns 64 bits of the hash in hexadecimal. That suffices: no adversary chooses the inputs.
    pub fn into_hex(self) -> String {
        self.0.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Returns the cache entry of a key. If it does not exist, `build` builds it in an empty directory.
pub fn find_or_build(
    kind: &str,
    key: Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    find_or_build_in(&workspace::cache_dir()?, kind, key, build)
}

fn find_or_build_in(
    root: &Path,
    kind: &str,
    key: Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let name = format!("{kind}-{}", key.into_hex());
    let entry = root.join(&name);
    if entry.is_dir() {
        return Ok(entry);
    }
    fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
    let _lock = lock_file(&root.join(format!("{kind}.lock")))?;
    if entry.is_dir() {
        return Ok(entry);
    }
    let partial = root.join(format!("{name}.partial"));
    // The lock is ours, so an existing directory was left by a builder that died.
    remove_tree(&partial)?;
    fs::create_dir(&partial).with_context(|| format!("create {}", partial.display()))?;
    let built = build(&partial).and_then(|()| make_read_only(&partial));
    if let Err(error) = built {
        // The first error matters; the next builder removes what is left.
        let _ = remove_tree(&partial);
        return Err(error);
    }
    fs::rename(&partial, &entry)
        .with_context(|| format!("rename {} to {}", partial.display(), entry.display()))?;
    Ok(entry)
}

fn lock_file(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        print_note(&format!("waiting for another build that holds {}", path.display()));
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(file)
}

/// Removes a link or a file if it exists.
pub fn remove_link(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a directory tree if it exists.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes write permission from every regular file of an entry.
fn make_read_only(dir: &Path) -> Result<()> {
    for item in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = item?.path();
        let meta = path.symlink_metadata()?;
        if meta.is_dir() {
            make_read_only(&path)?;
        } else if meta.is_file() {
            fs::set_permissions(&path, fs::Permissions::from_mode(meta.mode() & 0o555))?;
        }
    }
    Ok(())
}

/// Publishes a file of a cache entry as `target/artifacts/<name>`: a hard link, or a copy across
/// file systems.
pub fn publish_file(file: &Path, name: &str) -> Result<PathBuf> {
    publish_file_in(&workspace::artifacts_dir(), file, name)
}

fn publish_file_in(dir: &Path, file: &Path, name: &str) -> Result<PathBuf> {
    let target = dir.join(name);
    let source =
        file.metadata().with_context(|| format!("read the metadata of {}", file.display()))?;
    let is_current = |found: &fs::Metadata| {
        let linked = (found.dev(), found.ino()) == (source.dev(), source.ino());
        linked
            || (found.dev() != source.dev()
                && found.len() == source.len()
                && found.mtime() == source.mtime())
    };
    if target.metadata().is_ok_and(|found| is_current(&found)) {
        return Ok(target);
    }
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    if fs::hard_link(file, &temporary).is_err() {
        fs::copy(file, &temporary)
            .with_context(|| format!("copy {} to {}", file.display(), dir.display()))?;
        // The time marks the copy as current, see `is_current`.
        if let Ok(modified) = source.modified() {
            File::open(&temporary)?.set_modified(modified)?;
        }
    }
    fs::rename(&temporary, &target).with_context(|| format!("publish {}", target.display()))?;
    Ok(target)
}

#[cfg(test)]
#[path = "cache_test.rs"]
mod tests;
