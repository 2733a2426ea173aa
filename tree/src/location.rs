use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, mkdirat, openat, statat,
};
use rustix::io::Errno;

use crate::current_path::Trail;
use crate::{Error, Kind, Lookup, Refusal};

/// To pass through a directory: needs no right to list it.
pub(crate) const PASS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// To work on a directory's own attributes or entries.
pub(crate) const OPEN_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Where a tree's root is, or will be: a name in an open directory. The name is `.` where there is no other.
pub(crate) struct Place {
    pub dir: OwnedFd,
    pub name: Vec<u8>,
}

impl Place {
    pub fn find(path: &Path, lookup: Lookup, trail: &Trail) -> Result<Place, Error> {
        match lookup {
            Lookup::Follow => Place::follow(path),
            Lookup::NoLinks => Place::descend(path, trail, |_, _| Err(Errno::NOENT)),
        }
    }

    fn follow(path: &Path) -> Result<Place, Error> {
        // Without a slash at the end, which would follow a link unseen.
        let path = path.components().as_path();
        let no_follow = AtFlags::SYMLINK_NOFOLLOW;
        let is_link =
            statat(CWD, path, no_follow).is_ok_and(|stat| kind(stat.st_mode) == Kind::Symlink);
        let target;
        let path = if is_link {
            // Not left to the kernel: the link would be replaced instead of what it points to. One that points
            // nowhere is an error, as it is for `cp`.
            target = std::fs::canonicalize(path).map_err(|source| Error::Local {
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
        let opened = openat(CWD, dir, PASS, Mode::empty());
        let dir = opened.map_err(|errno| Error::Local {
            operation: "open",
            path: dir.into(),
            source: errno.into(),
        })?;
        Ok(Place { dir, name: name.as_bytes().into() })
    }

    /// Goes down from `/` one component at a time, past no link. What is missing on the way, `create` opens.
    fn descend(
        path: &Path,
        trail: &Trail,
        mut create: impl FnMut(&OwnedFd, &OsStr) -> Result<OwnedFd, Errno>,
    ) -> Result<Place, Error> {
        let mut components = path.components();
        if components.next() != Some(Component::RootDir) {
            return Err(trail.refused(Refusal::BadPath));
        }
        let mut dir = openat(CWD, "/", PASS, Mode::empty()).map_err(trail.local("open"))?;
        let mut name = OsStr::new(".");
        for component in components {
            let Component::Normal(next) = component else {
                return Err(trail.refused(Refusal::BadPath));
            };
            if name != "." {
                dir = match openat(&dir, name, PASS | OFlags::NOFOLLOW, Mode::empty()) {
                    Err(Errno::NOENT) => create(&dir, name),
                    result => result,
                }
                .map_err(|errno| link_or(errno, &dir, name, trail))?;
            }
            name = next;
        }
        Ok(Place { dir, name: name.as_bytes().into() })
    }
}

/// Makes a directory and those above it, as far as they are missing; those there stay as they are.
///
/// `path` is absolute, and no link in it is followed: a component that is one is an error. What is made gets
/// `mode`, whatever the umask, and `owner` (user and group id).
pub fn create_dirs(
    path: impl AsRef<Path>,
    mode: u32,
    owner: Option<(u32, u32)>,
) -> Result<(), Error> {
    let trail = Trail::new(path.as_ref());
    let create = |dir: &OwnedFd, name: &OsStr| match mkdirat(dir, name, Mode::RWXU) {
        // Somebody else's, made this moment, is as good.
        Err(Errno::EXIST) => openat(dir, name, PASS | OFlags::NOFOLLOW, Mode::empty()),
        Err(errno) => Err(errno),
        Ok(()) => {
            let made = openat(dir, name, OPEN_DIRECTORY, Mode::empty())?;
            own(&made, owner)?;
            fchmod(&made, Mode::from_raw_mode(mode & 0o777))?;
            Ok(made)
        }
    };
    // A last component for the descent to stop at, so that the whole of `path` is on the way.
    Place::descend(&path.as_ref().join("x"), &trail, create).map(|_| ())
}

pub(crate) fn own(fd: &OwnedFd, owner: Option<(u32, u32)>) -> Result<(), Errno> {
    match owner {
        Some((uid, gid)) => fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))),
        None => Ok(()),
    }
}

pub(crate) fn kind(mode: u32) -> Kind {
    FileType::from_raw_mode(mode).into()
}

/// Linux says "not a directory" of a link that it was told not to follow to one.
fn link_or(errno: Errno, dir: &OwnedFd, name: &OsStr, trail: &Trail) -> Error {
    let stat = statat(dir.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW);
    if stat.is_ok_and(|stat| kind(stat.st_mode) == Kind::Symlink) {
        return trail.refused(Refusal::LinkInPath);
    }
    trail.local("open the way to")(errno)
}
