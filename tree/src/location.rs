use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, mkdirat, openat, statat,
};
use rustix::io::Errno;

use crate::current_path::CurrentPath;
use crate::{Error, FileKind, Lookup, Refusal};

/// The flags for a directory that is only traversed, which needs no permission to list it.
pub(crate) const TRAVERSE_DIRECTORY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The flags for a directory whose attributes or entries are read or changed.
pub(crate) const OPEN_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The location of a tree's root, existing or not: a name in an open directory.
pub(crate) struct Location {
    pub dir: OwnedFd,
    /// One path component. It is `.` if the root is `dir` itself.
    pub name: Vec<u8>,
}

impl Location {
    pub fn resolve(path: &Path, lookup: Lookup, current: &CurrentPath) -> Result<Location, Error> {
        match lookup {
            Lookup::FollowLinks => Location::resolve_following_links(path),
            Lookup::NoLinks => {
                Location::resolve_without_links(path, current, |_, _| Err(Errno::NOENT))
            }
        }
    }

    fn resolve_following_links(path: &Path) -> Result<Location, Error> {
        // A slash at the end would make `statat` follow a link.
        let path = path.components().as_path();
        let no_follow = AtFlags::SYMLINK_NOFOLLOW;
        let is_link = statat(CWD, path, no_follow)
            .is_ok_and(|stat| file_kind(stat.st_mode) == FileKind::Symlink);
        let target;
        let path = if is_link {
            // Left to the kernel, `renameat` would replace the link instead of its target. A link
            // to a missing target is an error, as it is for `cp`.
            target = std::fs::canonicalize(path).map_err(|source| Error::Filesystem {
                operation: "follow the link",
                path: path.into(),
                source,
            })?;
            &target
        } else {
            path
        };
        let (dir, name) = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if parent.as_os_str().is_empty() => (Path::new("."), name),
            (Some(parent), Some(name)) => (parent, name),
            _ => (path, OsStr::new(".")),
        };
        let opened = openat(CWD, dir, TRAVERSE_DIRECTORY, Mode::empty());
        let dir = opened.map_err(|errno| Error::Filesystem {
            operation: "open",
            path: dir.into(),
            source: errno.into(),
        })?;
        Ok(Location { dir, name: name.as_bytes().into() })
    }

    /// Descends from `/` one component at a time and follows no link. `create` opens a component
    /// that is missing on the way.
    fn resolve_without_links(
        path: &Path,
        current: &CurrentPath,
        mut create: impl FnMut(&OwnedFd, &OsStr) -> Result<OwnedFd, Errno>,
    ) -> Result<Location, Error> {
        let mut components = path.components();
        if components.next() != Some(Component::RootDir) {
            return Err(current.refusal(Refusal::InvalidPath));
        }
        let mut dir = openat(CWD, "/", TRAVERSE_DIRECTORY, Mode::empty())
            .map_err(current.filesystem_error("open"))?;
        let mut name = OsStr::new(".");
        for component in components {
            let Component::Normal(next) = component else {
                return Err(current.refusal(Refusal::InvalidPath));
            };
            if name != "." {
                let flags = TRAVERSE_DIRECTORY | OFlags::NOFOLLOW;
                dir = match openat(&dir, name, flags, Mode::empty()) {
                    Err(Errno::NOENT) => create(&dir, name),
                    result => result,
                }
                .map_err(|errno| traverse_error(errno, &dir, name, current))?;
            }
            name = next;
        }
        Ok(Location { dir, name: name.as_bytes().into() })
    }
}

/// Creates a directory and its missing parents. Existing directories are not changed.
///
/// `path` must be absolute, and no link in it is followed: a component that is a link is an error.
/// Created directories get `mode`, regardless of the umask, and `owner` (user and group id).
///
/// # Errors
/// Returns [`Error::Refused`] for a path that is not absolute, has `.` or `..` in it, or leads
/// through a link, and [`Error::Filesystem`] if a directory cannot be created.
pub fn create_dirs(
    path: impl AsRef<Path>,
    mode: u32,
    owner: Option<(u32, u32)>,
) -> Result<(), Error> {
    let current = CurrentPath::new(path.as_ref());
    let create = |dir: &OwnedFd, name: &OsStr| match mkdirat(dir, name, Mode::RWXU) {
        // Another process has created it at this moment, which is just as good.
        Err(Errno::EXIST) => {
            openat(dir, name, TRAVERSE_DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
        }
        Err(errno) => Err(errno),
        Ok(()) => {
            let created = openat(dir, name, OPEN_DIRECTORY, Mode::empty())?;
            set_owner(&created, owner)?;
            fchmod(&created, Mode::from_raw_mode(mode & 0o777))?;
            Ok(created)
        }
    };
    // The descent stops before the last component; with one more, it covers the whole of `path`.
    Location::resolve_without_links(&path.as_ref().join("x"), &current, create).map(|_| ())
}

pub(crate) fn set_owner(fd: &OwnedFd, owner: Option<(u32, u32)>) -> Result<(), Errno> {
    match owner {
        Some((uid, gid)) => fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))),
        None => Ok(()),
    }
}

pub(crate) fn file_kind(mode: u32) -> FileKind {
    FileType::from_raw_mode(mode).into()
}

/// Distinguishes a link from other errors: for both, Linux reports `ENOTDIR` (`open(2)`,
/// `O_NOFOLLOW` with `O_PATH` and `O_DIRECTORY`).
fn traverse_error(errno: Errno, dir: &OwnedFd, name: &OsStr, current: &CurrentPath) -> Error {
    let stat = statat(dir.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW);
    if stat.is_ok_and(|stat| file_kind(stat.st_mode) == FileKind::Symlink) {
        return current.refusal(Refusal::LinkInPath);
    }
    current.filesystem_error("open the path to")(errno)
}
