use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat, fchmod, fstat,
    futimens, openat, renameat, statat, unlinkat,
};
use rustix::io::Errno;

use crate::current_path::CurrentPath;
use crate::location::{Location, file_kind, set_owner};
use crate::record::Attributes;
use crate::{Error, FileKind, Refusal};

/// A directory that is being filled.
pub(crate) struct OpenDirectory {
    pub fd: OwnedFd,
    /// The attributes to set when it is complete; `None` if the directory existed before.
    pub new: Option<Attributes>,
    /// The name of the last entry in it.
    pub last_name: Vec<u8>,
}

impl OpenDirectory {
    pub fn apply_attributes(&self, owner: Option<(u32, u32)>) -> Result<(), Errno> {
        self.new.map_or(Ok(()), |attributes| apply_attributes(&self.fd, attributes, owner))
    }
}

/// Sets owner, mode and time. The owner is set first, because the mode might lock this process out.
pub(crate) fn apply_attributes(
    fd: &OwnedFd,
    attributes: Attributes,
    owner: Option<(u32, u32)>,
) -> Result<(), Errno> {
    set_owner(fd, owner)?;
    fchmod(fd, Mode::from_raw_mode(attributes.mode.into()))?;
    let modified = Timespec { tv_sec: attributes.seconds, tv_nsec: attributes.nanoseconds.into() };
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    futimens(fd, &Timestamps { last_access: omit, last_modification: modified })
}

/// The operation of [`apply_attributes`] in an error.
pub(crate) const SET_ATTRIBUTES: &str = "set owner, mode and time of";

/// The destination of an entry: a name in an open directory.
pub(crate) struct Destination<'a> {
    pub dir: BorrowedFd<'a>,
    pub name: &'a [u8],
    /// True if another entry may exist there. False in a directory that this copy created.
    may_exist: bool,
    current: &'a CurrentPath,
}

impl<'a> Destination<'a> {
    /// Returns the destination of the current entry: in the innermost open directory, or `root`.
    pub fn of_current_entry(
        directories: &'a [OpenDirectory],
        root: &'a Location,
        current: &'a CurrentPath,
    ) -> Destination<'a> {
        match directories.last() {
            Some(parent) => Destination {
                dir: parent.fd.as_fd(),
                name: &parent.last_name,
                may_exist: parent.new.is_none(),
                current,
            },
            None => {
                Destination { dir: root.dir.as_fd(), name: &root.name, may_exist: true, current }
            }
        }
    }

    /// Fails if an existing entry cannot be replaced by one of kind `incoming`.
    ///
    /// It reports the conflict before any work is done. The kernel detects a later change.
    pub fn check_existing(&self, incoming: FileKind) -> Result<(), Error> {
        if !self.may_exist && incoming != FileKind::Directory {
            return Ok(());
        }
        let existing = match statat(self.dir, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => file_kind(stat.st_mode),
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(self.current.filesystem_error("examine")(errno)),
        };
        match (existing, incoming) {
            (FileKind::Directory, FileKind::Directory) => Ok(()),
            (FileKind::File | FileKind::Symlink, FileKind::File | FileKind::Symlink) => Ok(()),
            _ => Err(self.current.refusal(Refusal::KindMismatch { existing, incoming })),
        }
    }

    /// Renames a complete file or link to its final name.
    pub fn replace_with(
        &self,
        temporary: TemporaryEntry<'_>,
        incoming: FileKind,
    ) -> Result<(), Error> {
        match renameat(self.dir, &temporary.name, self.dir, self.name) {
            Ok(()) => {
                temporary.disarm();
                Ok(())
            }
            Err(Errno::ISDIR) => {
                let existing = FileKind::Directory;
                Err(self.current.refusal(Refusal::KindMismatch { existing, incoming }))
            }
            Err(errno) => Err(self.current.filesystem_error("create")(errno)),
        }
    }
}

/// An incomplete file or link under a temporary name, removed on drop.
pub(crate) struct TemporaryEntry<'a> {
    dir: BorrowedFd<'a>,
    /// Empty once the entry has its final name.
    name: String,
}

impl<'a> TemporaryEntry<'a> {
    /// Calls `create` with different names until one is unused.
    pub fn create<T>(
        dir: BorrowedFd<'a>,
        create: impl Fn(&str) -> Result<T, Errno>,
    ) -> Result<(TemporaryEntry<'a>, T), Errno> {
        /// Unique in this process. Other processes have another pid, or another pid namespace.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        /// Names in use are left by a killed process, or put there by one that wants the copy to
        /// fail.
        const ATTEMPTS: usize = 100;
        for _ in 0..ATTEMPTS {
            let name =
                format!(".chitin-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            match create(&name) {
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
                Ok(created) => return Ok((TemporaryEntry { dir, name }, created)),
            }
        }
        Err(Errno::EXIST)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Keeps the entry, which has its final name now.
    fn disarm(mut self) {
        self.name.clear();
    }
}

impl Drop for TemporaryEntry<'_> {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            let _ = unlinkat(self.dir, &self.name, AtFlags::empty());
        }
    }
}

/// Sets the owner of a link by its descriptor, and only if it is a link.
///
/// A process that can write to the directory may have replaced it, and a change of owner by name
/// would then give that entry away.
pub(crate) fn set_link_owner(
    dir: BorrowedFd<'_>,
    name: &str,
    owner: Option<(u32, u32)>,
) -> Result<(), Errno> {
    let Some((uid, gid)) = owner else { return Ok(()) };
    let link = openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if file_kind(fstat(&link)?.st_mode) != FileKind::Symlink {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    match chownat(&link, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH) {
        // gVisor does not change the owner by an `O_PATH` descriptor. The owner of a link has no
        // influence on where it leads.
        Err(Errno::BADF) => Ok(()),
        result => result,
    }
}
