//! Artifacts that are built once: kept under the hash of everything that went into them.
//!
//! An entry is a directory `<what>-<hash>`. It is built in `<what>-<hash>.partial` and renamed when complete, so an
//! entry that exists is whole; a lock per `<what>` makes a second builder wait and then find the entry. Nothing in an
//! entry changes afterwards: files are made read-only, because [`publish`] hands out hard links to them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::workspace;

/// The hash of all inputs of an artifact.
pub struct Key(Sha256);

impl Key {
    /// Starts a key for one kind of artifact. Raise `recipe` when the way it is built changes.
    pub fn new(what: &str, recipe: u32) -> Self {
        Self(Sha256::new()).text("what", what).text("recipe", &recipe.to_string())
    }

    /// Adds a named input.
    pub fn text(self, name: &str, value: &str) -> Self {
        self.bytes(name, value.as_bytes())
    }

    /// Adds a named input. Lengths go in as well, so that no two lists of inputs run together to the same bytes.
    pub fn bytes(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds the contents of a file, under its name.
    pub fn file(self, path: &Path) -> Result<Self> {
        let contents = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(self.bytes(&name, &contents))
    }

    /// Adds the contents of files, each under its name.
    pub fn files(self, paths: &[PathBuf]) -> Result<Self> {
        paths.iter().try_fold(self, |key, path| key.file(path))
    }

    /// 64 bits of the hash in hexadecimal: the keys are not an adversary's choice.
    pub fn finish(self) -> String {
        self.0.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Returns the cache entry of that key, building it with `build` in an empty directory if there is none.
pub fn find_or_build(
    what: &str,
    key: Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    find_or_build_in(&workspace::cache_dir()?, what, key, build)
}

fn find_or_build_in(
    root: &Path,
    what: &str,
    key: Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let name = format!("{what}-{}", key.finish());
    let entry = root.join(&name);
    if entry.is_dir() {
        return Ok(entry);
    }
    fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
    let _lock = lock_file(&root.join(format!("{what}.lock")))?;
    if entry.is_dir() {
        return Ok(entry);
    }
    let partial = root.join(format!("{name}.partial"));
    // We hold the lock, so what is there was left by a builder that died.
    remove_tree(&partial)?;
    fs::create_dir(&partial).with_context(|| format!("create {}", partial.display()))?;
    let built = build(&partial).and_then(|()| make_read_only(&partial));
    if let Err(error) = built {
        // The first error matters; a leftover is removed by the next builder anyway.
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
        eprintln!("waiting for another build that holds {}", path.display());
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(file)
}

/// Removes a link, or a file, if it is there.
pub fn remove_link(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a directory tree if it is there.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Takes write permission off every regular file of an entry.
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

/// Makes a file of a cache entry appear as `target/artifacts/<name>`: a hard link, or a copy across file systems.
pub fn publish_file(file: &Path, name: &str) -> Result<PathBuf> {
    publish_file_in(&workspace::artifacts_dir(), file, name)
}

fn publish_file_in(dir: &Path, file: &Path, name: &str) -> Result<PathBuf> {
    let target = dir.join(name);
    let source = file.metadata().with_context(|| format!("look at {}", file.display()))?;
    let same = |there: &fs::Metadata| {
        let linked = (there.dev(), there.ino()) == (source.dev(), source.ino());
        linked
            || (there.dev() != source.dev()
                && there.len() == source.len()
                && there.mtime() == source.mtime())
    };
    if target.metadata().is_ok_and(|there| same(&there)) {
        return Ok(target);
    }
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    if fs::hard_link(file, &temporary).is_err() {
        fs::copy(file, &temporary)
            .with_context(|| format!("copy {} to {}", file.display(), dir.display()))?;
        // The time marks the copy as current, see `same`.
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
