//! The files that are copied into the emulated machine's memory before the command starts.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Args;
use crate::process::find_on_path;
use crate::workspace;

/// The number of symbolic links that the kernel follows in one path.
const MAX_LINKS: u32 = 40;

/// The C library and the files that it reads at each start of a program.
const SYSTEM_FILES: [&str; 10] = [
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/x86_64-linux-gnu/libm.so.6",
    "/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "/lib64/ld-linux-x86-64.so.2",
    "/etc/ld.so.cache",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/bin/sh",
];

/// Returns the paths to copy: regular files, and the symbolic links on the way to them, because 9p
/// asks the outer machine each time a link is followed. No path leads through a link.
pub fn find_files(args: &Args) -> Result<Vec<Vec<u8>>> {
    let mut found = BTreeSet::new();
    for path in &args.preload {
        ensure!(path.exists(), "--preload {}: no such file or directory", path.display());
        add_files(path, &mut found).with_context(|| format!("--preload {}", path.display()))?;
    }
    if args.icount {
        let products = [workspace::artifacts_dir(), workspace::target_dir().join("release")];
        let system = SYSTEM_FILES.iter().map(PathBuf::from);
        for path in products.into_iter().chain(find_program(&args.command[0])).chain(system) {
            // Any of these may be absent; the command reports it if it needs the file.
            if path.exists() {
                add_files(&path, &mut found)?;
            }
        }
    }
    Ok(found.into_iter().map(|path| path.into_os_string().into_vec()).collect())
}

/// Returns the path of the program that a command names.
fn find_program(name: &OsString) -> Option<PathBuf> {
    let path = Path::new(name);
    if path.components().count() == 1 && !path.exists() {
        return find_on_path(&path.to_string_lossy());
    }
    Some(path.to_owned())
}

/// Adds a file, or the files directly in a directory.
fn add_files(path: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    let path = std::path::absolute(path)?;
    if path.is_file() {
        return add_with_links(&path, found);
    }
    for item in fs::read_dir(&path).with_context(|| format!("list {}", path.display()))? {
        let item = item?.path();
        // Cargo's own notes are of no use to a measured command.
        let skip =
            item.extension().is_some_and(|extension| extension == "d" || extension == "rlib");
        if !skip && item.is_file() {
            add_with_links(&item, found)?;
        }
    }
    Ok(())
}

/// Adds a file and every symbolic link on the way from the root to it.
fn add_with_links(path: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut rest: VecDeque<OsString> =
        path.components().map(|part| part.as_os_str().to_owned()).collect();
    let mut at = PathBuf::new();
    let mut links = 0;
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(part);
        if next.is_symlink() {
            links += 1;
            ensure!(links <= MAX_LINKS, "{}: too many symbolic links", path.display());
            let target = fs::read_link(&next)
                .with_context(|| format!("read the link {}", next.display()))?;
            found.insert(next);
            // An absolute target replaces the path so far, as `join` does.
            for part in target.components().rev().filter(|part| *part != Component::CurDir) {
                rest.push_front(part.as_os_str().to_owned());
            }
        } else {
            at = next;
        }
    }
    found.insert(at);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_on_the_way_are_preloaded() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/dash"), "").unwrap();
        std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
        std::os::unix::fs::symlink("./dash", root.join("usr/bin/ash")).unwrap();
        std::os::unix::fs::symlink(root.join("bin/../bin/ash"), root.join("usr/bin/sh")).unwrap();
        let mut found = BTreeSet::new();
        add_files(&root.join("bin/sh"), &mut found).unwrap();
        let expected =
            ["bin", "usr/bin/ash", "usr/bin/dash", "usr/bin/sh"].map(|name| root.join(name));
        assert_eq!(found, expected.into());
    }

    #[test]
    fn loop_of_links_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        assert!(add_with_links(&dir.path().join("loop"), &mut BTreeSet::new()).is_err());
    }
}
