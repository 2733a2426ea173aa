//! Operations on an unpacked root tree.
//!
//! The tree contains absolute symbolic links (`usr/lib/ssl/certs` → `/etc/ssl/certs`). They refer
//! to the root of the image, but followed here they lead to files of the builder. So nothing is
//! ever written below a link: see [`resolve_inside`].

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::recipe::{Directory, Link, Prune, check_path, matches_path};

/// Directories that Debian 12 keeps below /usr, while its packages still have them at the root.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// Returns the path in `tree` of a relative path, and creates its parent directories. Fails if one
/// of them is a link or a file.
pub fn resolve_inside(tree: &Path, path: &str) -> Result<PathBuf> {
    check_path(path)?;
    let mut at = tree.to_path_buf();
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        at.push(part);
        if parts.peek().is_none() {
            break;
        }
        match fs::symlink_metadata(&at) {
            Ok(found) => ensure!(found.is_dir(), "{path}: {part} is not a directory in the image"),
            Err(error) if error.kind() == ErrorKind::NotFound => create_directory(&at)?,
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("read the metadata of {}", at.display()));
            }
        }
    }
    Ok(at)
}

/// Moves /bin, /sbin, /lib and /lib64 into /usr and leaves links, as Debian's usrmerge does.
pub fn merge_usr(tree: &Path) -> Result<()> {
    for name in MERGED {
        let (from, to) = (tree.join(name), resolve_inside(tree, &format!("usr/{name}"))?);
        if fs::symlink_metadata(&from).is_ok() {
            move_into(&from, &to)?;
        } else if fs::symlink_metadata(&to).is_err() {
            create_directory(&to)?;
        }
        symlink(format!("usr/{name}"), &from)
            .with_context(|| format!("link {}", from.display()))?;
    }
    Ok(())
}

fn move_into(from: &Path, to: &Path) -> Result<()> {
    match fs::symlink_metadata(to) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return fs::rename(from, to)
                .with_context(|| format!("move {} to {}", from.display(), to.display()));
        }
        Err(error) => {
            return Err(error).with_context(|| format!("read the metadata of {}", to.display()));
        }
        Ok(there) => {
            let both = there.is_dir() && fs::symlink_metadata(from)?.is_dir();
            ensure!(both, "{} is in two packages, below /usr and outside of it", to.display());
        }
    }
    for name in sorted_names(from)? {
        move_into(&from.join(&name), &to.join(&name))?;
    }
    fs::remove_dir(from).with_context(|| format!("remove {}", from.display()))
}

/// Removes the paths that the rules match. Returns the patterns that matched nothing: they are out
/// of date.
pub fn prune_paths(tree: &Path, rules: &[Prune]) -> Result<Vec<String>> {
    let mut used = vec![false; rules.iter().map(|rule| rule.paths.len()).sum()];
    prune_below(tree, "", rules, &mut used)?;
    let patterns = rules.iter().flat_map(|rule| &rule.paths);
    Ok(patterns.zip(used).filter(|(_, used)| !used).map(|(pattern, _)| pattern.clone()).collect())
}

fn prune_below(tree: &Path, below: &str, rules: &[Prune], used: &mut [bool]) -> Result<()> {
    for name in sorted_names(&tree.join(below))? {
        let path = if below.is_empty() { name } else { format!("{below}/{name}") };
        let full = tree.join(&path);
        let is_dir = fs::symlink_metadata(&full)
            .with_context(|| format!("read the metadata of {path}"))?
            .is_dir();
        let mut first = 0;
        let mut verdict = None;
        for rule in rules {
            let hits =
                rule.paths.iter().enumerate().filter(|(_, pattern)| matches_path(pattern, &path));
            for (index, _) in hits {
                used[first + index] = true;
                verdict.get_or_insert(rule);
            }
            first += rule.paths.len();
        }
        match verdict {
            Some(rule) if rule.keep.iter().any(|pattern| matches_path(pattern, &path)) => {}
            // An entry below may have to stay: the same rule decides on each of them.
            Some(rule) if is_dir && !rule.keep.is_empty() => prune_below(tree, &path, rules, used)?,
            Some(_) if is_dir => {
                fs::remove_dir_all(&full).with_context(|| format!("remove {path}"))?
            }
            Some(_) => fs::remove_file(&full).with_context(|| format!("remove {path}"))?,
            None if is_dir => prune_below(tree, &path, rules, used)?,
            None => {}
        }
    }
    Ok(())
}

/// Creates a link, in place of a file or link of its name.
pub fn replace_link(tree: &Path, link: &Link) -> Result<()> {
    let path = resolve_inside(tree, &link.path)?;
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("replace {}", link.path))
        }
        _ => symlink(&link.target, &path)
            .with_context(|| format!("link {} to {}", link.path, link.target)),
    }
}

/// Sets the mode of every file to 0644 or 0755, of every directory to 0755 or the mode of the
/// recipe: independent of the builder's umask, and without set-id bits.
pub fn set_modes(tree: &Path, directories: &[Directory]) -> Result<()> {
    set_modes_below(tree)?;
    for directory in directories {
        set_mode(&resolve_inside(tree, &directory.path)?, directory.mode_bits()?)?;
    }
    Ok(())
}

fn set_modes_below(path: &Path) -> Result<()> {
    let found = fs::symlink_metadata(path)
        .with_context(|| format!("read the metadata of {}", path.display()))?;
    if found.is_dir() {
        set_mode(path, 0o755)?;
        for name in sorted_names(path)? {
            set_modes_below(&path.join(name))?;
        }
    } else if found.is_file() {
        set_mode(path, if found.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 })?;
    } else if !found.is_symlink() {
        bail!("{} is not a file, directory or link", path.display());
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {}", path.display()))
}

/// Creates a directory unless it exists.
pub fn ensure_directory(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => bail!("{} exists and is not a directory", path.display()),
        Err(_) => create_directory(path),
    }
}

fn create_directory(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("create the directory {}", path.display()))
}

/// Copies a tree over another one: files with their modes, links as links. Existing files are
/// replaced.
pub fn copy_over(from: &Path, to: &Path) -> Result<()> {
    for name in sorted_names(from)? {
        let (source, target) = (from.join(&name), to.join(&name));
        let found = fs::symlink_metadata(&source)
            .with_context(|| format!("read the metadata of {}", source.display()))?;
        if found.is_dir() {
            ensure_directory(&target)?;
            copy_over(&source, &target)?;
            // After its content, because the mode may forbid writing.
            set_mode(&target, found.permissions().mode() & 0o7777)?;
            continue;
        }
        if fs::symlink_metadata(&target).is_ok() {
            fs::remove_file(&target).with_context(|| format!("replace {}", target.display()))?;
        }
        if found.is_symlink() {
            symlink(fs::read_link(&source)?, &target)
                .with_context(|| format!("link {}", target.display()))?;
        } else {
            fs::copy(&source, &target)
                .with_context(|| format!("copy {} to {}", source.display(), target.display()))?;
        }
    }
    Ok(())
}

/// Adds names, kinds, executable bits and contents of a tree to a hash.
pub fn hash_tree(tree: &Path, hash: &mut Sha256) -> Result<()> {
    for name in sorted_names(tree)? {
        let path = tree.join(&name);
        let found = fs::symlink_metadata(&path)
            .with_context(|| format!("read the metadata of {}", path.display()))?;
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(&name);
        if found.is_dir() {
            hash.update(b"directory");
            hash_tree(&path, hash)?;
            hash.update(b"end");
            continue;
        }
        let content = if found.is_symlink() {
            hash.update(b"link");
            fs::read_link(&path)?.into_os_string().into_encoded_bytes()
        } else {
            let executable = found.permissions().mode() & 0o111 != 0;
            hash.update(if executable { b"program".as_slice() } else { b"file" });
            fs::read(&path).with_context(|| format!("read {}", path.display()))?
        };
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    Ok(())
}

/// Returns the names in a directory, sorted.
fn sorted_names(directory: &Path) -> Result<Vec<String>> {
    let list = || format!("list {}", directory.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(list)? {
        let name = entry.with_context(list)?.file_name();
        names.push(name.into_string().map_err(|name| anyhow::anyhow!("{name:?} is not UTF-8"))?);
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
#[path = "tree_test.rs"]
mod tests;
