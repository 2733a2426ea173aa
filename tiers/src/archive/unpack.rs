//! Creates the entries of an archive below a directory, without following a link.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, linkat, mkdirat,
    openat, openat2, statat, symlinkat,
};
use rustix::io::Errno;

use super::{ArchiveError, Content, Entry, read_entries};

/// User and group of every unpacked file: an id that no process has, neither on the host nor in a
/// container, so that no process is the owner of a shared file. It is below the ranges of
/// containers.
pub const IMAGE_ID: u32 = 0x3fff_0000;

/// Unpacks an archive into a new directory, whose entries belong to `owner` if there is one.
///
/// # Errors
/// An entry is refused, or cannot be created. The directory has what came before it.
pub fn unpack(archive: File, target: &Path, owner: Option<u32>) -> Result<(), ArchiveError> {
    let failed = |source| ArchiveError::Create { path: target.to_owned(), source };
    // Closed until the caller opens it.
    rustix::fs::mkdir(target, Mode::RWXU).map_err(|errno| failed(errno.into()))?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let root = rustix::fs::open(target, flags, Mode::empty());
    let root = root.map_err(|errno| failed(errno.into()))?;
    read_entries(archive, |mut entry| {
        let path = entry.path.clone();
        create_entry(root.as_fd(), &mut entry, owner)
            .map_err(|source| ArchiveError::Create { path, source })
    })
}

fn create_entry(root: BorrowedFd<'_>, entry: &mut Entry<'_>, owner: Option<u32>) -> io::Result<()> {
    let mode = Mode::from_raw_mode(entry.mode);
    let Some(name) = entry.path.file_name() else {
        return match entry.content {
            Content::Directory => set_owner_and_mode(root, owner, mode),
            _ => Err(Errno::ISDIR.into()),
        };
    };
    let parent = open_parent(root, &entry.path, owner)?;
    match &mut entry.content {
        Content::Directory => {
            create_directory(parent.as_fd(), Path::new(name))?;
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = openat(&parent, name, flags, Mode::empty())?;
            set_owner_and_mode(directory.as_fd(), owner, mode)
        }
        Content::File { data, size } => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(&parent, name, flags, Mode::RUSR | Mode::WUSR)?;
            let mut file = File::from(file);
            let copied = io::copy(&mut data.take(*size), &mut file)?;
            if copied != *size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            set_owner_and_mode(file.as_fd(), owner, mode)
        }
        Content::Symlink(link) => {
            symlinkat(&*link, &parent, name)?;
            if let Some(id) = owner {
                let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::chownat(&parent, name, Some(user), Some(group), flags)?;
            }
            Ok(())
        }
        Content::Link(existing) => {
            let (from, old) = (open_parent(root, existing, owner)?, existing.file_name());
            let old = old.ok_or(Errno::ISDIR)?;
            let kind = statat(&from, old, AtFlags::SYMLINK_NOFOLLOW)?.st_mode;
            if FileType::from_raw_mode(kind) != FileType::RegularFile {
                return Err(Errno::INVAL.into());
            }
            Ok(linkat(&from, old, &parent, name, AtFlags::empty())?)
        }
    }
}

/// Sets the owner before the mode: a change of owner may clear bits.
fn set_owner_and_mode(fd: BorrowedFd<'_>, owner: Option<u32>, mode: Mode) -> io::Result<()> {
    if let Some(id) = owner {
        fchown(fd, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)))?;
    }
    Ok(fchmod(fd, mode)?)
}

/// Creates a directory, or accepts an existing one.
fn create_directory(parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    match mkdirat(parent, name, Mode::RWXU) {
        Err(Errno::EXIST)
            if FileType::from_raw_mode(
                statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode,
            ) == FileType::Directory =>
        {
            Ok(())
        }
        created => Ok(created?),
    }
}

/// Opens the directory above a path, and creates the directories that the archive does not have.
fn open_parent(root: BorrowedFd<'_>, path: &Path, owner: Option<u32>) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Some(parent) = parent else {
        return Ok(openat(root, ".", flags, Mode::empty())?);
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match openat2(root, parent, flags, Mode::empty(), resolve) {
        Err(Errno::NOENT) => {
            let above = open_parent(root, parent, owner)?;
            let name = parent.file_name().ok_or(Errno::INVAL)?;
            create_directory(above.as_fd(), Path::new(name))?;
            let flags = flags | OFlags::NOFOLLOW;
            let directory = openat(&above, name, flags, Mode::empty())?;
            let mode = Mode::from_raw_mode(0o755);
            set_owner_and_mode(directory.as_fd(), owner, mode)?;
            Ok(directory)
        }
        opened => Ok(opened?),
    }
}

#[cfg(test)]
#[path = "unpack_test.rs"]
mod tests;
