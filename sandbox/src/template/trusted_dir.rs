//! Directories whose contents only this user, or root, can change.
//!
//! Every name is resolved in an open directory, one component at a time, and a link is not
//! followed. Owner and mode are read from the open file, so that what was checked is what is used.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;

use super::TemplateError;

/// The modes that let other users change a file or directory.
const OTHERS_MAY_WRITE: u32 = 0o022;

/// The reason why a file or directory is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// It is a symbolic link.
    #[error("it is a symbolic link, which is not followed: name its target")]
    Link,
    /// It belongs to another user.
    #[error("it belongs to user {owner}: it must belong to this user or to root")]
    Owner {
        /// The user id of its owner.
        owner: u32,
    },
    /// Its group or all users can write to it.
    #[error("its mode {mode:03o} lets other users change it: `chmod go-w` it")]
    Mode {
        /// Its permissions.
        mode: u32,
    },
    /// Other users can read it.
    #[error("its mode {mode:03o} lets other users read it: remove it, and build again")]
    Readable {
        /// Its permissions.
        mode: u32,
    },
    /// It is a device, a pipe, a socket, or a file in place of a directory.
    #[error("it is a file of another kind")]
    Kind,
}

/// An open directory that belongs to this user or to root, and that no other user can change.
#[derive(Debug)]
pub(crate) struct TrustedDir {
    dir: OwnedFd,
    path: PathBuf,
}

impl TrustedDir {
    /// Opens a directory. Its parent directory is the caller's choice, and may be reached through
    /// links; the directory itself may not.
    pub fn open(path: &Path) -> Result<TrustedDir, TemplateError> {
        open_dir(CWD, path.as_os_str(), path.to_owned())
    }

    /// Opens a directory after creating what is missing of its path, for this user alone.
    pub fn create(path: &Path) -> Result<TrustedDir, TemplateError> {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
        created.map_err(file_error("create", path))?;
        TrustedDir::open(path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of an entry, for messages.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.dir
    }

    /// Opens a directory in this one.
    pub fn open_dir(&self, name: &str) -> Result<TrustedDir, TemplateError> {
        open_dir(&self.dir, name.as_ref(), self.join(name))
    }

    /// Creates a directory in this one, for this user alone.
    pub fn create_dir(&self, name: &str) -> Result<TrustedDir, TemplateError> {
        mkdirat(&self.dir, name, Mode::RWXU).map_err(file_error("create", &self.join(name)))?;
        self.open_dir(name)
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, name: &str) -> Result<File, TemplateError> {
        let path = self.join(name);
        // Opening a pipe would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.dir, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::LOOP) => return Err(untrusted(path, Distrust::Link)),
            Err(errno) => return Err(file_error("open", &path)(errno)),
        };
        let metadata = file.metadata().map_err(file_error("inspect", &path))?;
        if !metadata.is_file() {
            return Err(untrusted(path, Distrust::Kind));
        }
        check_owner(metadata.uid(), metadata.mode(), path)?;
        Ok(file)
    }

    /// Creates a regular file for reading and writing. It must not exist.
    pub fn create_file(&self, name: &str, mode: Mode) -> Result<File, TemplateError> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let created = openat(&self.dir, name, flags, mode);
        Ok(File::from(created.map_err(file_error("create", &self.join(name)))?))
    }

    /// Lists the names of all entries.
    pub fn list_names(&self) -> Result<Vec<String>, TemplateError> {
        let failed = || file_error("list", &self.path);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.dir).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            // A name that is not text becomes one that no entry has.
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Returns whether an entry is a regular file.
    pub fn has_file(&self, name: &str) -> bool {
        statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    }

    /// Returns whether an entry is a directory.
    pub fn has_dir(&self, name: &str) -> bool {
        statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }

    /// Removes a directory in this one that contains only files of these names. Another entry stays
    /// and is an error.
    pub fn remove_dir(&self, name: &str, files: &[&str]) -> Result<(), TemplateError> {
        let dir = self.open_dir(name)?;
        for file in files {
            match unlinkat(&dir.dir, *file, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(file_error("remove", &dir.join(file))(errno)),
            }
        }
        unlinkat(&self.dir, name, AtFlags::REMOVEDIR).map_err(file_error("remove", &dir.path))
    }
}

fn open_dir(parent: impl AsFd, name: &OsStr, path: PathBuf) -> Result<TrustedDir, TemplateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(parent.as_fd(), name, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::LOOP | Errno::NOTDIR) => {
            let is_link = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink);
            return Err(untrusted(path, if is_link { Distrust::Link } else { Distrust::Kind }));
        }
        Err(errno) => return Err(file_error("open", &path)(errno)),
    };
    let stat = rustix::fs::fstat(&dir).map_err(file_error("inspect", &path))?;
    check_owner(stat.st_uid, stat.st_mode, path.clone())?;
    Ok(TrustedDir { dir, path })
}

fn check_owner(owner: u32, mode: u32, path: PathBuf) -> Result<(), TemplateError> {
    let own = rustix::process::geteuid().as_raw();
    if owner != own && owner != 0 {
        return Err(untrusted(path, Distrust::Owner { owner }));
    }
    let mode = mode & 0o777;
    if mode & OTHERS_MAY_WRITE != 0 {
        return Err(untrusted(path, Distrust::Mode { mode }));
    }
    Ok(())
}

pub(super) fn untrusted(path: PathBuf, reason: Distrust) -> TemplateError {
    TemplateError::Untrusted { path, reason }
}

pub(super) fn file_error<E: Into<io::Error>>(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { operation, path, source: source.into() }
}
